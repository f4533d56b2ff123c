"""The pool of keys and values: reserved or growing, blocks hold what was written, and are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lenvm.errors import PoolExhaustedError
from lenvm.paged import BlockPool, PoolShape
from lenvm.paged import pool as module

SHAPE = PoolShape(layers=3, kv_heads=2, head_dim=8)
BLOCK = (2, 3, 2, 4, 8)  # keys and values, layers, heads, tokens, numbers


def make(**options: Any) -> BlockPool:
    return BlockPool(SHAPE, block_size=4, **{"max_blocks": 33, **options})


@pytest.fixture(params=["reserved", "growing", "refused"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BlockPool:
    if request.param == "growing":
        return make(initial_blocks=4)
    if request.param == "refused":

        def refuse(nbytes: int) -> None:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(module, "reserved", refuse)
        return make(max_blocks=200)
    return make()


def test_blocks_keep_what_they_hold(pool: BlockPool) -> None:
    stored = torch.randn(20, *BLOCK)
    blocks = []
    for one in stored:
        blocks += pool.allocate(1)
        pool.restore(blocks[-1:], one[None])
    assert torch.equal(pool.read(blocks), stored)
    (fresh,) = pool.allocate(1)
    assert not pool.read([fresh]).any()  # zeros: what is masked is multiplied by nought
    pool.copy([(blocks[3], fresh)])
    assert torch.equal(pool.read([fresh])[0], stored[3])
    slots = [(blocks[0], 1), (blocks[7], 3)]
    keys, values = torch.randn(2, SHAPE.layers, 2, 2, 8)
    pool.write(slots, keys, values)
    for at, (block, offset) in enumerate(slots):
        both = pool.read([block])[0, :, :, :, offset]
        assert torch.equal(both[0], keys[:, at])
        assert torch.equal(both[1], values[:, at])


def test_blocks_are_counted(pool: BlockPool) -> None:
    free = pool.free_blocks
    assert free == pool.max_blocks - 1  # block 0 is nobody's
    blocks = pool.allocate(free)
    assert sorted(blocks) == list(range(1, free + 1))
    assert (pool.used_blocks, pool.free_blocks) == (free, 0)
    with pytest.raises(PoolExhaustedError):
        pool.allocate(1)
    pool.retain(blocks[:2])
    pool.release(blocks)
    assert (pool.used_blocks, pool.free_blocks) == (2, free - 2)
    pool.release(blocks[:2])
    assert (pool.used_blocks, pool.free_blocks) == (0, free)


def test_a_pool_on_the_cpu_never_moves() -> None:
    """Growing would copy all that is held while a request waits."""
    pool = make(max_blocks=1000, dtype=torch.bfloat16)
    places = [tensor.data_ptr() for tensor in (*pool.keys, *pool.values)]
    for _ in range(999):
        pool.allocate(1)
    assert [tensor.data_ptr() for tensor in (*pool.keys, *pool.values)] == places
    assert pool.keys[0].dtype == torch.bfloat16


def test_a_large_pool_takes_no_memory_before_it_is_written() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1])

    before = resident()
    pool = make(max_blocks=1 << 20)  # 1.5 GiB
    assert pool.num_blocks == 1 << 20
    assert (resident() - before) * 4096 < 512 << 20  # its lists take some
