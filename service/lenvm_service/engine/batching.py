"""Dynamic batching: one thread takes what waits, up to a token budget, and answers it in one call.

Whatever a batch raises reaches everyone who waits for it as a typed error; the thread then checks itself (the caller's
``check``) before it takes work again, and goes on. Nothing ends it but ``close``.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lenvm_service.engine.jobs import Job, Reply, Result
from lenvm_service.errors import (
    DeadlineExceededError,
    InternalError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    ServiceError,
)

__all__ = ["BatchObserver", "Batcher", "BatcherOptions", "Cost"]

logger = logging.getLogger(__name__)

_PRIORITY_STEP_S = 0.1  # a lower priority is an arrival that much later: nothing waits for ever
_IDLE_S = 0.2
_MAX_CHECK_PAUSE_S = 5.0
_GIVE_UP_AFTER = 8  # failed checks in a row after which only a restart of the process may help


@dataclass(frozen=True)
class Cost:
    """What a job adds to a batch: new tokens, and attention cells as the engine pads them."""

    tokens: int
    cells: int = 0


@dataclass(frozen=True)
class BatcherOptions:
    """``budget_tokens`` and ``budget_cells`` bound a batch (one job is always taken); ``wait_s`` is how long a batch
    is held open for others; ``max_queue_tokens`` bounds what may wait; ``stall_s``: a heartbeat older than this is no
    life sign."""

    budget_tokens: int = 4096
    budget_cells: int = 1 << 26
    wait_s: float = 0.002
    max_queue_tokens: int = 262_144
    stall_s: float = 60.0


class BatchObserver(Protocol):
    """What the batcher tells the metrics."""

    def waited(self, seconds: float) -> None: ...
    def queued(self, tokens: int) -> None: ...
    def batch(self, rows: int, tokens: int, seconds: float) -> None: ...
    def is_ready(self, ready: bool) -> None: ...
    def failed(self) -> None: ...


@dataclass(eq=False)
class _Ticket:
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

    def end(self, error: ServiceError | None = None) -> None:
        """Wake whoever waits; called from the batcher's thread."""
        self.gone, self.error = True, error
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to be told
            self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


@dataclass(order=True)
class _Entry:
    """One job in the queue, the earliest key first."""

    key: float
    order: int
    ticket: _Ticket = field(compare=False)
    at: int = field(compare=False)
    job: Job = field(compare=False)
    cost: Cost = field(compare=False)


