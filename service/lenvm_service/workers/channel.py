"""Messages between an API worker and the engines' process: JSON in frames over a socket pair, never pickle."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

from pydantic_core import from_json, to_json

from lenvm.errors import LenVMError
from lenvm.guidance import Objective
from lenvm_service.engine.jobs import CandidateJob, Job, PredictJob, Prefix, StepJob, TokenScoreJob

__all__ = ["Channel", "RemoteError", "error_fields", "job_fields", "job_of", "result_fields", "result_of"]

_HEAD = struct.Struct("!I")
_KINDS: dict[str, type[PredictJob] | type[TokenScoreJob] | type[CandidateJob] | type[StepJob]] = {
    "predict": PredictJob,
    "tokens": TokenScoreJob,
    "candidates": CandidateJob,
    "step": StepJob,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_FIELDS = {kind: tuple(field.name for field in fields(kind) if field.init) for kind in _NAMES}


class Channel(asyncio.Protocol):
    """One end. ``receive`` is called with each message, ``lost`` once when the other process has gone."""

    def __init__(self, receive: Callable[[dict[str, Any]], None], lost: Callable[[], None]) -> None:
        self._receive, self._lost = receive, lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._pending: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is ours."""
        self._transport = cast(asyncio.Transport, transport)  # one of uvloop's own, perhaps

    def connection_lost(self, exc: Exception | None) -> None:
        """The other process has gone."""
        self._transport = None
        self._lost()

    def send(self, message: dict[str, Any]) -> None:
        """Nothing happens where the other process has gone. What one turn of the loop sends, a batch's answers, goes
        in one write: each is a system call, and wakes the other process."""
        if self._transport is not None:
            body = to_json(message, inf_nan_mode="constants")
            if not self._pending:
                asyncio.get_running_loop().call_soon(self._flush)
            self._pending += (_HEAD.pack(len(body)), body)

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if self._transport is not None and pending:
            self._transport.write(b"".join(pending))

    def close(self) -> None:
        """Close this end, once what was sent is on its way."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Some frames, or parts of one."""
        buffer, at = self._buffer, 0
        buffer += data
        while len(buffer) >= at + _HEAD.size:
            (size,) = _HEAD.unpack_from(buffer, at)
            if len(buffer) < at + _HEAD.size + size:
                break
            at += _HEAD.size
            message = from_json(bytes(buffer[at : at + size]), cache_strings="keys")
            at += size
            self._receive(message)
        del buffer[:at]


class RemoteError(LenVMError):
    """An error of the engines' process: what the error table reads of it."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told.pop("message"))
        for name, value in told.items():
            setattr(self, name, value)


def error_fields(error: Exception) -> dict[str, Any]:
    """What :class:`RemoteError` is made of; nothing of an error that is not ours."""
    if not isinstance(error, LenVMError):
        return {"message": "the engine's process failed", "code": "internal"}
    told = {name: getattr(error, name, None) for name in ("code", "param", "reason", "retry_after_s")}
    return {"message": str(error), **{name: value for name, value in told.items() if value is not None}}


def job_fields(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    found = {name: getattr(job, name) for name in _FIELDS[type(job)]}
    if isinstance(job, PredictJob | CandidateJob):
        prefix = job.prefix
        found["prefix"] = [prefix.token_ids, prefix.session, prefix.tenant]
    if isinstance(job, CandidateJob) and job.objective is not None:
        found["objective"] = job.objective.to_dict()
    if isinstance(job, StepJob):
        # Rows mostly want the same: what each wants by its number among all that is wanted.
        wanted = list({id(objective): objective for objective in job.objectives}.values())
        places = {id(objective): at for at, objective in enumerate(wanted)}
        found["objectives"] = [
            [None if objective is None else objective.to_dict() for objective in wanted],
            [places[id(objective)] for objective in job.objectives],
        ]
    found["kind"] = _NAMES[type(job)]
    return found


def job_of(told: dict[str, Any]) -> Job:
    """The job that :func:`job_fields` told of; it was checked before that."""
    kind = _KINDS[told.pop("kind")]
    if "prefix" in told:
        token_ids, session, tenant = told["prefix"]
        told["prefix"] = Prefix(token_ids, session, tenant)
    if told.get("objective") is not None:
        told["objective"] = Objective.from_dict(told["objective"])
    if "objectives" in told:
        wanted = [None if objective is None else Objective.from_dict(objective) for objective in told["objectives"][0]]
        told["objectives"] = [wanted[at] for at in told["objectives"][1]]
    return kind(**told)


def result_fields(result: dict[str, Any] | LenVMError) -> dict[str, Any]:
    """A row or its error as JSON."""
    if isinstance(result, LenVMError):
        return {"error": error_fields(result)}
    if "errors" in result:  # of a step's rows
        return {"row": {**result, "errors": [[at, error_fields(error)] for at, error in result["errors"].items()]}}
    return {"row": result}


def result_of(told: dict[str, Any]) -> dict[str, Any] | LenVMError:
    """The row or its error."""
    if "error" in told:
        return RemoteError(told["error"])
    row: dict[str, Any] = told["row"]
    if "errors" in row:
        row["errors"] = {at: RemoteError(error) for at, error in row["errors"]}
    return row
