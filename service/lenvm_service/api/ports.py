"""What the HTTP layer needs from an engine and from the metrics; tests bring their own."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from lenvm.config import LenVMConfig
from lenvm_service.engine.jobs import Job, Reply
from lenvm_service.engine.queueing import Reservation

__all__ = ["EngineLike", "MetricsLike"]


class EngineLike(Protocol):
    """One model. Before it was ready for the first time only name, state, alive, ready and describe are valid."""

    name: str

    @property
    def config(self) -> LenVMConfig: ...
    @property
    def model_sha(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    @property
    def failure(self) -> Exception | None: ...

    def start(self) -> None: ...
    def close(self) -> None: ...
    def describe(self) -> dict[str, Any]: ...
    def reserve(self, tokens: int, *, deadline: float | None = None) -> Reservation: ...
    async def submit(
        self,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        priority: int = 0,
        reservation: Reservation | None = None,
    ) -> Reply: ...
    def feedback(
        self,
        prediction_id: str | None,
        token_ids: Sequence[int] | None,
        generated_tokens: int,
        finish_reason: str,
        tenant: str = "",
    ) -> Awaitable[None] | None: ...


class CountLike(Protocol):
    """Something that goes up and down."""

    def inc(self) -> None: ...
    def dec(self) -> None: ...


class MetricsLike(Protocol):
    """The process's metrics."""

    @property
    def inflight(self) -> CountLike: ...
    async def exposition(self) -> bytes: ...
    def observe_request(self, route: str, status: int, error_type: str, seconds: float) -> None: ...
