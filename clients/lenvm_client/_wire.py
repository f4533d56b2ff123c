"""The wire contract without input and output: what is sent, how an answer is read, when a call is made again.

Both clients run the same generator, ``exchange``: it asks for sends and waits, and is told what came back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import functools
import json
import math
import re
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, cast

from lenvm_client._decode import decode, load_json
from lenvm_client._types import (
    CandidateInput,
    CandidateScores,
    CompletionInput,
    FeedbackItem,
    PredictInput,
    RowError,
    TokenScores,
)
from lenvm_client.errors import (
    BadAnswerError,
    InvalidRequestError,
    LenVMClientError,
    OverloadedError,
    PayloadTooLargeError,
    ServiceTimeoutError,
    ServiceUnreachableError,
    UnauthorizedError,
    service_error,
)

__all__ = [
    "Call",
    "Reply",
    "RetryPolicy",
    "Send",
    "Wait",
    "candidate_inputs",
    "candidate_scores",
    "dump",
    "dump_integers",
    "error_of",
    "exchange",
    "input_rows",
    "make_call",
]

T = TypeVar("T")
Input: TypeAlias = str | Mapping[str, Any] | PredictInput | CompletionInput | CandidateInput | FeedbackItem

_RETRIED_STATUS = frozenset({429, 502, 503, 504})
_TURNED_AWAY = frozenset({429, 503})  # before any work was done


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request of the contract; ``rows`` is how many rows the answer's list ``rows_field`` must have, in each of the
    answer's ``results`` where ``models`` were asked.

    ``repeatable``: made twice it does what it does once, so that it may be made again when nobody knows whether the
    first one arrived.
    """

    method: str
    path: str
    answer: type[T]
    content: bytes | None = None
    rows_field: str | None = None
    rows: int = 0
    models: int = 0
    repeatable: bool = True

    def read(self, reply: Reply) -> T:
        """The typed answer. Raises the typed error of an error answer, BadAnswerError for what is neither."""
        request_id = reply.header("x-request-id")
        if reply.status != 200:
            raise error_of(reply)
        try:
            data = load_json(reply.content)
            if isinstance(data, dict) and request_id is not None:
                data["request_id"] = request_id
            answer = self._decoded(data)
        except BadAnswerError as error:
            error.status, error.request_id = reply.status, request_id
            raise
        return answer

    def _decoded(self, data: Any) -> T:
        answer = decode(self.answer, data)
        if self.rows_field is not None:
            self._check_rows(answer, self.rows_field)
        return answer

    def _check_rows(self, answer: Any, field: str) -> None:
        parts = [answer]
        if self.models:
            if [part.index for part in answer.results] != list(range(self.models)):
                raise BadAnswerError(f"{self.models} models were asked, the answer's results do not match them")
            parts = [part for part in answer.results if not isinstance(part, RowError)]
        for part in parts:
            if [row.index for row in getattr(part, field)] != list(range(self.rows)):
                raise BadAnswerError(f"{self.rows} inputs were sent, the answer's {field} do not match them")


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def header(self, name: str) -> str | None:
        return self.headers.get(name)


@dataclass(frozen=True)
class Send:
    """Send the call now; ``left_s``: seconds left of the total time, None without a bound."""

    left_s: float | None


@dataclass(frozen=True)
class Wait:
    """Sleep before the next send."""

    seconds: float


@dataclass(frozen=True)
class RetryPolicy:
    """When a call is made again. POST or not, a call is idempotent (a session is an immutable handle) unless it says
    that it is not ``repeatable``: then only where the request did not leave, or was turned away (429, 503).

    Back-off is exponential with full jitter: a uniform draw up to ``min(max_backoff_s, backoff_s * 2 ** attempt)``,
    on top of what the service asked for (Retry-After). ``total_s`` bounds all attempts and waits of a call.
    """

    max_retries: int = 2
    retry_timeouts: bool = False
    total_s: float | None = 60.0
    backoff_s: float = 0.25
    max_backoff_s: float = 8.0

    def wait(
        self, attempt: int, error: LenVMClientError, left_s: float | None, draw: float, *, repeatable: bool = True
    ) -> float | None:
        """Seconds to wait after failure ``attempt`` (from 0), or None to give up. ``draw`` is uniform in [0, 1)."""
        if attempt >= self.max_retries or not self._may_retry(error):
            return None
        if not repeatable and error.sent and error.status not in _TURNED_AWAY:
            return None
        wait = draw * min(self.max_backoff_s, self.backoff_s * 2.0**attempt) + (error.retry_after_s or 0.0)
        return wait if left_s is None or wait < left_s else None

    def _may_retry(self, error: LenVMClientError) -> bool:
        if isinstance(error, ServiceTimeoutError) and error.status is None:
            return self.retry_timeouts
        if error.status is None:
            return isinstance(error, ServiceUnreachableError) and error.retryable
        return error.retryable and error.status in _RETRIED_STATUS


