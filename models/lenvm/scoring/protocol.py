"""What every scoring engine offers, whatever runs the forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lenvm.distribution import LengthBins
from lenvm.scoring.blocks import BlockLayout, StateBlock

__all__ = ["PoolCounts", "PrefixState", "RowScore", "ScoreRow", "Scorer", "ScorerStats", "StepScores"]


@runtime_checkable
class PrefixState(Protocol):
    """Immutable handle on a scored prefix. Closing it frees its share of the cache; garbage collection does so too."""

    @property
    def length(self) -> int:
        """Tokens in the prefix."""

    @property
    def logit(self) -> float:
        """Value logit z at the end of the prefix (V = -sigmoid(z))."""

    @property
    def bin_logprobs(self) -> NDArray[np.float64] | None:
        """Log-probabilities over the length bins ``[n]`` at the end of the prefix."""

    def close(self) -> None:
        """Let go of the cached keys and values. A closed state cannot be scored again."""


@dataclass(slots=True)
class ScoreRow:
    """One row of a call: go on from ``state`` (None: from nothing) with ``append``, then score ``candidates``.

    ``values_from``: also give the values after each appended token from this index on (None: after the last only).
    """

    state: PrefixState | None = None
    append: Sequence[int] = ()
    candidates: Sequence[int] = ()
    values_from: int | None = None


@dataclass(slots=True)
class RowScore:
    """Answer of a row. ``T`` = scored places of ``append`` (1 unless ``values_from`` was given), ``K`` candidates."""

    state: PrefixState
    logits: NDArray[np.float64]  # [T] value logits
    bin_logprobs: NDArray[np.float64] | None  # [T, n]
    candidate_logits: NDArray[np.floating[Any]]  # [K]
    candidate_bin_logprobs: NDArray[np.floating[Any]] | None  # [K, n]
    cached_tokens: int  # tokens of the prefix that needed no computation


@dataclass(slots=True)
class StepScores:
    """Answer of a decoding step, all R rows side by side.

    ``lengths`` [R] and ``logits`` [R]: of the prefixes, their tokens and value logits; ``numbers`` [R, width, 1 + n]:
    value logit and bin log-probs of each candidate, of which row r has ``counts[r]``; ``means`` [R, width]: expected
    utility of each, where utilities of bins were given; ``make``: see ``states``.
    """

    lengths: Sequence[int]
    logits: NDArray[np.float64]
    numbers: NDArray[np.floating[Any]]
    means: NDArray[np.float32] | None
    counts: Sequence[int]
    make: Callable[[], Sequence[PrefixState]]
    made: Sequence[PrefixState] | None = None

    def states(self) -> Sequence[PrefixState]:
        """States of the prefixes [R]: made when they are first asked for, since no answer waits for them."""
        if self.made is None:
            self.made = self.make()
        return self.made

    def scored(self) -> NDArray[np.floating[Any]]:
        """[S, 1 + n]: the numbers of all candidates, one row's after another's."""
        return self.of_all(self.numbers)

    def of_all(self, columns: NDArray[Any]) -> NDArray[Any]:
        """``columns`` [R, width, ...] of all candidates alone, one row's after another's: [S, ...]."""
        width = columns.shape[1]
        if min(self.counts) == width:
            return columns.reshape(-1, *columns.shape[2:])
        return columns[np.arange(width) < np.array(self.counts)[:, None]]


@dataclass
class ScorerStats:
    """Work done: ``forwards`` calls of the backbone, ``tokens`` through it, ``promoted`` tokens that cost none."""

    forwards: int = 0
    tokens: int = 0
    promoted: int = 0


class PoolCounts(Protocol):
    """How full an engine's pool of prefix states is, in blocks of ``block_size`` tokens."""

    block_size: int
    max_blocks: int

    @property
    def free_blocks(self) -> int:
        """Blocks that can still be handed out."""

    @property
    def used_blocks(self) -> int:
        """Blocks that at least one state holds."""


class Scorer(Protocol):
    """An engine for one model. Not thread-safe: one thread at a time has it."""

    stats: ScorerStats

    @property
    def pool(self) -> PoolCounts:
        """Where the states live."""

    @property
    def gamma(self) -> float:
        """Discount of the value."""

    @property
    def bins(self) -> LengthBins | None:
        """Bins of the length distribution; None for a value head alone."""

    @property
    def context(self) -> int:
        """Longest prefix in tokens."""

    @property
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""

    def score(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None = None) -> list[RowScore]:
        """Answer all rows, aligned, in one forward where they fit the token budget. ``meanwhile`` is called once, as
        late as there still is something to wait for: on a GPU, what it does costs no time."""

    def token_values(self, prompt: Sequence[int], completion: Sequence[int]) -> RowScore:
        """Values s_0 .. s_T of a completion of T content tokens."""

    def blocks_needed(self, row: ScoreRow) -> int:
        """Most blocks that a row takes out of the pool."""

    def check(self, row: ScoreRow) -> None:
        """Raise what ``score`` would raise for this row (a full pool apart), and compute nothing."""

    @property
    def layout(self) -> BlockLayout | None:
        """Form of this engine's blocks; None where they cannot leave the device."""

    def blocks(self, state: PrefixState, first: int = 0) -> list[StateBlock]:
        """The state's full blocks from number ``first`` on, shared with it. A last block that is not full is left
        out."""

    def join(self, blocks: Sequence[StateBlock]) -> PrefixState:
        """The state after these blocks, which follow one another from a prefix's first token. What it costs is a
        reference each. Its value is not known: it can only be gone on from, by at least one token."""

    def dump(self, blocks: Sequence[StateBlock]) -> list[NDArray[np.uint8]]:
        """A copy of each block's bytes, on the host, in the form that :attr:`layout` says."""

    def load(self, payloads: Sequence[NDArray[np.uint8]]) -> list[StateBlock]:
        """Blocks with these bytes, aligned.

        Raises:
            PoolExhaustedError: no room; nothing is loaded.
        """
