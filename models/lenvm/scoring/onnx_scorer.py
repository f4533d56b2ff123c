"""The ONNX Runtime scorer: slots instead of blocks, one tree-masked forward a call, candidates kept in the pool."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lenvm.distribution import LengthBins
from lenvm.errors import InvalidRequestError, StateClosedError
from lenvm.scoring._rows import check_row
from lenvm.scoring.blocks import BlockLayout, StateBlock
from lenvm.scoring.onnx_model import KeyValueStore, OnnxModel
from lenvm.scoring.packing import Piece, pack
from lenvm.scoring.protocol import PrefixState, RowScore, ScoreRow, ScorerStats
from lenvm.scoring.token_pool import Slots, TokenPool

__all__ = ["OnnxScorer", "OnnxState"]

_CELLS = 1 << 22  # attention cells of one forward, as padded: about as much work as 50 tokens of a 135M model
_BLOCK = 32  # tokens that are shared, dumped and loaded together
_NONE: Slots = np.empty(0, dtype=np.int64)


class _Scored:
    """Candidates that a state was last scored with. Their keys and values stay in the pool, so that the one that is
    chosen need not be computed again: its slot becomes the child's."""

    def __init__(self, pool: TokenPool, ids: tuple[int, ...], slots: Slots, numbers: NDArray[np.float64]) -> None:
        self.ids, self.slots, self.numbers = ids, slots, numbers  # numbers [K, 1 + n]
        weakref.finalize(self, pool.release, slots)


