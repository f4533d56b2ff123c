"""Blocks of prefix states, torch and ONNX Runtime alike: shared, copied out, and loaded into another pool."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lenvm.errors import PoolExhaustedError
from lenvm.modeling import LengthValueModel
from lenvm.scoring import OnnxModel, OnnxScorer, ScoreRow, TorchScorer

Make = Callable[..., Any]


@pytest.fixture(params=["torch", "onnx"])
def make(request: pytest.FixtureRequest, tiny_model: LengthValueModel, tiny_export: Path) -> Make:
    if request.param == "torch":
        return lambda **options: TorchScorer(tiny_model, **options)
    model = OnnxModel(tiny_export, threads=1)
    return lambda **options: OnnxScorer(model, **options)


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


def close(score: Any, wanted: Any) -> None:
    z, bins = wanted
    np.testing.assert_allclose(score.logits[-1], z[-1], atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(score.bin_logprobs[-1], bins[-1], atol=2e-5, rtol=1e-5)


def test_only_full_blocks_are_shared(make: Make) -> None:
    scorer = make()
    size = scorer.layout.tokens
    counts = [len(scorer.blocks(scorer.open([ids(0, n)])[0])) for n in (1, size - 1, size, size + 1, 3 * size)]
    assert counts == [0, 0, 1, 1, 3]
    (state,) = scorer.open([ids(0, 3 * size)])
    assert len(scorer.blocks(state, 2)) == 1
    assert scorer.blocks(state, 3) == []


def test_another_prefix_goes_on_from_shared_blocks(make: Make, full_forward: Any) -> None:
    scorer = make()
    size = scorer.layout.tokens
    common, ends = ids(1, 2 * size), [ids(2, 5), ids(3, size + 1)]
    (first,) = scorer.open([common + ids(4, 3)])
    blocks = scorer.blocks(first)
    first.close()
    del first
    gc.collect()
    tokens = scorer.stats.tokens
    states = [scorer.join(blocks) for _ in ends]
    assert [state.length for state in states] == [2 * size] * 2
    scores = scorer.score([ScoreRow(state, end, candidates=[7, 9]) for state, end in zip(states, ends, strict=True)])
    assert scorer.stats.tokens - tokens == sum(map(len, ends)) + 4
    for score, end in zip(scores, ends, strict=True):
        close(score, full_forward(common + end))
        z, _ = full_forward([*common, *end, 9])
        np.testing.assert_allclose(score.candidate_logits[1], z[-1], atol=2e-5, rtol=1e-5)


def test_blocks_travel_to_another_pool_bit_by_bit(make: Make, full_forward: Any) -> None:
    here, there = make(), make()
    size = here.layout.tokens
    text = ids(5, 3 * size + 4)
    (state,) = here.open([text])
    there.open([ids(6, 40)])  # so that the numbers of the blocks differ
    payloads = here.dump(here.blocks(state))
    assert [payload.nbytes for payload in payloads] == [here.layout.nbytes] * 3
    assert here.layout == there.layout
    loaded = there.load([payload.copy() for payload in payloads])
    for again, payload in zip(there.dump(loaded), payloads, strict=True):
        assert again.tobytes() == payload.tobytes()
    (score,) = there.score([ScoreRow(there.join(loaded), text[3 * size :])])
    assert score.cached_tokens == 3 * size
    close(score, full_forward(text))


def test_what_nobody_holds_is_free_again(make: Make) -> None:
    scorer = make()
    size = scorer.layout.tokens
    (state,) = scorer.open([ids(7, 2 * size)])
    blocks = scorer.blocks(state)
    loaded = scorer.load(scorer.dump(blocks))
    joined = scorer.join(loaded)
    used = scorer.pool.used_blocks * scorer.pool.block_size
    assert used == 4 * size
    del state, blocks, loaded
    gc.collect()
    assert scorer.pool.used_blocks * scorer.pool.block_size == 2 * size
    joined.close()
    del joined
    gc.collect()
    assert scorer.pool.used_blocks == 0


def test_no_room_to_load_leaves_nothing_behind(make: Make) -> None:
    scorer = make(pool_tokens=96)
    size = scorer.layout.tokens
    (state,) = scorer.open([ids(8, 2 * size)])
    payloads = scorer.dump(scorer.blocks(state))
    used = scorer.pool.used_blocks
    with pytest.raises(PoolExhaustedError):
        scorer.load(payloads)
    gc.collect()
    assert scorer.pool.used_blocks == used


def test_appending_to_a_joined_state_leaves_the_blocks_alone(make: Make) -> None:
    scorer = make()
    size = scorer.layout.tokens
    (state,) = scorer.open([ids(9, size)])
    blocks = scorer.blocks(state)
    before = scorer.dump(blocks)[0].tobytes()
    for seed in range(3):
        scorer.score([ScoreRow(scorer.join(blocks), ids(seed, 3), candidates=[5])])
    assert scorer.dump(blocks)[0].tobytes() == before
