"""The engine with its thread on a tiny model: loading, recovery, feedback, and what it says of itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm.errors import ArtifactError, InvalidRequestError
from lenvm.guidance import Objective
from lenvm.scoring.step_graph import StepGraphs, StepNumbers
from lenvm_service.engine import CandidateJob, Engine, EngineOptions, PredictJob, Prefix, TokenScoreJob
from lenvm_service.engine import engine as engine_module
from lenvm_service.engine.jobs import StepJob
from lenvm_service.engine.sharing import Asked
from lenvm_service.errors import DeadlineExceededError, InternalError, PrefixUnknownError
from lenvm_service.metrics import Metrics
from tests.support.cpu_steps import compute_on_cpu, with_graphs

EOS = 2


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def engine(tiny_checkpoint: Path, metrics: Metrics) -> Iterator[Engine]:
    engine = Engine("tiny", tiny_checkpoint, EngineOptions(secret=b"k" * 16), metrics.engine("tiny"))
    engine.start()
    until(lambda: engine.state != "loading")
    assert engine.failure is None
    yield engine
    engine.close()


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    value = metrics.registry.get_sample_value(name, {"model": "tiny", **labels})
    return 0.0 if value is None else value


def test_loading_warms_up_and_leaves_nothing_behind(engine: Engine, metrics: Metrics) -> None:
    assert engine.ready
    assert engine.alive
    assert engine.core.scorer.stats.forwards > 0
    assert engine.core.scorer.pool.used_blocks == 0
    assert sample(metrics, "lenvm_engine_ready") == 1
    for name in ("lenvm_queue_tokens", "lenvm_queue_wait_seconds_count"):  # there from the start: for alerts
        assert metrics.registry.get_sample_value(name, {"model": "tiny"}) == 0
    found = engine.describe()
    assert found["eos_ids"] == [EOS]
    assert (found["vocab_size"], found["context"], found["cap"]) == (128, 512, 64)
    assert len(found["model_sha"]) == 64


def test_what_is_known_before_loading(tiny_checkpoint: Path) -> None:
    assert Engine("tiny", tiny_checkpoint, EngineOptions()).describe() == {
        "name": "tiny",
        "state": "loading",
        "device": "cpu",
        "dtype": "float32",
    }


def test_a_missing_checkpoint_is_a_typed_failure(tmp_path: Path) -> None:
    engine = Engine("none", tmp_path / "none", EngineOptions())
    engine.start()
    until(lambda: engine.state == "failed")
    assert isinstance(engine.failure, ArtifactError)
    engine.close()


def test_a_cache_that_does_not_hold_one_context(tiny_checkpoint: Path) -> None:
    engine = Engine("tiny", tiny_checkpoint, EngineOptions(cache_tokens=20))
    engine.start()
    until(lambda: engine.state == "failed")
    assert "--cache-tokens 20 is too small" in str(engine.failure)
    engine.close()


def test_every_layer_of_a_forward_is_a_life_sign(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int] = []
    monkeypatch.setattr(engine.batcher, "beat", lambda: beats.append(1))
    asyncio.run(engine.submit([PredictJob(Prefix([5, 6, 7]))]))
    assert len(beats) == 2  # layers of the tiny model


def test_a_batch_of_all_kinds(engine: Engine, metrics: Metrics) -> None:
    jobs = [
        PredictJob(Prefix([9, 6, 7])),
        TokenScoreJob([5, 6], [7, 8]),
        CandidateJob(Prefix([5, 6]), [7, EOS], objective=Objective(kind="at_most", target=4)),
        PredictJob(Prefix([500])),
    ]
    reply = asyncio.run(engine.submit(jobs))
    assert [isinstance(result, dict) for result in reply.results] == [True, True, True, False]
    assert sample(metrics, "lenvm_rows_total", kind="predict", outcome="ok") == 1
    assert sample(metrics, "lenvm_rows_total", kind="predict", outcome="invalid_request") == 1
    assert sample(metrics, "lenvm_guidance_rows_total", objective="at_most", method="posterior") == 1
    assert sample(metrics, "lenvm_forwards_total") == 1
    assert sample(metrics, "lenvm_tokens_total", source="computed") == 3 + 4 + 3
    until(lambda: sample(metrics, "lenvm_batch_rows_sum") == 4)  # noted after the callers are woken
    assert sample(metrics, "lenvm_sessions") == 2
    asyncio.run(engine.submit([CandidateJob(Prefix([7], reply.results[2]["session"]), [9], 1)]))  # type: ignore[index]
    assert sample(metrics, "lenvm_tokens_total", source="promoted") == 1
    assert sample(metrics, "lenvm_tokens_total", source="cached") == 2
    used = sample(metrics, "lenvm_cache_blocks", state="used")
    assert used == engine.core.scorer.pool.used_blocks > 0


def test_a_raising_engine_fails_its_callers_checks_itself_and_goes_on(
    engine: Engine, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = asyncio.run(engine.submit([PredictJob(Prefix([5, 6, 7]))])).results[0]
    score, gate = engine.core.scorer.score, threading.Event()
    broken = [RuntimeError("CUDA error: secret")]

    def raising(*arguments: Any) -> Any:
        if broken:
            raise broken.pop()
        assert gate.wait(10)  # the check after the failure
        return score(*arguments)

    monkeypatch.setattr(engine.core.scorer, "score", raising)
    (failed,) = asyncio.run(asyncio.wait_for(engine.submit([PredictJob(Prefix([8]))]), 10.0)).results
    assert isinstance(failed, InternalError)
    assert "secret" not in str(failed)
    assert not engine.ready
    until(lambda: sample(metrics, "lenvm_engine_ready") == 0)
    until(lambda: sample(metrics, "lenvm_engine_failures_total") == 1)
    gate.set()
    until(lambda: engine.ready)
    again = asyncio.run(engine.submit([PredictJob(Prefix((), kept["session"]))])).results[0]  # type: ignore[index]
    assert again["cached_tokens"] == 3  # type: ignore[index]


def test_an_engine_that_fails_its_check_starts_afresh(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = asyncio.run(engine.submit([PredictJob(Prefix([5, 6, 7]))])).results[0]
    old = engine.core.scorer
    monkeypatch.setattr(old, "score", lambda *_: 1 / 0)
    assert isinstance(asyncio.run(engine.submit([PredictJob(Prefix([8]))])).results[0], InternalError)
    until(lambda: engine.ready)
    assert engine.core.scorer is not old
    (result,) = asyncio.run(engine.submit([PredictJob(Prefix((), kept["session"]))])).results  # type: ignore[index]
    assert isinstance(result, PrefixUnknownError)
    assert isinstance(asyncio.run(engine.submit([PredictJob(Prefix([8]))])).results[0], dict)


def test_nan_is_a_failure_and_never_an_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    head = engine.core.scorer.model.head
    forward, broken = head.forward, [True]

    def damaged(hidden: Any) -> Any:
        out = forward(hidden)
        if broken:
            broken.clear()
            out.logits.fill_(float("nan"))
        return out

    monkeypatch.setattr(head, "forward", damaged)
    reply = asyncio.run(engine.submit([CandidateJob(Prefix([5]), [6, 7])]))
    assert isinstance(reply.results[0], InternalError)
    until(lambda: engine.ready)


def test_feedback_counts_coverage(engine: Engine, metrics: Metrics) -> None:
    reply = asyncio.run(engine.submit([PredictJob(Prefix([5, 6, 7]), quantiles=[0.5, 0.9, 0.3], generated=1)]))
    row = reply.results[0]
    assert isinstance(row, dict)
    median, high = row["quantiles"]["0.5"], row["quantiles"]["0.9"]
    assert 1 < median <= high

    def covered(quantile: str, outcome: str) -> float:
        return sample(metrics, "lenvm_feedback_quantile_total", quantile=quantile, outcome=outcome)

    # l = median exactly: one of the tokens was there before the prediction, and EOS counts.
    engine.feedback(row["prediction_id"], None, median, "stop")
    assert (covered("0.5", "within"), covered("0.5", "beyond"), covered("0.9", "within")) == (1, 0, 1)
    engine.feedback(None, [5, 6, 7], median + 1, "stop")
    assert covered("0.5", "beyond") == 1
    engine.feedback(row["prediction_id"], None, 1 + median, "length")  # l > median is certain now
    assert covered("0.5", "beyond") == 2
    before = covered("0.5", "within"), covered("0.5", "beyond")
    engine.feedback(row["prediction_id"], None, 2, "length")  # it may have ended on either side
    assert (covered("0.5", "within"), covered("0.5", "beyond")) == before
    assert covered("0.3", "within") == 0  # not one of the quantiles that are counted
    assert sample(metrics, "lenvm_feedback_total", finish_reason="length") == 2
    assert sample(metrics, "lenvm_feedback_relative_error_count") == 2
    # The sliding window: of four answers one ended within the median, two are beyond it, and one was cut below.
    assert sample(metrics, "lenvm_feedback_window_items") == 4
    assert sample(metrics, "lenvm_feedback_coverage_ratio", quantile="0.5") == pytest.approx(1 / 3)


def test_feedback_knows_the_cap(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(engine._metrics, "realised", lambda length, **named: told.append({"length": length, **named}))
    row = asyncio.run(engine.submit([PredictJob(Prefix([5, 6, 7]))])).results[0]
    assert isinstance(row, dict)
    engine.feedback(row["prediction_id"], None, 9, "stop")
    quantiles = list(row["quantiles"].values())
    assert told == [
        {"length": 10, "cut": False, "horizon": row["horizon"], "levels": [0.5, 0.9, 0.95], "quantiles": quantiles}
        | {"cap": 64}
    ]


def test_wrong_feedback(engine: Engine) -> None:
    reply = asyncio.run(engine.submit([PredictJob(Prefix([5, 6, 7]), generated=2)]))
    known = reply.results[0]["prediction_id"]  # type: ignore[index]
    with pytest.raises(PrefixUnknownError):
        engine.feedback("s-nope", None, 3, "stop")
    with pytest.raises(PrefixUnknownError):
        engine.feedback(None, [5, 6], 3, "stop")
    with pytest.raises(InvalidRequestError, match="whole answer"):
        engine.feedback(known, None, 1, "stop")
    with pytest.raises(InvalidRequestError, match="token_ids"):
        engine.feedback(None, [500], 3, "stop")


class TestSteps:
    """A step as one job, where the engine has graphs and holds all of its sessions."""

    @pytest.fixture
    def steps(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
        compute_on_cpu(monkeypatch)
        with_graphs(engine.core.scorer)  # type: ignore[arg-type]
        return engine

    @staticmethod
    async def begun(engine: Engine) -> StepJob:
        objective = Objective(kind="equal_to", target=9)
        jobs = [CandidateJob(Prefix([5, 6 + at]), [7, 8, EOS], objective=objective) for at in range(3)]
        found = [row for row in (await engine.submit(jobs)).results if isinstance(row, dict)]
        candidates = [[9, 10, EOS], [11, 12], [13, EOS]]
        return StepJob([row["session"] for row in found], [[7]] * 3, candidates, [1] * 3, [objective] * 3)

    def test_one_job_one_answer_and_its_rows_are_counted(self, steps: Engine, metrics: Metrics) -> None:
        async def ask() -> Any:
            job = await self.begun(steps)
            (first,) = (await steps.submit([job])).results
            (rows,) = (await steps.submit([replace(job, sessions=["s-nobody", *job.sessions[1:]])])).results
            return first, rows

        first, rows = asyncio.run(ask())
        assert first["errors"] == {}
        assert [len(weights) for weights in first["columns"]["log_weights"]] == [3, 2, 2]
        assert [error.code for error in rows["errors"].values()] == ["prefix_unknown"]
        until(lambda: sample(metrics, "lenvm_rows_total", kind="candidates", outcome="ok") == 3 + 3 + 2)
        assert sample(metrics, "lenvm_rows_total", kind="candidates", outcome="prefix_unknown") == 1
        until(lambda: sample(metrics, "lenvm_batch_rows_sum") == 3 + 3 + 3)
        until(lambda: sample(metrics, "lenvm_sessions") == len(steps.core.sessions) == 6)

    @pytest.mark.parametrize("recorded", [True, False])
    def test_a_caller_who_is_alone_is_answered_without_a_change_of_threads(
        self, steps: Engine, metrics: Metrics, monkeypatch: pytest.MonkeyPatch, recorded: bool
    ) -> None:
        """Where the graph is there; recording one takes a second, for which an event loop must not stand still."""
        threads: list[bool] = []
        launch = StepGraphs.launch

        def launched(self: StepGraphs, *given: Any) -> Any:
            threads.append(threading.current_thread() is threading.main_thread())
            return launch(self, *given)

        monkeypatch.setattr(StepGraphs, "launch", launched)

        async def ask() -> list[Any]:
            job, found = await self.begun(steps), []
            for _ in range(2):
                if not recorded:
                    steps.core.scorer._steps._graphs.clear()  # type: ignore[attr-defined]
                while not steps.core.settled or steps.batcher._working.locked():  # what was left is being done
                    await asyncio.sleep(0.001)
                self.alone(steps)
                found += (await steps.submit([job])).results
            return found

        first, second = asyncio.run(ask())
        assert first["errors"] == {} == second["errors"]
        assert first["columns"]["log_weights"] == second["columns"]["log_weights"]
        assert threads == [False, recorded]  # the first one records
        until(lambda: sample(metrics, "lenvm_rows_total", kind="candidates", outcome="ok") == 9)
        until(lambda: sample(metrics, "lenvm_batch_rows_sum") == 9)
        until(lambda: sample(metrics, "lenvm_sessions") == len(steps.core.sessions) == 6)

    @staticmethod
    def alone(engine: Engine) -> None:
        """As on a GPU whose one caller has waited for a moment."""
        engine.batcher._tokens_per_s, engine.batcher._shared_until, engine.batcher._answered_at = 1e6, 0.0, 0.0

    @staticmethod
    def next_of(job: StepJob, columns: dict[str, Any]) -> StepJob:
        generated = [count + 1 for count in job.generated]
        appended = [ids[:1] for ids in job.candidates]
        return replace(job, sessions=columns["session"], appended=appended, generated=generated)

    def test_what_a_step_leaves_reaches_the_shared_tier_however_soon_the_next_one_comes(
        self, steps: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offered: list[str] = []
        tier = SimpleNamespace(
            offer_session=lambda chain, *_: offered.append(chain.handle),
            takes_blocks=False,
            costs=SimpleNamespace(computed=lambda *_: None),
            took=lambda nbytes: None,
            close=lambda: None,
        )
        steps.tier = tier  # type: ignore[assignment]

        async def ask() -> list[str]:
            # Nothing is looked up: every session is held.
            monkeypatch.setattr(engine_module, "ask_shared", asked)
            monkeypatch.setattr(steps.batcher, "_nudge", lambda: None)  # the thread is slow to come
            job, handles = await self.begun(steps), list[str]()
            for at in range(6):
                if at % 2:
                    await asyncio.sleep(0.3)  # the sessions are there, so that the step is answered at once
                self.alone(steps)
                (found,) = (await steps.submit([job])).results
                assert isinstance(found, dict)
                handles += found["columns"]["session"]
                job = self.next_of(job, found["columns"])
            return handles

        async def asked(core: Any, tier: Any, jobs: Any, deadline: Any) -> Asked:
            return Asked(list(jobs))

        handles = asyncio.run(ask())
        until(lambda: set(handles) <= set(offered))

    @pytest.mark.parametrize("memory", [True, False])
    def test_states_that_cannot_be_kept_fail_nobody_else(
        self, steps: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, memory: bool
    ) -> None:
        kept = StepNumbers.kept
        broken = [True]

        def failing(self: StepNumbers) -> Any:
            if broken[0]:
                broken[0] = False
                raise MemoryError if memory else RuntimeError("the device fell over")
            return kept(self)

        monkeypatch.setattr(StepNumbers, "kept", failing)
        budget = steps.batcher._budget

        async def ask() -> list[Any]:
            job = await self.begun(steps)
            replies = [await steps.submit([job]), await steps.submit([PredictJob(Prefix([5, 6, 9]))])]
            replies.append(await steps.submit([await self.begun(steps)]))
            return [reply.results[0] for reply in replies]

        first, other, again = asyncio.run(ask())
        assert first["errors"] == {} == again["errors"]
        assert other["mean"] > 0
        assert "could not be kept" in caplog.text
        assert (steps.state, steps.batcher._budget) == ("ready", budget)

    def test_a_row_that_is_odd_is_found_out_once(self, steps: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the step that is answered at once; what comes then are its rows."""
        launches: list[int] = []
        launch = StepGraphs.launch

        def launched(self: StepGraphs, *given: Any) -> Any:
            launches.append(len(given[1]))
            return launch(self, *given)

        async def ask() -> Any:
            job = await self.begun(steps)
            await steps.submit([job])
            while not steps.core.settled or steps.batcher._working.locked():
                await asyncio.sleep(0.001)
            self.alone(steps)
            monkeypatch.setattr(StepGraphs, "launch", launched)
            return (await steps.submit([replace(job, candidates=[[9, 9, EOS], *job.candidates[1:]])])).results

        (found,) = asyncio.run(ask())
        assert {at: error.code for at, error in found["errors"].items()} == {0: "invalid_request"}
        assert launches == [3, 2]  # the step, and the rows that are as they should be

    def test_a_deadline_that_has_passed(self, steps: Engine) -> None:
        async def ask() -> None:
            job = await self.begun(steps)
            await steps.submit([job])
            await asyncio.sleep(0.02)
            self.alone(steps)
            await steps.submit([job], deadline=time.monotonic() - 1.0)

        with pytest.raises(DeadlineExceededError):
            asyncio.run(ask())

    def test_a_step_that_fails_as_a_whole_is_asked_again_row_by_row(
        self, steps: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, seen = steps.core.run, list[int]()

        def guilty(jobs: Any) -> Any:
            seen.append(len(jobs))
            if any(isinstance(job, StepJob) or 11 in getattr(job, "candidates", ()) for job in jobs):
                raise RuntimeError("the device fell over")
            return run(jobs)

        async def ask() -> Any:
            job = await self.begun(steps)
            monkeypatch.setattr(steps.core, "run", guilty)
            return (await steps.submit([job])).results

        (result,) = asyncio.run(ask())
        assert {at: type(error) for at, error in result["errors"].items()} == {1: InternalError}
        assert [value is None for value in result["columns"]["value"]] == [False, True, False]
        assert seen[0] == 1
        until(lambda: steps.ready)

    def test_where_there_are_no_graphs_its_rows_are_asked(self, engine: Engine) -> None:
        async def ask() -> Any:
            return (await engine.submit([await self.begun(engine)])).results

        (result,) = asyncio.run(ask())
        assert result["errors"] == {}
        assert None not in result["columns"]["session"]
