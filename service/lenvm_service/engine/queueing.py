"""What waits for the engine: jobs with their costs, the requests that they belong to, and room kept for more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lenvm_service.engine.jobs import Job, Result
from lenvm_service.errors import OverloadedError, ServiceError

__all__ = ["Backlog", "BatchObserver", "BatcherOptions", "Cost", "Entry", "Reservation", "Ticket"]


class Cost(NamedTuple):
    """What a job adds to a batch: new tokens, attention cells as the engine pads them, and rows."""

    tokens: int
    cells: int = 0
    rows: int = 1


@dataclass(frozen=True)
class BatcherOptions:
    """How large batches and the queue may be.

    Args:
        budget_tokens, budget_cells: most of a batch; it takes one job at least.
        batch_s: most work of a batch, in seconds at the rate of late: who comes next waits for no longer.
        wait_s: how long a batch is held open for others, from the arrival of the request that goes first.
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


class Backlog(NamedTuple):
    """What is to be done before a new request's turn, and how fast that goes.

    ``waiting``, ``in_hand``: tokens; ``tokens_per_s``: of late, 0 where nothing is known; ``batch_s``: seconds that a
    batch took of late.
    """

    waiting: float = 0
    in_hand: float = 0
    tokens_per_s: float = 0.0
    batch_s: float = 0.0

    def seconds(self, tokens: float) -> float:
        """How long so many tokens take; 0 where nothing is known."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0

    def check(self, tokens: int, deadline: float | None, options: BatcherOptions) -> None:
        """Raise OverloadedError where so many more tokens may not wait, or could not be answered by ``deadline`` (of
        time.monotonic)."""
        # What is larger than the queue is taken where nothing else waits: it could never come in otherwise.
        if not self.waiting:
            return
        ahead = self.seconds(self.waiting + self.in_hand)
        # A row is answered with its whole batch: as much as a batch after its own turn. Who is let in and then too late
        # costs as much as who is answered.
        late = deadline is not None and time.monotonic() + ahead + self.seconds(tokens) + self.batch_s > deadline
        if late or ahead > options.max_queue_s or self.waiting + tokens > options.max_queue_tokens:
            # Until half of what waits is done.
            wait = min(60.0, max(0.1, 0.5 * self.waiting / (self.tokens_per_s or options.budget_tokens)))
            problem = f"{self.waiting:.0f} tokens wait already" + (", too many for the deadline" if late else "")
            raise OverloadedError(f"{problem}: try again in {wait:.1f} s", retry_after_s=wait)


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
        self.error = error
        self.end_all([self])

    @staticmethod
    def end_all(tickets: Sequence[Ticket]) -> None:
        """:meth:`end` of all of them. A loop is woken once: each time that it is, it takes Python from this thread."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        for ticket in tickets:
            ticket.gone = True
            by_loop.setdefault(ticket.loop, []).append(ticket)
        for loop, its in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to be told
                loop.call_soon_threadsafe(_wake, its)


def _wake(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        if not ticket.future.done():
            ticket.future.set_result(None)


class Entry(NamedTuple):
    """One job in the queue, the earliest key first. Compared as a tuple, in C: no two have one ``order``."""

    key: float
    order: int
    ticket: Ticket
    at: int
    job: Job
    cost: Cost
    tried: bool = False  # alone, when memory had run out


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
