"""What all requests share: the engines, the limits, whether the process is draining, and who is being served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import anyio
import anyio.to_thread

from lenvm_service.api.ports import EngineLike, MetricsLike
from lenvm_service.errors import DrainingError, ModelNotFoundError, NotReadyError
from lenvm_service.keys import KeyRing
from lenvm_service.settings import Settings
from lenvm_service.tracing import Tracing, traced

__all__ = ["Service"]

T = TypeVar("T")
# Less than this keeps the event loop busy for about a millisecond, and going to another thread and back costs as much.
_INLINE_BYTES = 64 * 1024  # of JSON to parse
_INLINE_TEXT = 8 * 1024  # characters to encode
_WITHOUT_MODEL = frozenset({"loading", "failed", "stopped"})
_RETRY_S = 2.0


class Service:
    """The process as its requests see it. ``requests`` are the tasks that serve one each; the loop's thread only.

    ``pages`` are the tasks that serve the playground: its streams stay open as long as a browser's tab, so that no
    drain waits for them.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineLike],
        settings: Settings,
        metrics: MetricsLike,
        tracing: Tracing | None = None,
    ) -> None:
        self.engines = dict(engines)
        self.settings = settings
        self.metrics = metrics
        self.tracing = tracing
        self.keys = None if settings.api_keys is None else KeyRing(settings.api_keys)
        self.created = int(time.time())
        self.draining = False
        self.abandoned = False
        self.requests: set[asyncio.Task[object]] = set()
        self.pages: set[asyncio.Task[object]] = set()
        self._workers = anyio.CapacityLimiter(2)  # threads that parse and encode: more would only share the cores

    def admit(self) -> None:
        """Raise DrainingError where the process takes no new work."""
        if self.draining:
            raise DrainingError("this process is shutting down: send the request again, to another replica")

    def engine(self, name: str | None) -> EngineLike:
        """The engine of that name (None: the first one), if it has a model.

        While it recovers from a failure, work may wait for it. Raises ModelNotFoundError or NotReadyError.
        """
        if name is None:
            engine = next(iter(self.engines.values()), None)
        else:
            engine = self.engines.get(name)
        if engine is None:
            raise ModelNotFoundError(f"there is no such model here: use one of {', '.join(self.engines) or 'none'}")
        if engine.state in _WITHOUT_MODEL or not engine.alive:
            raise NotReadyError(f"model {engine.name} takes no work now: try again", retry_after_s=_RETRY_S)
        return engine

    def abandon(self) -> None:
        """End every request that is still being served; its caller gets ``draining``."""
        self.abandoned = True
        for task in [*self.requests, *self.pages]:
            task.cancel()

    @staticmethod
    def reads_inline(size: int) -> bool:
        """Whether a body of so many bytes is parsed on the event loop."""
        return size <= _INLINE_BYTES

    async def offload(self, size: int, work: Callable[[], T]) -> T:
        """``work()``, which parses a body of ``size`` bytes; in a worker thread where that would keep the event loop
        busy."""
        if self.reads_inline(size):
            return work()
        return await anyio.to_thread.run_sync(work, limiter=self._workers)

    async def tokenized(self, size: int, work: Callable[[], T], *, text: int) -> T:
        """``work()``, which makes jobs of such a body and token ids of the ``text`` characters in it; likewise."""
        with traced(self.tracing, "tokenize"):
            return await self.offload(size if text <= _INLINE_TEXT else max(size, _INLINE_BYTES + 1), work)
