"""One decoding step of all rows as one CUDA graph: backbone, candidates, values, guidance and draw, no host between."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lenvm.cuda_graph import captured
from lenvm.decoding.randomness import uniforms
from lenvm.decoding.step_decoder import StepDecoder
from lenvm.device_guidance import Column, Family, Rules, bin_edges, weigh
from lenvm.paged import BlockPool
from lenvm.paged.attention import Plan

if TYPE_CHECKING:
    from lenvm.decoding.sampler import Sampler
    from lenvm.decoding.types import SamplingParams

__all__ = ["DeviceStep", "Shortlist", "draw_token", "guided_law", "pick_candidate", "top_candidates"]

# Steps between two looks of the host. A row that has ended stands still for one and a half of these on average, which
# costs a large batch more than looking twice as often does.
_CHUNK, _CHUNK_OF_MANY, _MANY_ROWS = 16, 8, 512
_TILE = 256  # tokens of the vocabulary that are summed as one when a token is drawn
_CANDIDATE_TILE = 64
_COMPILE_ROWS = 256  # fewer rows are not worth the compiler's half a minute


def draw_token(logits: torch.Tensor, temperature: float, draws: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF sampling over the whole vocabulary: ``logits [B, vocabulary]``, uniforms ``[B]`` -> ids ``[B]``.

    Two levels, first a tile and then a token in it: the vocabulary is read twice and never written.
    """
    rows, vocabulary = logits.shape
    short = -vocabulary % _TILE
    if short:
        logits = torch.nn.functional.pad(logits, (0, short), value=-math.inf)
    tiles = logits.view(rows, -1, _TILE)
    peak = logits.amax(-1, keepdim=True).float()
    mass = ((tiles.float() - peak[..., None]) / temperature).exp().sum(-1)  # [B, tiles]
    reached = mass.double().cumsum(-1)
    target = draws[:, None] * reached[:, -1:]
    tile = (reached <= target).sum(-1, keepdim=True).clamp_(max=tiles.shape[1] - 1)
    inside = tiles.gather(1, tile[..., None].expand(-1, 1, _TILE))[:, 0]
    reached_before = torch.where(tile > 0, reached.gather(1, (tile - 1).clamp_min(0)), 0.0)
    weights = ((inside.float() - peak) / temperature).exp().double().cumsum(-1)
    place = (weights <= target - reached_before).sum(-1, keepdim=True).clamp_(max=_TILE - 1)
    # Rounding between the two levels must not end on a token of no probability.
    last = (weights < weights[:, -1:]).sum(-1, keepdim=True)
    return (tile * _TILE + torch.minimum(place, last))[:, 0].clamp_(max=vocabulary - 1)


