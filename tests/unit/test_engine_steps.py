"""Decoding steps as columns: the same answers as row by row, by one graph, and whatever is odd told by its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lenvm import guidance
from lenvm.guidance import Objective, PreparedWeights
from lenvm.modeling import LengthValueModel
from lenvm.scoring import TorchScorer
from lenvm_service.engine import CandidateJob, EngineCore, PredictJob, Prefix, SessionStore
from lenvm_service.engine.jobs import StepJob, folded
from lenvm_service.engine.steps import answer_steps
from tests.support.cpu_steps import compute_on_cpu, with_graphs

EOS = 2
SECRET = b"0123456789abcdef"
EQUAL = Objective(kind="equal_to", target=20)
MOST = Objective(kind="at_most", target=9, strength=0.7)
PAPER = Objective(kind="equal_to", target=20, method="paper")
CAREFUL = Objective(kind="equal_to", target=3, min_eos_prob=0.2)
OWN = Objective(kind="tilt", lambda_=-float(np.log(0.99)))


def make(model: LengthValueModel, **options: Any) -> EngineCore:
    sessions = SessionStore(**options.pop("sessions", {}))
    scorer = TorchScorer(model, block_size=16, **options)
    return EngineCore(model.config, model.tokenizer, scorer, eos_ids=[EOS], secret=SECRET, sessions=sessions)


@pytest.fixture
def plain(tiny_model: LengthValueModel) -> EngineCore:
    return make(tiny_model)


@pytest.fixture
def core(tiny_model: LengthValueModel, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    compute_on_cpu(monkeypatch)
    found = make(tiny_model)
    with_graphs(found.scorer)  # type: ignore[arg-type]
    return found


class Loop:
    """Rows that go on with a candidate of the step before, in one core."""

    def __init__(self, core: EngineCore, objectives: Sequence[Objective | None], *, tenant: str = "") -> None:
        self.core, self.objectives, self.tenant = core, list(objectives), tenant
        self.rng = np.random.default_rng(4)
        self.generated = 0
        self.candidates = [self._candidates() for _ in objectives]
        jobs = [
            CandidateJob(
                Prefix(self.rng.integers(3, 128, 10 + 5 * at).tolist(), tenant=tenant),
                ids,
                0,
                objective,
                self._logs(ids),
            )
            for at, (ids, objective) in enumerate(zip(self.candidates, self.objectives, strict=True))
        ]
        self.sessions = [result["session"] for result in core.run(jobs) if isinstance(result, dict)]

    def _candidates(self) -> list[int]:
        """Four or five, EOS among them at some place or not."""
        ids = (3 + self.rng.permutation(125)[:5]).tolist()
        if self.rng.random() < 0.6:
            ids[int(self.rng.integers(5))] = EOS
        return ids[: int(self.rng.integers(4, 6))]

    def _logs(self, ids: Sequence[int]) -> list[float]:
        return (-3.0 * self.rng.random(len(ids))).tolist()

    def job(self) -> StepJob:
        """The next step, going on with the first candidate that does not end the answer."""
        appended = [[next(token for token in ids if token != EOS)] for ids in self.candidates]
        self.candidates = [self._candidates() for _ in self.candidates]
        self.generated += 1
        logs = [self._logs(ids) for ids in self.candidates]
        counts = [self.generated] * len(self.sessions)
        return StepJob(self.sessions, appended, self.candidates, counts, self.objectives, logs, (), self.tenant)

    def take(self, result: Any) -> dict[str, list[Any]]:
        assert result["errors"] == {}
        columns: dict[str, list[Any]] = result["columns"]
        self.sessions = columns["session"]
        return columns


def near(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        for one, other in zip(values, wanted[name], strict=True):
            if isinstance(one, list | float):
                assert one == pytest.approx(other, abs=2e-4), name
            else:
                assert one == other, name


@pytest.mark.parametrize(
    "objectives",
    [[EQUAL] * 4, [EQUAL, MOST, EQUAL, OWN], [EQUAL, None, PAPER, CAREFUL], [None, None], [PAPER, PAPER], [OWN, OWN]],
)
def test_the_same_as_row_by_row(core: EngineCore, plain: EngineCore, objectives: list[Objective | None]) -> None:
    loops = Loop(core, objectives), Loop(plain, objectives)
    for _ in range(24):  # blocks become full on the way
        found, wanted = (loop.take(loop.core.run([loop.job()])[0]) for loop in loops)
        near(found, wanted)
        assert not core.settled  # or it was answered row by row
        assert core.counts.forwards == 1
        assert core.counts.promoted_tokens == len(objectives)
        assert core.counts.computed_tokens == sum(len(ids) - (EOS in ids) for ids in loops[0].candidates)
        assert core.counts.cached_tokens == plain.counts.cached_tokens + plain.counts.computed_tokens - sum(
            len(ids) - (EOS in ids) for ids in loops[0].candidates
        )
        assert core.counts.guided == plain.counts.guided
    core.settle()
    assert set(core.sessions._sessions) == set(plain.sessions._sessions)
    assert len(core.prefixes.blocks) == len(plain.prefixes.blocks)


def test_steps_of_several_requests_and_tenants_and_other_jobs_in_one_batch(core: EngineCore, plain: EngineCore) -> None:
    both = []
    for its in (core, plain):
        loops = [Loop(its, [EQUAL, MOST], tenant="a"), Loop(its, [EQUAL] * 3, tenant="b")]
        prompt = PredictJob(Prefix([9, 8, 7], tenant="a"))
        for _ in range(3):
            first, other, second = its.run([loops[0].job(), prompt, loops[1].job()])
            answers = [loops[0].take(first), loops[1].take(second)]
        assert isinstance(other, dict)
        both.append((answers, other["mean"]))
    for found, wanted in zip(both[0][0], both[1][0], strict=True):
        near(found, wanted)
    assert both[0][1] == pytest.approx(both[1][1], rel=1e-5)


def odd(job: StepJob, at: int, **changed: Any) -> StepJob:
    """The job with one row changed."""
    return replace(
        job,
        **{
            name: [value if row == at else one for row, one in enumerate(getattr(job, name))]
            for name, value in changed.items()
        },
    )


ODD: dict[str, dict[str, Any]] = {
    "unknown session": {"sessions": "s-nobody"},
    "a token twice": {"candidates": [5, 5, 6, 7]},
    "outside the vocabulary": {"candidates": [5, 128, 6, 7]},
    "negative": {"candidates": [5, -1, 6, 7]},
    "none, and said to end the answer": {"candidates": [5, 200, 6, 7]},
    "no 32-bit integer": {"candidates": [5, 1 << 40, 6, 7]},
    "no candidates": {"candidates": []},
    "more generated than there is": {"generated": 1000},
    "a scale in mid-answer": {"objectives": Objective(kind="scale", factor=0.5)},
    "too few log-probs": {"logprobs": [-1.0]},
}


@pytest.mark.parametrize("changed", ODD.values(), ids=ODD)
def test_one_odd_row_gets_its_error_and_its_neighbours_their_answers(
    core: EngineCore, plain: EngineCore, changed: dict[str, Any]
) -> None:
    found = []
    for its in (core, plain):
        loop = Loop(its, [EQUAL] * 3)
        loop.take(its.run([loop.job()])[0])
        used = its.scorer.pool.used_blocks
        (result,) = its.run([odd(replace(loop.job(), eos_ids=(200,)), 1, **changed)])
        assert isinstance(result, dict)
        assert set(result["errors"]) == {1}
        error = result["errors"][1]
        assert [column[1] for column in result["columns"].values()] == [None] * len(result["columns"])
        kept = {name: [column[0], column[2]] for name, column in result["columns"].items()}
        found.append((kept, type(error), str(error), error.param))
        its.settle()
        its.sessions.clear()
        assert its.scorer.pool.used_blocks <= used
    near(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_odd_rows_that_are_no_errors_are_answered_too(core: EngineCore, plain: EngineCore) -> None:
    for changed in ({"appended": ()}, {"appended": [7, 9]}, {"appended": [127]}, {"candidates": [EOS]}):
        found = []
        for its in (core, plain):
            loop = Loop(its, [EQUAL] * 3)
            job = odd(loop.job(), 1, **changed)
            job = odd(job, 1, logprobs=[-1.0] * len(job.candidates[1]))
            found.append(loop.take(its.run([job])[0]))
            loop.candidates[1] = [5, 6] if loop.candidates[1] == [EOS] else loop.candidates[1]
        near(*found)


def test_a_step_again_and_from_another_tenant(core: EngineCore) -> None:
    loop = Loop(core, [EQUAL] * 2, tenant="a")
    job = loop.job()
    first, second = core.run([job])[0], core.run([job])[0]
    near(loop.take(first), loop.take(second))
    stolen = StepJob(job.sessions, job.appended, job.candidates, job.generated, job.objectives, None, (), "b")
    (result,) = core.run([stolen])
    assert isinstance(result, dict)
    assert [error.code for error in result["errors"].values()] == ["prefix_unknown"] * 2


def test_the_next_step_finds_what_was_left_for_later(core: EngineCore) -> None:
    loop = Loop(core, [EQUAL] * 2)
    columns = loop.take(core.run([loop.job()])[0])
    assert columns["session"][0] not in core.sessions
    assert not core.settled
    core.settle()
    assert columns["session"][0] in core.sessions
    assert core.settled
    loop.take(core.run([loop.job()])[0])
    loop.take(core.run([loop.job()])[0])  # settles by itself
    assert core.counts.forwards == 1


def test_numbers_that_are_none_are_no_answers(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(core, [EQUAL] * 2)
    core.run([loop.job()])
    head = core.scorer.model.head  # type: ignore[attr-defined]
    loop.sessions = list(core.sessions._sessions)[-2:]
    monkeypatch.setattr(head.output.bias, "data", head.output.bias.data * float("nan"))
    with pytest.raises(ArithmeticError):
        core.run([loop.job()])
    core.settle()


def test_a_pool_without_room_answers_row_by_row(tiny_model: LengthValueModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_on_cpu(monkeypatch)
    core = make(tiny_model, pool_tokens=16 * 7)
    with_graphs(core.scorer)  # type: ignore[arg-type]
    loop = Loop(core, [EQUAL] * 2)
    job = loop.job()
    assert answer_steps(core, [StepJob([*job.sessions] * 2, *[[*getattr(job, name)] * 2 for name in FIELDS])]) is None
    (result,) = core.run([job])
    loop.take(result)


FIELDS = ("appended", "candidates", "generated", "objectives")


def test_folded() -> None:
    assert isinstance(folded([]), dict)
    found = folded([{"value": 1.0, "values": [], "session": "s"}])
    assert isinstance(found, dict)
    assert found["columns"]["value"] == [1.0]
    assert "values" not in found["columns"]


def test_a_step_s_states_are_made_though_their_parents_lost_their_candidates_meanwhile(
    tiny_model: LengthValueModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_on_cpu(monkeypatch)
    core = make(tiny_model, sessions={"max_candidates": 40})
    with_graphs(core.scorer)  # type: ignore[arg-type]
    loop = Loop(core, [EQUAL] * 3)
    loop.take(core.run([loop.job()])[0])
    others = [CandidateJob(Prefix([3 + at, 4, 5]), list(range(10, 30)), 0, EQUAL) for at in range(4)]
    loop.take(core.run([loop.job(), *others])[0])
    core.settle()
    assert all(session in core.sessions for session in loop.sessions)


def test_nothing_is_left_for_later_of_a_batch_that_failed(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(core, [EQUAL] * 2)
    loop.take(core.run([loop.job()])[0])
    core.settle()
    held = len(core.sessions)

    def fail(jobs: Any) -> Any:
        raise RuntimeError("the device fell over")

    monkeypatch.setattr(core, "_run_rows", fail)
    with pytest.raises(RuntimeError):
        core.run([loop.job(), PredictJob(Prefix([4, 5, 6]))])
    assert core.settled
    assert len(core.sessions) == held


def test_letting_go_of_everything_lets_go_of_what_was_left_for_later(core: EngineCore) -> None:
    loop = Loop(core, [EQUAL] * 2)
    core.run([loop.job()])
    assert not core.settled
    core.clear()
    core.settle()
    assert len(core.sessions) == 0
    assert core.scorer.pool.used_blocks == 0


@pytest.mark.parametrize(
    ("objectives", "means", "logprobs"),
    [
        ([EQUAL] * 2, np.float32, np.float32),  # the device took the mean
        ([EQUAL, MOST], None, np.float32),
        ([Objective(kind="equal_to", target=20, strength=500.0)] * 2, None, np.float64),
    ],
    ids=["alike", "mixed", "magnified"],
)
def test_what_is_magnified_is_computed_in_float64(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, objectives: list[Objective], means: Any, logprobs: type
) -> None:
    seen: list[Any] = []
    of_scored = PreparedWeights.of_scored

    def watched(self: PreparedWeights, places: Any, bin_logprobs: Any, own: Any = None) -> Any:
        seen.append((None if own is None else own.dtype, bin_logprobs.dtype))
        found = of_scored(self, places, bin_logprobs, own)
        exact = of_scored(self, places, bin_logprobs.astype(np.float64))
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6)
        return found

    monkeypatch.setattr(PreparedWeights, "of_scored", watched)
    loop = Loop(core, objectives)
    seen.clear()
    loop.take(core.run([loop.job()])[0])
    assert seen == [(means, logprobs)]


def test_a_mean_that_float32_cannot_hold_is_taken_in_logs(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tiny in (guidance._TINY, dict.fromkeys(guidance._TINY, 2.0)):  # then every mean is too small
        monkeypatch.setattr(guidance, "_TINY", tiny)
        loop = Loop(core, [EQUAL] * 3)
        found.append(loop.take(core.run([loop.job()])[0])["log_weights"])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=2e-6)
        assert one != other  # another way to the same