def exchange(
    call: Call[T], policy: RetryPolicy, *, clock: Callable[[], float], draw: Callable[[], float]
) -> Generator[Send | Wait, Reply | None, T]:
    """The life of one call. After a ``Send`` the driver sends the reply in, or throws the LenVMClientError that stands
    for a failed transport; after a ``Wait`` it sends None. Returns the answer or raises the last error."""
    started = clock()

    def left() -> float | None:
        return None if policy.total_s is None else policy.total_s - (clock() - started)

    attempt = 0
    while True:
        try:
            reply = yield Send(left())
            assert reply is not None
            return call.read(reply)
        except LenVMClientError as error:
            wait = policy.wait(attempt, error, left(), draw(), repeatable=call.repeatable)
            if wait is None:
                raise
        attempt += 1
        yield Wait(wait)


# ---------------------------------------------------------------------------------------------------------------------
# Requests
def make_call(
    method: str,
    path: str,
    answer: type[T],
    body: Mapping[str, Any] | None = None,
    *,
    rows_field: str | None = None,
    repeatable: bool = True,
) -> Call[T]:
    """A call; fields of ``body`` that are None are left out. Raises InvalidRequestError for what JSON cannot carry."""
    if body is None:
        return Call(method, path, answer)
    fields = {name: plain for name, value in body.items() if (plain := _plain(value)) is not None}
    rows = next((len(fields[name]) for name in ("inputs", "items") if name in fields), 1)
    content = dump(fields)
    return Call(method, path, answer, content, rows_field, rows, len(fields.get("models", ())), repeatable)


def input_rows(inputs: Input | Iterable[Input], rows: type[PredictInput] | type[CompletionInput]) -> dict[str, Any]:
    """The body's part of one input (given flat: its error is that of the call) or of several (``inputs``)."""
    if isinstance(inputs, str) or not isinstance(inputs, Iterable) or isinstance(inputs, Mapping):
        return _row(inputs, rows)
    return {"inputs": [_row(item, rows) for item in inputs]}


def _row(item: Input, kind: type[PredictInput] | type[CompletionInput]) -> dict[str, Any]:
    if type(item) is CandidateInput and kind is CompletionInput:  # a step has dozens
        return cast(dict[str, Any], _plain(item))
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, PredictInput if kind is PredictInput else (CompletionInput, CandidateInput)):
        return cast(dict[str, Any], _plain(item))
    wanted = "PredictInput" if kind is PredictInput else "CompletionInput or CandidateInput"
    raise InvalidRequestError(f"an input must be a str, a mapping or a {wanted}, not {type(item).__name__}")


def _plain(value: Any) -> Any:
    """Typed inputs as mappings without the fields that were not given, at any depth of lists."""
    if (names := _names(cast(Any, type(value)))) is not None:
        fields = value.__dict__
        given = {name: field for name in names if (field := fields[name]) is not None}
        if "session" not in given:
            given.pop("append", None)
        if not len(given.get("eos_ids", ())):
            given.pop("eos_ids", None)
        if given.get("return_values", False):
            del given["return_values"]
        return given
    if isinstance(value, list | tuple):
        return value if set(map(type, value)) <= _PLAIN else [_plain(item) for item in value]
    return value


_PLAIN = frozenset((dict, int, float, str))


@functools.cache
def _names(kind: Hashable) -> tuple[str, ...] | None:
    """Of a dataclass its fields; None for anything else."""
    if not dataclasses.is_dataclass(kind):
        return None
    return tuple(field.name for field in dataclasses.fields(kind))


def _foreign(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_foreign)


@functools.cache
def _fast_writer() -> Callable[[Any], bytes] | None:
    """pydantic's, several times as fast on lists of numbers, where it is installed anyway."""
    try:
        from pydantic_core import to_json
    except ImportError:
        return None
    return to_json


def dump_integers(body: Mapping[str, Any]) -> bytes:
    """``dump`` for what holds texts and integers, and lists of these."""
    if (write := _fast_writer()) is not None:
        with contextlib.suppress(ValueError, TypeError):  # told by the one that everyone has
            return write(body)
    return dump(body)


