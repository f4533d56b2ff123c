"""The scorer without HTTP: answers like the service's, one bad row among good ones, and failures that are typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenvm_client import (
    CandidateInput,
    CandidateScores,
    GuidedDecoder,
    GuidedRow,
    InternalServerError,
    InvalidRequestError,
    OverloadedError,
    RowError,
)
from lenvm_service.engine.jobs import CandidateJob, Job, StepJob
from lenvm_service.errors import OverloadedError as PoolFull
from lenvm_service.local import LocalScorer
from tests.support.cpu_steps import compute_on_cpu, with_graphs

TILT = {"kind": "tilt", "lambda": 0.5}
GOOD = CandidateInput(token_ids=[5, 6, 7], candidates=[8, 2], logprobs=[-0.5, -1.0], objective=TILT)


@pytest.fixture
def scorer(tiny_checkpoint: Path) -> LocalScorer:
    return LocalScorer(tiny_checkpoint)


def test_rows_and_their_sessions(scorer: LocalScorer) -> None:
    (first,) = scorer.score_candidates([GOOD])
    assert isinstance(first, CandidateScores)
    assert first.log_weights is not None
    assert len(first.log_weights) == 2
    (whole,) = scorer.score_candidates([CandidateInput(token_ids=np.array([5, 6, 7, 8]), candidates=[9])])  # type: ignore[arg-type]
    (appended,) = scorer.score_candidates(
        [CandidateInput(session=first.session, append=torch.tensor([8]), candidates=[9])]  # type: ignore[arg-type]
    )
    assert isinstance(whole, CandidateScores)
    assert isinstance(appended, CandidateScores)
    assert appended.session == whole.session
    assert appended.values == pytest.approx(whole.values, abs=1e-5)
    assert scorer.score_candidates([]) == []


@pytest.mark.parametrize(
    ("row", "code", "param"),
    [
        ({"token_ids": [1.5]}, "invalid_request", "token_ids"),
        ({"token_ids": [True]}, "invalid_request", "token_ids"),
        ({"token_ids": 7}, "invalid_request", "token_ids"),
        ({"token_ids": [1 << 70]}, "invalid_request", "token_ids"),
        ({"session": "s", "append": ["x"]}, "invalid_request", "append"),
        ({"token_ids": [5], "candidates": [None]}, "invalid_request", "candidates"),
        ({"token_ids": [5], "generated": "1"}, "invalid_request", "generated"),
        ({"token_ids": [5], "eos_ids": [0.5]}, "invalid_request", "eos_ids"),
        ({"token_ids": [5], "logprobs": ["a"]}, "invalid_request", "logprobs"),
        ({"token_ids": [5], "logprobs": [10**400]}, "invalid_request", "logprobs"),
        ({"token_ids": [5], "objective": {"kind": ["tilt"]}}, "invalid_request", "kind"),
        ({"token_ids": [5], "session": "s"}, "exactly_one", None),
        ({}, "exactly_one", None),
        ({"prompt": "Why?"}, "invalid_request", "prompt"),
    ],
)
def test_a_bad_row_does_not_fail_its_neighbours(
    scorer: LocalScorer, row: dict[str, Any], code: str, param: Any
) -> None:
    bad, good = scorer.score_candidates([CandidateInput(**{"candidates": [3], **row}), GOOD])
    assert isinstance(good, CandidateScores)
    assert isinstance(bad, RowError)
    assert (bad.index, bad.type, bad.code, bad.param, bad.retryable) == (0, "invalid_request", code, param, False)
    assert "\n" not in bad.message


def test_an_overloaded_row_says_when_to_come_back(scorer: LocalScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer.core, "run", lambda jobs: [PoolFull("full", retry_after_s=1.5) for _ in jobs])
    (row,) = scorer.score_candidates([GOOD])
    assert isinstance(row, RowError)
    assert (row.type, row.code, row.retryable, row.retry_after_ms) == ("overloaded", "overloaded", True, 1500.0)
    error = row.to_exception()
    assert isinstance(error, OverloadedError)
    assert error.retry_after_s == 1.5


def test_a_failing_model_is_a_typed_error_and_no_end_of_a_generation(
    scorer: LocalScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(jobs: Any) -> Any:
        raise ArithmeticError("values that are\nnot finite")

    monkeypatch.setattr(scorer.core, "run", broken)
    with pytest.raises(InternalServerError, match=r"\(ArithmeticError: values that are not finite\)") as caught:
        scorer.score_candidates([GOOD])
    assert isinstance(caught.value.__cause__, ArithmeticError)
    decoder = GuidedDecoder(scorer, [2])
    (answer,) = decoder.step([GuidedRow(prefix=[5, 6], candidates=[7, 2], logprobs=[-0.5, -1.0], objective=TILT)])
    assert not answer.guided
    assert decoder.report([]).errors == {"internal": 1}


class TestSteps:
    """A decoder's step is one job, and its answers are those of its rows."""

    @staticmethod
    def decoded(scorer: LocalScorer, steps: int = 4, **changed: Any) -> tuple[list[Any], str, list[Job]]:
        """Answers and text costs of some steps of three rows, what else the report says, and every job."""
        jobs, run = list[Job](), scorer._run
        scorer._run = lambda its: jobs.extend(its) or run(its)  # type: ignore[func-returns-value]
        decoder = GuidedDecoder(scorer, [2], on_error="raise")
        found: list[Any] = []
        last: list[Any] = [None] * 3
        prefixes = [[5, 6, 7], [8, 9], [4, 4, 4, 4]]
        for step in range(steps):
            rows = [
                GuidedRow(
                    prefix=list(prefix), candidates=[20 + step, 11, 2], logprobs=[-1.0, -2.0, -3.0 - step],
                    generated=step, after=after, **{"objective": TILT, **changed},
                )
                for prefix, after in zip(prefixes, last, strict=True)
            ]  # fmt: skip
            last = decoder.step(rows)
            found.append([[*answer.log_weights, answer.guided] for answer in last])
            for prefix in prefixes:
                prefix.append(11)
        ended = [GuidedRow(prefix=prefix, generated=steps, objective=TILT) for prefix in prefixes]
        scorer._run = run
        rows = decoder.report(ended).rows
        found.append([[row.text_cost] for row in rows])
        return found, str([replace(row, text_cost=0.0) for row in rows]), jobs

    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"objective": {"kind": "equal_to", "target": 9}},
            {"objective": {"kind": "at_most", "target": 9, "method": "paper"}},
        ],
        ids=["tilt", "equal_to", "paper"],
    )  # fmt: skip
    @pytest.mark.parametrize("graphs", [False, True], ids=["rows in the engine", "columns in the engine"])
    def test_as_row_by_row(
        self, tiny_checkpoint: Path, changed: dict[str, Any], graphs: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class ByRows(LocalScorer):
            def score_candidates(self, rows: Any) -> Any:  # a call of its own, which gets what it expects
                assert type(rows) is list
                return super().score_candidates(rows)

        scorer = LocalScorer(tiny_checkpoint)
        if graphs:
            compute_on_cpu(monkeypatch)
            with_graphs(scorer.core.scorer)  # type: ignore[arg-type]
        found, report, jobs = self.decoded(scorer, **changed)
        assert not graphs or scorer.core.scorer.stats.promoted == 9  # every step of three rows but the first
        wanted, by_rows, rows = self.decoded(ByRows(tiny_checkpoint), **changed)
        assert [type(job) for job in jobs] == [CandidateJob] * 3 + [StepJob] * 3
        assert [type(job) for job in rows] == [CandidateJob] * 12
        assert report == by_rows
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert all(row[-1] for step in found[:-1] for row in step)

    def test_a_session_that_is_gone_is_sent_again_whole(self, scorer: LocalScorer) -> None:
        wanted, _, _ = self.decoded(scorer)
        run, lost = scorer._run, list[int]()

        def forgetful(jobs: Any) -> Any:
            if isinstance(jobs[0], StepJob) and not lost:
                lost.append(1)
                jobs[0].sessions[1] = "no session of ours"
            return run(jobs)

        scorer._run = forgetful
        found, report, jobs = self.decoded(scorer)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert lost
        assert report.count("prefix_resends=1") == 1
        assert [type(job) for job in jobs] == [CandidateJob] * 3 + [StepJob, CandidateJob, StepJob, StepJob]

    def test_what_is_no_plain_row_is_told_of_that_row(self, scorer: LocalScorer) -> None:
        decoder, good = GuidedDecoder(scorer, [2], on_error="raise"), {"kind": "equal_to", "target": 9}
        last: list[Any] = [None, None]
        for step, second in enumerate((good, good, good | {"target": "x"})):
            rows = [
                GuidedRow(
                    prefix=[5, token, *[7] * step], candidates=[7, 4], logprobs=[-1.0, -2.0], generated=step,
                    objective=objective, after=after,
                )
                for token, objective, after in zip((6, 8), (good, second), last, strict=True)
            ]  # fmt: skip
            if second is good:
                last = decoder.step(rows)
                continue
            with pytest.raises(InvalidRequestError, match="target") as caught:
                decoder.step(rows)
            assert caught.value.param == "target"

    def test_a_call_that_fails_as_a_whole_fails_each_row(self, scorer: LocalScorer) -> None:
        run = scorer._run
        scorer._run = lambda jobs: [PoolFull("full", retry_after_s=31.0)] if isinstance(jobs[0], StepJob) else run(jobs)
        decoder = GuidedDecoder(scorer, [2])
        last: list[Any] = [None, None]
        for step in range(2):
            last = decoder.step(
                [
                    GuidedRow(prefix=[5, token, *[7] * step], candidates=[7, 9], generated=step, objective=TILT,
                              logprobs=[-1.0, -1.0], after=after)
                    for token, after in zip((6, 8), last, strict=True)
                ]
            )  # fmt: skip
        assert [answer.guided for answer in last] == [False, False]
        assert decoder.report([]).errors == {"overloaded": 2}
