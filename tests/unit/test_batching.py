"""The batcher: what is put together, what everyone hears when a batch fails, and that the loop goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lenvm.errors import InvalidRequestError
from lenvm_service.engine.batching import Batcher, BatcherOptions, Cost
from lenvm_service.engine.jobs import PredictJob, Prefix, Result
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


@pytest.mark.parametrize("error", [RuntimeError("secret"), SystemExit(3), MemoryError()])
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
        with pytest.raises(InternalError, match="engine failed") as caught:
            await asyncio.wait_for(first, 1.0)
        assert "secret" not in str(caught.value)
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
    with pytest.raises(InternalError):
        asyncio.run(batcher.submit([job(1)]))


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
    with pytest.raises(InternalError):
        asyncio.run(batcher.submit([job(1)]))
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
        with pytest.raises(InternalError):
            await first
        with pytest.raises(NotReadyError):
            await asyncio.wait_for(second, 10)
        assert not batcher.alive
        assert not batcher.ready
        with pytest.raises(NotReadyError):
            await batcher.submit([job(2)])

    asyncio.run(scenario())


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
