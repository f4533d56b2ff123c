"""Keys and values of prefix states in fixed-size blocks, shared by reference count."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lenvm._pages import reserved
from lenvm.errors import PoolExhaustedError

__all__ = ["BlockPool", "PoolShape", "to_device"]


@dataclass(frozen=True)
class PoolShape:
    """What one token costs: ``layers x kv_heads x head_dim`` keys and as many values."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> PoolShape:
        """Read the shape from a Hugging Face decoder config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim)

    @property
    def suits_kernel(self) -> bool:
        """True if the Triton kernels can serve such heads."""
        return self.head_dim & (self.head_dim - 1) == 0

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that one token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


def to_device(array: Any, device: torch.device) -> torch.Tensor:
    """A NumPy array as a tensor there; the host does not wait for what a GPU is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class BlockPool:
    """``keys[layer]`` and ``values[layer]`` are ``[blocks, kv_heads, block_size, head_dim]``.

    Block 0 is never handed out: padded rows write and read there. A block may belong to several prefix states at once.
    Blocks are append-only: ``fork`` lets the first child of a state go on in its half-filled last block and gives every
    later child a copy (copy-on-write), so what a state refers to never changes.

    On the CPU the pool has its full size at once and takes memory as blocks are first written. On other devices, and
    where the system refuses that, it starts with ``initial_blocks`` and doubles: all that it holds is copied then, and
    a request waits. At full size the tensors never move, which CUDA graphs need, and all layers lie in one tensor, so
    that a copy or a write is one operation and not one for each layer.
    """

    def __init__(
        self,
        shape: PoolShape,
        *,
        max_blocks: int,
        initial_blocks: int | None = None,
        block_size: int = 32,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape = shape
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.device = torch.device(device)
        self.dtype = dtype
        # [layers, blocks, kv_heads, block_size, head_dim] twice, or None where the pool grows.
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None
        if initial_blocks is None and self.device.type == "cpu":
            with contextlib.suppress(OSError):
                self._whole = self._reserve(), self._reserve()
        self.num_blocks = max_blocks if self._whole is not None else min(initial_blocks or 64, max_blocks)
        if self.num_blocks == max_blocks and self._whole is None:
            self._whole = self._new(shape.layers, max_blocks), self._new(shape.layers, max_blocks)
        if self._whole is not None:
            self.keys, self.values = (list(tensor.unbind(0)) for tensor in self._whole)
        else:
            self.keys = [self._new(self.num_blocks) for _ in range(shape.layers)]
            self.values = [self._new(self.num_blocks) for _ in range(shape.layers)]
        self._free = list(range(self.num_blocks - 1, 0, -1))
        # Lists, not arrays: they are read and written one block at a time, for every row of every step.
        self._used = 0
        self._references = [0] * self.num_blocks
        self._filled = [0] * self.num_blocks

    def _new(self, *blocks: int) -> torch.Tensor:
        # Zeros, not empty: masked positions are multiplied by 0, and 0 x NaN of stale memory is NaN.
        return torch.zeros(self._size(*blocks), dtype=self.dtype, device=self.device)

    def _size(self, *blocks: int) -> tuple[int, ...]:
        return *blocks, self.shape.kv_heads, self.block_size, self.shape.head_dim

    def _reserve(self) -> torch.Tensor:
        """Zeros of the pool's full size, on the CPU. Raises OSError."""
        size = self._size(self.shape.layers, self.max_blocks)
        return torch.from_numpy(reserved(math.prod(size) * self.dtype.itemsize)).view(self.dtype).view(size)

    @property
    def has_step_kernel(self) -> bool:
        """True if the Triton kernels serve this pool: on CUDA, for heads whose size is a power of two."""
        return self.device.type == "cuda" and self.shape.suits_kernel

    @property
    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all layers, ``[layers, blocks, kv_heads, block_size, head_dim]``; only of a pool that does
        not grow."""
        assert self._whole is not None
        return self._whole

    @property
    def free_blocks(self) -> int:
        """Blocks that can still be handed out, growth included."""
        return len(self._free) + self.max_blocks - self.num_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks that at least one state holds."""
        return self._used

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill, the last perhaps in part."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks, each with one reference.

        Raises:
            PoolExhaustedError: fewer than ``count`` blocks are left; nothing is handed out.
        """
        if count > self.free_blocks:
            raise PoolExhaustedError(
                f"the pool has {self.free_blocks} free blocks of {self.block_size} tokens but {count} are needed: "
                "close states, score fewer rows at once or raise the pool size"
            )
        while count > len(self._free):
            self._grow()
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self._filled[block] = 0
        self._used += count
        return blocks

    def _grow(self) -> None:
        grown = min(2 * self.num_blocks, self.max_blocks)
        extra = grown - self.num_blocks
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = torch.cat([tensor, self._new(extra)])
        self._free = list(range(grown - 1, self.num_blocks - 1, -1)) + self._free
        self._references += [0] * extra
        self._filled += [0] * extra
        self.num_blocks = grown

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block."""
        references = self._references
        for block in blocks:
            references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block; a block without references is free again."""
        references = self._references
        for block in blocks:
            references[block] -= 1
            if references[block] == 0:
                self._used -= 1
                self._free.append(block)

    def fork(
        self, blocks: Sequence[int], length: int, count: int, copies: list[tuple[int, int]] | None = None
    ) -> list[int]:
        """Blocks of a child: the parent's first ``length`` tokens, shared, and room for ``count`` more.

        A copy-on-write is made at once, or noted in ``copies`` as (source, target) for one :meth:`copy` of many forks,
        which must come before anything is written.

        Raises:
            PoolExhaustedError: the pool is full; no reference has changed.
        """
        shared = list(blocks[: self.blocks_for(length)])
        used = length % self.block_size
        copied = count > 0 and used > 0 and self._filled[shared[-1]] != used
        missing = self.blocks_for(length + count) - len(shared) + (1 if copied else 0)
        fresh = self.allocate(missing) if missing else []
        if copied:
            pair = shared.pop(), fresh[0]
            if copies is None:
                self.copy([pair])
            else:
                copies.append(pair)
        self.retain(shared)
        child = shared + fresh
        # Nothing appended: the parent's last block keeps its fill mark, or a later child would write over a sibling.
        for index in range(length // self.block_size, len(child)) if count else ():
            self._filled[child[index]] = min(self.block_size, length + count - index * self.block_size)
        return child

    def advance(self, blocks: Sequence[int], length: int) -> bool:
        """Take the place after a state's ``length`` tokens, in its last block, for a child with the same blocks. False
        where there is none, or where another child has it: this one must be forked."""
        used = length % self.block_size
        if used == 0 or self._filled[blocks[-1]] != used:
            return False
        self._filled[blocks[-1]] = used + 1
        return True

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, ``(source, target)`` each, all of them together."""
        if not pairs:
            return
        source, target = to_device(np.asarray(pairs, dtype=np.int64), self.device).unbind(-1)
        if self._whole is not None:
            for tensor in self._whole:
                tensor[:, target] = tensor[:, source]
            return
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[target] = tensor[source]

    def slot(self, blocks: Sequence[int], position: int) -> tuple[int, int]:
        """Where token ``position`` of a state lives: ``(block, offset in the block)``."""
        return blocks[position // self.block_size], position % self.block_size

    def write(self, slots: Sequence[tuple[int, int]], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``W`` tokens at ``slots`` (block, offset), all of them together. ``keys`` and ``values`` are
        ``[layers, W, kv_heads, head_dim]``."""
        block, offset = to_device(np.asarray(slots, dtype=np.int64), self.device).unbind(-1)
        if self._whole is not None:
            for tensor, stored in zip(self._whole, (keys, values), strict=True):
                tensor.permute(1, 3, 0, 2, 4)[block, offset] = stored.transpose(0, 1)
            return
        for layer in range(self.shape.layers):
            self.keys[layer][block, :, offset] = keys[layer]
            self.values[layer][block, :, offset] = values[layer]

    def read(self, blocks: Sequence[int]) -> torch.Tensor:
        """A copy of blocks, ``[B, 2, layers, kv_heads, block_size, head_dim]``, keys before values."""
        if self._whole is not None and self.device.type == "cpu":
            # Block by block into its place: gathering first copies everything three times.
            made = torch.empty(len(blocks), 2, *self._size(self.shape.layers), dtype=self.dtype)
            for to, block in zip(made, blocks, strict=True):
                for side, tensor in enumerate(self._whole):
                    to[side] = tensor[:, block]
            return made
        at = to_device(np.asarray(blocks, dtype=np.int64), self.device)
        if self._whole is not None:
            both = torch.stack([tensor[:, at] for tensor in self._whole])
        else:
            both = torch.stack([torch.stack([tensor[at] for tensor in side]) for side in (self.keys, self.values)])
        return both.permute(2, 0, 1, 3, 4, 5).contiguous()

    def restore(self, blocks: Sequence[int], stored: torch.Tensor) -> None:
        """Fill whole blocks with what :meth:`read` gave."""
        self._put(blocks, stored)
        for block in blocks:
            self._filled[block] = self.block_size

    def _put(self, blocks: Sequence[int], stored: torch.Tensor) -> None:
        if self._whole is not None and self.device.type == "cpu":
            for block, both in zip(blocks, stored, strict=True):
                for side, tensor in enumerate(self._whole):
                    tensor[:, block] = both[side]
            return
        at = to_device(np.asarray(blocks, dtype=np.int64), self.device)
        both = stored.to(self.device).permute(1, 2, 0, 3, 4, 5)
        for side, tensors in enumerate((self.keys, self.values)):
            if self._whole is not None:
                self._whole[side][:, at] = both[side]
                continue
            for layer, tensor in enumerate(tensors):
                tensor[at] = both[side, layer]
