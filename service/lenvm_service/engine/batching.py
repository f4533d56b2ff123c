"""Dynamic batching: one thread takes what waits, up to a token budget, and answers it in one call.

A batch that raises is tried again in halves until the row that makes it fail stands alone: that row gets a typed error,
its neighbours their answers. After each failure the thread checks itself (the caller's ``check``) before it takes work
again. Nothing ends it but ``close``. A short job of somebody who asks alone needs no thread: ``Batcher.at_once``.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lenvm_service.engine.jobs import Job, Reply, Result
from lenvm_service.engine.queueing import Backlog, BatcherOptions, BatchObserver, Cost, Entry, Reservation, Ticket
from lenvm_service.errors import (
    DeadlineExceededError,
    InternalError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
)

if TYPE_CHECKING:
    from lenvm_service.tracing import Tracing

__all__ = ["Batcher", "is_out_of_memory"]

logger = logging.getLogger(__name__)

_PRIORITY_STEP_S = 0.1  # a lower priority is an arrival that much later: nothing waits for ever
_IDLE_S = 0.2
_GIVE_WAY_S = 0.0005
_AT_ONCE_S = 0.005  # what takes longer must not keep an event loop from its other callers
_APART_S = 0.002  # requests that come sooner after an answer are of several callers, whom one batch serves together
_SHARED_S = 0.1
_SLOW_S = 1.0
_MAX_CHECK_PAUSE_S = 5.0
_LEAST_BATCH = 128  # tokens: a rate that was measured on less says little
_LEAST_BUDGET = 16  # of the budget: a sixteenth is tried even where memory runs out again and again
_GIVE_UP_AFTER = 8  # failed checks in a row after which only a restart of the process may help


class Batcher:
    """Runs jobs on a thread of its own.

    Args:
        run: answers a batch, aligned; called on the batcher's thread alone. A result may be an error of its row.
        cost: what a job adds to a batch.
        prepare: called on the thread before anything else (loads the model).
        check: called on the thread after ``run`` raised, until it returns: is the engine sound?
        finish: called on the thread after a batch's answers were handed out: work that nobody waits for. While it gives
            True, there is more of it, and it is called again as soon as nothing waits.
        relieve: called on the thread when memory ran out, before the batch is tried again in parts.
        run_short: answers one job that takes milliseconds, or gives None: see :meth:`at_once`.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], list[Result]],
        cost: Callable[[Job], Cost],
        *,
        options: BatcherOptions | None = None,
        prepare: Callable[[], None] = lambda: None,
        check: Callable[[int], None] = lambda attempt: None,
        finish: Callable[[], bool | None] = lambda: None,
        relieve: Callable[[], None] = lambda: None,
        run_short: Callable[[Job], Result | None] = lambda job: None,
        observer: BatchObserver | None = None,
        tracing: Tracing | None = None,
        name: str = "engine",
    ) -> None:
        self.options = options or BatcherOptions()
        self.name = name
        self.state = "loading"
        self.failure: Exception | None = None
        self._run, self._cost, self._prepare, self._check = run, cost, prepare, check
        self._finish, self._relieve, self._run_short = finish, relieve, run_short
        self._observer, self._tracing = observer, tracing
        self._condition = threading.Condition()
        self._working = threading.Lock()  # held by whoever has ``run``, ``finish``, ``check`` or ``run_short`` in hand
        self._answered_at = self._shared_until = 0.0
        self._queue: list[Entry] = []
        self._queued_tokens = 0
        self._reserved_tokens = 0
        self._in_hand = 0  # tokens of the batch that is being answered
        self._halves: list[list[Entry]] = []  # of batches that failed: each is tried alone
        self._budget = self.options.budget_tokens  # less than that after memory ran out
        self._order = 0
        self._tokens_per_s: float | None = None
        self._batch_seconds = 0.0  # of late
        self._lone = True  # the last batch held one request and nothing waited: do not hold the next one open
        self._stopping = False
        self._failed_checks = 0
        self._beat = time.monotonic()
        self._current: list[Entry] = []  # the batch in hand
        self._unfinished = False  # ``finish`` has more to do
        self._publish: Callable[[Backlog], None] | None = None
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

    def reserve(self, tokens: int, *, deadline: float | None = None) -> Reservation:
        """Room for about so many tokens, before they are known exactly; the same rule as for :meth:`submit`.

        Raises OverloadedError or NotReadyError.
        """
        self._check_open()
        with self._condition:
            self._check_room(tokens, deadline)
            self._reserved_tokens += tokens
        return Reservation(tokens, self._unreserve)

    def _unreserve(self, tokens: int) -> None:
        with self._condition:
            self._reserved_tokens -= tokens

    async def submit(
        self,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        priority: int = 0,
        reservation: Reservation | None = None,
    ) -> Reply:
        """Answer the jobs of one request. ``deadline``: ``time.monotonic()`` seconds; ``priority``: lower is earlier;
        ``reservation``: room that was kept for it.

        A cancelled call drops what has not begun.

        Raises:
            OverloadedError: the queue is full, or it is clear that the deadline cannot be kept.
            NotReadyError: loading, stopped, or beyond recovery.
            PayloadTooLargeError: more rows than the queue could ever hold.
            DeadlineExceededError: the deadline passed.
            InternalError: the engine failed outside of any batch. A job that makes it fail gets that error as its row.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        ticket = Ticket([None] * len(jobs), loop, loop.create_future(), now, deadline, len(jobs))
        if self._tracing is not None:
            ticket.trace = self._tracing.here()
        if deadline is not None and deadline <= now:
            raise DeadlineExceededError("the deadline had passed when the request arrived: give it more time")
        self._enqueue(ticket, jobs, now + _PRIORITY_STEP_S * priority, reservation)
        try:
            if deadline is None:
                await ticket.future
            else:
                async with asyncio.timeout(deadline - now):
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

    def at_once(self, job: Job) -> Reply | None:
        """Answer a short job on the thread of the event loop that asks, where nobody else does: to change threads twice
        takes a good part of a decoding step. None, with nothing answered: it is to be submitted. So is what fails here,
        which is contained there, and whatever is traced, as part of its batch."""
        since = time.monotonic()
        if since - self._answered_at < _APART_S:
            self._shared_until = since + _SHARED_S
        cost = self._cost(job)
        if self._tracing is not None or since < self._shared_until or not self._lone:
            return None
        if not 0 < self.backlog.seconds(cost.tokens) < _AT_ONCE_S or not self._working.acquire(blocking=False):
            return None
        try:
            if self._queue or self._halves or self.state != "ready" or self._stopping:
                return None
            result = self._run_short(job)
        except Exception:
            logger.exception("%s: a step failed: it is tried again as a batch", self.name)
            if self._observer:
                self._observer.failed()
            return None
        finally:
            self._working.release()
        if result is None:
            return None
        self._answered_at = now = time.monotonic()
        if now - since > _AT_ONCE_S:  # the estimate is of prompts, perhaps
            self._shared_until = now + _SLOW_S
        asyncio.get_running_loop().call_soon(self._note_short, cost, now - since)
        return Reply([result], queue_ms=0.0, inference_ms=1000 * (now - since))

    def _note_short(self, cost: Cost, seconds: float) -> None:
        """What need not be done before the answer is on its way; the rest is the thread's, once that has left."""
        self._note_rate(cost.tokens / max(seconds, 1e-6))
        if self._observer:
            self._observer.waited(0.0)
            self._observer.batch(cost.rows, cost.tokens, seconds)
        self._unfinished = True
        asyncio.get_running_loop().call_later(_GIVE_WAY_S, self._nudge)

    def _nudge(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _enqueue(self, ticket: Ticket, jobs: Sequence[Job], key: float, reservation: Reservation | None = None) -> None:
        self._check_open()
        costs = [self._cost(job) for job in jobs]
        tokens = sum(cost.tokens for cost in costs)
        limit = self.options.max_queue_tokens
        if tokens > limit and len(jobs) > 1:
            raise PayloadTooLargeError(f"the request has {tokens} tokens, {limit} are allowed: split it")
        with self._condition:
            self._check_open()
            if reservation is not None:
                reservation.release()  # the lock is ours: nobody else gets the room in between
            self._check_room(tokens, None if reservation is not None else ticket.deadline)
            ahead, rate, entries = 0, self._tokens_per_s or self.options.budget_tokens, list[Entry]()
            for at, (job, cost) in enumerate(zip(jobs, costs, strict=True)):
                self._order += 1
                # Later rows of a request count as later arrivals: a large one shares the engine with small ones.
                entries.append(Entry(key + ahead / rate, self._order, ticket, at, job, cost))
                ahead += cost.tokens
            if self._queue:
                for entry in entries:
                    heapq.heappush(self._queue, entry)
            else:  # in order, which is a heap
                self._queue = entries
            self._queued_tokens += tokens
            self._note_queue()
            self._condition.notify_all()

    @property
    def backlog(self) -> Backlog:
        """What is to be done before a new request's turn."""
        waiting = self._queued_tokens + self._reserved_tokens
        return Backlog(waiting, self._in_hand, self._tokens_per_s or 0.0, self._batch_seconds)

    def _check_room(self, tokens: int, deadline: float | None) -> None:
        """Raise OverloadedError where so many more tokens may not wait, or could not be answered in time."""
        self.backlog.check(tokens, deadline, self.options)

    def _check_open(self) -> None:
        if self._stopping or self.state in ("loading", "failed", "stopped") or self._failed_checks >= _GIVE_UP_AFTER:
            raise NotReadyError(f"the model {self.name} takes no work now: {self.state}", retry_after_s=1.0)

    def beat(self) -> None:
        """A life sign from inside a long batch."""
        self._beat = time.monotonic()

    def _batch_budget(self) -> int:
        """Tokens of the next batch."""
        if self._tokens_per_s is None:
            return self._budget
        return min(self._budget, max(_LEAST_BATCH, int(self._tokens_per_s * self.options.batch_s)))

    def _drop(self, ticket: Ticket) -> None:
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
        self._tell()

    def _tell(self) -> None:
        if self._publish is None:
            return
        with self._condition:  # or an older backlog could be told after a newer one, and stand there
            self._publish(self.backlog)

    def tell_backlog(self, publish: Callable[[Backlog], None]) -> None:
        """Call ``publish`` whenever the backlog changes, on whatever thread that happens."""
        self._publish = publish

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
                with self._working:
                    self._recover()
        self._become("stopped")
        self._refuse_all()

    def _serve(self) -> None:
        while not self._stopping:
            self._beat = time.monotonic()
            batch = self._next_half() if self._halves else self._next_batch()
            if not batch and not self._unfinished:
                continue
            with self._working:
                if not batch:
                    self._finish_some()
                elif not self._answer(batch):
                    self._recover()

    def _next_half(self) -> list[Entry]:
        """What is left of a part of a batch that failed; its callers may have gone meanwhile."""
        return [entry for entry in self._halves.pop() if not entry.ticket.gone]

    def _next_batch(self) -> list[Entry]:
        """The jobs that go first, up to the budget; none after a short wait, so that the heart beats."""
        with self._condition:
            if not self._queue and not self._unfinished:
                self._condition.wait(_IDLE_S)
            if not self._queue:
                self._lone = True
                return []
            if not self._lone:
                # From its arrival on: what waited while the batch before was at work has waited for others already.
                # Under load that is everyone, and a pause between two batches would lengthen all that follow.
                opened = self._queue[0].ticket.arrived
                while self._queued_tokens < self._batch_budget() and not self._stopping:
                    left = opened + self.options.wait_s - time.monotonic()
                    if left <= 0:
                        break
                    self._condition.wait(left)
            return self._take()

    def _take(self) -> list[Entry]:
        batch: list[Entry] = []
        tokens = cells = 0
        now, budget = time.monotonic(), self._batch_budget()
        while self._queue:
            cost = self._queue[0].cost
            full = tokens + cost.tokens > budget or cells + cost.cells > self.options.budget_cells
            if batch and full:
                break
            entry = heapq.heappop(self._queue)
            self._queued_tokens -= cost.tokens
            ticket = entry.ticket
            if ticket.gone:
                continue
            if ticket.deadline is not None:
                # What would be late is not begun, but for one that is alone: how long it takes is an estimate.
                needed = self.backlog.seconds(tokens + cost.tokens) if batch or self._queue else 0.0
                if ticket.deadline <= now + needed:
                    ticket.end(DeadlineExceededError("the deadline passed while the request waited: give it more time"))
                    continue
            batch.append(entry)
            tokens, cells = tokens + cost.tokens, cells + cost.cells
        self._lone = len({id(entry.ticket) for entry in batch}) <= 1 and not self._queue
        self._note_queue()
        return batch

    def _answer(self, batch: list[Entry]) -> bool:
        """Run the batch and hand out what it gave; False where it raised."""
        since = time.monotonic()
        self._current, self._in_hand = batch, sum(entry.cost.tokens for entry in batch)
        self._tell()
        tickets = list({id(entry.ticket): entry.ticket for entry in batch}.values())
        first = [ticket for ticket in tickets if ticket.started is None]
        for ticket in first:
            ticket.started = since
        tokens, rows = sum(entry.cost.tokens for entry in batch), sum(entry.cost.rows for entry in batch)
        try:
            with (
                contextlib.nullcontext()
                if self._tracing is None
                else self._tracing.batch(tickets, first, rows=rows, tokens=tokens)
            ):
                results = self._run([entry.job for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} answers to {len(batch)} jobs")
        except BaseException as error:
            logger.exception("%s: a batch of %d rows failed", self.name, len(batch))
            self._contain(batch, error)
            return False
        self._grow_budget()
        seconds = time.monotonic() - since
        self._note_rate(tokens / max(seconds, 1e-6))
        self._batch_seconds += 0.2 * (seconds - self._batch_seconds)
        for ticket in tickets:
            ticket.inference_s += seconds
        Ticket.end_all(
            [entry.ticket for entry, result in zip(batch, results, strict=True) if self._completes(entry, result)]
        )
        self._answered_at = time.monotonic()
        self._give_way()
        self._current, self._in_hand = [], 0
        self._tell()
        if self._observer:
            for ticket in first:
                self._observer.waited(since - ticket.arrived)
            self._observer.batch(rows, tokens, seconds)
        self._finish_some()
        return True

    def _give_way(self) -> None:
        """The event loop is to hand the answers on, and what this thread has still to do would keep Python from it."""
        with self._condition:
            if not self._queue and not self._stopping:
                self._condition.wait(_GIVE_WAY_S)

    def _finish_some(self) -> None:
        self._unfinished = False
        try:
            self._unfinished = bool(self._finish())
        except Exception:  # everyone has their answer
            logger.exception("%s: the work after a batch failed", self.name)

    def _note_rate(self, rate: float) -> None:
        self._tokens_per_s = rate if self._tokens_per_s is None else 0.8 * self._tokens_per_s + 0.2 * rate

    def _give(self, entry: Entry, result: Result) -> None:
        if self._completes(entry, result):
            entry.ticket.end()

    @staticmethod
    def _completes(entry: Entry, result: Result) -> bool:
        """Note a row's result; whether its request has all of them now, and someone waits for it."""
        ticket = entry.ticket
        ticket.results[entry.at] = result
        ticket.missing -= 1
        return ticket.missing == 0 and not ticket.gone

    def _contain(self, batch: list[Entry], error: BaseException) -> None:
        """A batch failed: its halves are tried alone, until whoever is guilty stands alone and gets the error."""
        # Not ready before anyone hears of it: who asks next must see that something happened.
        self._become("recovering")
        self._current, self._in_hand = [], 0
        if self._observer:
            self._observer.failed()
        out_of_memory = is_out_of_memory(error)
        if out_of_memory:
            self._budget = max(self.options.budget_tokens // _LEAST_BUDGET, self._budget // 2)
            self._relieve()
        if len(batch) > 1:
            self._halves += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
        elif out_of_memory and not batch[0].tried:
            self._halves.append([batch[0]._replace(tried=True)])
        elif out_of_memory:
            self._give(batch[0], OverloadedError("the device has no memory for this row: try again", retry_after_s=1.0))
        else:
            self._give(batch[0], InternalError("the engine failed on this row"))

    def _grow_budget(self) -> None:
        if self._budget < self.options.budget_tokens:
            self._budget = min(self.options.budget_tokens, self._budget + max(1, self.options.budget_tokens // 64))

    def _fail_current(self) -> None:
        """Everyone who waits for the batch in hand, or for a part of one that failed, hears that it failed."""
        # Not ready before anyone hears of it: who asks next must see that something happened.
        self._become("recovering")
        entries = self._current + [entry for half in self._halves for entry in half]
        self._current, self._halves = [], []
        for ticket in {id(entry.ticket): entry.ticket for entry in entries}.values():
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
                self._fail_current()  # it was not a row's fault: nobody is kept waiting for the next try
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


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, of CUDA (torch's error by name: torch need not be here), or of ONNX Runtime."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "Failed to allocate memory" in str(error)
