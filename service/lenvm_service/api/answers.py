"""The answers of the two model routes: run the jobs, watch the caller and the clock, put the rows together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from lenvm.config import GeneratorRef
from lenvm.errors import LenVMError
from lenvm_service.api.errors import error_object
from lenvm_service.api.middleware import RequestContext
from lenvm_service.api.ports import EngineLike
from lenvm_service.api.rows import Row
from lenvm_service.api.schemas import GeneratorClaim, RequestOptions
from lenvm_service.engine.jobs import Job, Reply, Result, StepJob, folded, rows_of
from lenvm_service.engine.queueing import Reservation
from lenvm_service.errors import DeadlineExceededError, InternalError

__all__ = [
    "ask",
    "deadline_of",
    "generator_warnings",
    "json_response",
    "model_answer",
    "row_answers",
    "step_answer",
    "timings",
    "watched",
]

_DEADLINE_SLACK_S = 0.1  # the engine keeps deadlines itself; this is for one that is busy with a long batch


def json_response(content: Any, headers: Mapping[str, str] | None = None) -> Response:
    """``content`` as JSON, written once. Numbers that JSON cannot hold become null, never NaN."""
    return Response(to_json(content, inf_nan_mode="null"), headers=headers, media_type="application/json")


@contextlib.asynccontextmanager
async def watched(receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    """What is done when the caller goes: one watcher a request, however many engines work on it. The body was read."""
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        yield gone
    finally:
        gone.cancel()  # and not waited for: that would be one more turn of the loop for every request
        gone.add_done_callback(_seen)


async def ask(
    gone: asyncio.Task[None],
    engine: EngineLike,
    jobs: Sequence[Job],
    *,
    deadline: float | None,
    priority: int,
    reservation: Reservation | None = None,
) -> Reply:
    """What the engine answers. ``gone``: see ``watched``; ``deadline``: of time.monotonic; ``reservation``: room in its
    queue.

    Raises what the engine raises, DeadlineExceededError, and ClientDisconnect when the caller goes, whose work is
    dropped then.
    """
    timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) + _DEADLINE_SLACK_S
    task = asyncio.current_task()
    assert task is not None
    left = over = False

    def leave(_: object) -> None:
        nonlocal left
        if not over:  # it may have been on its way when the answer came
            left = True
            task.cancel()

    # The work is awaited here and not in a task of its own, which would be some more turns of the loop.
    gone.add_done_callback(leave)
    try:
        if gone.done():
            raise ClientDisconnect
        async with asyncio.timeout(timeout) if timeout is not None else contextlib.nullcontext():
            return await engine.submit(jobs, deadline=deadline, priority=priority, reservation=reservation)
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnect from None
        if left or task.cancelling():
            raise
        raise InternalError("the engine dropped the request") from None  # not a cancellation of ours
    except TimeoutError:
        raise DeadlineExceededError("the deadline passed before the answer was there: give it more time") from None
    finally:
        over = True
        gone.remove_done_callback(leave)


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def deadline_of(request: Request, options: RequestOptions) -> float | None:
    """When the answer must be there, of time.monotonic. Raises DeadlineExceededError where that has passed."""
    deadline_ms = options.deadline_ms or request.app.state.service.settings.default_deadline_ms
    if deadline_ms is None:
        return None
    deadline: float = request.state.context.started + deadline_ms / 1000
    if time.monotonic() >= deadline:
        raise DeadlineExceededError("the deadline passed while the request was read: give it more time")
    return deadline


async def model_answer(
    request: Request,
    gone: asyncio.Task[None],
    engine: EngineLike,
    options: RequestOptions,
    rows: Sequence[Row],
    *,
    name: str,
    flat: bool,
    deadline: float | None,
    reservation: Reservation | None,
) -> dict[str, Any]:
    """Run the jobs among ``rows``: the answer of one model, with an entry for each row under ``name``.

    Raises what concerns the whole request: what ``ask`` raises, and the error of a ``flat`` row.
    """
    all_rows, tail = await _answered(request, gone, engine, options, rows, deadline, reservation)
    if flat and isinstance(all_rows[0], LenVMError):
        raise all_rows[0]
    return {**_head(engine), name: row_answers(all_rows, request.state.context, "inputs"), **tail}


async def step_answer(
    request: Request,
    gone: asyncio.Task[None],
    engine: EngineLike,
    options: RequestOptions,
    rows: Sequence[Row],
    *,
    deadline: float | None,
    reservation: Reservation | None,
) -> dict[str, Any]:
    """The same for columns: one ``StepJob``, or a job or an error for each of their rows."""
    all_rows, tail = await _answered(request, gone, engine, options, rows, deadline, reservation)
    step = all_rows[0] if isinstance(rows[0], StepJob) else folded(all_rows)
    if isinstance(step, LenVMError):
        raise step
    context = request.state.context
    errors = [
        {"index": at, "error": error_object(error, request_id=context.request_id, at=f"columns[{at}]")}
        for at, error in step["errors"].items()
    ]
    return {**_head(engine), "columns": step["columns"], "errors": errors, **tail}


async def _answered(
    request: Request,
    gone: asyncio.Task[None],
    engine: EngineLike,
    options: RequestOptions,
    rows: Sequence[Row],
    deadline: float | None,
    reservation: Reservation | None,
) -> tuple[list[Result], dict[str, Any]]:
    """All rows' results, and what an answer ends with."""
    context = request.state.context
    jobs = [row for row in rows if not isinstance(row, LenVMError)]
    context.rows, context.model = sum(map(rows_of, jobs)) + len(rows) - len(jobs), engine.name
    reply = Reply([], queue_ms=0.0, inference_ms=0.0)
    if jobs:
        priority = options.priority or 0
        reply = await ask(gone, engine, jobs, deadline=deadline, priority=priority, reservation=reservation)
        # Of several models the slowest counts: they work side by side.
        context.queue_ms = max(context.queue_ms, reply.queue_ms)
        context.inference_ms = max(context.inference_ms, reply.inference_ms)
    answered = iter(reply.results)
    all_rows: list[Result] = [row if isinstance(row, LenVMError) else next(answered) for row in rows]
    tail = {
        "warnings": generator_warnings(options.generator, engine),
        "timings_ms": timings(context, reply),
    }
    return all_rows, tail


