"""What waits for the engine: jobs with their costs, the requests that they belong to, and room kept for more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lenvm_service.engine.jobs import Job, Result
from lenvm_service.errors import ServiceError

__all__ = ["BatchObserver", "BatcherOptions", "Cost", "Entry", "Reservation", "Ticket"]


@dataclass(frozen=True)
class Cost:
    """What a job adds to a batch: new tokens, and attention cells as the engine pads them."""

    tokens: int
    cells: int = 0


@dataclass(frozen=True)
class BatcherOptions:
    """How large batches and the queue may be.

    Args:
        budget_tokens, budget_cells: most of a batch; it takes one job at least.
        batch_s: most work of a batch, in seconds at the rate of late: who comes next waits for no longer.
        wait_s: how long a batch is held open for others.
        max_queue_tokens, max_queue_s: most that may wait.
        stall_s: a heartbeat older than this is no life sign.
    """

    budget_tokens: int = 4096
    budget_cells: int = 1 << 26
    batch_s: float = 0.5
    wait_s: float = 0.002
    max_queue_tokens: int = 262_144
    max_queue_s: float = 30.0
    stall_s: float = 60.0


class BatchObserver(Protocol):
    """What the batcher tells the metrics."""

    def waited(self, seconds: float) -> None: ...
    def queued(self, tokens: int) -> None: ...
    def batch(self, rows: int, tokens: int, seconds: float) -> None: ...
    def is_ready(self, ready: bool) -> None: ...
    def failed(self) -> None: ...


@dataclass(eq=False)
class Ticket:
    """A request: its jobs' results come in from one batch or several."""

    results: list[Result | None]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    arrived: float
    deadline: float | None
    missing: int
    started: float | None = None
    inference_s: float = 0.0
    error: ServiceError | None = None
    gone: bool = False  # nobody waits any more
    trace: Any = None  # of the request: see Tracing.here

    def end(self, error: ServiceError | None = None) -> None:
        """Wake whoever waits; called from the batcher's thread."""
        self.gone, self.error = True, error
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to be told
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


@dataclass(order=True)
class Entry:
    """One job in the queue, the earliest key first."""

    key: float
    order: int
    ticket: Ticket = field(compare=False)
    at: int = field(compare=False)
    job: Job = field(compare=False)
    cost: Cost = field(compare=False)
    tried: bool = field(default=False, compare=False)  # alone, when memory had run out


class Reservation:
    """Room in the queue for a request whose text is still to be tokenised. Released once, by whoever comes first."""

    def __init__(self, tokens: int, give_back: Callable[[int], None]) -> None:
        self.tokens, self._give_back = tokens, give_back

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        tokens, self.tokens = self.tokens, 0
        if tokens:
            self._give_back(tokens)
