"""The torch scorer: paged prefix states, one tree-masked forward a call, promotion of candidates."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.distribution import LengthBins
from lenvm.errors import ContextTooLongError, InvalidRequestError, StateClosedError
from lenvm.modeling import HeadOutput, LengthValueModel
from lenvm.paged import BlockPool, PoolShape, Row, build_plan, packed_forward
from lenvm.scoring.protocol import RowScore, ScoreRow, ScorerStats

__all__ = ["TorchScorer", "TorchState"]


@dataclass(frozen=True)
class _Scored:
    """Candidates that a state was last scored with, so that the one that is chosen need not be computed again."""

    ids: tuple[int, ...]
    logits: NDArray[np.float64]
    bin_logprobs: NDArray[np.float64] | None
    keys: torch.Tensor  # [layers, K, kv_heads, head_dim]
    values: torch.Tensor


class TorchState:
    """A prefix in the block pool: :class:`lenvm.scoring.PrefixState`."""

    def __init__(
        self, pool: BlockPool, blocks: list[int], length: int, logit: float, bin_logprobs: NDArray[np.float64] | None
    ) -> None:
        self.length, self.logit, self.bin_logprobs = length, logit, bin_logprobs
        self.pool, self.blocks = pool, blocks
        self.scored: _Scored | None = None
        self._finalizer = weakref.finalize(self, pool.release, blocks)

    @property
    def closed(self) -> bool:
        """True once :meth:`close` was called."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Give the blocks back; a second call does nothing."""
        self._finalizer()
        self.scored = None


@dataclass
class _Work:
    """A row on its way through a call."""

    row: ScoreRow
    blocks: list[int]
    length: int  # tokens of the prefix that are in the pool
    tail: list[int]
    logit: float
    bin_logprobs: NDArray[np.float64] | None

    @property
    def first_value(self) -> int:
        """Index in the tail from which values are wanted."""
        return len(self.tail) - 1 if self.row.values_from is None else self.row.values_from

    @property
    def new_tokens(self) -> int:
        """Tokens that this row sends through the backbone."""
        return len(self.tail) + len(self.row.candidates)


