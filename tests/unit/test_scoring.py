"""The torch scorer against a plain full forward of the same tokens."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from lenvm.errors import ContextTooLongError, InvalidRequestError, PoolExhaustedError, StateClosedError
from lenvm.scoring import ScoreRow, TorchScorer

RNG = np.random.default_rng(3)


def ids(count: int) -> list[int]:
    return RNG.integers(3, 128, count).tolist()


@pytest.fixture
def scorer(tiny_model: Any) -> TorchScorer:
    return TorchScorer(tiny_model, block_size=8)


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


def test_a_ragged_batch_of_prefixes_costs_one_forward(scorer: TorchScorer, full_forward: Any) -> None:
    prefixes = [ids(n) for n in (1, 7, 8, 9, 40)]
    states = scorer.open(prefixes)
    assert scorer.stats.forwards == 1
    assert scorer.stats.tokens == sum(map(len, prefixes))
    for prefix, state in zip(prefixes, states, strict=True):
        z, bins = full_forward(prefix)
        close(state.logit, z[-1])
        close(state.bin_logprobs, bins[-1])


def test_decoding_steps_are_one_forward_of_the_candidates(scorer: TorchScorer, full_forward: Any) -> None:
    texts = [ids(n) for n in (1, 8, 21)]
    states: list[Any] = scorer.open(texts)
    chosen: list[list[int]] = [[], [], []]
    forwards, tokens = scorer.stats.forwards, scorer.stats.tokens
    for step in range(20):
        rows = [
            ScoreRow(state, append, RNG.choice(125, 5, replace=False) + 3)
            for state, append in zip(states, chosen, strict=True)
        ]
        answers = scorer.score(rows)
        for at, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            texts[at] += list(row.append)
            close(answer.logits[-1], full_forward(texts[at])[0][-1])
            for k, candidate in enumerate(row.candidates):
                z, bins = full_forward([*texts[at], int(candidate)])
                close(answer.candidate_logits[k], z[-1])
                assert answer.candidate_bin_logprobs is not None
                close(answer.candidate_bin_logprobs[k], bins[-1])
            assert answer.cached_tokens == answer.state.length == len(texts[at])
        states = [answer.state for answer in answers]
        chosen = [[int(row.candidates[(step + at) % 5])] for at, row in enumerate(rows)]
    assert scorer.stats.forwards - forwards == 20
    assert scorer.stats.tokens - tokens == 20 * 3 * 5
    assert scorer.stats.promoted == 19 * 3


def test_a_token_that_was_no_candidate_is_computed(scorer: TorchScorer, full_forward: Any) -> None:
    prefix = ids(5)
    (state,) = scorer.open([prefix])
    (scored,) = scorer.score([ScoreRow(state, candidates=[10, 11])])
    (answer,) = scorer.score([ScoreRow(scored.state, [12], [13])])
    close(answer.candidate_logits[0], full_forward([*prefix, 12, 13])[0][-1])
    assert scorer.stats.promoted == 0
    assert answer.cached_tokens == 5
    assert answer.state.length == 6


def test_handles_are_immutable_and_siblings_do_not_meet(scorer: TorchScorer, full_forward: Any) -> None:
    prefix = ids(11)  # ends inside a block, so that children share a half-filled one
    (parent,) = scorer.open([prefix])
    (scored,) = scorer.score([ScoreRow(parent, candidates=[20, 21])])
    children = scorer.score(
        [
            ScoreRow(scored.state, [20]),
            ScoreRow(scored.state, [21, 22, 23]),
            ScoreRow(parent, [24]),
            ScoreRow(parent, [20]),
        ]
    )
    # Looking again without appending must not let a later child write over an earlier one.
    scorer.score([ScoreRow(parent, candidates=[50, 51])])
    scorer.score([ScoreRow(parent, [60])])
    grandchildren = scorer.score([ScoreRow(child.state, [30 + at], [40]) for at, child in enumerate(children)])
    tails = [[20], [21, 22, 23], [24], [20]]
    for at, (tail, child, grandchild) in enumerate(zip(tails, children, grandchildren, strict=True)):
        close(child.state.logit, full_forward(prefix + tail)[0][-1])
        close(grandchild.candidate_logits[0], full_forward([*prefix, *tail, 30 + at, 40])[0][-1])
    again = scorer.score([ScoreRow(scored.state, [20])])[0]
    assert again.state.logit == children[0].state.logit


def test_values_of_every_token(scorer: TorchScorer, full_forward: Any) -> None:
    prompt, completion = ids(6), ids(12)
    score = scorer.token_values(prompt, completion)
    z, bins = full_forward(prompt + completion)
    close(score.logits, z[5:])
    close(score.bin_logprobs, bins[5:])


def test_blocks_come_back(scorer: TorchScorer) -> None:
    states = scorer.open([ids(30), ids(3)])
    answers = scorer.score([ScoreRow(state, candidates=[5, 6]) for state in states])
    assert scorer.pool.used_blocks > 0
    for state in states:
        state.close()
        state.close()  # twice is harmless
    del states, answers
    gc.collect()
    assert scorer.pool.used_blocks == 0


def test_a_large_call_is_split_by_token_budget(tiny_model: Any) -> None:
    prefixes = [ids(n) for n in (30, 2, 17, 29, 5)]
    whole, split = TorchScorer(tiny_model), TorchScorer(tiny_model, token_budget=40)
    for a, b in zip(whole.open(prefixes), split.open(prefixes), strict=True):
        close(a.logit, b.logit)
    assert whole.stats.forwards == 1
    assert split.stats.forwards > 1


def test_a_full_pool_is_a_typed_error_and_leaves_nothing_behind(tiny_model: Any) -> None:
    scorer = TorchScorer(tiny_model, pool_tokens=64, block_size=8)
    with pytest.raises(PoolExhaustedError, match="free blocks"):
        scorer.open([ids(30), ids(30), ids(30)])
    assert scorer.pool.used_blocks == 0
    assert scorer.open([ids(60)])[0].length == 60


def test_bad_rows(scorer: TorchScorer, tiny_model: Any) -> None:
    (state,) = scorer.open([ids(4)])
    (foreign,) = TorchScorer(tiny_model).open([ids(4)])
    for row, error in (
        (ScoreRow(), InvalidRequestError),
        (ScoreRow(append=[128]), InvalidRequestError),
        (ScoreRow(append=[-1]), InvalidRequestError),
        (ScoreRow(state, candidates=[500]), InvalidRequestError),
        (ScoreRow(foreign, [3]), InvalidRequestError),
        (ScoreRow(append=[3, 4], values_from=2), InvalidRequestError),
        (ScoreRow(append=ids(513)), ContextTooLongError),
        (ScoreRow(append=ids(512), candidates=[3]), ContextTooLongError),
    ):
        with pytest.raises(error):
            scorer.score([row])
    state.close()
    with pytest.raises(StateClosedError):
        scorer.score([ScoreRow(state, [3])])


def test_check_says_what_score_would(scorer: TorchScorer) -> None:
    scorer.check(ScoreRow(append=[3], candidates=[4]))
    with pytest.raises(InvalidRequestError):
        scorer.check(ScoreRow(append=[128]))
    assert scorer.stats.forwards == 0


def test_a_long_lived_handle_does_not_keep_its_call_alive(scorer: TorchScorer, full_forward: Any) -> None:
    prefixes = [ids(9 + n) for n in range(8)]
    answers = scorer.score([ScoreRow(append=prefix, candidates=[20, 21, 22]) for prefix in prefixes])
    survivors: list[Any] = [answers[2].state, answers[5].state]
    capture = survivors[0].scored.capture
    assert capture is survivors[1].scored.capture
    assert capture.keys.shape[1] == 24
    for answer in answers:
        if answer.state not in survivors:
            answer.state.close()
    del answers, answer
    gc.collect()
    scorer.open([ids(3)])  # the next call tidies up
    assert capture.keys.shape[1] == capture.values.shape[1] == 6
    promoted = scorer.score([ScoreRow(state, [21], [30]) for state in survivors])
    assert scorer.stats.promoted == 2
    for prefix, answer in zip((prefixes[2], prefixes[5]), promoted, strict=True):
        close(answer.logits[-1], full_forward([*prefix, 21])[0][-1])
        close(answer.candidate_logits[0], full_forward([*prefix, 21, 30])[0][-1])
    survivors[0].close()
    assert survivors[0].scored is None


def test_promotions_of_several_calls_meet_in_one(scorer: TorchScorer, full_forward: Any) -> None:
    prefixes = [ids(n) for n in (5, 8, 15)]
    # Each was scored in a call of its own, and is gone on with twice, so that blocks are copied as well.
    states: list[Any] = [scorer.score([ScoreRow(append=p, candidates=[20, 21])])[0].state for p in prefixes]
    rows = [ScoreRow(state, [token], [40]) for state in states for token in (20, 21, 60)]
    forwards = scorer.stats.forwards
    texts = [[*prefix, token, 40] for prefix in prefixes for token in (20, 21, 60)]
    for text, answer in zip(texts, scorer.score(rows), strict=True):
        close(answer.candidate_logits[0], full_forward(text)[0][-1])
    assert scorer.stats.forwards == forwards + 1
    assert scorer.stats.promoted == 6


def test_prompts_and_decoding_steps_part_where_the_kernel_would_be_lost(
    scorer: TorchScorer, full_forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lenvm.scoring.torch_scorer._STEP_ROWS", 2)
    prefixes = [ids(n) for n in (5, 8)]
    states = scorer.open(prefixes)
    joining = ids(6)
    rows = [ScoreRow(states[0], (), [9]), ScoreRow(None, joining, [9]), ScoreRow(states[1], (), [9])]
    forwards = scorer.stats.forwards
    scorer.score(rows)
    assert scorer.stats.forwards == forwards + 1
    works: list[Any] = []
    scorer._begin(rows, works)
    monkeypatch.setattr(type(scorer.pool), "has_step_kernel", True)
    assert list(scorer._chunks(works)) == [[1], [0, 2]]
    monkeypatch.undo()


def test_a_gpu_that_records_no_graph_is_served_without(
    scorer: TorchScorer, full_forward: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from lenvm.cuda_graph import GraphError

    class Refusing:
        def fits(self, rows: int, width: int) -> bool:
            return True

        def launch(self, *_: Any) -> None:
            raise GraphError("not here")

    prefix = ids(6)
    (state,) = scorer.open([prefix])
    scorer._steps = Refusing()  # type: ignore[assignment]
    calls: list[int] = []
    with caplog.at_level("WARNING"):
        (answer,) = scorer.score([ScoreRow(state, (), [9, 10])], lambda: calls.append(1))
    assert scorer._steps is None
    assert calls == [1]
    assert "not here" in caplog.text
    close(answer.candidate_logits[1], full_forward([*prefix, 10])[0][-1])


def test_what_is_done_meanwhile_is_done_once_and_before_the_numbers_are_there(scorer: TorchScorer) -> None:
    import torch

    events: list[str] = []

    class Numbers:
        numbers = np.full((1, 2, 1 + scorer.bins.size), np.nan)  # type: ignore[union-attr]
        width, means = 2, None

        def kept(self) -> torch.Tensor:
            return torch.zeros(2, 1, 2, 1, 1)

        def wait(self) -> None:
            events.append("wait")
            self.numbers[:] = 0.5

    class Steps:
        def fits(self, rows: int, width: int) -> bool:
            return True

        def launch(self, *_: Any) -> Numbers:
            events.append("launch")
            return Numbers()

    (state,) = scorer.open([ids(6)])
    scorer._steps = Steps()  # type: ignore[assignment]
    (answer,) = scorer.score([ScoreRow(state, (), [9, 10])], lambda: events.append("meanwhile"))
    assert events == ["launch", "meanwhile", "wait"]
    assert list(answer.candidate_logits) == [0.5, 0.5]
    with pytest.raises(ZeroDivisionError):
        scorer.score([ScoreRow(state, (), [9, 10])], lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert events == ["launch", "meanwhile", "wait", "launch", "wait"]  # no step may begin before the last has ended
    scorer._steps = None
    scorer.score([ScoreRow(append=ids(5))], lambda: events.append("meanwhile"))
    assert events[5:] == ["meanwhile"]
