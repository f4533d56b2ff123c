"""Guidance between a backbone's logits and its sampler that never leaves the GPU: candidates, promotion, values,
log-weights and the guided law as one CUDA graph, for loops that are not ours (``generate`` of transformers).

What the host would have to wait for stays on the device: which token was drawn, which row has ended. The host copies
the logits and the last tokens in, launches, and goes on; blocks for the whole answer are taken at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lenvm.cuda_graph import captured
from lenvm.decoding.device_step import Shortlist, guided_law, pick_candidate
from lenvm.decoding.randomness import uniforms
from lenvm.decoding.sampler import FORCED_STOP_PROBABILITY
from lenvm.device_guidance import Column, Family, Rules, bin_edges, weigh
from lenvm.paged.pool import to_device
from lenvm.scoring.step_layers import SHORT

if TYPE_CHECKING:
    from lenvm.scoring.torch_scorer import TorchScorer, TorchState

__all__ = ["DeviceProcessor", "DeviceRow"]

_NOTHING = -1  # no token


@dataclass(frozen=True)
class _Shape:
    """What a graph is made for."""

    rows: int
    top_k: int
    vocabulary: int
    end_ids: tuple[int, ...]
    families: frozenset[Family]
    drawn: bool  # the graph draws with the rows' seeds
    long: bool


@dataclass(frozen=True)
class DeviceRow:
    """What guidance did to one answer: ``steps`` tokens, of which EOS is one; ``text_cost``: log q - log p over them,
    both over the candidates, in nats; ``forced_stop``: an EOS was taken where all of them had less than 1e-3."""

    steps: int
    text_cost: float
    forced_stop: bool


class _Graph:
    """Static buffers and the step that reads and fills them. ``busy``: a generation is using them."""

    def __init__(self, scorer: TorchScorer, shape: _Shape) -> None:
        assert scorer._steps is not None
        self.shape, self.pool, self.model = shape, scorer.pool, scorer.model
        self.layers, self.head = scorer._steps.layers, scorer._steps.head
        self.busy = False
        device, rows = self.pool.device, shape.rows
        width = min(shape.top_k, shape.vocabulary) + len(shape.end_ids)

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.scores = zeros(rows, shape.vocabulary, dtype=torch.float32)
        self.out = torch.zeros_like(self.scores)
        self.tokens, self.positions, self.steps, self.seeds = (zeros(rows) for _ in range(4))
        self.alive = zeros(rows, dtype=torch.bool)
        self.tables = zeros(rows, self.pool.blocks_for(scorer.context), dtype=torch.int32)
        self.rule = zeros(rows, len(Column), dtype=torch.float64)
        self.temperature = torch.ones(1, device=device)
        self.ends = torch.tensor(shape.end_ids, dtype=torch.int64, device=device)
        self.edges = bin_edges(scorer.bins, device)
        # Of the step before: candidates (their keys and values too), what each costs, and log p of all EOS ids.
        self.ids = zeros(rows, width)
        self.costs = zeros(rows, width, dtype=torch.float64)
        self.stop = zeros(rows, dtype=torch.float64)
        self.cost = zeros(rows, dtype=torch.float64)
        self.forced = zeros(rows, dtype=torch.bool)
        form = self.pool.shape
        self.kept = torch.zeros(
            2, form.layers, rows * width, form.kv_heads, form.head_dim, dtype=self.pool.dtype, device=device
        )
        self.numbers = zeros(rows * width, scorer.model.head.output.out_features, dtype=torch.float64)
        keys, values = self.kept
        token = keys.stride(1) * keys.itemsize
        self.starts = torch.tensor([keys.data_ptr(), values.data_ptr()], device=device)
        self.strides = torch.tensor([token, keys.stride(0)], device=device)
        self.first = torch.arange(rows, device=device) * width
        self.advance = captured(self._step) if device.type == "cuda" else self._step

    def _step(self) -> None:
        self._take()
        found = Shortlist.of(self.scores, self.shape.top_k, self.ends, self.temperature)
        self.ids.copy_(found.ids)
        base, guided = guided_law(found, self._weights(found))
        self.stop.copy_(found.stop())
        self.costs.copy_(torch.where(base > -math.inf, guided - base, 0.0))
        self.out.fill_(-math.inf)
        if self.shape.drawn:
            at = pick_candidate(guided, uniforms(self.seeds, self.steps))
            self.out.scatter_(-1, found.ids.gather(-1, at), 0.0)
        else:
            # An id that stands there twice has its chance in the first place alone.
            self.out.scatter_reduce_(-1, found.ids, (guided * self.temperature).float(), "amax")
        # What stands behind an answer that has ended is not ours.
        self.out.copy_(torch.where(self.alive[:, None], self.out, self.scores))
        self.steps += self.alive

    def _take(self) -> None:
        """The tokens that were drawn from the step before: into the pool, and into the account."""
        from lenvm.paged.kernels import promote_tokens

        same = (self.ids == self.tokens[:, None]) & (self.tokens != _NOTHING)[:, None]
        at = same.int().argmax(-1)
        drawn = self.alive & same.any(-1)
        ends = drawn & torch.isin(self.tokens, self.ends)
        self.cost += torch.where(drawn, self.costs.gather(-1, at[:, None])[:, 0], 0.0)
        self.forced |= ends & (self.stop < math.log(FORCED_STOP_PROBABILITY))
        # A token that was no candidate: somebody else's, whose state nobody has.
        self.alive &= ~ends & (drawn | (self.tokens == _NOTHING))
        grows = drawn & self.alive
        size = self.pool.block_size
        block = self.tables.gather(1, (self.positions // size)[:, None])[:, 0].long()
        addresses = self.starts + ((self.first + at) * self.strides[0])[:, None]
        stride = torch.where(grows, self.strides[1], 0)
        promote_tokens(
            torch.cat([addresses, torch.stack([stride, block, self.positions % size], 1)], 1), *self.pool.stacked
        )
        self.positions += grows

    def _weights(self, shortlist: Shortlist) -> torch.Tensor:
        ids, is_eos, kept, logprobs = shortlist
        rows, width = ids.shape
        if not self.shape.families - {Family.NONE}:
            return torch.zeros_like(logprobs)
        lengths = torch.where(self.alive, self.positions, 0).int()
        hidden = self.layers(ids.view(-1), lengths, self.tables, self.pool, self.kept, long=self.shape.long)
        self.head(hidden, self.numbers)
        numbers = self.numbers.view(rows, width, -1)
        return weigh(
            self.rule,
            self.shape.families,
            logits=numbers[..., 0],
            bin_logprobs=numbers[..., 1:] if numbers.shape[-1] > 1 else None,
            is_eos=is_eos,
            kept=kept,
            generated=self.steps,
            logprobs=logprobs,
            edges=self.edges,
            gamma=self.model.config.gamma,
        )


class DeviceProcessor:
    """A logits processor of transformers for one call of ``generate``: raw scores in, ``temperature * log q`` out, all
    but the candidates at -inf. One row a prompt, no beams. A row whose objective is None has the same candidates and is
    not guided.

    Args:
        scorer: of a model on the device, which records steps as graphs.
        rules: one for each prompt.
        prompts: token ids without padding; their states are opened here.
        end_ids: EOS and stop ids.
        room: tokens that an answer may have.
        vocabulary: width of the scores.
        seeds: one for each prompt: the graph draws, and leaves one token.

    Raises:
        PoolExhaustedError: no room for prompts and answers. ContextTooLongError: they do not fit in the context.
        GraphError: this GPU or driver would not record it.
    """

    @torch.inference_mode()
    def __init__(
        self,
        scorer: TorchScorer,
        rules: Rules,
        prompts: Sequence[Sequence[int]],
        *,
        end_ids: Sequence[int],
        temperature: float,
        top_k: int,
        room: int,
        vocabulary: int,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.states: list[TorchState] = scorer.open(prompts)
        self.count, pool = len(prompts), scorer.pool
        blocks: list[list[int]] = []
        try:
            for state in self.states:
                assert state.held is not None
                blocks.append(pool.fork(state.held.blocks, state.length, room))
                state.close()
            longest = max(state.length for state in self.states) + room
            shape = _Shape(
                self.count, top_k, vocabulary, tuple(end_ids), rules.families, seeds is not None, longest > SHORT
            )
            self.graph = _graph(scorer, shape)
        except BaseException:
            for own in blocks:
                pool.release(own)
            raise
        self._blocks, self._begun = blocks, False
        graph = self.graph
        table = np.zeros(tuple(graph.tables.shape), dtype=np.int32)
        for row, own in zip(table, blocks, strict=True):
            row[: len(own)] = own
        graph.tables.copy_(to_device(table, pool.device))
        graph.positions.copy_(to_device(np.array([state.length for state in self.states]), pool.device))
        graph.rule.copy_(to_device(rules.table, pool.device))
        graph.seeds.copy_(to_device(np.array(seeds or [0] * self.count, dtype=np.int64), pool.device))
        graph.temperature.fill_(temperature)
        graph.tokens.fill_(_NOTHING)
        for counter in (graph.steps, graph.cost, graph.forced):
            counter.zero_()
        graph.alive.fill_(True)

    @torch.inference_mode()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``[B, T]`` ids and ``[B, V]`` raw scores -> ``[B, V]`` scores; nothing is waited for."""
        graph = self.graph
        graph.scores.copy_(scores)
        if self._begun:
            graph.tokens.copy_(input_ids[:, -1])
        self._begun = True
        graph.advance()
        return graph.out.to(scores.device, scores.dtype, copy=True)

    @torch.inference_mode()
    def finish(self, last: torch.Tensor | None = None) -> list[DeviceRow]:
        """What guidance did to each answer, ``last [B]`` being the tokens that came out of the last step. Gives back
        what was taken; the processor cannot be used any more."""
        graph, found = self.graph, []
        if last is not None and self._blocks:
            graph.tokens.copy_(last)
            graph._take()
            columns = (graph.steps.tolist(), graph.cost.tolist(), graph.forced.tolist())
            found = [DeviceRow(*row) for row in zip(*columns, strict=True)]
        for own in self._blocks:
            graph.pool.release(own)
        if self._blocks:
            graph.busy = False
        self._blocks = []
        return found


def _graph(scorer: TorchScorer, shape: _Shape) -> _Graph:
    """A graph that nobody uses, made where there is none; the last few stay with the scorer."""
    graphs: list[_Graph] = scorer._device_graphs
    for graph in graphs:
        if graph.shape == shape and not graph.busy:
            graph.busy = True
            return graph
    made = _Graph(scorer, shape)
    made.busy = True
    graphs.append(made)
    idle = [graph for graph in graphs if not graph.busy]
    for graph in idle[: max(0, len(graphs) - _KEPT)]:
        graphs.remove(graph)
    return made


_KEPT = 4  # graphs