class TorchScorer:
    """Scores prefixes and candidates with a :class:`LengthValueModel`. Implements :class:`lenvm.scoring.Scorer`.

    Args:
        model: in eval mode with paged attention, as ``LengthValueModel.from_pretrained`` gives it.
        pool_tokens: tokens of keys and values that open states may hold together; default: 256k on the CPU, what a
            quarter of the free memory holds on CUDA.
        block_size: tokens in a block.
        token_budget: new tokens of one forward; a larger call is split.
    """

    def __init__(
        self,
        model: LengthValueModel,
        *,
        pool_tokens: int | None = None,
        block_size: int = 32,
        token_budget: int = 16384,
    ) -> None:
        self.model = model
        self.stats = ScorerStats()
        self.token_budget = token_budget
        shape = PoolShape.of(model.decoder.config)
        if pool_tokens is None:
            pool_tokens = 1 << 18
            if model.device.type == "cuda":
                pool_tokens = torch.cuda.mem_get_info(model.device)[0] // 4 // shape.token_bytes(model.dtype)
        self.pool = BlockPool(
            shape,
            max_blocks=-(-pool_tokens // block_size) + 1,
            block_size=block_size,
            device=model.device,
            dtype=model.dtype,
        )

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
        return self.model.context

    @property
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""
        return int(self.model.decoder.config.vocab_size)

    def open(self, prefixes: Sequence[Sequence[int]]) -> list[TorchState]:
        """States of whole prefixes, scored at their last token."""
        return [score.state for score in self.score([ScoreRow(append=p) for p in prefixes])]  # type: ignore[misc]

    def token_values(self, prompt: Sequence[int], completion: Sequence[int]) -> RowScore:
        """Values s_0 .. s_T of a completion of T content tokens, in one forward."""
        row = ScoreRow(append=[*prompt, *completion], values_from=len(prompt) - 1)
        (score,) = self.score([row])
        return score

    @torch.inference_mode()
    def score(self, rows: Sequence[ScoreRow]) -> list[RowScore]:
        """Answer all rows, aligned; see :class:`lenvm.scoring.Scorer`.

        Raises:
            InvalidRequestError: an id out of range, or a row with neither a state nor tokens.
            ContextTooLongError: prefix, tokens and candidate do not fit in the context.
            StateClosedError: a row's state was closed.
            PoolExhaustedError: the pool of prefix states is full. Nothing is left half done.
        """
        for row in rows:
            self._check(row)
        works: list[_Work] = []
        results: dict[int, RowScore] = {}
        try:
            for row in rows:
                works.append(self._begin(row))
            for chunk in self._chunks(works):
                results.update(zip(chunk, self._forward([works[i] for i in chunk]), strict=True))
        except BaseException:
            for index, work in enumerate(works):
                if index not in results:
                    self.pool.release(work.blocks)
            raise
        return [results[index] for index in range(len(rows))]

    def _check(self, row: ScoreRow) -> None:
        state = row.state
        if state is None and not len(row.append):
            raise InvalidRequestError("the prompt is empty: give at least one token", param="token_ids")
        if state is not None and (not isinstance(state, TorchState) or state.pool is not self.pool):
            raise InvalidRequestError("the state belongs to another scorer", param="session")
        if isinstance(state, TorchState) and state.closed:
            raise StateClosedError("the prefix state was closed: open the prefix again")
        for name, ids in (("token_ids", row.append), ("candidates", row.candidates)):
            if len(ids) and (min(ids) < 0 or max(ids) >= self.vocab_size):
                raise InvalidRequestError(f"{name} must be in [0, {self.vocab_size})", param=name)
        if row.values_from is not None and not 0 <= row.values_from < len(row.append):
            raise InvalidRequestError("values_from must index the appended tokens", param="values_from")
        total = (state.length if state else 0) + len(row.append) + (1 if len(row.candidates) else 0)
        if total > self.context:
            raise ContextTooLongError(
                f"the prefix has {total} tokens; the model's context is {self.context}: shorten it", param="token_ids"
            )

    def _begin(self, row: ScoreRow) -> _Work:
        """Blocks for the new state; the first appended token is promoted if the state was scored with it."""
        tail = list(row.append)
        if row.state is None:
            return _Work(row, self.pool.fork([], 0, len(tail)), 0, tail, float("nan"), None)
        state = row.state
        assert isinstance(state, TorchState)
        blocks = self.pool.fork(state.blocks, state.length, len(tail))
        work = _Work(row, blocks, state.length, tail, state.logit, state.bin_logprobs)
        scored = state.scored
        if tail and row.values_from is None and scored is not None and tail[0] in scored.ids:
            at = scored.ids.index(tail.pop(0))
            block, offset = self.pool.slot(blocks, state.length)
            self.pool.write(block, offset, scored.keys[:, at], scored.values[:, at])
            work.length += 1
            work.logit = float(scored.logits[at])
            work.bin_logprobs = None if scored.bin_logprobs is None else scored.bin_logprobs[at]
            self.stats.promoted += 1
        return work

    def _chunks(self, works: Sequence[_Work]) -> Iterator[list[int]]:
        """Split a call so that each forward takes at most the token budget (or one row)."""
        chunk: list[int] = []
        tokens = 0
        for index, work in enumerate(works):
            if chunk and tokens + work.new_tokens > self.token_budget:
                yield chunk
                chunk, tokens = [], 0
            chunk.append(index)
            tokens += work.new_tokens
        if chunk:
            yield chunk

    def _forward(self, works: Sequence[_Work]) -> list[RowScore]:
        active = [work for work in works if work.new_tokens]
        if not active:
            return [self._finish(work, None, None, 0) for work in works]
        rows = [Row(work.blocks, work.length, work.tail, work.row.candidates) for work in active]
        plan = build_plan(self.pool, rows)
        hidden = packed_forward(self.model.decoder, plan)
        wanted = np.concatenate(
            [
                start + np.arange(work.first_value if work.tail else 0, work.new_tokens)
                for work, start in _starts(active)
            ]
        )
        head: HeadOutput = self.model.head(hidden[torch.from_numpy(wanted).to(hidden.device)])
        # One transfer to the host a call: logits and log-probabilities together.
        packed = (
            head.logits[:, None]
            if head.bin_logprobs is None
            else torch.cat([head.logits[:, None], head.bin_logprobs], 1)
        )
        numbers = packed.double().cpu().numpy()
        keys = torch.stack(plan.captured_keys) if plan.captured_keys else None
        values = torch.stack(plan.captured_values) if plan.captured_values else None
        self.stats.forwards += 1
        self.stats.tokens += int(plan.input_ids.numel())
        results, at, candidate_at = [], 0, 0
        for work in works:
            if not work.new_tokens:
                results.append(self._finish(work, None, None, 0))
                continue
            count = len(work.row.candidates)
            size = (len(work.tail) - work.first_value if work.tail else 0) + count
            own = numbers[at : at + size]
            at += size
            captured = None
            if count and keys is not None and values is not None:
                mine = slice(candidate_at, candidate_at + count)
                # Copies: a handle that lives long must not keep the whole call's keys and values alive.
                captured = keys[:, mine].clone(), values[:, mine].clone()
                candidate_at += count
            results.append(self._finish(work, own, captured, count))
        return results

    def _finish(
        self,
        work: _Work,
        numbers: NDArray[np.float64] | None,
        captured: tuple[torch.Tensor, torch.Tensor] | None,
        count: int,
    ) -> RowScore:
        """Split a row's numbers ``[places + K, 1 + n]`` into those of the prefix and those of the candidates."""
        has_bins = self.bins is not None
        width = 1 + (self.bins.size if self.bins else 0)
        numbers = np.empty((0, width)) if numbers is None else numbers
        own, others = numbers[: len(numbers) - count], numbers[len(numbers) - count :]
        if not len(own):
            bins = work.bin_logprobs if work.bin_logprobs is not None else np.empty(0)
            own = np.concatenate([[work.logit], bins])[None]
        logit, bin_logprobs = float(own[-1, 0]), own[-1, 1:] if has_bins else None
        length = work.length + len(work.tail)
        state = TorchState(self.pool, work.blocks, length, logit, bin_logprobs)
        candidate_bins = others[:, 1:] if has_bins else None
        if captured is not None:
            state.scored = _Scored(tuple(work.row.candidates), others[:, 0], candidate_bins, *captured)
        return RowScore(
            state=state,
            logits=own[:, 0],
            bin_logprobs=own[:, 1:] if has_bins else None,
            candidate_logits=others[:, 0],
            candidate_bin_logprobs=candidate_bins,
            cached_tokens=work.length,
        )


def _starts(works: Sequence[_Work]) -> Iterator[tuple[_Work, int]]:
    start = 0
    for work in works:
        yield work, start
        start += work.new_tokens
