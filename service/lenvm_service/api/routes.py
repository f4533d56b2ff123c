"""The routes of the contract. Each reads its own body, so that every refusal is ours; see ``openapi`` for the rest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from lenvm import __version__
from lenvm.errors import LenVMError
from lenvm_service.api import responses as answer
from lenvm_service.api import rows
from lenvm_service.api import schemas as ask
from lenvm_service.api.answers import deadline_of, json_response, model_answer, row_answers, step_answer, watched
from lenvm_service.api.body import parse_object, read_body
from lenvm_service.api.errors import RequestError
from lenvm_service.api.openapi import documented
from lenvm_service.api.predictions import header_form, predict_many, predict_one, wants_headers
from lenvm_service.api.service import Service
from lenvm_service.engine.jobs import Result
from lenvm_service.errors import DrainingError, NotReadyError, PayloadTooLargeError

__all__ = ["router"]

router = APIRouter()

_REFUSAL_S = 1.0  # for the rest of a body that is not wanted


@router.post(
    "/predict_length",
    **documented(
        "Predict how many tokens are still to come",
        answer.PredictResponse | answer.PredictModelsResponse,
        errors=(400, 404, 413, 422, 429, 500, 503, 504),
    ),
)
async def predict_length(request: Request) -> Response:
    """One prediction for each prefix: at the prompt boundary, or in mid-generation. Lengths are remaining tokens, the
    end-of-sequence token included. A bad row gets its own error; its neighbours are answered.

    With `models` each of them is asked at once, and an entry of `results` is what the call would get from that model
    alone; a model that is missing or fails is its entry's error, and the call's only where no model answered. Compare
    `mean` and `quantiles`, each in tokens of that model's own tokenizer and up to its own `cap` (`saturated` says so):
    times what a token costs or takes there. `rank_key`, `value` and `horizon` do not compare."""
    service, body = await _admitted(request)
    limits = service.settings
    call = await service.offload(len(body), lambda: rows.read_predict(body, limits.max_batch_rows))
    as_headers = wants_headers(request, call)
    async with watched(request.receive) as gone:
        if call.options.models is not None:
            return json_response(await predict_many(request, gone, call, len(body)))
        found = await predict_one(request, gone, service.engine(call.options.model), call, len(body))
    return json_response(found, header_form(found["predictions"][0]) if as_headers else None)


@router.post(
    "/score",
    **documented(
        "Score a text token by token, or candidates for the next token",
        answer.ScoreResponse | answer.StepResponse,
        errors=(400, 404, 413, 422, 429, 500, 503, 504),
    ),
)
async def score(request: Request) -> Response:
    """Rows with `completion` get the value at each of its tokens; rows with `candidates` get a value and, with an
    objective, a log-weight for each. Both kinds may stand in one request.

    The rows of a decoding step may come as `columns` instead of `inputs`, and are answered so: the same numbers, in
    less time. All of their prefixes are sessions, and they have no `values` and `horizons`."""
    service, body = await _admitted(request)
    limits = service.settings
    call = await service.offload(len(body), lambda: rows.read_score(body, limits.max_batch_rows))
    engine = service.engine(call.options.model)
    deadline, tenant = deadline_of(request, call.options), request.state.context.tenant
    # A step is read at once: there is nothing to tokenise.
    steps: Sequence[rows.Row] | None = None
    if call.columns is not None:
        columns = call.columns
        step = await service.offload(len(body), lambda: rows.step_job(columns, limits.max_candidates, tenant))
        steps = None if step is None else [step]
        call = replace(call, rows=rows.spread(columns) if step is None else [])
    elif service.reads_inline(len(body)):
        steps = rows.step_jobs(call, limits.max_candidates, tenant)
    # What need not be tokenised stands in the queue before long.
    room = None if steps is not None else engine.reserve(rows.estimated_tokens(call.rows), deadline=deadline)
    with room or contextlib.nullcontext():
        jobs: Sequence[rows.Row] | None = steps
        if jobs is None:
            jobs = await service.tokenized(
                len(body),
                lambda: rows.score_jobs(call, engine.tokenizer, limits.max_candidates, tenant),
                text=rows.text_size(call.rows),
            )
        async with watched(request.receive) as gone:
            asked = (request, gone, engine, call.options, jobs)
            if call.columns is not None:
                found = await step_answer(*asked, deadline=deadline, reservation=room)
            else:
                found = await model_answer(*asked, name="scores", flat=call.flat, deadline=deadline, reservation=room)
    return json_response(found)


@router.post(
    "/tokenize",
    **documented(
        "Encode a prompt or messages",
        answer.TokenizeResponse,
        errors=(400, 404, 413, 422, 500, 503),
    ),
)
async def tokenize(request: Request) -> Response:
    """Ids up to where the answer begins, the chat template applied: what the other routes would make of the text."""
    service, body = await _admitted(request)
    wanted = await service.offload(len(body), lambda: rows.check(ask.TokenizeRequest, parse_object(body)))
    engine = service.engine(wanted.model)
    ids = await service.tokenized(len(body), lambda: rows.encode_text(wanted, engine.tokenizer), text=len(body))
    request.state.context.model = engine.name
    return json_response({"model": engine.name, "token_ids": ids})


@router.post(
    "/detokenize",
    **documented(
        "Decode token ids",
        answer.DetokenizeResponse,
        errors=(400, 404, 413, 422, 500, 503),
    ),
)
async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens kept."""
    service, body = await _admitted(request)
    wanted = await service.offload(len(body), lambda: rows.check(ask.DetokenizeRequest, parse_object(body)))
    engine = service.engine(wanted.model)
    size = engine.vocab_size
    bad = next((at for at, token in enumerate(wanted.token_ids) if token >= size), None)
    if bad is not None:
        problem = f"token id {wanted.token_ids[bad]} is out of range: the vocabulary has {size} ids"
        raise RequestError(problem, reason="token_out_of_range", param=f"token_ids[{bad}]")
    text = await service.offload(len(body), lambda: engine.tokenizer.decode(wanted.token_ids))
    request.state.context.model = engine.name
    return json_response({"model": engine.name, "text": text})


