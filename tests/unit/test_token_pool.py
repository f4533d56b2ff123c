"""Slots of single tokens: counted exactly, shared, given back."""

from __future__ import annotations

import numpy as np
import pytest

from lenvm.errors import PoolExhaustedError
from lenvm.scoring.token_pool import TokenPool


def test_slots_are_counted_and_come_back() -> None:
    pool = TokenPool(101, initial_blocks=8)
    first, second = pool.allocate(20), pool.allocate(30)
    assert len({0, *first, *second}) == 51  # all different, and slot 0 is nobody's
    assert (pool.used_blocks, pool.free_blocks) == (50, 50)
    assert pool.num_blocks >= 51
    pool.retain(first)
    pool.release(first)
    assert pool.used_blocks == 50
    pool.release(first)
    pool.release(second)
    assert (pool.used_blocks, pool.free_blocks) == (0, 100)
    assert set(pool.allocate(100)) == set(range(1, 101))


def test_a_full_pool_hands_out_nothing() -> None:
    pool = TokenPool(11)
    held = pool.allocate(6)
    with pytest.raises(PoolExhaustedError, match="room for 4 tokens but 5 are needed"):
        pool.allocate(5)
    assert pool.free_blocks == 4
    pool.release(held)
    assert len(pool.allocate(10)) == 10


def test_a_slot_is_never_held_twice() -> None:
    rng = np.random.default_rng(0)
    pool = TokenPool(200, initial_blocks=4)
    held: list[np.ndarray] = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            pool.release(held.pop(int(rng.integers(len(held)))))
        elif pool.free_blocks >= 15:
            held.append(pool.allocate(int(rng.integers(15))))
        slots = np.concatenate([np.zeros(1, dtype=np.int64), *held])
        assert len(np.unique(slots)) == len(slots)
        assert pool.used_blocks == len(slots) - 1