def dump(body: Any) -> bytes:
    """JSON without spaces. Arrays of any library go through their ``tolist``."""
    try:
        return _encoder.encode(body).encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("a text holds a lone surrogate: send valid Unicode", code="not_unicode") from error
    except (TypeError, ValueError, RecursionError) as error:
        param = _path_of_non_finite(body)
        if param is not None:
            message = f"{param} is not finite: JSON has neither NaN nor infinities, leave such candidates out"
            raise InvalidRequestError(message, code="non_finite", param=param) from error
        raise InvalidRequestError(f"the request cannot be written as JSON: {error}", code="not_json") from error


def _path_of_non_finite(value: Any, path: str = "") -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    if hasattr(value, "tolist"):
        value = value.tolist()
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Mapping):
        items = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        items = ((f"{path}[{at}]", item) for at, item in enumerate(value))
    return next((found for where, item in items if (found := _path_of_non_finite(item, where)) is not None), None)


def candidate_inputs(rows: Iterable[CandidateInput | Mapping[str, Any]]) -> list[CandidateInput]:
    """Rows as ``CandidateInput``; mappings may stand for them. Raises InvalidRequestError for anything else."""
    found = []
    for at, row in enumerate(rows):
        try:
            found.append(row if isinstance(row, CandidateInput) else CandidateInput(**row))
        except TypeError as error:
            raise InvalidRequestError(f"row {at} is no CandidateInput ({error})", param=f"inputs[{at}]") from None
    return found


def candidate_scores(
    answered: Sequence[TokenScores | CandidateScores | RowError], rows: Sequence[CandidateInput]
) -> list[CandidateScores | RowError]:
    """The answer's rows as a candidate scorer gives them, checked against what was asked. Raises BadAnswerError."""
    scores: list[CandidateScores | RowError] = []
    for row, score in zip(rows, answered, strict=True):
        if isinstance(score, CandidateScores):
            sizes = {len(score.values), len(score.horizons)} if row.return_values else set()
            sizes |= set() if score.log_weights is None else {len(score.log_weights)}
            if not sizes <= {len(row.candidates)}:
                raise BadAnswerError(f"scores[{score.index}] does not match its {len(row.candidates)} candidates")
        elif not isinstance(score, RowError):
            raise BadAnswerError(f"scores[{score.index}] is not an answer for candidates")
        scores.append(score)
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Errors
def error_of(reply: Reply) -> LenVMClientError:
    """The typed error of an answer that is not 200: the contract's body, or what a proxy in between made of it."""
    after = _retry_after(reply.header("retry-after"))
    request_id = reply.header("x-request-id")
    try:
        body = decode(RowError, {"index": 0, "error": load_json(reply.content)["error"]})
    except (BadAnswerError, KeyError, TypeError):
        return _foreign_error(reply, after, request_id)
    if body.retry_after_ms is not None:
        after = max(after or 0.0, body.retry_after_ms / 1000.0)
    return service_error(
        body.type,
        body.message,
        code=body.code,
        param=body.param,
        retryable=body.retryable,
        retry_after_s=after,
        status=reply.status,
        request_id=body.request_id or request_id,
    )


def _foreign_error(reply: Reply, after: float | None, request_id: str | None) -> LenVMClientError:
    status = reply.status
    text = re.sub(r"<[^>]*>|\s+", " ", reply.content[:2000].decode("utf-8", "replace"))
    said = f"status {status} ({' '.join(text.split())[:100] or 'no body'})"
    if status in (502, 503):
        message = f"something before the service answered {said}: is the service running?"
        return ServiceUnreachableError(message, status=status, retry_after_s=after, request_id=request_id)
    if status == 504:
        message = f"something before the service answered {said}: try again, or with fewer inputs"
        return ServiceTimeoutError(message, status=status, retry_after_s=after, request_id=request_id)
    if status == 429:
        message = f"something before the service answered {said}: send fewer requests"
        return OverloadedError(message, status=status, retry_after_s=after, request_id=request_id)
    if status in (401, 403):
        return UnauthorizedError(f"not let in: {said}; give api_key", status=status, request_id=request_id)
    if status == 413:
        return PayloadTooLargeError(f"refused: {said}; send fewer inputs", status=status, request_id=request_id)
    message = f"not an answer of a LenVM service: {said}; check base_url"
    return BadAnswerError(message, status=status, request_id=request_id)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number of seconds or an HTTP date. None for anything else."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, OSError):  # the last: years that the platform cannot count
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
