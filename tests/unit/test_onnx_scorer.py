"""The ONNX Runtime scorer on an exported tiny model, against a plain full forward of the same tokens."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lenvm.errors import ArtifactError, ContextTooLongError, InvalidRequestError, PoolExhaustedError, StateClosedError
from lenvm.scoring import OnnxModel, OnnxScorer, Scorer, ScoreRow, onnx_scorer

RNG = np.random.default_rng(3)


def ids(count: int) -> list[int]:
    return RNG.integers(3, 128, count).tolist()


@pytest.fixture(scope="module")
def model(tiny_export: Path) -> OnnxModel:
    return OnnxModel(tiny_export, threads=1)


@pytest.fixture
def scorer(model: OnnxModel) -> OnnxScorer:
    return OnnxScorer(model)


def close(got: Any, want: Any) -> None:
    # Relative as well: other kernels sum in another order, and unlikely bins have large log-probabilities.
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


def test_it_is_a_scorer(scorer: OnnxScorer) -> None:
    same: Scorer = scorer  # for the type checker
    assert (same.context, same.vocab_size, same.gamma) == (512, 128, 0.99)
    assert same.bins is not None
    assert same.bins.cap == 64


def test_a_ragged_batch_of_prefixes_costs_one_forward(scorer: OnnxScorer, full_forward: Any) -> None:
    prefixes = [ids(n) for n in (1, 7, 8, 9, 40)]
    states = scorer.open(prefixes)
    assert scorer.stats.forwards == 1
    assert scorer.stats.tokens == sum(map(len, prefixes))
    for prefix, state in zip(prefixes, states, strict=True):
        z, bins = full_forward(prefix)
        close(state.logit, z[-1])
        close(state.bin_logprobs, bins[-1])


def test_decoding_steps_are_one_forward_of_the_candidates(scorer: OnnxScorer, full_forward: Any) -> None:
    texts = [ids(n) for n in (1, 8, 21)]
    states: list[Any] = scorer.open(texts)
    chosen: list[list[int]] = [[], [], []]
    forwards, tokens = scorer.stats.forwards, scorer.stats.tokens
    for step in range(12):
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
    assert scorer.stats.forwards - forwards == 12
    assert scorer.stats.tokens - tokens == 12 * 3 * 5
    assert scorer.stats.promoted == 11 * 3


def test_handles_are_immutable_and_siblings_do_not_meet(scorer: OnnxScorer, full_forward: Any) -> None:
    prefix = ids(11)
    (parent,) = scorer.open([prefix])
    (scored,) = scorer.score([ScoreRow(parent, candidates=[20, 21])])
    tails = [[20], [21, 22, 23], [24], [20]]
    parents = [scored.state, scored.state, parent, parent]
    children = scorer.score([ScoreRow(state, tail) for state, tail in zip(parents, tails, strict=True)])
    scorer.score([ScoreRow(parent, candidates=[50, 51])])
    grandchildren = scorer.score([ScoreRow(child.state, [30 + at], [40]) for at, child in enumerate(children)])
    for at, (tail, child, grandchild) in enumerate(zip(tails, children, grandchildren, strict=True)):
        close(child.state.logit, full_forward(prefix + tail)[0][-1])
        close(grandchild.candidate_logits[0], full_forward([*prefix, *tail, 30 + at, 40])[0][-1])
    assert scorer.score([ScoreRow(scored.state, [20])])[0].state.logit == children[0].state.logit
    assert scorer.stats.promoted == 3


def test_values_of_every_token_and_of_a_state_that_goes_on(scorer: OnnxScorer, full_forward: Any) -> None:
    prompt, completion = ids(6), ids(12)
    score = scorer.token_values(prompt, completion)
    z, bins = full_forward(prompt + completion)
    close(score.logits, z[5:])
    close(score.bin_logprobs, bins[5:])
    more = ids(4)
    (after,) = scorer.score([ScoreRow(score.state, more, [9], values_from=1)])
    close(after.logits, full_forward(prompt + completion + more)[0][-3:])
    (nothing,) = scorer.score([ScoreRow(after.state)])
    assert nothing.logits.tolist() == [after.state.logit]


def test_a_long_prompt_goes_through_in_pieces(model: OnnxModel, full_forward: Any) -> None:
    beats: list[int] = []
    scorer = OnnxScorer(model, token_budget=16, on_forward=lambda: beats.append(1))
    texts = [ids(50), ids(3), ids(17)]
    rows = [
        ScoreRow(append=texts[0], candidates=[5, 6], values_from=14),
        ScoreRow(append=texts[1]),
        ScoreRow(append=texts[2]),
    ]
    long, short, middle = scorer.score(rows)
    close(long.logits, full_forward(texts[0])[0][14:])
    close(long.candidate_logits, [full_forward([*texts[0], token])[0][-1] for token in (5, 6)])
    close(short.logits[-1], full_forward(texts[1])[0][-1])
    close(middle.logits[-1], full_forward(texts[2])[0][-1])
    assert len(beats) == scorer.stats.forwards > 4


def test_more_tokens_than_the_context_are_more_than_one_forward(model: OnnxModel, full_forward: Any) -> None:
    scorer = OnnxScorer(model)
    assert model.context < 600
    prompts = [[3 + (7 * i + j) % 100 for j in range(300)] for i in range(2)]
    for prompt, answer in zip(prompts, scorer.score([ScoreRow(append=p) for p in prompts]), strict=True):
        np.testing.assert_allclose(answer.logits, full_forward(prompt)[0][-1:], atol=1e-4)
    longest = [3 + j % 100 for j in range(model.context - 1)]
    (answer,) = scorer.score([ScoreRow(append=longest, candidates=list(range(3, 19)))])
    np.testing.assert_allclose(answer.candidate_logits[5], full_forward([*longest, 8])[0][-1], atol=1e-4)


def test_rows_of_very_different_shape_part(
    scorer: OnnxScorer, full_forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [ids(n) for n in (60, 2, 55, 3)]
    states = scorer.open(texts)
    monkeypatch.setattr(onnx_scorer, "_CELLS", 200)
    forwards = scorer.stats.forwards
    rows = [*(ScoreRow(state, candidates=[7]) for state in states), ScoreRow(append=ids(40), candidates=[7])]
    for text, answer in zip(texts, scorer.score(rows), strict=False):
        close(answer.candidate_logits[0], full_forward([*text, 7])[0][-1])
    assert scorer.stats.forwards - forwards == 3


def test_the_pool_grows_and_keeps_what_it_holds(model: OnnxModel, full_forward: Any) -> None:
    scorer = OnnxScorer(model)
    prefix = ids(9)
    (state,) = scorer.open([prefix])
    before = scorer.pool.num_blocks
    others = [scorer.open([ids(500)])[0] for _ in range(6)]
    assert scorer.pool.num_blocks > before
    (answer,) = scorer.score([ScoreRow(state, candidates=[5])])
    close(answer.candidate_logits[0], full_forward([*prefix, 5])[0][-1])
    assert len(others) == 6


def test_slots_come_back(scorer: OnnxScorer) -> None:
    states = scorer.open([ids(30), ids(3)])
    answers = scorer.score([ScoreRow(state, candidates=[5, 6]) for state in states])
    assert scorer.pool.used_blocks == 33 + 4
    for state in states:
        state.close()
        state.close()  # twice is harmless
    assert scorer.pool.used_blocks == 33 + 4  # the answers' states share them
    answers[0].state.scored = None  # type: ignore[attr-defined]
    assert scorer.pool.used_blocks == 33 + 2
    del states, answers
    gc.collect()
    assert scorer.pool.used_blocks == 0


def test_a_full_pool_is_a_typed_error_and_leaves_nothing_behind(model: OnnxModel) -> None:
    scorer = OnnxScorer(model, pool_tokens=64)
    with pytest.raises(PoolExhaustedError):
        scorer.open([ids(30), ids(30), ids(30)])
    assert scorer.pool.used_blocks == 0
    assert scorer.open([ids(60)])[0].length == 60


def test_a_failed_forward_leaves_nothing_behind(scorer: OnnxScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    (state,) = scorer.open([ids(5)])

    def failing(feeds: Any) -> Any:
        raise RuntimeError("no more")

    monkeypatch.setattr(scorer._store, "forward", failing)
    with pytest.raises(RuntimeError, match="no more"):
        scorer.score([ScoreRow(state, ids(3), ids(4)), ScoreRow(append=ids(8))])
    assert scorer.pool.used_blocks == 5


def test_bad_rows(scorer: OnnxScorer, model: OnnxModel) -> None:
    (state,) = scorer.open([ids(4)])
    (foreign,) = OnnxScorer(model).open([ids(4)])
    for row, error in (
        (ScoreRow(), InvalidRequestError),
        (ScoreRow(append=[128]), InvalidRequestError),
        (ScoreRow(state, candidates=[-1]), InvalidRequestError),
        (ScoreRow(foreign, [3]), InvalidRequestError),
        (ScoreRow(append=[3, 4], values_from=2), InvalidRequestError),
        (ScoreRow(append=ids(512), candidates=[3]), ContextTooLongError),
    ):
        with pytest.raises(error):
            scorer.score([row])
    state.close()
    with pytest.raises(StateClosedError):
        scorer.score([ScoreRow(state, [3])])


def test_devices(tiny_export: Path, tmp_path: Path) -> None:
    for device in ("tpu", "cpu:1", "cuda:x"):
        with pytest.raises(InvalidRequestError, match="unknown device"):
            OnnxModel(tiny_export, device=device)
    with pytest.raises(ArtifactError, match="is no LenVM checkpoint"):
        OnnxModel(tmp_path)