def top_candidates(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids ``[B, count]`` of the largest logits ``[B, vocabulary]``, in no order: they lie in the ``count`` tiles of the
    largest maxima, so that only those are sorted."""
    rows, vocabulary = logits.shape
    short = -vocabulary % _CANDIDATE_TILE
    if short:
        logits = torch.nn.functional.pad(logits, (0, short), value=-math.inf)
    tiles = logits.view(rows, -1, _CANDIDATE_TILE)
    if tiles.shape[1] <= 2 * count:
        return logits.topk(count, dim=-1, sorted=False).indices
    best = tiles.amax(-1).topk(count, dim=-1, sorted=False).indices  # [B, count]
    inside = tiles.gather(1, best[..., None].expand(-1, -1, _CANDIDATE_TILE)).view(rows, -1)
    at = inside.topk(count, dim=-1, sorted=False).indices
    return best.gather(1, at // _CANDIDATE_TILE) * _CANDIDATE_TILE + at % _CANDIDATE_TILE


class Shortlist(NamedTuple):
    """Candidates of a step, ``[B, K]`` each: ids in order, which end an answer, which are ``kept`` (an id that stands
    there twice is in its first place alone), and natural logs over the whole vocabulary at the temperature, float64."""

    ids: torch.Tensor
    is_eos: torch.Tensor
    kept: torch.Tensor
    logprobs: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, count: int, ends: torch.Tensor, temperature: float | torch.Tensor) -> Shortlist:
        """The ``count`` likeliest tokens of logits ``[B, vocabulary]``, and the ids ``ends``. Sorted by id, as on the
        host: the same uniform draws the same token."""
        ids = top_candidates(logits, count)
        ids = torch.cat([ids, ends.expand(len(ids), -1)], dim=-1).sort(dim=-1).values
        # In float32, as the host computes them.
        wide = logits.float() / temperature
        logprobs = logits.gather(-1, ids).double() / temperature - wide.logsumexp(-1, keepdim=True)
        kept = torch.ones_like(ids, dtype=torch.bool)
        kept[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return cls(ids, torch.isin(ids, ends), kept, logprobs)

    def stop(self) -> torch.Tensor:
        """Natural log ``[B]`` of the probability of all that ends an answer."""
        return torch.where(self.is_eos & self.kept, self.logprobs, -math.inf).logsumexp(-1)


def guided_law(shortlist: Shortlist, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Natural logs ``[B, K]`` of p and of ``q ~ p exp(log-weight)``, both over the candidates."""
    base = torch.where(shortlist.kept, shortlist.logprobs, -math.inf)
    base = base - base.logsumexp(-1, keepdim=True)
    guided = base + weights
    return base, guided - guided.logsumexp(-1, keepdim=True)


def pick_candidate(law: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The place ``[B, 1]`` that uniforms ``[B]`` draw from natural logs ``[B, K]``."""
    reached = law.exp().cumsum(-1)
    return (reached <= draws[:, None] * reached[:, -1:]).sum(-1, keepdim=True).clamp_(max=law.shape[1] - 1)


class DeviceStep:
    """Static buffers for ``rows`` lanes and the captured graph that advances all of them by one token.

    ``pool`` is the backbone's; ``values`` is the value model's pool, with the same blocks: a token has one place in
    both. A lane whose ``alive`` is False reads nothing and writes where nobody reads.
    """

    def __init__(self, sampler: Sampler, rows: int, params: SamplingParams, rules: Rules | None) -> None:
        device, pool = sampler.device, sampler.pool
        self.chunk = _CHUNK if rows < _MANY_ROWS else _CHUNK_OF_MANY
        self.sampler, self.pool, self.params, self.rules = sampler, pool, params, rules
        self.model = rules.model if rules is not None else None
        self.families: frozenset[Family] = rules.families if rules is not None else frozenset()
        self.values = _twin(pool, self.model) if self.model is not None else None
        self.edges = bin_edges(self.model.config.head.bins, device) if self.model is not None else None

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tokens, self.positions, self.seeds, self.steps = (zeros(rows) for _ in range(4))
        self.limits = zeros(rows)
        self.alive = zeros(rows, dtype=torch.bool)
        self.tables = zeros(rows, pool.blocks_for(sampler.context + 1), dtype=torch.int32)
        self.rule = zeros(rows, len(Column), dtype=torch.float64)
        # What an answer accumulates: text cost, log p at temperature 1, log p(EOS) at its last step.
        self.sums = zeros(3, rows, dtype=torch.float64)
        self.history = zeros(self.chunk, rows)
        self.column = zeros(1)
        self.eos = torch.tensor(sampler.eos_ids, device=device)
        self.lanes = torch.arange(rows + 1, device=device)
        self.candidates = (params.top_k or 0) and min(params.top_k or 0, sampler.vocab_size) + len(sampler.eos_ids)
        on_gpu = device.type == "cuda"
        compiled = on_gpu and rows >= _COMPILE_ROWS
        self._draw_token = torch.compile(draw_token, dynamic=False) if compiled else draw_token
        self._decoder = StepDecoder(sampler.decoder, compiled=compiled)
        self._lm_head = sampler.model.get_output_embeddings()
        self._value_decoder = StepDecoder(self.model.decoder, compiled=compiled) if self.model is not None else None
        with self._decoder.recording(), self._value_decoder.recording() if self._value_decoder else nullcontext():
            self.advance = captured(self._step) if on_gpu else self._step
        self.column.zero_()

    def _plan(self, pool: BlockPool, ids: torch.Tensor, positions: torch.Tensor, **fields: Any) -> Plan:
        return Plan(pool=pool, input_ids=ids, positions=positions, tables=self.tables, **fields)

    def _place(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of a token; scratch block 0 for lanes that are not alive."""
        size = self.pool.block_size
        column = (positions // size).clamp_(max=self.tables.shape[1] - 1)
        block = self.tables.gather(1, column[:, None])[:, 0].long()
        return torch.where(self.alive, block, 0), positions % size

    def _logits(self) -> torch.Tensor:
        block, offset = self._place(self.positions)
        plan = self._plan(
            self.pool,
            self.tokens,
            self.positions,
            prefix_lens=torch.where(self.alive, self.positions, 0),
            write_tokens=self.lanes[:-1],
            write_blocks=block,
            write_offsets=offset,
            width=1,
            starts=self.lanes,
        )
        if self._decoder.fused is not None:  # such architectures do nothing more to their logits
            logits: torch.Tensor = self._lm_head(self._decoder(self.tokens, self.positions, plan))
            return logits
        output = self.sampler.model(
            input_ids=self.tokens.unsqueeze(0), position_ids=self.positions.unsqueeze(0), use_cache=False, plan=plan
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _step(self) -> None:
        logits = self._logits()
        draws = uniforms(self.seeds, self.steps)
        chosen = self._guided(logits, draws) if self.candidates else self._unguided(logits, draws)
        self.history.index_copy_(0, self.column, chosen[None])
        self.tokens.copy_(torch.where(self.alive, chosen, self.tokens))
        self.positions += self.alive
        self.steps += self.alive
        self.alive &= ~torch.isin(chosen, self.eos) & (self.steps < self.limits)
        self.column.add_(1).remainder_(self.chunk)

    def _unguided(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = self._draw_token(logits, self.params.temperature, draws)
        return chosen

    def _guided(self, logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Draw from ``q ~ p exp(log-weight)`` over the candidates; as ``Sampler`` does on the host."""
        found = Shortlist.of(logits, self.candidates - len(self.eos), self.eos, self.params.temperature)
        ids, is_eos = found.ids, found.is_eos
        raw = logits.gather(-1, ids).double() - logits.float().logsumexp(-1, keepdim=True)
        weights, captured = self._weights(found)
        base, tilted = guided_law(found, weights)
        at = pick_candidate(tilted, draws)

        def pick(x: torch.Tensor) -> torch.Tensor:
            return x.gather(-1, at)[:, 0]

        ends = pick(is_eos)
        self.sums[0] += torch.where(self.alive, pick(tilted) - pick(base), 0.0)
        self.sums[1] += torch.where(self.alive & ~ends, pick(raw), 0.0)
        self.sums[2].copy_(torch.where(self.alive, found.stop(), self.sums[2]))
        if captured is not None:
            self._promote(captured, at[:, 0])
        return pick(ids)

    def _weights(self, shortlist: Shortlist) -> tuple[torch.Tensor, Plan | None]:
        ids, is_eos, kept, logprobs = shortlist
        if not self.families - {Family.NONE}:
            return torch.zeros_like(logprobs), None
        logits = bin_logprobs = captured = None
        if self.model is not None and self.values is not None and self._value_decoder is not None:
            rows, width = ids.shape
            # The pending token is in the value model's pool already: it was a candidate of the step before.
            positions = (self.positions + 1).repeat_interleave(width)
            captured = self._plan(
                self.values,
                ids.view(-1),
                positions,
                prefix_lens=torch.where(self.alive, self.positions + 1, 0),
                write_tokens=None,
                write_blocks=None,
                write_offsets=None,
                width=width,
                starts=self.lanes * width,
                capture_all=True,
            )
            found = self.model.head(self._value_decoder(captured.input_ids, positions, captured))
            logits = found.logits.view(rows, width)
            bin_logprobs = None if found.bin_logprobs is None else found.bin_logprobs.view(rows, width, -1)
        weights = weigh(
            self.rule,
            self.families,
            logits=logits,
            bin_logprobs=bin_logprobs,
            is_eos=is_eos,
            kept=kept,
            generated=self.steps,
            logprobs=logprobs,
            edges=self.edges,
            gamma=self.model.config.gamma if self.model is not None else 0.5,
        )
        return weights, captured

    def _promote(self, plan: Plan, at: torch.Tensor) -> None:
        """Keys and values of the chosen candidates become the prefix's: no second forward for them."""
        from lenvm.paged.kernels import store_tokens

        assert self.values is not None
        block, offset = self._place(self.positions + 1)
        tokens = self.lanes[:-1] * plan.width + at
        for layer, (keys, values) in enumerate(zip(plan.captured_keys, plan.captured_values, strict=True)):
            store_tokens(keys, values, self.values.keys[layer], self.values.values[layer], tokens, block, offset)


def _twin(pool: BlockPool, model: Any) -> BlockPool:
    """A pool for another model with as many blocks of the same size; it hands none out itself."""
    from lenvm.paged import PoolShape

    return BlockPool(
        PoolShape.of(model.decoder.config),
        max_blocks=pool.max_blocks,
        initial_blocks=pool.num_blocks,
        block_size=pool.block_size,
        device=pool.device,
        dtype=model.dtype,
    )
