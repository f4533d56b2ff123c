"""Variable-length sequences side by side in fixed-size batches: no padding, one shape for the compiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import DataError

__all__ = ["PackedBatch", "Sample", "pack"]


_PAD_PIECE = 1024


def _places(sequences: int) -> int:
    """Room for the bounds, rounded up to a power of two so that a compiler sees few shapes."""
    return max(256, 1 << (sequences - 1).bit_length())


class Sample(Protocol):
    """The part of a rollout that training needs."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Prompt tokens."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Content tokens, EOS excluded."""

    @property
    def finished(self) -> bool:
        """True if EOS was reached; otherwise the answer was cut and its length is censored."""


@dataclass(frozen=True)
class PackedBatch:
    """``tokens`` places. ``remaining``: ``l`` where ``finished``, else the ``c`` tokens that are known to follow.
    ``supervised`` marks the states s_0 .. s_L: last prompt token and every content token."""

    ids: NDArray[np.int32]  # [tokens]
    positions: NDArray[np.int32]  # [tokens]
    bounds: NDArray[np.int32]  # [a power of two] starts of the sequences; the tail repeats ``tokens``
    longest: int  # an upper bound on the sequences' length, rounded up so that few values occur
    remaining: NDArray[np.int32]  # [tokens]
    finished: NDArray[np.bool_]  # [tokens]
    supervised: NDArray[np.bool_]  # [tokens]


def pack(samples: Sequence[Sample], *, tokens: int, seed: int) -> Iterator[PackedBatch]:
    """Shuffle ``samples`` and pack them first-fit into batches of ``tokens`` places; each sample is used once.

    Raises:
        DataError: a sample is longer than a batch.
    """
    order = np.random.default_rng(seed).permutation(len(samples))
    open_bins: list[tuple[int, list[int]]] = []  # (room, sample indices); few stay open, so first-fit stays cheap
    for index in order:
        sample = samples[index]
        need = len(sample.prompt_ids) + len(sample.token_ids)
        if need > tokens:
            raise DataError(f"a sample of {need} tokens does not fit in a batch of {tokens}: raise batch_tokens")
        for at, (room, members) in enumerate(open_bins):
            if room >= need:
                open_bins[at] = (room - need, [*members, int(index)])
                break
        else:
            if len(open_bins) >= 8:
                fullest = min(range(len(open_bins)), key=lambda i: open_bins[i][0])
                yield _batch([samples[i] for i in open_bins.pop(fullest)[1]], tokens)
            open_bins.append((tokens - need, [int(index)]))
    for _, members in open_bins:
        yield _batch([samples[i] for i in members], tokens)


def _batch(samples: Sequence[Sample], tokens: int) -> PackedBatch:
    ids = np.zeros(tokens, dtype=np.int32)
    positions = np.zeros(tokens, dtype=np.int32)
    remaining = np.ones(tokens, dtype=np.int32)
    finished = np.zeros(tokens, dtype=np.bool_)
    supervised = np.zeros(tokens, dtype=np.bool_)
    bounds = np.full(_places(len(samples) + tokens // _PAD_PIECE + 2), tokens, dtype=np.int32)
    start = 0
    for at, sample in enumerate(samples):
        prompt, content = len(sample.prompt_ids), len(sample.token_ids)
        end = start + prompt + content
        ids[start:end] = [*sample.prompt_ids, *sample.token_ids]
        positions[start:end] = np.arange(prompt + content)
        states = slice(start + prompt - 1, end)  # s_0 .. s_L
        # EOS counts: after all L content tokens one token is still to come. A cut answer is known to have gone on
        # through its last token only, so its last state knows nothing (c = 0).
        remaining[states] = np.arange(content, -1, -1) + (1 if sample.finished else 0)
        finished[states] = sample.finished
        supervised[states] = True
        bounds[at] = start
        start = end
    # What is left over becomes short sequences of padding, so that attention has no gap and no long row of its own.
    padding = np.arange(start, tokens, _PAD_PIECE)
    bounds[len(samples) : len(samples) + len(padding)] = padding
    positions[start:] = np.arange(tokens - start) % _PAD_PIECE
    longest = min(tokens, -(-int(np.diff(bounds).max()) // 4096) * 4096)
    return PackedBatch(ids, positions, bounds, longest, remaining, finished, supervised)
