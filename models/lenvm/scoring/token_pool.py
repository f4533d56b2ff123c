"""Slots for the keys and values of single tokens, shared by reference count. NumPy only."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import PoolExhaustedError

__all__ = ["Slots", "TokenPool"]

Slots = NDArray[np.int64]


class TokenPool:
    """Hands out slots. A prefix is the list of its tokens' slots, so that sharing, branching and promoting a candidate
    copy nothing.

    Slot 0 is never handed out: padded places read it. Not thread-safe but for :meth:`release`, which finalizers call
    from whatever thread collects garbage. Counts are named as in ``lenvm.paged.BlockPool``: a block is one token.

    Args:
        max_blocks: slots, the one that is never handed out included. The pool begins small and doubles up to it.
    """

    block_size = 1

    def __init__(self, max_blocks: int, *, initial_blocks: int = 2048) -> None:
        self.max_blocks = max_blocks
        self.num_blocks = min(initial_blocks, max_blocks)
        self._references = np.zeros(self.num_blocks, dtype=np.int32)
        self._free = np.arange(self.num_blocks - 1, 0, -1, dtype=np.int64)  # a stack, its top at the end
        self._released: deque[Slots] = deque()

    @property
    def free_blocks(self) -> int:
        """Slots that can still be handed out, growth included."""
        self._settle()
        return len(self._free) + self.max_blocks - self.num_blocks

    @property
    def used_blocks(self) -> int:
        """Slots that somebody holds."""
        self._settle()
        return self.num_blocks - 1 - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Slots of so many tokens."""
        return tokens

    def allocate(self, count: int) -> Slots:
        """``count`` slots with one reference each.

        Raises:
            PoolExhaustedError: fewer are left; nothing is handed out.
        """
        if count > self.free_blocks:
            raise PoolExhaustedError(
                f"the pool has room for {self.free_blocks} tokens but {count} are needed: "
                "close states, score fewer rows at once or raise the pool size"
            )
        while count > len(self._free):
            self._grow()
        at = len(self._free) - count
        slots, self._free = self._free[at:].copy(), self._free[:at]
        self._references[slots] = 1
        return slots

    def retain(self, slots: Slots) -> None:
        """One reference more for each of these, which are all different."""
        self._references[slots] += 1

    def release(self, slots: Slots) -> None:
        """One reference less for each of these, which are all different; done when the owner next looks."""
        self._released.append(slots)

    def _settle(self) -> None:
        freed = []
        while self._released:
            slots = self._released.popleft()
            self._references[slots] -= 1
            freed.append(slots[self._references[slots] == 0])
        if freed:
            self._free = np.concatenate([self._free, *freed])

    def _grow(self) -> None:
        grown = min(2 * self.num_blocks, self.max_blocks)
        added = np.arange(grown - 1, self.num_blocks - 1, -1, dtype=np.int64)
        self._free = np.concatenate([added, self._free])
        self._references = np.concatenate([self._references, np.zeros(len(added), dtype=np.int32)])
        self.num_blocks = grown
