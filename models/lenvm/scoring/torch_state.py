"""Prefix states of the torch scorer: blocks of its pool, and what a state was last scored with."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.paged import BlockPool

__all__ = ["Capture", "Held", "Scored", "TorchState"]


class Capture:
    """Keys and values of all candidates of one forward, shared by the states that were scored in it.

    One tensor for the call: copies for each row would be most of a step's time on a GPU. So that one long-lived handle
    does not keep its whole call alive, the scorer compacts a capture that has lost half of its users.
    """

    __slots__ = ("__weakref__", "_addresses", "keys", "users", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values  # [layers, candidates of the call, kv_heads, head_dim]
        self.users: list[weakref.ref[Scored]] = []
        self._addresses: tuple[int, int, int, int] | None = None

    def left(self) -> list[Scored]:
        """The users that are still there."""
        return [user for reference in self.users if (user := reference()) is not None]

    def addresses(self) -> tuple[int, int, int, int]:
        """Of the first candidate's keys and values in the first layer; bytes from one candidate to the next, and
        elements from one layer to the next."""
        if self._addresses is None:
            keys, values = self.keys, self.values
            self._addresses = keys.data_ptr(), values.data_ptr(), keys.stride(1) * keys.itemsize, keys.stride(0)
        return self._addresses

    def compact(self, left: Sequence[Scored]) -> None:
        """Keep the candidates of the users that are left."""
        if not left:
            return
        kept = np.concatenate([user.first + np.arange(len(user.ids)) for user in left])
        at = torch.from_numpy(kept).to(self.keys.device)
        self.keys, self.values, self._addresses = self.keys[:, at], self.values[:, at], None
        self.users = [weakref.ref(user) for user in left]
        first = 0
        for user in left:
            user.first = first
            first += len(user.ids)
            user.logits = user.logits.copy()
            user.bin_logprobs = None if user.bin_logprobs is None else user.bin_logprobs.copy()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Scored:
    """Candidates that a state was last scored with, so that the one that is chosen need not be computed again."""

    ids: Sequence[int]
    logits: NDArray[np.floating[Any]]
    bin_logprobs: NDArray[np.floating[Any]] | None
    capture: Capture
    first: int  # of its candidates in the capture


class Held:
    """Blocks with a reference each, which go when nobody holds this any more. States of one length of blocks share it,
    so that a decoding step counts no references."""

    __slots__ = ("blocks", "pool")

    def __init__(self, pool: BlockPool, blocks: list[int]) -> None:
        self.pool, self.blocks = pool, blocks

    # Not weakref.finalize, which takes longer than all else that a row of a step costs.
    def __del__(self) -> None:
        self.pool.release(self.blocks)


class TorchState:
    """A prefix in the block pool: :class:`lenvm.scoring.PrefixState`."""

    __slots__ = ("__weakref__", "bin_logprobs", "held", "length", "logit", "pool", "scored")

    def __init__(self, held: Held, length: int, logit: float, bin_logprobs: NDArray[np.float64] | None) -> None:
        self.length, self.logit, self.bin_logprobs = length, logit, bin_logprobs
        self.pool = held.pool
        self.held: Held | None = held
        self.scored: Scored | None = None

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return self.held is None

    def close(self) -> None:
        """Give the blocks back; a second call does nothing."""
        self.held = self.scored = None