class OnnxState:
    """A prefix in the pool: :class:`lenvm.scoring.PrefixState`. ``numbers [1 + n]``: value logit, bin log-probs."""

    def __init__(self, pool: TokenPool, slots: Slots, numbers: NDArray[np.float64]) -> None:
        self.pool, self.slots, self.numbers = pool, slots, numbers
        self.scored: _Scored | None = None
        self._finalizer = weakref.finalize(self, pool.release, slots)

    @property
    def length(self) -> int:
        """Tokens in the prefix."""
        return len(self.slots)

    @property
    def logit(self) -> float:
        """Value logit z at the end of the prefix."""
        return float(self.numbers[0])

    @property
    def bin_logprobs(self) -> NDArray[np.float64] | None:
        """Log-probabilities over the length bins ``[n]`` at the end of the prefix."""
        return self.numbers[1:] if len(self.numbers) > 1 else None

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Give the slots back; a second call does nothing."""
        self._finalizer()
        self.scored = None


@dataclass
class _Work:
    """A row on its way through a call. ``slots``: of the prefix, tail included; ``candidates``: those of candidates."""

    row: ScoreRow
    slots: Slots
    candidates: Slots
    cached: int  # tokens of the prefix that need no computation
    tail: list[int]
    own: NDArray[np.float64]  # [1 + n] at the end of what is cached
    places: list[NDArray[np.float64]] = field(default_factory=list)  # numbers of the wanted places, in order

    def pieces(self, longest: int, most: int) -> Iterator[Piece]:
        """What this row sends through the graph, at most ``longest`` tokens of its tail at a time, and at most ``most``
        with its candidates."""
        first = len(self.tail) - 1 if self.row.values_from is None else self.row.values_from
        starts = range(0, len(self.tail), longest) or range(1 if len(self.row.candidates) else 0)
        for start in starts:
            ids = self.tail[start : start + longest]
            end = self.cached + start + len(ids)
            skipped, last = min(len(ids), max(0, first - start)), start + longest >= len(self.tail)
            apart = last and len(ids) > 0 and len(ids) + len(self.row.candidates) > most
            if apart or not last:
                yield Piece(tail=ids, candidates=[], slots=self.slots[:end], skipped=skipped)
            if last:
                rest, before = ([], 0) if apart else (ids, skipped)
                slots = np.concatenate([self.slots[:end], self.candidates])
                yield Piece(tail=rest, candidates=list(self.row.candidates), slots=slots, skipped=before)


class OnnxScorer:
    """Scores prefixes and candidates with an :class:`OnnxModel`. Implements :class:`lenvm.scoring.Scorer`.

    Args:
        pool_tokens: tokens of keys and values that open states, and the candidates they were scored with, may hold.
        token_budget: new tokens of one forward, at most the context; a larger call is split, a longer prompt goes in
            pieces.
        on_forward: called after each forward, as a life sign from a long call.
    """

    def __init__(
        self,
        model: OnnxModel,
        *,
        pool_tokens: int = 1 << 18,
        token_budget: int = 2048,
        on_forward: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.stats = ScorerStats()
        # The graph's rotary embedding takes no more tokens side by side than it has positions.
        self.token_budget = min(token_budget, model.context)
        self.on_forward = on_forward
        self.pool = TokenPool(pool_tokens + 1)
        self._store = KeyValueStore(model)
        self._numbers = 1 + model.config.head.num_bins

    @property
    def gamma(self) -> float:
        """Discount of the value."""
        return self.model.config.gamma

    @property
    def bins(self) -> LengthBins | None:
        """Bins of the length distribution; None for a value head alone."""
        return self.model.config.head.bins

    @property
    def context(self) -> int:
        """Longest prefix in tokens."""
        return self.model.info.context

    @property
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""
        return self.model.info.vocab_size

    def open(self, prefixes: Sequence[Sequence[int]]) -> list[OnnxState]:
        """States of whole prefixes, scored at their last token."""
        return [score.state for score in self.score([ScoreRow(append=p) for p in prefixes])]  # type: ignore[misc]

    def token_values(self, prompt: Sequence[int], completion: Sequence[int]) -> RowScore:
        """Values s_0 .. s_T of a completion of T content tokens."""
        row = ScoreRow(append=[*prompt, *completion], values_from=len(prompt) - 1)
        (score,) = self.score([row])
        return score

    def blocks_needed(self, row: ScoreRow) -> int:
        """Most slots that a row takes out of the pool."""
        return len(row.append) + len(row.candidates)

    def check(self, row: ScoreRow) -> None:
        """Raise what :meth:`score` would raise for this row (a full pool apart), and compute nothing."""
        state = row.state
        if state is not None and (not isinstance(state, OnnxState) or state.pool is not self.pool):
            raise InvalidRequestError("the state belongs to another scorer", param="session")
        if isinstance(state, OnnxState) and state.closed:
            raise StateClosedError("the prefix state was closed: open the prefix again")
        check_row(row, context=self.context, vocab_size=self.vocab_size)

    def score(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None = None) -> list[RowScore]:
        """Answer all rows, aligned; see :class:`lenvm.scoring.Scorer`.

        Raises:
            InvalidRequestError: an id out of range, or a row with neither a state nor tokens.
            ContextTooLongError: prefix, tokens and candidate do not fit in the context.
            StateClosedError: a row's state was closed.
            PoolExhaustedError: the pool of prefix states is full. Nothing is left half done.
        """
        for row in rows:
            self.check(row)
        if meanwhile is not None:
            meanwhile()
        works: list[_Work] = []
        try:
            for row in rows:
                works.append(self._begin(row))
            self._run(works)
        except BaseException:
            for work in works:
                self.pool.release(work.slots)
                self.pool.release(work.candidates)
            raise
        return [self._finish(work) for work in works]

    @property
    def layout(self) -> BlockLayout | None:
        """Form of this engine's blocks; None on a GPU, whose memory ONNX Runtime gives back only as a whole."""
        if not self._store.on_cpu:
            return None
        info = self.model.info
        dims = (2, info.layers, info.kv_heads, _BLOCK, info.head_dim)
        return BlockLayout(f"onnx-{info.variant}", np.dtype(info.dtype).name, dims)

    def blocks(self, state: PrefixState, first: int = 0) -> list[StateBlock]:
        """The state's full blocks from number ``first`` on; see :class:`lenvm.scoring.Scorer`."""
        assert isinstance(state, OnnxState)
        starts = range(first * _BLOCK, state.length - _BLOCK + 1, _BLOCK)
        found = [state.slots[start : start + _BLOCK].copy() for start in starts]
        for slots in found:
            self.pool.retain(slots)
        return [StateBlock(self.pool, slots) for slots in found]

    def join(self, blocks: Sequence[StateBlock]) -> OnnxState:
        """The state after these blocks, its value not known; see :class:`lenvm.scoring.Scorer`."""
        slots = np.concatenate([_NONE, *(block.places for block in blocks)])
        self.pool.retain(slots)
        return OnnxState(self.pool, slots, np.full(self._numbers, np.nan))

    def dump(self, blocks: Sequence[StateBlock]) -> list[NDArray[np.uint8]]:
        """A copy of each block's bytes, in the form of :attr:`layout`. On the CPU only."""
        if not blocks:
            return []
        self._fit()
        read = self._store.read(np.stack([block.places for block in blocks]))
        return list(read.reshape(len(blocks), -1).view(np.uint8))

    def load(self, payloads: Sequence[NDArray[np.uint8]]) -> list[StateBlock]:
        """Blocks with these bytes. Raises PoolExhaustedError where there is no room. On the CPU only."""
        if not payloads:
            return []
        layout = self.layout
        assert layout is not None
        slots = self.pool.allocate(len(payloads) * _BLOCK).reshape(len(payloads), _BLOCK)
        blocks = [StateBlock(self.pool, places) for places in slots]
        self._fit()
        stored = np.stack(payloads).view(layout.dtype).reshape(len(payloads), *layout.shape)
        self._store.restore(slots, stored)
        return blocks

    def _fit(self) -> None:
        if self._store.slots >= self.pool.num_blocks:
            return
        if self._store.on_cpu:
            # All of them at once: growing would copy what is held, while a request waits.
            with contextlib.suppress(OSError):
                self._store.resize(self.pool.max_blocks)
                return
        self._store.resize(self.pool.num_blocks)

    def _begin(self, row: ScoreRow) -> _Work:
        """Slots for a row; a first appended token that the state was scored with is promoted."""
        tail, state = [int(token) for token in row.append], row.state
        shared, own = _NONE, np.full(self._numbers, np.nan)
        promoted = 0
        if isinstance(state, OnnxState):
            shared, own = state.slots, state.numbers
            scored = state.scored
            if tail and row.values_from is None and scored is not None and tail[0] in scored.ids:
                at = scored.ids.index(tail.pop(0))
                shared, own = np.append(shared, scored.slots[at]), scored.numbers[at]
                promoted = 1
        fresh = self.pool.allocate(len(tail) + len(row.candidates))
        self.pool.retain(shared)
        self.stats.promoted += promoted
        slots = np.concatenate([shared, fresh[: len(tail)]])
        return _Work(row, slots, fresh[len(tail) :], len(shared), tail, own)

    def _run(self, works: Sequence[_Work]) -> None:
        """All forwards of a call. Pieces of one row come one after another, of different rows side by side."""
        self._fit()
        pieces = [list(work.pieces(self.token_budget, self.context)) for work in works]
        for turn in range(max(map(len, pieces), default=0)):
            waiting = [(work, found[turn]) for work, found in zip(works, pieces, strict=True) if turn < len(found)]
            for group in _groups([piece for _, piece in waiting], self.token_budget):
                self._forward([waiting[at] for at in group])

    def _forward(self, group: Sequence[tuple[_Work, Piece]]) -> None:
        packed = pack([piece for _, piece in group])
        numbers = self._store.forward(packed)
        self.stats.forwards += 1
        self.stats.tokens += len(packed["input_ids"])
        start = 0
        for work, piece in group:
            end = start + piece.wanted
            work.places.append(numbers[start:end])
            start = end
        if self.on_forward is not None:
            self.on_forward()

    def _finish(self, work: _Work) -> RowScore:
        """Split a row's numbers ``[places + K, 1 + n]`` into those of the prefix and those of the candidates."""
        count = len(work.row.candidates)
        numbers = np.concatenate(work.places) if work.places else np.empty((0, self._numbers))
        own, others = numbers[: len(numbers) - count], numbers[len(numbers) - count :]
        if not len(own):
            own = work.own[None]
        # Copies: a handle that lives long must not keep all numbers of its call alive.
        state = OnnxState(self.pool, work.slots, own[-1].copy())
        if count:
            ids = tuple(int(token) for token in work.row.candidates)
            state.scored = _Scored(self.pool, ids, work.candidates, others.copy())
        has_bins = self._numbers > 1
        return RowScore(
            state=state,
            logits=own[:, 0],
            bin_logprobs=own[:, 1:] if has_bins else None,
            candidate_logits=others[:, 0],
            candidate_bin_logprobs=others[:, 1:] if has_bins else None,
            cached_tokens=work.cached,
        )


def _groups(pieces: Sequence[Piece], token_budget: int) -> Iterator[list[int]]:
    """Indices of pieces that go through one forward: within the token budget, and rows of like length together where
    padding all of them to the longest would cost more than it saves."""
    order = sorted(range(len(pieces)), key=lambda at: (pieces[at].size, len(pieces[at].slots)))
    group: list[int] = []
    tokens = width = keys = 0
    for at in order:
        piece = pieces[at]
        wide, deep = max(width, piece.size), max(keys, len(piece.slots))
        if group and (tokens + piece.size > token_budget or (len(group) + 1) * wide * deep > _CELLS):
            yield sorted(group)
            group, tokens, wide, deep = [], 0, piece.size, len(piece.slots)
        group.append(at)
        tokens, width, keys = tokens + piece.size, wide, deep
    if group:
        yield sorted(group)