class Batcher:
    """Runs jobs on a thread of its own.

    Args:
        run: answers a batch, aligned; called on the batcher's thread alone. A result may be an error of its row.
        cost: what a job adds to a batch.
        prepare: called on the thread before anything else (loads the model).
        check: called on the thread after ``run`` raised, until it returns: is the engine sound?
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], list[Result]],
        cost: Callable[[Job], Cost],
        *,
        options: BatcherOptions | None = None,
        prepare: Callable[[], None] = lambda: None,
        check: Callable[[int], None] = lambda attempt: None,
        observer: BatchObserver | None = None,
        name: str = "engine",
    ) -> None:
        self.options = options or BatcherOptions()
        self.name = name
        self.state = "loading"
        self.failure: Exception | None = None
        self._run, self._cost, self._prepare, self._check = run, cost, prepare, check
        self._observer = observer
        self._condition = threading.Condition()
        self._queue: list[_Entry] = []
        self._queued_tokens = 0
        self._order = 0
        self._tokens_per_s: float | None = None
        self._lone = True  # the last batch held one request and nothing waited: do not hold the next one open
        self._stopping = False
        self._failed_checks = 0
        self._beat = time.monotonic()
        self._current: list[_Entry] = []  # the batch in hand
        self._thread = threading.Thread(target=self._main, name=f"lenvm-{name}", daemon=True)

    # -- from outside --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the batch in hand end, refuse what still waits, and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def ready(self) -> bool:
        """Takes work, and its heart beats."""
        return self.state == "ready" and self.alive

    @property
    def alive(self) -> bool:
        """The thread runs, its heart beat lately, and it can still hope to get well."""
        if self.state == "loading":
            return True
        fresh = time.monotonic() - self._beat < self.options.stall_s
        return self._thread.is_alive() and fresh and self._failed_checks < _GIVE_UP_AFTER

    async def submit(self, jobs: Sequence[Job], *, deadline: float | None = None, priority: int = 0) -> Reply:
        """Answer the jobs of one request. ``deadline``: ``time.monotonic()`` seconds; ``priority``: lower is earlier.

        A cancelled call drops what has not begun.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: loading, stopped, or beyond recovery.
            PayloadTooLargeError: more rows than the queue could ever hold.
            DeadlineExceededError: the deadline passed.
            InternalError: a batch that held one of the jobs failed.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        ticket = _Ticket([None] * len(jobs), loop, loop.create_future(), now, deadline, len(jobs))
        if deadline is not None and deadline <= now:
            raise DeadlineExceededError("the deadline had passed when the request arrived: give it more time")
        self._enqueue(ticket, jobs, now + _PRIORITY_STEP_S * priority)
        try:
            async with asyncio.timeout(None if deadline is None else deadline - now):
                await ticket.future
        except TimeoutError:
            self._drop(ticket)
            raise DeadlineExceededError("the deadline passed before the work was done: give it more time") from None
        except asyncio.CancelledError:
            self._drop(ticket)
            raise
        if ticket.error is not None:
            raise ticket.error
        started = ticket.arrived if ticket.started is None else ticket.started
        return Reply(
            [result for result in ticket.results if result is not None],
            queue_ms=1000 * (started - ticket.arrived),
            inference_ms=1000 * ticket.inference_s,
        )

    def _enqueue(self, ticket: _Ticket, jobs: Sequence[Job], key: float) -> None:
        self._check_open()
        costs = [self._cost(job) for job in jobs]
        tokens = sum(cost.tokens for cost in costs)
        limit = self.options.max_queue_tokens
        if tokens > limit and len(jobs) > 1:
            raise PayloadTooLargeError(f"the request has {tokens} tokens, {limit} are allowed: split it")
        with self._condition:
            self._check_open()
            # A single row larger than the queue is taken where nothing else waits: it could never come in otherwise.
            if self._queue and self._queued_tokens + tokens > limit:
                wait = self._drain_s()
                raise OverloadedError(
                    f"{self._queued_tokens} tokens wait already: try again in {wait:.1f} s", retry_after_s=wait
                )
            ahead, rate = 0, self._tokens_per_s or self.options.budget_tokens
            for at, (job, cost) in enumerate(zip(jobs, costs, strict=True)):
                self._order += 1
                # Later rows of a request count as later arrivals: a large one shares the engine with small ones.
                heapq.heappush(self._queue, _Entry(key + ahead / rate, self._order, ticket, at, job, cost))
                ahead += cost.tokens
            self._queued_tokens += tokens
            self._note_queue()
            self._condition.notify_all()

    def _check_open(self) -> None:
        if self._stopping or self.state in ("loading", "failed", "stopped") or self._failed_checks >= _GIVE_UP_AFTER:
            raise NotReadyError(f"the model {self.name} takes no work now: {self.state}", retry_after_s=1.0)

    def beat(self) -> None:
        """A life sign from inside a long batch."""
        self._beat = time.monotonic()

    def _drain_s(self) -> float:
        """Until half of what waits is done, at the rate of late."""
        rate = self._tokens_per_s or self.options.budget_tokens
        return min(60.0, max(0.1, 0.5 * self._queued_tokens / rate))

    def _drop(self, ticket: _Ticket) -> None:
        """Take what has not begun out of the queue."""
        with self._condition:
            ticket.gone = True
            kept = [entry for entry in self._queue if entry.ticket is not ticket]
            if len(kept) < len(self._queue):
                heapq.heapify(kept)
                self._queue = kept
                self._queued_tokens = sum(entry.cost.tokens for entry in kept)
                self._note_queue()

    def _note_queue(self) -> None:
        if self._observer:
            self._observer.queued(self._queued_tokens)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            self.failure = error
            self._become("failed")
            self._refuse_all()
            return
        self._become("ready")
        while not self._stopping:
            try:
                self._serve()
            except BaseException:  # outside a batch: a bug of ours, and still no reason to leave anyone waiting
                logger.exception("%s: the batching loop failed", self.name)
                self._fail_current()
                self._recover()
        self._become("stopped")
        self._refuse_all()

    def _serve(self) -> None:
        while not self._stopping:
            self._beat = time.monotonic()
            batch = self._next_batch()
            if batch and not self._answer(batch):
                self._recover()

    def _next_batch(self) -> list[_Entry]:
        """The jobs that go first, up to the budget; none after a short wait, so that the heart beats."""
        with self._condition:
            if not self._queue:
                self._condition.wait(_IDLE_S)
            if not self._queue:
                self._lone = True
                return []
            if not self._lone:
                opened = time.monotonic()
                while self._queued_tokens < self.options.budget_tokens and not self._stopping:
                    left = opened + self.options.wait_s - time.monotonic()
                    if left <= 0:
                        break
                    self._condition.wait(left)
            return self._take()

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        tokens = cells = 0
        now = time.monotonic()
        while self._queue:
            cost = self._queue[0].cost
            full = tokens + cost.tokens > self.options.budget_tokens or cells + cost.cells > self.options.budget_cells
            if batch and full:
                break
            entry = heapq.heappop(self._queue)
            self._queued_tokens -= cost.tokens
            ticket = entry.ticket
            if ticket.gone:
                continue
            if ticket.deadline is not None and ticket.deadline <= now:
                ticket.end(DeadlineExceededError("the deadline passed while the request waited: give it more time"))
                continue
            batch.append(entry)
            tokens, cells = tokens + cost.tokens, cells + cost.cells
        self._lone = len({id(entry.ticket) for entry in batch}) <= 1 and not self._queue
        self._note_queue()
        return batch

    def _answer(self, batch: list[_Entry]) -> bool:
        """Run the batch and hand out what it gave; False where it raised."""
        since = time.monotonic()
        self._current = batch
        tickets = list({id(entry.ticket): entry.ticket for entry in batch}.values())
        first = [ticket for ticket in tickets if ticket.started is None]
        for ticket in first:
            ticket.started = since
        try:
            results = self._run([entry.job for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} answers to {len(batch)} jobs")
        except BaseException:
            logger.exception("%s: a batch of %d rows failed", self.name, len(batch))
            self._fail_current()
            return False
        seconds = time.monotonic() - since
        tokens = sum(entry.cost.tokens for entry in batch)
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_s = rate if self._tokens_per_s is None else 0.8 * self._tokens_per_s + 0.2 * rate
        for entry, result in zip(batch, results, strict=True):
            entry.ticket.results[entry.at] = result
            entry.ticket.missing -= 1
        for ticket in tickets:
            ticket.inference_s += seconds
            if ticket.missing == 0 and not ticket.gone:
                ticket.end()
        self._current = []
        if self._observer:
            for ticket in first:
                self._observer.waited(since - ticket.arrived)
            self._observer.batch(len(batch), tokens, seconds)
        return True

    def _fail_current(self) -> None:
        """Everyone who waits for the batch in hand hears that it failed."""
        # Not ready before anyone hears of it: who asks next must see that something happened.
        self._become("recovering")
        batch, self._current = self._current, []
        for ticket in {id(entry.ticket): entry.ticket for entry in batch}.values():
            if not ticket.gone:
                ticket.end(InternalError("the engine failed on this batch: try again"))
        if self._observer:
            self._observer.failed()

    def _recover(self) -> None:
        """Not ready until the check passes; what waits goes on waiting."""
        self._become("recovering")
        pause = 0.05
        self._failed_checks = 0
        while not self._stopping:
            self._beat = time.monotonic()
            try:
                self._check(self._failed_checks)
            except BaseException:
                self._failed_checks += 1
                logger.exception("%s: check %d after a failure failed", self.name, self._failed_checks)
                if self._failed_checks >= _GIVE_UP_AFTER:
                    self._refuse_all()
                with self._condition:
                    self._condition.wait(pause)
                pause = min(2 * pause, _MAX_CHECK_PAUSE_S)
                continue
            self._failed_checks = 0
            self._become("ready")
            return

    def _become(self, state: str) -> None:
        self.state = state
        if self._observer:
            self._observer.is_ready(state == "ready")

    def _refuse_all(self) -> None:
        with self._condition:
            entries, self._queue, self._queued_tokens = self._queue, [], 0
            self._note_queue()
        for ticket in {id(entry.ticket): entry.ticket for entry in entries}.values():
            if not ticket.gone:
                ticket.end(NotReadyError(f"the model {self.name} takes no work any more", retry_after_s=1.0))
