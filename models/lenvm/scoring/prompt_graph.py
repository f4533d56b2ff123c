"""Whole prompts through the decoder's layers as CUDA graphs: launched one by one, the kernels of a batch of prompts
keep the host busy for longer than they keep the GPU.

Tokens, rows and the longest row are rounded up to buckets, each with a graph of its own; all share one memory pool.
What pads the tokens is written nowhere and belongs to no row; what pads the rows is empty.
"""

from __future__ import annotations

import bisect

import torch

from lenvm.cuda_graph import captured
from lenvm.paged import BlockPool
from lenvm.paged.attention import Plan
from lenvm.scoring.step_layers import StepLayers

__all__ = ["PromptGraphs"]

_TOKENS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
_ROWS, _WIDTHS = (8, 512), (128, 1024, 8192)  # rows that are not there cost little: nothing is computed for them


class PromptGraphs:
    """The graphs of one decoder and its pool, whose tensors must never move."""

    def __init__(self, layers: StepLayers, pool: BlockPool) -> None:
        self.layers, self.pool = layers, pool
        self._memory = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int, int], _PromptGraph] = {}

    def __call__(self, plan: Plan) -> torch.Tensor | None:
        """Last hidden states ``[N, hidden]`` of a plan of whole prompts, which the next call overwrites; None where it
        is larger than the buckets. Raises GraphError."""
        tokens = _bucket(_TOKENS, len(plan.input_ids))
        rows, width = _bucket(_ROWS, len(plan.starts) - 1), _bucket(_WIDTHS, plan.width)
        if tokens is None or rows is None or width is None:
            return None
        return self._graph(tokens, rows, width).run(plan)

    def record(self, tokens: int) -> None:
        """Have the graphs of short prompts, up to so many tokens together. Raises what a call raises."""
        few, many = _ROWS
        for size in _TOKENS[: bisect.bisect_left(_TOKENS, tokens) + 1]:
            for rows in (few, many) if size <= few * _WIDTHS[0] else (many,):
                self._graph(size, rows, _WIDTHS[0])

    def _graph(self, tokens: int, rows: int, width: int) -> _PromptGraph:
        graph = self._graphs.get((tokens, rows, width))
        if graph is None:
            graph = _PromptGraph(self.layers, self.pool, tokens, rows, width, self._memory)
            self._graphs[tokens, rows, width] = graph
        return graph


def _bucket(buckets: tuple[int, ...], size: int) -> int | None:
    return next(iter(buckets[bisect.bisect_left(buckets, size) :]), None)


class _PromptGraph:
    """Static buffers and the layers over them."""

    def __init__(
        self, layers: StepLayers, pool: BlockPool, tokens: int, rows: int, width: int, memory: tuple[int, int]
    ) -> None:
        self.layers, self.pool, self.width = layers, pool, width
        # ids, positions, blocks and offsets of the tokens; first tokens of the rows
        self.inputs = torch.zeros(4, tokens, dtype=torch.int64, device=pool.device)
        self.starts = torch.zeros(rows + 1, dtype=torch.int32, device=pool.device)
        self.hidden = torch.empty(0)
        self.replay = captured(self._run, pool=memory)

    def _run(self) -> None:
        ids, positions, blocks, offsets = self.inputs.unbind(0)
        self.hidden = self.layers.prompts(ids, positions, blocks, offsets, self.starts, self.width, self.pool)

    def run(self, plan: Plan) -> torch.Tensor:
        """See :meth:`PromptGraphs.__call__`."""
        assert plan.write_blocks is not None
        assert plan.write_offsets is not None
        count = len(plan.input_ids)
        given = (plan.input_ids, plan.positions, plan.write_blocks, plan.write_offsets)
        self.inputs[:, :count] = torch.stack(given)
        self.inputs[2:, count:] = 0
        self.starts[: len(plan.starts)] = plan.starts
        self.starts[len(plan.starts) :] = count
        self.replay()
        return self.hidden[:count]
