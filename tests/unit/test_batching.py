"""The batcher: what is put together, what everyone hears when a batch fails, and that the loop goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lenvm.errors import InvalidRequestError
from lenvm_service.engine import batching
from lenvm_service.engine.batching import Batcher
from lenvm_service.engine.jobs import PredictJob, Prefix, Result
from lenvm_service.engine.queueing import Backlog, BatcherOptions, Cost
from lenvm_service.errors import (
    DeadlineExceededError,
    InternalError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
)


def job(*ids: int) -> PredictJob:
    return PredictJob(Prefix(ids))


class Runner:
    """Answers with the job's first token; can be held, and can raise."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.raises: BaseException | None = None
        self.poison: int | None = None
        self.checks: list[int] = []
        self.check_gate = threading.Event()
        self.check_gate.set()
        self.failing_checks = 0

    def run(self, jobs: Sequence[Any]) -> list[Result]:
        self.batches.append([job.prefix.token_ids[0] for job in jobs])
        self.entered.set()
        assert self.gate.wait(10)
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        if self.poison in self.batches[-1]:
            raise RuntimeError("poison")
        return [
            InvalidRequestError("bad") if job.prefix.token_ids[0] < 0 else {"id": job.prefix.token_ids[0]}
            for job in jobs
        ]

    def check(self, attempt: int) -> None:
        self.checks.append(attempt)
        assert self.check_gate.wait(10)
        if self.failing_checks:
            self.failing_checks -= 1
            raise RuntimeError("still broken")


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def make(runner: Runner) -> Iterator[Callable[..., Batcher]]:
    made: list[Batcher] = []

    def make(**options: Any) -> Batcher:
        batcher = Batcher(
            runner.run,
            lambda job: Cost(len(job.prefix.token_ids)),  # type: ignore[union-attr]
            options=BatcherOptions(**options),
            check=runner.check,
        )
        batcher.start()
        made.append(batcher)
        until(lambda: batcher.state == "ready")
        return batcher

    yield make
    runner.gate.set()
    runner.check_gate.set()
    for batcher in made:
        batcher.close()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def at_a_rate_of(batcher: Batcher, tokens_per_s: float) -> None:
    """As if that had been measured, and nothing else."""
    batcher._tokens_per_s = tokens_per_s
    batcher._note_rate = lambda rate: None  # type: ignore[method-assign]


async def held(runner: Runner, batcher: Batcher) -> asyncio.Task[Any]:
    """A request that is inside ``run``, and stays there until the gate opens."""
    runner.gate.clear()
    runner.entered.clear()
    task = asyncio.create_task(batcher.submit([job(0)]))
    await asyncio.to_thread(runner.entered.wait, 5)
    return task


def test_waiting_requests_share_a_batch_up_to_the_budget(runner: Runner, make: Any) -> None:
    async def scenario() -> list[Any]:
        batcher = make(budget_tokens=10)
        first = await held(runner, batcher)
        others = [asyncio.create_task(batcher.submit([job(i, i)])) for i in range(1, 8)]
        await asyncio.sleep(0.05)
        runner.gate.set()
        return [(await task).results for task in [first, *others]]

    answers = asyncio.run(scenario())
    assert answers == [[{"id": i}] for i in range(8)]
    assert runner.batches == [[0], [1, 2, 3, 4, 5], [6, 7]]


