"""The scorer without HTTP: answers like the service's, one bad row among good ones, and failures that are typed."""

from __future__ import annotations

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
    OverloadedError,
    RowError,
)
from lenvm_service.errors import OverloadedError as PoolFull
from lenvm_service.local import LocalScorer

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
