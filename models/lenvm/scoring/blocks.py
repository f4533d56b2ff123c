"""Blocks of a prefix state: what prefixes share, and what travels between replicas."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["BlockLayout", "StateBlock"]


@dataclass(frozen=True)
class BlockLayout:
    """How a block's keys and values lie in bytes. Engines whose layouts are equal understand each other's blocks.

    ``shape`` is ``(2, layers, kv_heads, tokens, head_dim)``, keys before values; ``dtype`` is of NumPy, or bfloat16;
    ``engine`` says what computed the numbers, which differ a little between engines.
    """

    engine: str
    dtype: str
    shape: tuple[int, int, int, int, int]

    @property
    def tokens(self) -> int:
        """Tokens in a block."""
        return self.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return prod(self.shape) * {"float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]


class StateBlock:
    """Keys and values of one full block of tokens in a scorer's pool, held until nobody refers to this any more.

    ``places``: the pool's own numbers, one block or one slot for each token.
    """

    __slots__ = ("__weakref__", "places", "pool")

    def __init__(self, pool: Any, places: Any) -> None:
        self.pool, self.places = pool, places

    # Not weakref.finalize, which takes longer than all else that keeping a block costs.
    def __del__(self) -> None:
        self.pool.release(self.places)