@router.post(
    "/feedback",
    **documented(
        "Tell how long answers really became",
        answer.FeedbackResponse,
        errors=(400, 404, 413, 422, 500, 503),
    ),
)
async def feedback(request: Request) -> Response:
    """Realised lengths, for the calibration metrics. `length` says that an answer was cut: it is censored."""
    service, body = await _admitted(request)
    call = await service.offload(len(body), lambda: rows.read_feedback(body, service.settings.max_batch_rows))
    engine = service.engine(call.options.model)
    items = await service.offload(len(body), lambda: rows.feedback_items(call))
    results: list[Result] = []
    tenant = request.state.context.tenant
    for item in items:
        if isinstance(item, LenVMError):
            results.append(item)
            continue
        try:
            told = engine.feedback(
                item.prediction_id, item.token_ids, item.generated_tokens, item.finish_reason, tenant
            )
            if told is not None:
                await told
            results.append({"accepted": True})
        except LenVMError as error:
            results.append(error)
    context = request.state.context
    context.rows, context.model = len(results), engine.name
    accepted = sum(isinstance(result, dict) for result in results)
    return json_response({"accepted": accepted, "results": row_answers(results, context, "items")})


@router.get("/v1/models", **documented("The models that requests may name", answer.ModelsResponse, errors=(500,)))
async def models(request: Request) -> Response:
    """In the form of OpenAI's list."""
    service = _service(request)
    entries = [
        {"id": name, "object": "model", "created": service.created, "owned_by": "lenvm"} for name in service.engines
    ]
    return json_response({"object": "list", "data": entries})


@router.get("/info", **documented("Release, models and limits", answer.InfoResponse, errors=(500,)))
async def info(request: Request) -> Response:
    """What each model is, for which generator it is valid, and what is refused as too large."""
    service = _service(request)
    limits = ("max_body_bytes", "max_batch_rows", "max_candidates", "max_queue_tokens")
    return json_response(
        {
            "version": __version__,
            "models": [engine.describe() for engine in service.engines.values()],
            "limits": {name: getattr(service.settings, name) for name in limits},
        }
    )


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", **documented("Is the process sound?", answer.LiveResponse, errors=(500, 503)))
async def live(request: Request) -> Response:
    """503 when an engine is dead or stuck: only a restart helps."""
    for engine in _service(request).engines.values():
        if not engine.alive:
            raise NotReadyError(f"the engine of model {engine.name} does not respond: restart the process")
    return json_response({"status": "live"})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", **documented("Does it take work?", answer.ReadyResponse, errors=(500, 503)))
async def ready(request: Request) -> Response:
    """503 while a model loads or its engine is being checked after a failure, and while the process shuts down."""
    service = _service(request)
    if service.draining:
        raise DrainingError("this process is shutting down")
    states = {name: engine.state for name, engine in service.engines.items()}
    waiting = [f"{name} is {states[name]}" for name, engine in service.engines.items() if not engine.ready]
    if waiting:
        raise NotReadyError(f"not ready yet: {', '.join(waiting)}")
    return json_response({"status": "ready", "models": states})


@router.get("/metrics", **documented("Prometheus metrics", None, errors=(500,)), response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """In Prometheus' text format."""
    text = await _service(request).metrics.exposition()
    return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


def _service(request: Request) -> Service:
    service: Any = request.app.state.service
    assert isinstance(service, Service)
    return service


async def _admitted(request: Request) -> tuple[Service, bytes]:
    """The service and the whole body, where new work is taken."""
    service = _service(request)
    if service.draining:
        # The connection is closed after the answer: with bytes unread, the caller would see a reset instead of it.
        with contextlib.suppress(PayloadTooLargeError, TimeoutError):
            async with asyncio.timeout(_REFUSAL_S):
                await read_body(request, service.settings.max_body_bytes)
    service.admit()
    return service, await read_body(request, service.settings.max_body_bytes)
