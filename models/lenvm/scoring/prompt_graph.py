"""Whole prompts through the decoder's layers and the value head as CUDA graphs: launched one by one, the kernels of a
batch of prompts keep the host busy for longer than they keep the GPU, and each launch is a moment at which another
thread may take Python from this one.

Tokens, rows and the longest row are rounded up to buckets, each with a graph of its own; all share one memory pool.
What pads the tokens is written nowhere and belongs to no row; what pads the rows is empty.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.cuda_graph import captured
from lenvm.paged import BlockPool
from lenvm.paged.attention import HostPlan, Plan
from lenvm.scoring.step_layers import StepHead, StepLayers

__all__ = ["PromptGraphs", "PromptNumbers"]

_TOKENS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
_ROWS, _WIDTHS = (8, 512), (128, 1024, 8192)  # rows that are not there cost little: nothing is computed for them
_Bucket = tuple[int, int, int]


@dataclass(frozen=True)
class PromptNumbers:
    """What prompts give at their last tokens, once :meth:`wait` has returned: ``numbers [rows, 1 + n]`` (value logit,
    bin log-probs; float64)."""

    numbers: NDArray[np.float64]
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """Until the numbers are there."""
        if self.done is not None:
            self.done.synchronize()


class PromptGraphs:
    """The graphs of one decoder and its pool, whose tensors must never move."""

    def __init__(self, layers: StepLayers, head: StepHead, pool: BlockPool) -> None:
        self.layers, self.head, self.pool = layers, head, pool
        self._memory = torch.cuda.graph_pool_handle() if pool.device.type == "cuda" else None
        self._graphs: dict[_Bucket, _PromptGraph] = {}

    def __call__(self, plan: Plan) -> torch.Tensor | None:
        """Last hidden states ``[N, hidden]`` of a plan of whole prompts, which the next call overwrites; None where it
        is larger than the buckets. Raises GraphError."""
        host = plan.host
        if host is None or (bucket := _bucket(len(host.ids), len(host.starts) - 1, plan.width)) is None:
            return None
        graph = self._graph(bucket)
        graph.run(host)
        return graph.hidden[: len(host.ids)]

    def launch(self, prompts: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]]) -> PromptNumbers | None:
        """Score whole prompts at their last tokens; keys and values go to ``blocks`` (of each prompt). None where they
        are more than the buckets hold. The numbers are there after ``wait``, before which nothing else may be launched.
        Raises GraphError; nothing is done then."""
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        total = int(lengths.sum())
        bucket = _bucket(total, len(prompts), int(lengths.max()))
        if bucket is None:
            return None
        size = self.pool.block_size
        ids = np.fromiter(chain.from_iterable(prompts), np.int64, total)
        ends = np.cumsum(lengths)
        positions = np.arange(total) - np.repeat(ends - lengths, lengths)
        counts = np.fromiter(map(len, blocks), np.int64, len(blocks))
        held = np.fromiter(chain.from_iterable(blocks), np.int64, int(counts.sum()))
        of_token = held[np.repeat(np.cumsum(counts) - counts, lengths) + positions // size]
        starts = np.concatenate([[0], ends])
        return self._graph(bucket).launch(HostPlan(ids, positions, of_token, positions % size, starts))

    def record(self, tokens: int) -> None:
        """Have the graphs of short prompts, up to so many tokens together. Raises what a call raises."""
        few, many = _ROWS
        for size in _TOKENS[: bisect.bisect_left(_TOKENS, tokens) + 1]:
            for rows in (few, many) if size <= few * _WIDTHS[0] else (many,):
                self._graph((size, rows, _WIDTHS[0]))

    def _graph(self, bucket: _Bucket) -> _PromptGraph:
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = _PromptGraph(self, *bucket, self._memory)
        return graph


def _bucket(tokens: int, rows: int, width: int) -> _Bucket | None:
    found = [_up(_TOKENS, tokens), _up(_ROWS, rows), _up(_WIDTHS, width)]
    return None if None in found else (found[0], found[1], found[2])  # type: ignore[return-value]  # none is None here


def _up(buckets: tuple[int, ...], size: int) -> int | None:
    return next(iter(buckets[bisect.bisect_left(buckets, size) :]), None)


class _PromptGraph:
    """Static buffers, the layers over them, and the head at the rows' last tokens."""

    def __init__(
        self, graphs: PromptGraphs, tokens: int, rows: int, width: int, memory: tuple[int, int] | None
    ) -> None:
        self.layers, self.head, self.pool, self.width = graphs.layers, graphs.head, graphs.pool, width
        device, on_gpu = self.pool.device, self.pool.device.type == "cuda"
        # One buffer and one copy from the host: ids, positions, blocks and offsets of the tokens; first tokens of the
        # rows, and their last ones.
        self.sent = torch.zeros(4 * tokens + 2 * rows + 1, dtype=torch.int32, pin_memory=on_gpu)
        self.inputs = self.sent.to(device)
        sizes = [tokens, tokens, tokens, tokens, rows + 1, rows]
        self.host = [part.numpy() for part in self.sent.split(sizes)]
        self.parts = self.inputs.split(sizes)
        self.filled = 0  # tokens that have a block in the host's buffer
        self.hidden = torch.empty(0)
        self.numbers = torch.zeros(rows, graphs.head.width, dtype=torch.float64, device=device)
        self.replay = captured(self._run, pool=memory) if on_gpu else self._run
        self.done = torch.cuda.Event() if on_gpu else None

    def _run(self) -> None:
        self.inputs.copy_(self.sent, non_blocking=True)
        ids, positions, blocks, offsets, starts, last = self.parts
        self.hidden = self.layers.prompts(ids, positions, blocks, offsets, starts, self.width, self.pool)
        self.head(self.hidden.index_select(0, last), self.numbers)

    def run(self, host: HostPlan) -> None:
        """The graph over these tokens and rows."""
        if self.done is not None:
            self.done.synchronize()  # of the call before, if that failed before it waited: its copy reads the buffer
        count, rows = len(host.ids), len(host.starts) - 1
        for own, given in zip(self.host, (host.ids, host.positions, host.blocks, host.offsets), strict=False):
            own[:count] = given
        self.host[2][count : self.filled] = 0  # what pads the tokens is written nowhere
        self.filled = count
        first, last = self.host[4:]
        first[: rows + 1], first[rows + 1 :] = host.starts, count
        last[:rows], last[rows:] = host.starts[1:] - 1, 0
        self.replay()
        if self.done is not None:
            self.done.record()

    def launch(self, host: HostPlan) -> PromptNumbers:
        """See :meth:`PromptGraphs.launch`."""
        rows = len(host.starts) - 1
        received = torch.empty(rows, self.numbers.shape[1], dtype=torch.float64, pin_memory=self.done is not None)
        self.run(host)
        received.copy_(self.numbers[:rows], non_blocking=True)
        if self.done is not None:
            self.done.record()
        return PromptNumbers(received.numpy(), self.done)