def timings(context: RequestContext, reply: Reply | None = None) -> dict[str, float]:
    """Milliseconds, of one model's reply or of the whole request."""
    of = context if reply is None else reply
    return {"queue": of.queue_ms, "inference": of.inference_ms, "total": context.total_ms}


def row_answers(rows: Sequence[Result], context: RequestContext, name: str) -> list[dict[str, Any]]:
    """Rows with their index; errors in the one form that errors have."""
    return [
        {"index": at, "error": error_object(row, request_id=context.request_id, at=f"{name}[{at}]")}
        if isinstance(row, LenVMError)
        else {"index": at, **row}
        for at, row in enumerate(rows)
    ]


def _head(engine: EngineLike) -> dict[str, Any]:
    config = engine.config
    bins = config.head.bins
    return {
        "model": engine.name,
        "model_sha": engine.model_sha,
        "gamma": config.gamma,
        "cap": bins.cap if bins else None,
    }


def generator_warnings(claim: GeneratorClaim | None, engine: EngineLike) -> list[dict[str, str]]:
    """A warning where the caller generates with another policy than the one that the model was trained for."""
    if claim is None:
        return []
    own = engine.config.generator
    problems = []
    if claim.backbone is not None and not _same_backbone(claim.backbone, own):
        problems.append(f"the backbone {own.backbone}")
    for name in ("temperature", "top_p", "max_new_tokens"):
        wanted, expected = getattr(claim, name), getattr(own, name)
        if wanted is not None and abs(wanted - expected) > 1e-6:
            problems.append(f"{name} {expected:g}")
    if not problems:
        return []
    message = f"model {engine.name} predicts lengths of {' and '.join(problems)}; yours differs, so errors are larger"
    return [{"code": "generator_mismatch", "message": message}]


def _same_backbone(name: str, own: GeneratorRef) -> bool:
    """Equal but for case; a bare name also fits a hub id or folder that ends in it."""
    ours, theirs = own.backbone.casefold().rstrip("/"), name.casefold().rstrip("/")
    bare = "/" not in ours or "/" not in theirs
    return ours == theirs or (bare and ours.rpartition("/")[2] == theirs.rpartition("/")[2])
