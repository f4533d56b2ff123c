"""L1: the engine's own blocks by key, the least recently used ones going first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lenvm.scoring import StateBlock
from lenvm_service.prefix_cache.chain import ChainBlock

__all__ = ["BlockCache"]


class BlockCache:
    """Which blocks of which prefixes the pool holds. Owned by the engine's thread; ``in`` may be asked from any.

    Args:
        tick: the clock of last uses, shared with the sessions, so that both give way in one order.
    """

    def __init__(self, tick: list[int] | None = None) -> None:
        self._tick = [0] if tick is None else tick
        self._blocks: OrderedDict[bytes, tuple[StateBlock, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    @property
    def oldest(self) -> int | None:
        """When the block that would go next was last used; None where there is none."""
        for _, used in self._blocks.values():
            return used
        return None

    def match(self, blocks: Sequence[ChainBlock]) -> list[StateBlock]:
        """The longest run of held blocks from the first one on."""
        count = 0
        while count < len(blocks) and blocks[count].key in self._blocks:
            count += 1
        found = [self._blocks[block.key][0] for block in blocks[:count]]
        self._tick[0] += 1
        # The last one first: a block is of use only behind its parents, which must outlive it.
        for block, held in zip(reversed(blocks[:count]), reversed(found), strict=True):
            self._blocks[block.key] = held, self._tick[0]
            self._blocks.move_to_end(block.key)
        return found

    def get(self, key: bytes) -> StateBlock | None:
        """The block, if it is held. That is no use of it."""
        found = self._blocks.get(key)
        return None if found is None else found[0]

    def put(self, blocks: Sequence[ChainBlock], held: Sequence[StateBlock]) -> None:
        """Keep blocks, aligned with ``held``, that follow one another."""
        self._tick[0] += 1
        kept, now = self._blocks, self._tick[0]
        for block, state_block in zip(reversed(blocks), reversed(held), strict=True):
            key = block.key
            if key in kept:  # a new one stands at the end by itself
                kept.move_to_end(key)
            kept[key] = state_block, now

    def evict(self) -> bool:
        """Let go of the block that was used longest ago; False where there is none."""
        if not self._blocks:
            return False
        self._blocks.popitem(last=False)
        return True

    def clear(self) -> None:
        """Let go of all."""
        self._blocks.clear()
