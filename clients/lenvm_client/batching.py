"""Many predictions in few calls: rows in bulk, and concurrent callers that share a call."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from lenvm_client import _calls as calls
from lenvm_client._types import PredictInput, Prediction, PredictLengthResponse, RowError
from lenvm_client.errors import (
    BadAnswerError,
    InvalidRequestError,
    LenVMClientError,
    PayloadTooLargeError,
    ServiceError,
    ServiceTimeoutError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from lenvm_client.async_client import AsyncClient
    from lenvm_client.client import Client

__all__ = ["PredictionBatcher", "predict_rows", "predict_rows_async"]

Input: TypeAlias = str | Mapping[str, Any] | PredictInput
Rows: TypeAlias = list[Prediction | RowError]

_MAX_ROWS = 100


def predict_rows(
    client: Client, inputs: Iterable[Input], *, budget_s: float | None = 0.4, max_rows: int = _MAX_ROWS, **options: Any
) -> Rows:
    """A prediction or an error for every input, aligned, whatever happens: a scheduler's bulk call never raises.

    Calls of at most ``max_rows`` rows, one after the other, until ``budget_s`` seconds are over (None: no bound); rows
    that had no call by then fail with type ``timeout``. A call that fails gives its error to its rows, an input that
    JSON cannot carry to that row alone. ``options`` go to ``predict_length``. Give the client ``max_retries=0``: its
    waits would count.
    """
    rows, good = _checked(inputs)
    ends = None if budget_s is None else time.monotonic() + budget_s
    for places in _chunks(list(good), max_rows):
        left = None if ends is None else ends - time.monotonic()
        if left is not None and left <= 0.0:
            _put_error(rows, places, too_late())
            continue
        try:
            answer = client.predict_length([good[at] for at in places], **within_budget(left, options))
        except LenVMClientError as error:
            _put_error(rows, places, error)
        else:
            _put(rows, places, answer)
    return [rows[at] for at in range(len(rows))]


async def predict_rows_async(
    client: AsyncClient,
    inputs: Iterable[Input],
    *,
    budget_s: float | None = 0.4,
    max_rows: int = _MAX_ROWS,
    **options: Any,
) -> Rows:
    """``predict_rows`` over an ``AsyncClient``: its calls run at once, and ``budget_s`` is exact."""
    rows, good = _checked(inputs)

    async def call(places: Sequence[int]) -> None:
        try:
            async with asyncio.timeout(budget_s):
                answer = await client.predict_length([good[at] for at in places], **within_budget(budget_s, options))
        except TimeoutError as error:
            _put_error(rows, places, error if isinstance(error, LenVMClientError) else too_late())
        except LenVMClientError as error:
            _put_error(rows, places, error)
        else:
            _put(rows, places, answer)

    await asyncio.gather(*(call(places) for places in _chunks(list(good), max_rows)))
    return [rows[at] for at in range(len(rows))]


class PredictionBatcher:
    """Concurrent ``predict`` calls of one event loop share a request: the first waits ``window_s`` for others, and a
    full batch of ``max_rows`` goes at once. Close it, or use it in an ``async with`` block.

    Each caller gets its own row's prediction or error; where a whole call fails, all of its callers get that error, but
    a batch whose body is too large is halved first. A caller that gives up before the batch left takes its row along.
    ``options`` (model, max_tokens, quantiles, ...) go to ``predict_length`` and hold for all.
    """

    def __init__(
        self, client: AsyncClient, *, window_s: float = 1e-3, max_rows: int = _MAX_ROWS, **options: Any
    ) -> None:
        if max_rows < 1 or window_s < 0.0:
            raise InvalidRequestError("max_rows must be at least 1 and window_s at least 0", param="max_rows")
        self._client = client
        self._window_s = window_s
        self._max_rows = max_rows
        self._options = options
        self._waiting: list[tuple[Input, asyncio.Future[Prediction]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._closed = False

    async def predict(self, input: Input) -> Prediction:
        """The prediction of one input. Raises its row's error, or the call's (see ``predict_length``)."""
        if self._closed:
            raise InvalidRequestError("this batcher is closed", code="closed")
        _check(input)  # what JSON cannot carry must not fail the others
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Prediction] = loop.create_future()
        self._waiting.append((input, future))
        if len(self._waiting) >= self._max_rows:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(self._window_s, self._flush)
        return await future

    async def close(self) -> None:
        """Send what waits, and wait for the calls on their way. The client stays open."""
        self._closed = True
        self._flush()
        while self._calls:
            await asyncio.gather(*self._calls, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = [item for item in self._waiting if not item[1].done()], []
        if batch:
            task = asyncio.get_running_loop().create_task(self._call(batch))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _call(self, batch: list[tuple[Input, asyncio.Future[Prediction]]]) -> None:
        try:
            answer = await self._client.predict_length([row for row, _ in batch], **self._options)
        except PayloadTooLargeError as error:
            if len(batch) > 1:
                half = len(batch) // 2
                await asyncio.gather(self._call(batch[:half]), self._call(batch[half:]))
            else:
                _fail(batch, error)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            _fail(batch, error)
        else:
            for (_, future), row in zip(batch, answer.predictions, strict=True):
                if future.done():
                    continue
                if isinstance(row, RowError):
                    future.set_exception(row.to_exception())
                else:
                    future.set_result(row)


def _fail(batch: Sequence[tuple[Input, asyncio.Future[Prediction]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(copy.copy(error))  # each its own: a raised exception collects tracebacks


def _check(input: Input) -> None:
    if isinstance(input, Iterable) and not isinstance(input, str | Mapping):
        raise InvalidRequestError("an input must be a str, a mapping or a PredictInput")
    calls.predict_length(input, {}, None, None)


def _checked(inputs: Iterable[Input]) -> tuple[dict[int, Prediction | RowError], dict[int, Input]]:
    """Errors of inputs that cannot be sent, and the others, by index."""
    rows: dict[int, Prediction | RowError] = {}
    good: dict[int, Input] = {}
    for at, input in enumerate([inputs] if isinstance(inputs, str | Mapping | PredictInput) else inputs):
        try:
            _check(input)
        except LenVMClientError as error:
            rows[at] = row_error(at, error)
        else:
            good[at] = input
    return rows, good


def _chunks(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def within_budget(left: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The service should not work for a caller that has gone on."""
    return dict(options) if left is None else {"deadline_ms": 1e3 * left, "timeout": left, **options}


def _put(rows: dict[int, Prediction | RowError], places: Sequence[int], answer: PredictLengthResponse) -> None:
    for at, row in zip(places, answer.predictions, strict=True):
        rows[at] = replace(row, index=at)


def _put_error(rows: dict[int, Prediction | RowError], places: Sequence[int], error: LenVMClientError) -> None:
    for at in places:
        rows[at] = row_error(at, error)


def too_late() -> ServiceTimeoutError:
    return ServiceTimeoutError("no answer within budget_s")


def row_error(index: int, error: LenVMClientError) -> RowError:
    if isinstance(error, ServiceError):
        kind, code, param = error.type, error.code, error.param
    else:
        names = {ServiceTimeoutError: "timeout", BadAnswerError: "bad_answer"}
        kind = next((name for known, name in names.items() if isinstance(error, known)), "unreachable")
        code, param = kind, None
    after = None if error.retry_after_s is None else 1e3 * error.retry_after_s
    return RowError(
        index=index,
        type=kind,
        code=code,
        message=str(error),
        param=param,
        request_id=error.request_id,
        retryable=error.retryable,
        retry_after_ms=after,
    )