def test_who_has_waited_for_a_batch_waits_for_nobody_else(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(wait_s=30.0)
        first = await held(runner, batcher)
        waiting = [asyncio.create_task(batcher.submit([job(number)])) for number in (1, 2)]
        await asyncio.to_thread(until, lambda: len(batcher._queue) == 2)
        for entry in batcher._queue:
            entry.ticket.arrived -= 31.0  # so long has the first batch taken
        batcher._lone = False
        runner.gate.set()
        await asyncio.wait_for(asyncio.gather(first, *waiting), 10)
        assert runner.batches == [[0], [1, 2]]

    asyncio.run(scenario())


def test_cells_bound_a_batch_too_but_one_job_is_always_taken(runner: Runner) -> None:
    batcher = Batcher(runner.run, lambda job: Cost(1, 100), options=BatcherOptions(budget_cells=150))
    batcher.start()
    until(lambda: batcher.state == "ready")
    reply = asyncio.run(batcher.submit([job(1), job(2), job(3)]))
    batcher.close()
    assert [result["id"] for result in reply.results] == [1, 2, 3]  # type: ignore[index]
    assert runner.batches == [[1], [2], [3]]


def test_a_bad_row_is_an_answer_like_any_other(make: Any) -> None:
    reply = asyncio.run(make().submit([job(1), job(-1), job(2)]))
    assert [type(result) for result in reply.results] == [dict, InvalidRequestError, dict]
    assert reply.inference_ms >= 0
    assert reply.queue_ms >= 0


@pytest.mark.parametrize("error", [RuntimeError("secret"), SystemExit(3)])
def test_a_failing_batch_reaches_every_waiter_and_the_loop_goes_on(
    runner: Runner, make: Any, error: BaseException
) -> None:
    async def scenario() -> None:
        batcher = make()
        first = await held(runner, batcher)
        second = asyncio.create_task(batcher.submit([job(1)]))  # waits in the queue: not to blame, not lost
        await asyncio.sleep(0.02)
        runner.raises = error
        runner.check_gate.clear()
        runner.gate.set()
        (failed,) = (await asyncio.wait_for(first, 10.0)).results
        assert isinstance(failed, InternalError)
        assert "secret" not in str(failed)
        assert not batcher.ready
        assert batcher.state == "recovering"
        assert batcher.alive
        runner.check_gate.set()
        assert (await asyncio.wait_for(second, 5)).results == [{"id": 1}]
        assert batcher.ready
        assert (await batcher.submit([job(7)])).results == [{"id": 7}]

    asyncio.run(scenario())
    assert runner.checks == [0]


def test_wrong_number_of_answers_is_a_failure_of_the_batch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = make()
    monkeypatch.setattr(batcher, "_run", lambda jobs: [])
    reply = asyncio.run(batcher.submit([job(1), job(2)]))
    assert [type(result) for result in reply.results] == [InternalError, InternalError]


def test_a_bug_in_the_loop_itself_leaves_nobody_waiting(
    runner: Runner, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = make()
    broken = [True]
    original = type(batcher)._answer

    def answer(self: Any, batch: Any) -> Any:
        self._current = batch
        if broken:
            broken.clear()
            raise ZeroDivisionError
        return original(self, batch)

    monkeypatch.setattr(type(batcher), "_answer", answer)
    with pytest.raises(InternalError):
        asyncio.run(asyncio.wait_for(batcher.submit([job(1)]), 5))
    assert asyncio.run(batcher.submit([job(2)])).results == [{"id": 2}]
    assert runner.checks == [0]


def test_readiness_waits_until_the_check_passes(runner: Runner, make: Any) -> None:
    runner.failing_checks = 2
    batcher = make()
    runner.raises = RuntimeError("x")
    assert isinstance(asyncio.run(batcher.submit([job(1)])).results[0], InternalError)
    assert asyncio.run(batcher.submit([job(2)])).results == [{"id": 2}]
    assert runner.checks == [0, 1, 2]
    assert batcher.ready


def test_what_cannot_get_well_is_not_alive_and_leaves_nobody_waiting(
    runner: Runner, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lenvm_service.engine.batching._MAX_CHECK_PAUSE_S", 0.01)
    runner.failing_checks = 1000

    async def scenario() -> None:
        batcher = make()
        first = await held(runner, batcher)
        second = asyncio.create_task(batcher.submit([job(1)]))
        await asyncio.sleep(0.02)
        runner.raises = RuntimeError("x")
        runner.gate.set()
        assert isinstance((await first).results[0], InternalError)
        with pytest.raises(NotReadyError):
            await asyncio.wait_for(second, 10)
        assert not batcher.alive
        assert not batcher.ready
        with pytest.raises(NotReadyError):
            await batcher.submit([job(2)])

    asyncio.run(scenario())


def test_the_guilty_row_stands_alone(runner: Runner, make: Any) -> None:
    runner.poison = 13

    async def scenario() -> list[Any]:
        batcher = make()
        first = await held(runner, batcher)
        tasks = [asyncio.create_task(batcher.submit([job(4 * at + k + 1) for k in range(4)])) for at in range(16)]
        while batcher._queued_tokens < 64:
            await asyncio.sleep(0.001)
        runner.gate.set()
        await first
        replies = await asyncio.gather(*tasks)
        assert batcher.ready
        return [result for reply in replies for result in reply.results]

    results = asyncio.run(scenario())
    assert [at for at, result in enumerate(results, 1) if isinstance(result, InternalError)] == [13]
    assert [result["id"] for result in results if isinstance(result, dict)] == [n for n in range(1, 65) if n != 13]
    # 64, 32, 16, 8, 4, 2, 1: each failure is followed by a check.
    assert len(runner.checks) == 7
    assert sum(13 in batch for batch in runner.batches) == 7


def test_rows_wait_in_vain_for_no_engine_that_is_broken(runner: Runner, make: Any) -> None:
    runner.poison, runner.failing_checks = 1, 1
    replies: list[Any] = []

    async def scenario() -> None:
        batcher = make()
        with pytest.raises(InternalError):
            replies.append(await asyncio.wait_for(batcher.submit([job(1), job(2)]), 10))
        assert (await batcher.submit([job(3)])).results == [{"id": 3}]

    asyncio.run(scenario())
    assert replies == []


@pytest.mark.parametrize("kind", ["host", "device"])
def test_memory_that_runs_out_shrinks_the_batches_and_they_grow_again(runner: Runner, kind: str) -> None:
    class OutOfMemoryError(RuntimeError):
        """Named as torch's."""

    relieved: list[int] = []

    def run(jobs: Sequence[Any]) -> list[Result]:
        if len(jobs) > 8:
            raise MemoryError if kind == "host" else OutOfMemoryError("CUDA out of memory")
        return runner.run(jobs)

    batcher = Batcher(
        run,
        lambda job: Cost(len(job.prefix.token_ids)),  # type: ignore[union-attr]
        options=BatcherOptions(budget_tokens=64),
        relieve=lambda: relieved.append(1),
    )
    batcher.start()
    until(lambda: batcher.state == "ready")
    reply = asyncio.run(batcher.submit([job(n) for n in range(64)]))
    assert [result["id"] for result in reply.results] == list(range(64))  # type: ignore[index]
    assert relieved
    assert batcher._budget < 64
    shrunk = batcher._budget
    for n in range(64 - shrunk):
        asyncio.run(batcher.submit([job(n)]))
    assert batcher._budget == 64
    batcher.close()


def test_a_row_that_no_memory_suffices_for_is_an_overload_of_its_own(runner: Runner) -> None:
    def run(jobs: Sequence[Any]) -> list[Result]:
        if any(job.prefix.token_ids[0] == 5 for job in jobs):
            raise MemoryError
        return runner.run(jobs)

    batcher = Batcher(run, lambda job: Cost(1))
    batcher.start()
    until(lambda: batcher.state == "ready")
    reply = asyncio.run(batcher.submit([job(4), job(5), job(6)]))
    batcher.close()
    assert [type(result) for result in reply.results] == [dict, OverloadedError, dict]


def test_what_comes_after_a_batch_keeps_nobody_waiting_and_breaks_nothing(runner: Runner) -> None:
    finished = threading.Event()
    gate = threading.Event()

    def finish() -> None:
        assert gate.wait(10)
        finished.set()
        raise RuntimeError("nobody's business")

    batcher = Batcher(runner.run, lambda job: Cost(1), finish=finish)
    batcher.start()
    until(lambda: batcher.state == "ready")
    assert asyncio.run(batcher.submit([job(1)])).results == [{"id": 1}]
    assert not finished.is_set()
    gate.set()
    assert finished.wait(10)
    assert asyncio.run(batcher.submit([job(2)])).results == [{"id": 2}]
    assert batcher.ready
    batcher.close()


def test_what_comes_after_a_batch_goes_on_while_nothing_waits(runner: Runner) -> None:
    left = 5
    batches_at: list[int] = []
    gate = threading.Event()

    def finish() -> bool:
        nonlocal left
        assert gate.wait(10)
        batches_at.append(len(runner.batches))
        left -= 1
        return left > 0

    batcher = Batcher(runner.run, lambda job: Cost(1), finish=finish)
    batcher.start()
    until(lambda: batcher.state == "ready")

    async def scenario() -> None:
        await batcher.submit([job(1)])
        second = asyncio.create_task(batcher.submit([job(2)]))  # the thread is inside finish, and takes it next
        while not batcher._queued_tokens:
            await asyncio.sleep(0.001)
        gate.set()
        await second

    asyncio.run(scenario())
    until(lambda: left == 0)
    assert batches_at == [1, 2, 2, 2, 2]  # who waits goes before the rest of it
    batcher.close()
    assert len(batches_at) == 5


def test_room_is_kept_before_the_tokens_are_known(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(max_queue_tokens=10)
        first = await held(runner, batcher)
        with batcher.reserve(6) as room:
            with pytest.raises(OverloadedError):
                batcher.reserve(5)
            with pytest.raises(OverloadedError):
                await batcher.submit([job(*range(5))])
            second = asyncio.create_task(batcher.submit([job(*range(8))], reservation=room))
            while room.tokens:
                await asyncio.sleep(0.001)
        with pytest.raises(OverloadedError):  # it counts as it is now, once
            batcher.reserve(3)
        batcher.reserve(2).release()
        runner.gate.set()
        await asyncio.gather(first, second)
        room = batcher.reserve(10)
        room.release()
        room.release()
        batcher.reserve(10).release()

    asyncio.run(scenario())


def test_what_cannot_be_done_in_time_is_refused_at_once(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(max_queue_s=2.0)
        await batcher.submit([job(1)])
        first = await held(runner, batcher)
        at_a_rate_of(batcher, 10.0)
        second = asyncio.create_task(batcher.submit([job(*range(15))]))
        while batcher._queued_tokens < 15:
            await asyncio.sleep(0.001)
        with pytest.raises(OverloadedError, match="deadline"):
            batcher.reserve(1, deadline=time.monotonic() + 1.0)
        with pytest.raises(OverloadedError, match="deadline"):
            await batcher.submit([job(2)], deadline=time.monotonic() + 1.0)
        with batcher.reserve(10, deadline=time.monotonic() + 30.0):
            with pytest.raises(OverloadedError) as caught:  # 2.5 s of work wait
                batcher.reserve(1)
            assert caught.value.retry_after_s == pytest.approx(1.25)
        runner.gate.set()
        await asyncio.gather(first, second)

    asyncio.run(scenario())


def test_the_backlog_is_told_whenever_it_changes(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make()
        told = [Backlog()]
        batcher.tell_backlog(told.append)
        first = await held(runner, batcher)
        tokens = told[-1].in_hand
        assert tokens > 0
        second = asyncio.create_task(batcher.submit([job(*range(15))]))
        while told[-1].waiting != 15:
            await asyncio.sleep(0.001)
        assert told[-1] == batcher.backlog == Backlog(15, tokens, 0.0, 0.0)
        third = asyncio.create_task(batcher.submit([job(*range(7))]))
        while told[-1].waiting != 22:
            await asyncio.sleep(0.001)
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        assert told[-1].waiting == 15
        runner.gate.set()
        await asyncio.gather(first, second)
        while told[-1].in_hand:  # the thread tells after it has answered
            await asyncio.sleep(0.001)
        assert told[-1].waiting == 0
        assert told[-1].tokens_per_s > 0
        assert told[-1].batch_s > 0

    asyncio.run(scenario())


def test_a_batch_is_bounded_in_time(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(batch_s=0.5)
        await batcher.submit([job(1)])
        first = await held(runner, batcher)
        at_a_rate_of(batcher, 600.0)
        others = [asyncio.create_task(batcher.submit([job(*range(2, 102))])) for _ in range(6)]
        while batcher._queued_tokens < 600:
            await asyncio.sleep(0.001)
        late = asyncio.create_task(batcher.submit([job(*range(2, 102))], deadline=time.monotonic() + 60))
        runner.gate.set()
        await asyncio.gather(first, *others, late)

    asyncio.run(scenario())
    assert [len(batch) for batch in runner.batches[2:]] == [3, 3, 1]  # 300 tokens each


def test_what_would_be_late_is_not_begun(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make()
        await batcher.submit([job(1)])
        first = await held(runner, batcher)
        others = [asyncio.create_task(batcher.submit([job(*range(10))])) for _ in range(2)]
        hopeless = asyncio.create_task(batcher.submit([job(99)], deadline=time.monotonic() + 5.0))
        while batcher._queued_tokens < 21:
            await asyncio.sleep(0.001)
        at_a_rate_of(batcher, 1.0)  # twenty seconds of work wait before it
        runner.gate.set()
        with pytest.raises(DeadlineExceededError, match="while the request waited"):
            await hopeless
        await asyncio.gather(first, *others)

    asyncio.run(scenario())
    assert not any(99 in batch for batch in runner.batches)


def test_a_long_batch_that_shows_life_is_no_stall(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(stall_s=0.2)
        task = await held(runner, batcher)
        for _ in range(10):
            batcher.beat()  # as each layer of a long forward does
            await asyncio.sleep(0.05)
            assert batcher.alive
        runner.gate.set()
        await task

    asyncio.run(scenario())


def test_a_large_request_shares_the_engine_with_small_ones(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(budget_tokens=10)
        batcher._tokens_per_s = 100.0
        first = await held(runner, batcher)
        large = asyncio.create_task(batcher.submit([job(at, at) for at in range(1, 101)]))
        await asyncio.sleep(0.01)
        small = asyncio.create_task(batcher.submit([job(1000)]))
        await asyncio.sleep(0.01)
        runner.gate.set()
        await asyncio.gather(first, large, small)

    asyncio.run(scenario())
    at = next(index for index, batch in enumerate(runner.batches) if 1000 in batch)
    assert at <= 3
    assert len(runner.batches) > 15


def test_more_rows_than_the_queue_could_ever_hold(make: Any) -> None:
    with pytest.raises(PayloadTooLargeError, match="split"):
        asyncio.run(make(max_queue_tokens=4).submit([job(1, 2, 3), job(4, 5)]))


def test_a_stalled_engine_is_neither_ready_nor_alive(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(stall_s=0.05)
        task = await held(runner, batcher)
        await asyncio.to_thread(until, lambda: not batcher.alive)
        assert not batcher.ready
        runner.gate.set()
        await task
        await asyncio.to_thread(until, lambda: batcher.ready)

    asyncio.run(scenario())


def test_a_full_queue_says_when_to_come_back(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(max_queue_tokens=4)
        first = await held(runner, batcher)
        big = asyncio.create_task(batcher.submit([job(*range(1, 10))]))  # larger than the queue, which is empty
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError) as caught:
            await batcher.submit([job(5)])
        assert caught.value.retry_after_s is not None
        assert 0.1 <= caught.value.retry_after_s <= 60
        runner.gate.set()
        assert (await big).results == [{"id": 1}]
        await first

    asyncio.run(scenario())


def test_deadlines(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make()
        with pytest.raises(DeadlineExceededError):
            await batcher.submit([job(1)], deadline=time.monotonic() - 1)
        first = await held(runner, batcher)
        with pytest.raises(DeadlineExceededError):
            await batcher.submit([job(2)], deadline=time.monotonic() + 0.02)
        runner.gate.set()
        await first
        assert (await batcher.submit([job(3)], deadline=time.monotonic() + 5)).results == [{"id": 3}]

    asyncio.run(scenario())
    assert [2] not in runner.batches


def test_who_goes_away_takes_the_work_along(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make()
        first = await held(runner, batcher)
        leaving = asyncio.create_task(batcher.submit([job(2)]))
        staying = asyncio.create_task(batcher.submit([job(3)]))
        await asyncio.sleep(0.02)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        runner.gate.set()
        await asyncio.gather(first, staying)

    asyncio.run(scenario())
    assert runner.batches == [[0], [3]]


def test_lower_priority_numbers_go_first_but_nothing_waits_for_ever(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make(budget_tokens=1)
        first = await held(runner, batcher)
        tasks = []
        for ids, priority in ((1, 5), (2, 0), (3, -1)):
            tasks.append(asyncio.create_task(batcher.submit([job(ids)], priority=priority)))
            await asyncio.sleep(0.005)
        runner.gate.set()
        await asyncio.gather(first, *tasks)

    asyncio.run(scenario())
    assert runner.batches == [[0], [3], [2], [1]]


def test_not_ready_before_loading_and_after_closing(runner: Runner) -> None:
    loading = threading.Event()
    batcher = Batcher(runner.run, lambda job: Cost(1), prepare=lambda: (loading.wait(5), None)[1])
    batcher.start()
    with pytest.raises(NotReadyError, match="loading"):
        asyncio.run(batcher.submit([job(1)]))
    assert batcher.alive
    assert not batcher.ready
    loading.set()
    until(lambda: batcher.ready)
    batcher.close()
    assert batcher.state == "stopped"
    assert not batcher.alive
    with pytest.raises(NotReadyError):
        asyncio.run(batcher.submit([job(1)]))


def test_closing_ends_the_batch_in_hand_and_refuses_the_rest(runner: Runner, make: Any) -> None:
    async def scenario() -> None:
        batcher = make()
        first = await held(runner, batcher)
        second = asyncio.create_task(batcher.submit([job(2)]))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.02)
        runner.gate.set()
        assert (await first).results == [{"id": 0}]
        with pytest.raises(NotReadyError):
            await second
        await closing

    asyncio.run(scenario())


def test_a_model_that_does_not_load(runner: Runner) -> None:
    def prepare() -> None:
        raise InvalidRequestError("no such folder")

    batcher = Batcher(runner.run, lambda job: Cost(1), prepare=prepare)
    batcher.start()
    until(lambda: batcher.state == "failed")
    assert isinstance(batcher.failure, InvalidRequestError)
    assert not batcher.ready
    with pytest.raises(NotReadyError):
        asyncio.run(batcher.submit([job(1)]))


class TestAtOnce:
    """A short job on the thread of the event loop that asks."""

    @pytest.fixture
    def short(self, runner: Runner) -> Iterator[tuple[Batcher, list[str]]]:
        events: list[str] = []

        def where() -> str:
            return "here" if threading.current_thread() is threading.main_thread() else "there"

        def run_short(job: Any) -> Result | None:
            token = job.prefix.token_ids[0]
            if token == 13:
                raise RuntimeError("the device fell over")
            if token < 0:
                return None
            events.append(f"answered {where()}")
            return {"id": token}

        def run(jobs: Sequence[Any]) -> list[Result]:
            events.append(f"ran {where()}")
            return runner.run(jobs)

        batcher = Batcher(
            run,
            lambda job: Cost(len(job.prefix.token_ids)),  # type: ignore[union-attr]
            finish=lambda: events.append(f"finished {where()}"),
            check=runner.check,
            run_short=run_short,
        )
        batcher.start()
        until(lambda: batcher.state == "ready")
        at_a_rate_of(batcher, 1e6)
        yield batcher, events
        runner.gate.set()
        batcher.close()

    def test_who_asks_alone_is_answered_here_and_the_rest_is_done_there(self, short: Any) -> None:
        batcher, events = short

        async def ask() -> Any:
            reply = batcher.at_once(job(7))
            assert events == ["answered here"]  # nobody waits for what comes after
            await asyncio.to_thread(until, lambda: len(events) == 2)
            return reply

        reply = asyncio.run(ask())
        assert reply.results == [{"id": 7}]
        assert (reply.queue_ms, reply.inference_ms > 0) == (0.0, True)
        assert events == ["answered here", "finished there"]

    @pytest.mark.parametrize("why", ["slow", "unknown rate", "closed", "not short", "recovering"])
    def test_what_is_to_be_submitted(self, short: Any, why: str) -> None:
        batcher, events = short
        asked = job(-7) if why == "not short" else job(7)
        if why in ("slow", "unknown rate"):
            batcher._tokens_per_s = 10.0 if why == "slow" else None
        elif why == "closed":
            batcher.close()
        elif why == "recovering":
            batcher.state = "recovering"

        async def ask() -> Any:
            return batcher.at_once(asked)

        assert asyncio.run(ask()) is None
        assert not any(event.startswith("answered") for event in events)

    def test_not_beside_a_batch_in_hand(self, short: Any, runner: Runner) -> None:
        batcher, events = short

        async def ask() -> Any:
            other = await held(runner, batcher)
            first = batcher.at_once(job(7))
            runner.gate.set()
            await other
            await asyncio.sleep(0.15)  # until nobody else asks
            return first, batcher.at_once(job(8))

        first, second = asyncio.run(ask())
        assert first is None
        assert second.results == [{"id": 8}]
        assert events[0] == "ran there"

    def test_callers_who_follow_closely_share_batches_for_a_while(
        self, short: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batcher, _ = short

        async def ask() -> Any:
            monkeypatch.setattr(batching, "_APART_S", 10.0)  # however slow this machine is
            found = [batcher.at_once(job(7)), batcher.at_once(job(8))]
            monkeypatch.setattr(batching, "_APART_S", 0.0)
            monkeypatch.setattr(batcher, "_shared_until", batcher._shared_until + 10.0)
            await asyncio.sleep(0.02)
            found.append(batcher.at_once(job(9)))
            monkeypatch.setattr(batcher, "_shared_until", batcher._shared_until - 10.0)
            await asyncio.sleep(0.12)
            found.append(batcher.at_once(job(10)))
            return found

        first, close, soon, later = asyncio.run(ask())
        assert (first.results, later.results) == ([{"id": 7}], [{"id": 10}])
        assert (close, soon) == (None, None)

    def test_what_fails_here_is_contained_there(self, short: Any, caplog: pytest.LogCaptureFixture) -> None:
        batcher, events = short

        async def ask() -> Any:
            assert batcher.at_once(job(13)) is None
            return (await batcher.submit([job(13)])).results, batcher.at_once(job(7))

        results, _ = asyncio.run(ask())
        assert results == [{"id": 13}]
        assert "tried again" in caplog.text
        assert events[0] == "ran there"

    def test_answers_here_and_there_at_once_are_each_their_own(
        self, short: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two event loops and the thread, as fast as they can: nothing is lost and no two are in the core together."""
        batcher, _ = short
        monkeypatch.setattr(batching, "_APART_S", 0.0)  # as if each were the only one
        inside, worst = [0], [0]
        run, run_short = batcher._run, batcher._run_short

        def watched(call: Any) -> Any:
            def of(*given: Any) -> Any:
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
                time.sleep(0.0002)
                try:
                    return call(*given)
                finally:
                    inside[0] -= 1

            return of

        batcher._run, batcher._run_short, batcher._finish = watched(run), watched(run_short), watched(lambda: None)
        here = [0]

        async def ask(first: int) -> None:
            for token in range(first, first + 150):
                reply = batcher.at_once(job(token))
                here[0] += reply is not None
                if reply is None:
                    reply = await batcher.submit([job(token)])
                assert reply.results == [{"id": token}]
                await asyncio.sleep(0.003 if token % 3 else 0.0)

        threads = [threading.Thread(target=lambda first=first: asyncio.run(ask(first))) for first in (1000, 2000)]
        failed: list[Any] = []
        hook, threading.excepthook = threading.excepthook, failed.append
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        finally:
            threading.excepthook = hook
        assert not failed
        assert worst == [1]
        assert here[0] > 0
