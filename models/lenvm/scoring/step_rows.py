"""The rows of a decoding step of the torch scorer: what its launch must know, and the states that come of it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.paged import BlockPool
from lenvm.scoring.protocol import PrefixState, RowScore, StepScores
from lenvm.scoring.torch_state import Capture, Held, Scored, TorchState

if TYPE_CHECKING:
    from lenvm.scoring.step_graph import StepNumbers

__all__ = ["StepRows", "longest", "row_scores"]

_NO_PROMOTION = (0, 0, 0, 0, 0)


@dataclass(slots=True)
class StepRows:
    """Rows that each go on from a state, by one of the candidates that it was scored with or by nothing.

    Attributes:
        before: the states.
        held, blocks, lengths: what each row's prefix holds, its blocks and its tokens, with what is appended.
        chosen: what the state was scored with, and which of it is appended; None for nothing.
        promotions: five numbers a row (``lenvm.paged.kernels.promote_tokens``), one row after another.
    """

    before: Sequence[TorchState]
    held: list[Held]
    blocks: list[list[int]]
    lengths: list[int]
    chosen: list[tuple[Scored, int] | None]
    promotions: list[int]

    @classmethod
    def of(
        cls,
        pool: BlockPool,
        context: int,
        before: Sequence[PrefixState | None],
        appended: Sequence[Sequence[int]],
    ) -> StepRows | None:
        """Take what the new states need out of the pool; None for rows that are no such step, or are too long.

        The device waits for this, so that it is one loop over what must be known before the launch, and no more.
        Raises PoolExhaustedError."""
        copies: list[tuple[int, int]] = []
        states: list[TorchState] = []
        held: list[Held] = []
        blocks: list[list[int]] = []
        lengths: list[int] = []
        chosen: list[tuple[Scored, int] | None] = []
        promotions: list[int] = []
        size, capture, advance = pool.block_size, None, pool.advance
        for state, new in zip(before, appended, strict=True):
            # Places that are taken for a call that turns out to be none belong to nobody: a child copies the block.
            if not isinstance(state, TorchState) or state.pool is not pool or (own := state.held) is None:
                return None
            length, own_blocks = state.length, own.blocks
            if len(new):
                scored = state.scored
                if len(new) > 1 or scored is None:
                    return None
                try:
                    at = scored.ids.index(new[0])
                except ValueError:
                    return None
                chosen.append((scored, at))  # kept: the state may lose its candidates before its child is made
                if not advance(own_blocks, length):
                    own = Held(pool, pool.fork(own_blocks, length, 1, copies))
                    own_blocks = own.blocks
                if scored.capture is not capture:
                    capture = scored.capture
                    keys, values, token, layer = capture.addresses()
                skip = (scored.first + at) * token
                promotions += keys + skip, values + skip, layer, own_blocks[length // size], length % size
                length += 1
            else:
                chosen.append(None)
                promotions += _NO_PROMOTION
            if length >= context:
                return None
            states.append(state)
            held.append(own)
            blocks.append(own_blocks)
            lengths.append(length)
        if copies:
            with torch.inference_mode():
                pool.copy(copies)
        return cls(states, held, blocks, lengths, chosen, promotions)

    @property
    def promoted(self) -> int:
        """Rows that append a token."""
        return len(self.chosen) - self.chosen.count(None)

    def logits(self) -> NDArray[np.float64]:
        """The value logit of each row's prefix."""
        return np.array(
            [
                state.logit if chosen is None else chosen[0].logits[chosen[1]]
                for state, chosen in zip(self.before, self.chosen, strict=True)
            ],
            np.float64,
        )

    def states(
        self, ids: NDArray[np.int32], counts: Sequence[int], step: StepNumbers, *, has_bins: bool
    ) -> tuple[list[TorchState], Capture]:
        """The new states, each with the candidates that it was scored with, ``counts[row]`` of ``ids``, and the keys
        and values of all of them. Numbers are views, and need not be there yet."""
        capture = Capture(*step.kept())
        capture.addresses()  # asked for now, and not when the next step waits for it
        rows, width = len(self.held), step.numbers.shape[1]
        all_logits, all_bins = list(step.numbers[:rows, :, 0]), list(step.numbers[:rows, :, 1:])
        all_ids, begin, first = ids.tolist(), 0, 0
        states = []
        for row, (was, own, length, chosen, count) in enumerate(
            zip(self.before, self.held, self.lengths, self.chosen, counts, strict=True)
        ):
            logit, bins = was.logit, was.bin_logprobs
            if chosen is not None:
                scored, at = chosen
                # A copy: a handle that lives long must not keep all numbers of its step alive.
                logit = float(scored.logits[at])
                bins = None if scored.bin_logprobs is None else scored.bin_logprobs[at].astype(np.float64)
            state = TorchState(own, length, logit, bins)
            logits, row_bins = all_logits[row], all_bins[row] if has_bins else None
            if count < width:
                logits, row_bins = logits[:count], None if row_bins is None else row_bins[:count]
            state.scored = Scored(all_ids[begin : begin + count], logits, row_bins, capture, first)
            capture.users.append(weakref.ref(state.scored))
            states.append(state)
            begin += count
            first += step.width
        return states, capture


def longest(before: Sequence[PrefixState | None], appended: Sequence[Sequence[int]]) -> int:
    """Tokens of the longest prefix, with what is appended to it."""
    return max((0 if state is None else state.length) + len(new) for state, new in zip(before, appended, strict=True))


def row_scores(step: StepScores) -> list[RowScore]:
    """A step's answers row by row: views of numbers, which need not be there yet."""
    answers = []
    for row, state in enumerate(step.states()):
        assert isinstance(state, TorchState)
        scored = state.scored
        assert scored is not None
        own = None if state.bin_logprobs is None else state.bin_logprobs[None]
        logits, bins = scored.logits, scored.bin_logprobs
        answers.append(RowScore(state, step.logits[row : row + 1], own, logits, bins, state.length))
    return answers
