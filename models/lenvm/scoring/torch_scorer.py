"""The torch scorer: paged prefix states, one tree-masked forward a call, promotion of candidates."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.cuda_graph import GraphError
from lenvm.distribution import LengthBins
from lenvm.errors import InvalidRequestError, StateClosedError
from lenvm.fused import can_fuse
from lenvm.modeling import HeadOutput, LengthValueModel
from lenvm.paged import BlockPool, PoolShape, Row, build_plan, packed_forward
from lenvm.paged.attention import Plan, suits_fresh_attention
from lenvm.scoring._rows import check_row, packed_ids
from lenvm.scoring.blocks import BlockLayout, StateBlock
from lenvm.scoring.protocol import PrefixState, RowScore, ScoreRow, ScorerStats, StepScores
from lenvm.scoring.step_rows import StepRows, longest, row_scores
from lenvm.scoring.torch_state import Capture, Held, Scored, TorchState

if TYPE_CHECKING:
    from lenvm.decoding.step_decoder import StepDecoder
    from lenvm.scoring.prompt_graph import PromptGraphs
    from lenvm.scoring.step_graph import StepGraphs

__all__ = ["TorchScorer", "TorchState"]

_log = logging.getLogger(__name__)
_LEAST_PREFIX = 128
_COMPACT_EVERY = 16  # steps: captures that have lost users stay whole until then
_STEP_ROWS = 128  # decoding rows in a call from which on they have a forward of their own


def _is_whole(row: ScoreRow) -> bool:
    """A prompt from its first token on, wanted at its last one alone."""
    return row.state is None and row.values_from is None and not len(row.candidates)


class _Promotion(NamedTuple):
    """The first token that a row appends was a candidate of its state."""

    row: int
    capture: Capture
    candidate: int  # in the capture
    place: tuple[int, int]  # block and offset


@dataclass(slots=True)
class _Work:
    """A row on its way through a call."""

    row: ScoreRow
    held: Held | None  # None once the call has failed
    length: int  # tokens of the prefix that are in the pool
    tail: list[int]
    logit: float
    bin_logprobs: NDArray[np.float64] | None

    def taken(self) -> Held:
        """What the row's new state holds."""
        assert self.held is not None
        return self.held

    @property
    def blocks(self) -> list[int]:
        """Blocks of the new state."""
        return self.taken().blocks

    def as_row(self) -> Row:
        """For a packed forward."""
        return Row(self.blocks, self.length, self.tail, self.row.candidates)

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
        self._captures: weakref.WeakSet[Capture] = weakref.WeakSet()  # those with several users
        self._steps_since = 0  # captures were looked through
        self.token_budget = token_budget
        # Kept: reading a Hugging Face config takes microseconds, and every row of every call asks.
        self._context, self._vocab_size = model.context, int(model.decoder.config.vocab_size)
        shape = PoolShape.of(model.decoder.config)
        if pool_tokens is None:
            pool_tokens = 1 << 18
            if model.device.type == "cuda":
                pool_tokens = torch.cuda.mem_get_info(model.device)[0] // 4 // shape.token_bytes(model.dtype)
        self._pool: BlockPool | None = None
        self._pool_size = -(-pool_tokens // block_size) + 1, block_size
        self._decoder: StepDecoder | None = None
        self._steps: StepGraphs | None = None
        self._prompts: PromptGraphs | None = None
        self._device_graphs: list[Any] = []  # of lenvm.decoding.device_processor

    @property
    def pool(self) -> BlockPool:
        """The block pool, made on first use; on CUDA at full size, since graphs need tensors that never move."""
        if self._pool is None:
            blocks, size = self._pool_size
            model, on_gpu = self.model, self.model.device.type == "cuda"
            self._pool = BlockPool(
                PoolShape.of(model.decoder.config),
                max_blocks=blocks,
                initial_blocks=blocks if on_gpu else None,
                block_size=size,
                device=model.device,
                dtype=model.dtype,
            )
            if self._pool.has_step_kernel and can_fuse(model.decoder):
                self._use_fused(compiled=on_gpu)
        return self._pool

    def _use_fused(self, *, compiled: bool) -> None:
        """Run our own fused decoder, and decoding steps as graphs."""
        from lenvm.decoding.step_decoder import StepDecoder
        from lenvm.scoring.prompt_graph import PromptGraphs
        from lenvm.scoring.step_graph import StepGraphs
        from lenvm.scoring.step_layers import StepLayers

        self._decoder = StepDecoder(self.model.decoder, compiled=compiled, dynamic=True)
        fused = self._decoder.fused
        if fused is not None and StepLayers.suits(self.model.decoder, fused):
            layers = StepLayers(self.model.decoder, fused, self._context)
            self._steps = StepGraphs(self.model, self.pool, layers)
            if suits_fresh_attention(self.pool):
                self._prompts = PromptGraphs(layers, self._steps.head, self.pool)

    @property
    def least_prefix(self) -> int:
        """Tokens of a shared prefix of which fewer are sooner computed again than gone on from: whole prompts have a
        graph of their own."""
        return 0 if self.pool is None or self._prompts is None else _LEAST_PREFIX

    @property
    def has_graphs(self) -> bool:
        """Whether decoding steps are CUDA graphs: on a GPU, for architectures whose layers we run ourselves."""
        return self.pool is not None and self._steps is not None

    @torch.inference_mode()
    def warm_up(self, tokens: int) -> None:
        """Have ready what batches of prompts of up to so many tokens need, so that no request waits for it."""
        if self.pool is not None and self._prompts is not None:
            try:
                self._prompts.record(tokens)
            except (GraphError, torch.OutOfMemoryError) as error:
                self._leave_prompt_graphs(error)

    def _leave_prompt_graphs(self, error: Exception) -> None:
        _log.warning("prompts run without CUDA graphs, and slower: %s", error)
        self._prompts = None

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
        return self._context

    @property
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""
        return self._vocab_size

    def open(self, prefixes: Sequence[Sequence[int]]) -> list[TorchState]:
        """States of whole prefixes, scored at their last token."""
        return [score.state for score in self.score([ScoreRow(append=p) for p in prefixes])]  # type: ignore[misc]

    def token_values(self, prompt: Sequence[int], completion: Sequence[int]) -> RowScore:
        """Values s_0 .. s_T of a completion of T content tokens, in one forward."""
        row = ScoreRow(append=[*prompt, *completion], values_from=len(prompt) - 1)
        (score,) = self.score([row])
        return score

    @torch.inference_mode()
    def score(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None = None) -> list[RowScore]:
        """Answer all rows, aligned; see :class:`lenvm.scoring.Scorer`.

        Raises:
            InvalidRequestError: an id out of range, or a row with neither a state nor tokens.
            ContextTooLongError: prefix, tokens and candidate do not fit in the context.
            StateClosedError: a row's state was closed.
            PoolExhaustedError: the pool of prefix states is full. Nothing is left half done.
        """
        if (stepped := self._stepped(rows, meanwhile)) is not None:
            return stepped
        self._compact()
        for row in rows:
            self.check(row)
        if (prompted := self._prompted(rows, meanwhile)) is not None:
            return prompted
        if self._prompts is not None and (whole := [at for at, row in enumerate(rows) if _is_whole(row)]):
            rest = [at for at, row in enumerate(rows) if not _is_whole(row)]
            # One row that goes on from a prefix must not keep whole prompts from their graph.
            if rest and (first := self._prompted([rows[at] for at in whole], None)) is not None:
                try:
                    second = self.score([rows[at] for at in rest], meanwhile)
                except BaseException:
                    for answer in first:
                        answer.state.close()
                    raise
                by_row = dict(zip([*whole, *rest], [*first, *second], strict=True))
                return [by_row[at] for at in range(len(rows))]
        if meanwhile is not None:
            meanwhile()
        works: list[_Work] = []
        results: dict[int, RowScore] = {}
        try:
            self._promote(self._begin(rows, works))
            for chunk in self._chunks(works):
                results.update(zip(chunk, self._forward([works[i] for i in chunk]), strict=True))
        except BaseException:
            # At once, and not when whoever catches this lets go of its frames.
            for work in works:
                work.held = None
            for score in results.values():
                score.state.close()
            raise
        return [results[index] for index in range(len(rows))]

    def check(self, row: ScoreRow) -> None:
        """Raise what :meth:`score` would raise for this row (a full pool apart), and compute nothing.

        A caller with many rows checks them one by one first, so that one bad row does not fail its neighbours.
        """
        state = row.state
        if state is not None and (not isinstance(state, TorchState) or state.pool is not self.pool):
            raise InvalidRequestError("the state belongs to another scorer", param="session")
        if isinstance(state, TorchState) and state.closed:
            raise StateClosedError("the prefix state was closed: open the prefix again")
        check_row(row, context=self.context, vocab_size=self.vocab_size)

    def blocks_needed(self, row: ScoreRow) -> int:
        """Most blocks that a row takes out of the pool: those of its tokens, and one for a copy-on-write."""
        return self.pool.blocks_for(len(row.append)) + 1

    @property
    def layout(self) -> BlockLayout:
        """Form of this engine's blocks."""
        shape = self.pool.shape
        dims = (2, shape.layers, shape.kv_heads, self.pool.block_size, shape.head_dim)
        return BlockLayout("torch", str(self.model.dtype).removeprefix("torch."), dims)

    def blocks(self, state: PrefixState, first: int = 0) -> list[StateBlock]:
        """The state's full blocks from number ``first`` on; see :class:`lenvm.scoring.Scorer`."""
        assert isinstance(state, TorchState)
        assert state.held is not None
        held = state.held.blocks[first : state.length // self.pool.block_size]
        self.pool.retain(held)
        return [StateBlock(self.pool, [block]) for block in held]

    def join(self, blocks: Sequence[StateBlock]) -> TorchState:
        """The state after these blocks, its value not known; see :class:`lenvm.scoring.Scorer`."""
        places = [place for block in blocks for place in block.places]
        self.pool.retain(places)
        return TorchState(Held(self.pool, places), len(places) * self.pool.block_size, float("nan"), None)

    @torch.inference_mode()
    def dump(self, blocks: Sequence[StateBlock]) -> list[NDArray[np.uint8]]:
        """A copy of each block's bytes on the host, in the form of :attr:`layout`."""
        if not blocks:
            return []
        read = self.pool.read([place for block in blocks for place in block.places])
        return list(read.flatten(1).cpu().view(torch.uint8).numpy())

    @torch.inference_mode()
    def load(self, payloads: Sequence[NDArray[np.uint8]]) -> list[StateBlock]:
        """Blocks with these bytes. Raises PoolExhaustedError where there is no room."""
        if not payloads:
            return []
        places = self.pool.allocate(len(payloads))
        blocks = [StateBlock(self.pool, [place]) for place in places]
        stored = torch.from_numpy(np.stack(payloads)).view(self.model.dtype)
        self.pool.restore(places, stored.view(len(places), *self.layout.shape))
        return blocks

    def _compact(self) -> None:
        self._steps_since = 0
        # Here and not when a state goes: in a decoding loop all users of the last call go, and nothing is copied.
        for capture in list(self._captures):
            left = capture.left()
            if 2 * len(left) <= len(capture.users):
                capture.compact(left)

    def _begin(self, rows: Sequence[ScoreRow], works: list[_Work]) -> list[_Promotion]:
        """Blocks for the new states, noted in ``works`` as they are taken. A first appended token that the state was
        scored with is not to be computed: what is to be copied for it is returned."""
        copies: list[tuple[int, int]] = []
        promotions = []
        pool = self.pool
        for row in rows:
            tail = list(row.append)
            state = row.state
            if state is None:
                works.append(_Work(row, Held(pool, pool.fork([], 0, len(tail))), 0, tail, float("nan"), None))
                continue
            assert isinstance(state, TorchState)
            assert state.held is not None
            held = state.held
            if tail and not (len(tail) == 1 and pool.advance(held.blocks, state.length)):
                held = Held(pool, pool.fork(held.blocks, state.length, len(tail), copies))
            work = _Work(row, held, state.length, tail, state.logit, state.bin_logprobs)
            works.append(work)
            scored = state.scored
            if tail and row.values_from is None and scored is not None and tail[0] in scored.ids:
                at = scored.ids.index(tail.pop(0))
                place = pool.slot(held.blocks, state.length)
                promotions.append(_Promotion(len(works) - 1, scored.capture, scored.first + at, place))
                work.length += 1
                work.logit = float(scored.logits[at])
                work.bin_logprobs = None if scored.bin_logprobs is None else scored.bin_logprobs[at].astype(np.float64)
        pool.copy(copies)
        return promotions

    def _promote(self, promotions: Sequence[_Promotion]) -> None:
        """Copy chosen candidates' keys and values into the pool."""
        if not promotions:
            return
        self.stats.promoted += len(promotions)
        of: dict[Capture, list[_Promotion]] = {}
        for promotion in promotions:
            of.setdefault(promotion.capture, []).append(promotion)
        keys, values, slots = [], [], []
        for capture, its in of.items():
            at = torch.tensor([promotion.candidate for promotion in its], device=capture.keys.device)
            keys.append(capture.keys[:, at])
            values.append(capture.values[:, at])
            slots += [promotion.place for promotion in its]
        self.pool.write(slots, torch.cat(keys, dim=1), torch.cat(values, dim=1))

    def _chunks(self, works: Sequence[_Work]) -> Iterator[list[int]]:
        """Split a call so that each forward takes at most the token budget (or one row)."""
        tails = [index for index, work in enumerate(works) if work.tail]
        steps = [index for index, work in enumerate(works) if not work.tail]
        # Among prompts a decoding step cannot use its kernel; with many rows that costs more than a second forward.
        apart = self.pool.has_step_kernel and len(steps) >= _STEP_ROWS and len(tails) > 0
        for group in (tails, steps) if apart else (range(len(works)),):
            chunk: list[int] = []
            tokens = 0
            for index in group:
                if chunk and tokens + works[index].new_tokens > self.token_budget:
                    yield chunk
                    chunk, tokens = [], 0
                chunk.append(index)
                tokens += works[index].new_tokens
            if chunk:
                yield chunk

    def _forward(self, works: Sequence[_Work]) -> list[RowScore]:
        active = [work for work in works if work.new_tokens]
        if not active:
            return [self._finish(work, None, None, 0) for work in works]
        plan = build_plan(self.pool, [work.as_row() for work in active])
        hidden = self._hidden(plan)
        # The places whose values are wanted: of a tail those from ``first_value`` on, and every candidate.
        sizes = np.array([work.new_tokens for work in active])
        skipped = np.array([work.first_value if work.tail else 0 for work in active])
        place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        wanted = torch.from_numpy(np.flatnonzero(place >= np.repeat(skipped, sizes)))
        head: HeadOutput = self.model.head(hidden[wanted.to(hidden.device)])
        # One transfer to the host a call: logits and log-probabilities together.
        packed = (
            head.logits[:, None]
            if head.bin_logprobs is None
            else torch.cat([head.logits[:, None], head.bin_logprobs], 1)
        )
        numbers = packed.cpu().double().numpy()
        capture = None
        if plan.captured_keys:
            capture = Capture(torch.stack(plan.captured_keys), torch.stack(plan.captured_values))
        self._count(int(plan.input_ids.numel()))
        results, at, candidate_at = [], 0, 0
        for work in works:
            size = work.new_tokens - (work.first_value if work.tail else 0)
            results.append(self._finish(work, numbers[at : at + size] if size else None, capture, candidate_at))
            at += size
            candidate_at += len(work.row.candidates)
        if capture is not None:
            self._keep(capture)
        return results

    def _hidden(self, plan: Plan) -> torch.Tensor:
        """Last hidden states ``[N, hidden]`` of a packed forward."""
        if self._prompts is not None and plan.fresh:
            try:
                if (hidden := self._prompts(plan)) is not None:
                    return hidden
            except GraphError as error:
                self._leave_prompt_graphs(error)
        # One token alone would be compiled anew, which takes seconds.
        if self._decoder is not None and (plan.fresh or not plan.groups) and len(plan.input_ids) > 1:
            return self._decoder(plan.input_ids, plan.positions, plan)
        return packed_forward(self.model.decoder, plan)

    def _stepped(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None) -> list[RowScore] | None:
        """A decoding step, see :meth:`step`; None for any other call."""
        if self._steps is None:
            return None
        candidates = [row.candidates for row in rows]
        counts: list[int] = list(map(len, candidates))
        ids = packed_ids(candidates, sum(counts)) if all(counts) and counts else None
        if ids is None or any(row.values_from is not None and len(row.append) for row in rows):
            return None

        answers: list[RowScore] = []

        def also(step: StepScores) -> None:
            answers.extend(row_scores(step))
            if meanwhile is not None:
                meanwhile()

        found = self.step([row.state for row in rows], [row.append for row in rows], ids, counts, also)
        return None if found is None else answers

    def step(
        self,
        before: Sequence[PrefixState | None],
        appended: Sequence[Sequence[int]],
        ids: NDArray[np.int32],
        counts: Sequence[int],
        meanwhile: Callable[[StepScores], None] | None = None,
        *,
        utilities: NDArray[np.float32] | None = None,
        record: bool = True,
    ) -> StepScores | None:
        """A decoding step by one graph: each row has a state, at most one more token, which is among the candidates
        that the state was scored with, and candidates: ``counts[row]`` of ``ids``, all rows' one after another. None
        for any other call, or where this GPU or driver would not record the step (for good); with ``record`` False also
        where the graph is not there yet, whose recording takes a second or so. ``meanwhile`` is called with the answer
        while the device is at work: its numbers are not there yet. ``utilities [n]``: of each bin, for
        ``StepScores.means``. Ids out of range are found then, too: such a call is run, and is none all the same.

        Raises PoolExhaustedError."""
        steps = self._steps
        if steps is None or not counts or 0 in counts or not steps.fits(len(counts), max(counts)):
            return None
        if not record and not steps.recorded(len(counts), max(counts), longest(before, appended)):
            return None
        rows = StepRows.of(self.pool, self._context, before, appended)
        if rows is None:
            return None
        try:
            launched = steps.launch(rows.blocks, rows.lengths, counts, ids, rows.promotions, utilities)
        except GraphError as error:
            _log.warning("decoding steps run without CUDA graphs, and slower: %s", error)
            self._steps = None
            return None

        def made() -> list[TorchState]:
            states, capture = rows.states(ids, counts, launched, has_bins=self.bins is not None)
            self._keep(capture)
            return states

        try:  # while the device is at work, for which an id that is none is as good as another
            if np.maximum.reduce(ids.view(np.uint32)) >= self._vocab_size:  # negative ids are the largest then
                return None
            size = len(rows.lengths)
            means = None if launched.means is None else launched.means[:size]
            found = StepScores(rows.lengths, rows.logits(), launched.numbers[:size], means, counts, made)
            self._count(len(ids))
            self.stats.promoted += rows.promoted
            if meanwhile is not None:
                meanwhile(found)
        finally:
            launched.wait()  # whatever happens: no other step may be launched before
        # Not while the device is at work: a copy to it would wait for the step, and so would all that comes after.
        self._steps_since += 1
        if self._steps_since >= _COMPACT_EVERY:
            self._compact()
        return found

    def _prompted(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None) -> list[RowScore] | None:
        """Whole prompts, wanted at their last tokens alone, by one graph; None for any other call, and where this GPU
        or driver would not record it (for good)."""
        if self._prompts is None or not all(map(_is_whole, rows)):
            return None
        tokens = sum(len(row.append) for row in rows)
        if not 0 < tokens <= self.token_budget:
            return None
        pool, held = self.pool, list[Held]()
        try:
            for row in rows:
                held.append(Held(pool, pool.fork([], 0, len(row.append))))
            launched = self._prompts.launch([row.append for row in rows], [own.blocks for own in held])
            if launched is None:
                return None
            try:
                self._count(tokens)
                if meanwhile is not None:
                    meanwhile()
            finally:
                launched.wait()  # whatever happens: nothing else may be launched before
        except GraphError as error:
            self._leave_prompt_graphs(error)
            return None
        except BaseException:
            held.clear()  # at once, and not when whoever catches this lets go of its frames
            raise
        results = []
        for row, own, numbers in zip(rows, held, launched.numbers, strict=True):
            # A copy: a state that lives long must not keep all numbers of its call alive.
            kept = numbers.copy()
            bins = kept[1:] if self.bins is not None else None
            state = TorchState(own, len(row.append), float(kept[0]), bins)
            none, no_bins = np.empty(0), None if bins is None else np.empty((0, len(bins)))
            results.append(RowScore(state, kept[:1], None if bins is None else bins[None], none, no_bins, 0))
        return results

    def _count(self, tokens: int) -> None:
        self.stats.forwards += 1
        self.stats.tokens += tokens

    def _keep(self, capture: Capture) -> None:
        if len(capture.users) > 1:
            self._captures.add(capture)

    def _finish(
        self, work: _Work, numbers: NDArray[np.float64] | None, capture: Capture | None, first: int
    ) -> RowScore:
        """Split a row's numbers ``[places + K, 1 + n]`` into those of the prefix and those of the candidates, which
        begin at ``first`` in the capture."""
        has_bins = self.bins is not None
        count = len(work.row.candidates)
        if numbers is None:
            numbers = np.empty((0, 1 + (self.bins.size if self.bins else 0)))
        own, others = numbers[: len(numbers) - count], numbers[len(numbers) - count :]
        if not len(own):
            bins = work.bin_logprobs if work.bin_logprobs is not None else np.empty(0)
            own = np.concatenate([[work.logit], bins])[None]
        # A copy: a handle that lives long must not keep all numbers of its call alive.
        logit, bin_logprobs = float(own[-1, 0]), own[-1, 1:].copy() if has_bins else None
        state = TorchState(work.taken(), work.length + len(work.tail), logit, bin_logprobs)
        candidate_bins = others[:, 1:] if has_bins else None
        if count and capture is not None:
            state.scored = Scored(tuple(work.row.candidates), others[:, 0], candidate_bins, capture, first)
            capture.users.append(weakref.ref(state.scored))
        return RowScore(
            state=state,
            logits=own[:, 0],
            bin_logprobs=own[:, 1:] if has_bins else None,
            candidate_logits=others[:, 0],
            candidate_bin_logprobs=candidate_bins,
            cached_tokens=work.length,
        )
