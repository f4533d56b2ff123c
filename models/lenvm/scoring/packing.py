"""Rows of tokens as the inputs of the exported graph (``lenvm.export.graph``). NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Piece", "pack"]


@dataclass(frozen=True)
class Piece:
    """New tokens of one row of a forward.

    Attributes:
        tail: tokens that go on from the prefix; each sees the prefix and the tail up to itself.
        candidates: each sees the prefix, the whole tail and itself, at the position after the tail.
        slots: of prefix, tail and candidates, in this order.
        skipped: values are wanted from this tail token on, and of all candidates.
    """

    tail: Sequence[int]
    candidates: Sequence[int]
    slots: NDArray[np.int64]
    skipped: int

    @property
    def size(self) -> int:
        """New tokens."""
        return len(self.tail) + len(self.candidates)

    @property
    def prefix(self) -> int:
        """Tokens that are stored already."""
        return len(self.slots) - self.size

    @property
    def wanted(self) -> int:
        """Places whose values are wanted."""
        return self.size - self.skipped


def pack(pieces: Sequence[Piece]) -> dict[str, NDArray[Any]]:
    """The inputs of one forward but the keys and values; tokens are ordered row by row, tail before candidates."""
    sizes = np.array([piece.size for piece in pieces])
    tails = np.array([len(piece.tail) for piece in pieces])
    prefixes = np.array([piece.prefix for piece in pieces])
    skipped = np.array([piece.skipped for piece in pieces])
    total, width, keys = int(sizes.sum()), int(sizes.max()), int((prefixes + sizes).max())
    starts = np.cumsum(sizes) - sizes
    row = np.repeat(np.arange(len(pieces)), sizes)
    local = np.arange(total) - starts[row]
    tables = np.zeros((len(pieces), keys), dtype=np.int64)
    for at, piece in enumerate(pieces):
        tables[at, : len(piece.slots)] = piece.slots
    place = np.arange(width)
    wanted = np.flatnonzero(local >= skipped[row])
    return {
        "input_ids": np.concatenate([np.asarray([*p.tail, *p.candidates], dtype=np.int64) for p in pieces]),
        "positions": prefixes[row] + np.minimum(local, tails[row]),
        "write_slots": tables[row, prefixes[row] + local],
        "tables": tables,
        "mask": _mask(prefixes, tails, width, keys),
        "pad": np.where(place < sizes[:, None], starts[:, None] + place, 0),
        "places": row * width + local,
        # Nothing wanted (the middle of a long prompt): one place all the same, as some kernels take no empty tensors.
        "wanted": wanted if len(wanted) else np.zeros(1, dtype=np.int64),
    }


def _mask(prefixes: NDArray[Any], tails: NDArray[Any], width: int, keys: int) -> NDArray[np.bool_]:
    """The tree mask ``[B, T, C]``. A padded place sees something too: no row of the softmax may be empty."""
    query = np.arange(width)[None, :, None]
    key = np.arange(keys)[None, None, :] - prefixes[:, None, None]  # place among the row's own new tokens
    tail = tails[:, None, None]
    mask: NDArray[np.bool_] = (key < np.minimum(query + 1, tail)) | (key == query)
    return mask
