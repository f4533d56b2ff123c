"""/predict_length: one model or several asked at once, and the numbers of one prediction as headers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request

from lenvm.errors import LenVMError
from lenvm_service.api import rows
from lenvm_service.api.answers import deadline_of, model_answer, timings
from lenvm_service.api.errors import RequestError, error_object
from lenvm_service.api.ports import EngineLike
from lenvm_service.api.schemas import PredictOptions
from lenvm_service.api.service import Service

__all__ = ["HEADER_FORM", "header_form", "predict_many", "predict_one", "wants_headers"]

logger = logging.getLogger(__name__)

HEADER_FORM = "x-lenvm-headers"
"""Asked for by a header: a gateway adds one to a request more easily than it changes its URL."""
_LEVELS: Mapping[str, str] = {"0.5": "p50", "0.9": "p90", "0.95": "p95"}


async def predict_one(
    request: Request,
    gone: asyncio.Task[None],
    engine: EngineLike,
    call: rows.Call[PredictOptions],
    size: int,
    *,
    text_only: bool = False,
) -> dict[str, Any]:
    """One model's answer. ``size``: bytes of the body; ``text_only``: rows of token ids or sessions are errors.

    Raises what concerns the whole request; see ``model_answer``.
    """
    service: Service = request.app.state.service
    deadline, tenant = deadline_of(request, call.options), request.state.context.tenant
    with engine.reserve(rows.estimated_tokens(call.rows), deadline=deadline) as room:
        jobs = await service.tokenized(
            size,
            lambda: rows.predict_jobs(call, engine.tokenizer, tenant, text_only=text_only),
            text=rows.text_size(call.rows),
        )
        return await model_answer(
            request,
            gone,
            engine,
            call.options,
            jobs,
            name="predictions",
            flat=call.flat,
            deadline=deadline,
            reservation=room,
        )


async def predict_many(
    request: Request, gone: asyncio.Task[None], call: rows.Call[PredictOptions], size: int
) -> dict[str, Any]:
    """Every model's answer, in the order of ``models``: an entry is what the call would get from that model alone, or
    the error that it would end with.

    Raises one of these errors where no model answered (one that a retry may cure, else one of a model that is there),
    and ClientDisconnect.
    """
    service: Service = request.app.state.service
    context, names = request.state.context, call.options.models or []
    found: list[EngineLike | LenVMError] = [_engine(service, name) for name in names]
    engines = [one for one in found if not isinstance(one, LenVMError)]
    text_only = len({engine.config.backbone.tokenizer_sha256 for engine in engines}) > 1
    work = (predict_one(request, gone, engine, call, size, text_only=text_only) for engine in engines)
    answers = iter(await asyncio.gather(*work, return_exceptions=True))
    parts = [one if isinstance(one, LenVMError) else next(answers) for one in found]
    context.rows, context.model = len(call.rows), ",".join(engine.name for engine in engines) or None
    results: list[dict[str, Any]] = []
    failed: list[tuple[bool, bool, int]] = []
    for at, (name, part) in enumerate(zip(names, parts, strict=True)):
        if isinstance(part, dict):
            results.append({"index": at, **part})
            continue
        if isinstance(part, ClientDisconnect | asyncio.CancelledError):
            raise part
        where = "" if getattr(part, "param", None) else f"models[{at}]"
        error = error_object(part, request_id=context.request_id, at=where)  # type: ignore[arg-type]
        results.append({"index": at, "model": name, "error": error})
        failed.append((error["type"] == "model_not_found", not error["retryable"], at))
    if len(failed) == len(results):
        raise parts[min(failed)[2]]  # type: ignore[misc]
    for _, _, at in failed:
        if not isinstance(parts[at], LenVMError):
            logger.error("model %s failed on a request", found[at].name, exc_info=parts[at])  # type: ignore[union-attr, arg-type]
    return {"results": results, "timings_ms": timings(context)}


def _engine(service: Service, name: str) -> EngineLike | LenVMError:
    try:
        return service.engine(name)
    except LenVMError as error:
        return error


def wants_headers(request: Request, call: rows.Call[PredictOptions]) -> bool:
    """Are the numbers wanted as headers too? Raises RequestError where there is more than one prediction."""
    if request.headers.get(HEADER_FORM) != "1":
        return False
    if not call.flat or call.options.models is not None:
        name = "models" if call.flat else "inputs"
        raise RequestError(
            f"{HEADER_FORM} is for one input, given flat, and one model: leave {name} out",
            reason="headers_of_many",
            param=name,
        )
    return True


def header_form(row: Mapping[str, Any]) -> dict[str, str]:
    """A prediction as headers; what it has no number for (no distribution, another choice of quantiles) is left out."""
    quantiles = row["quantiles"] or {}
    numbers = {name: quantiles.get(level) for level, name in _LEVELS.items()}
    numbers |= {"mean": row["mean"], "rank-key": row["rank_key"]}
    given = {
        f"x-lenvm-{name}": f"{number:.10g}"
        for name, number in numbers.items()
        if number is not None and math.isfinite(number)
    }
    return {**given, "x-lenvm-prediction-id": row["prediction_id"]}
