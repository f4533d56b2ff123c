"""What the host sends to a decoding step's graph; the step itself is tested with the kernels, and on a GPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from lenvm.errors import InvalidRequestError
from lenvm.modeling import LengthValueModel
from lenvm.scoring import RowScore, ScoreRow, TorchScorer, step_graph
from lenvm.scoring.step_graph import StepGraphs, StepNumbers, _StepGraph


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each step found in its buffers; it answers with the candidates' ids, and keeps keys of these numbers."""
    found: list[dict[str, Any]] = []

    def step(self: _StepGraph) -> None:
        self.inputs.copy_(self.sent)
        names = ("promotions", "lengths", "ids", "tables")
        found.append({name: getattr(self, name).clone() for name in names} | {"long": self.long})
        self.numbers[:] = self.ids.reshape(-1, 1).double()
        self.kept[:] = self.ids.reshape(1, 1, -1, 1, 1).to(self.kept.dtype)

    monkeypatch.setattr(_StepGraph, "_step", step)
    return found


@pytest.fixture
def scorer(tiny_model: LengthValueModel) -> TorchScorer:
    scorer = TorchScorer(tiny_model, pool_tokens=4096, block_size=16)
    scorer._steps = StepGraphs(tiny_model, scorer.pool, None)  # type: ignore[arg-type]  # the step is ours
    return scorer


def blocks(answer: RowScore) -> list[int]:
    return list(answer.state.held.blocks)  # type: ignore[attr-defined]


def test_rows_of_several_widths_stand_where_the_step_reads_them(
    scorer: TorchScorer, sent: list[dict[str, Any]]
) -> None:
    states = scorer.open([list(range(1, 18)), list(range(1, 6)), [3]])
    rows = [[7, 8], [9, 10, 11, 12, 13], [14]]
    answers = scorer.score([ScoreRow(state, (), row) for state, row in zip(states, rows, strict=True)])
    assert [list(answer.candidate_logits) for answer in answers] == [[float(i) for i in row] for row in rows]
    (step,) = sent
    assert step["lengths"].tolist() == [17, 5, 1, 0]
    assert step["ids"].shape == (4, 8)
    assert [step["ids"][at, : len(row)].tolist() for at, row in enumerate(rows)] == rows
    for at, answer in enumerate(answers):
        assert step["tables"][at, : len(blocks(answer))].tolist() == blocks(answer)
    assert not step["promotions"].any()


def test_a_chosen_candidate_is_copied_from_where_the_step_before_left_it(
    scorer: TorchScorer, sent: list[dict[str, Any]]
) -> None:
    states = scorer.open([list(range(1, 17)), list(range(1, 6))])
    first = scorer.score([ScoreRow(states[0], (), [7, 8]), ScoreRow(states[1], (), [9, 10])])
    second = scorer.score([ScoreRow(first[0].state, [8], [5, 6]), ScoreRow(first[1].state, (), [5, 6])])
    promotion, none = sent[1]["promotions"]
    assert not none.any()
    capture = first[0].state.scored.capture  # type: ignore[attr-defined]
    token = capture.keys.stride(1) * capture.keys.itemsize
    assert promotion.tolist() == [
        capture.keys.data_ptr() + token,
        capture.values.data_ptr() + token,
        capture.keys.stride(0),
        blocks(second[0])[1],  # the seventeenth token begins a block
        0,
    ]
    assert sent[1]["lengths"].tolist() == [17, 5]
    assert (second[0].state.length, second[0].logits.tolist()) == (17, [8.0])


def test_captures_that_lost_their_users_shrink_before_long_and_never_while_a_step_is_under_way(
    scorer: TorchScorer, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a session store does it: all but one of a step's rows lose their candidates some steps later."""
    under_way = False

    def watched(self: StepNumbers) -> None:
        nonlocal under_way
        under_way = False

    launch, compact = StepGraphs.launch, TorchScorer._compact

    def launched(self: StepGraphs, *given: Any) -> StepNumbers:
        nonlocal under_way
        under_way = True
        return launch(self, *given)

    def compacted(self: TorchScorer) -> None:
        assert not under_way
        compact(self)

    monkeypatch.setattr(StepNumbers, "wait", watched)
    monkeypatch.setattr(StepGraphs, "launch", launched)
    monkeypatch.setattr(TorchScorer, "_compact", compacted)
    states = scorer.open([[1, 2], [3], [4], [5]])
    answers = scorer.score([ScoreRow(state, (), [7, 8]) for state in states])
    capture = answers[0].state.scored.capture  # type: ignore[attr-defined]
    whole = capture.keys.shape[1]
    kept, answers = answers[0], answers[1:]
    for _ in range(16):
        answers = scorer.score([ScoreRow(answer.state, [8], [7, 8]) for answer in answers])
    assert capture.keys.shape[1] == 2 < whole
    child = scorer.score([ScoreRow(kept.state, [8], [7, 8]), *(ScoreRow(x.state, [8], [7, 8]) for x in answers)])
    assert child[0].logits.tolist() == [8.0]
    assert sent[-1]["promotions"][0, 0] == capture.keys.data_ptr() + capture.keys.stride(1) * capture.keys.itemsize


def test_keys_of_a_step_are_its_own_whenever_its_states_are_made(
    scorer: TorchScorer, sent: list[dict[str, Any]]
) -> None:
    (state,) = scorer.open([[1, 2]])
    steps = []
    for ids in ([7, 8], [5, 6], [3, 4]):
        steps.append((scorer.step([state], [()], np.array(ids, np.int32), [2]), ids))
    for found, ids in reversed(steps):
        assert found is not None
        (made,) = found.states()
        capture = made.scored.capture  # type: ignore[attr-defined]
        assert capture.keys[0, :2, 0, 0].tolist() == capture.values[0, :2, 0, 0].tolist() == ids


def test_a_state_does_not_keep_the_numbers_of_its_whole_step(scorer: TorchScorer, sent: list[dict[str, Any]]) -> None:
    (state,) = scorer.open([[1, 2]])
    (first,) = scorer.score([ScoreRow(state, (), [7, 8])])
    (second,) = scorer.score([ScoreRow(first.state, [8], [7, 8])])
    bins = second.state.bin_logprobs  # type: ignore[attr-defined]
    assert bins is not None
    assert bins.base is None
    assert bins.tolist() == [8.0] * len(bins)


def test_a_step_that_cannot_be_read_back_is_no_step(
    scorer: TorchScorer, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (state,) = scorer.open([[1, 2]])
    with monkeypatch.context() as patch:
        patch.setattr(step_graph.torch, "empty", Mock(side_effect=MemoryError("pinned memory")))
        with pytest.raises(MemoryError):
            scorer.score([ScoreRow(state, (), [7, 8])])
    (answer,) = scorer.score([ScoreRow(state, (), [7, 9])])
    assert answer.candidate_logits.tolist() == [7.0, 9.0]


def test_fewer_rows_leave_nothing_of_the_step_before(scorer: TorchScorer, sent: list[dict[str, Any]]) -> None:
    states = scorer.open([[1, 2], [3], [4], [5]])
    answers = scorer.score([ScoreRow(state, (), [7, 8]) for state in states])
    scorer.score([ScoreRow(answer.state, [7], [5, 6]) for answer in answers])
    scorer.score([ScoreRow(state, (), [7, 8]) for state in states[:3]])
    last = sent[-1]
    assert last["lengths"].tolist() == [2, 1, 1, 0]
    assert not last["promotions"].any()


def test_only_a_long_prefix_takes_the_whole_table(
    scorer: TorchScorer, sent: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graph, "SHORT", 64)
    for length in (64, 65):
        (state,) = scorer.open([[7] * length])
        scorer.score([ScoreRow(state, (), [7])])
    size = scorer.pool.block_size
    assert [step["tables"].shape[1] for step in sent] == [64 // size, scorer.context // size]
    assert [step["long"] for step in sent] == [False, True]


@pytest.mark.parametrize("bad", [-1, 1 << 31, 1 << 70])
def test_an_id_that_is_none_is_refused_as_anywhere(scorer: TorchScorer, sent: list[Any], bad: int) -> None:
    (state,) = scorer.open([[1, 2]])
    with pytest.raises(InvalidRequestError, match="candidates must be in"):
        scorer.score([ScoreRow(state, (), [5, bad])])
    with pytest.raises(InvalidRequestError, match="candidates must be in"):
        scorer.score([ScoreRow(state, (), [5, scorer.vocab_size])])
    (answer,) = scorer.score([ScoreRow(state, (), [5])])  # nothing has happened to the state
    assert answer.candidate_logits.tolist() == [5.0]
    # Nor where a token was to be appended, and was written before the ids were looked at.
    counted = scorer.stats.forwards, scorer.stats.promoted
    with pytest.raises(InvalidRequestError, match="candidates must be in"):
        scorer.score([ScoreRow(answer.state, [5], [6, bad])])
    assert (scorer.stats.forwards, scorer.stats.promoted) == counted
    (again,) = scorer.score([ScoreRow(answer.state, [5], [6])])
    assert (again.state.length, again.logits.tolist(), again.candidate_logits.tolist()) == (3, [5.0], [6.0])
    assert (sent[-1]["lengths"].tolist(), bool(sent[-1]["promotions"].any())) == ([3], True)
