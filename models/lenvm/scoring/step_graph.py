"""A decoding step of the scorer as one CUDA graph: every row's candidates over its paged prefix, one launch for all.

A step is a few hundred small kernels: launched one by one they cost more than the GPU takes for them. Shapes are
rounded up to buckets, each with a graph of its own that is captured when it is first needed; the pieces between two
attentions are compiled once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.decoding.device_step import captured
from lenvm.decoding.step_decoder import StepDecoder
from lenvm.modeling import LengthValueModel
from lenvm.paged import BlockPool
from lenvm.paged.attention import Plan

__all__ = ["GraphError", "StepGraphs", "StepNumbers"]

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WIDTHS = (4, 8, 16, 24, 32, 64)  # not 1: a compiler makes code of its own for one token


class GraphError(RuntimeError):
    """This GPU or driver would not record the step; the scorer goes on without graphs."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step gives: ``numbers [rows, width, 1 + n]`` (value logit, bin log-probs; float64), and ``keys`` and
    ``values [layers, rows x width, kv_heads, head_dim]`` of all candidates, of which a row owns ``width`` places."""

    numbers: NDArray[np.float64]
    keys: torch.Tensor
    values: torch.Tensor
    width: int


class StepGraphs:
    """The graphs of one model and its pool, whose tensors must never move.

    Args:
        decoder: the fused decoder, compiled for any number of tokens.
    """

    def __init__(self, model: LengthValueModel, pool: BlockPool, decoder: StepDecoder) -> None:
        self.model, self.pool, self.decoder = model, pool, decoder
        self._graphs: dict[tuple[int, int], _StepGraph] = {}

    @staticmethod
    def fits(rows: int, width: int) -> bool:
        """Whether there is a bucket for so many rows of so many candidates."""
        return 0 < rows <= _ROWS[-1] and 0 < width <= _WIDTHS[-1]

    def run(
        self, blocks: Sequence[Sequence[int]], lengths: Sequence[int], candidates: Sequence[Sequence[int]]
    ) -> StepNumbers:
        """Score each row's candidates after its prefix of ``lengths[row]`` tokens, which lie in ``blocks[row]``.

        Raises:
            GraphError: the step cannot be recorded here. What goes wrong in a replay is raised as it is.
        """
        rows = next(size for size in _ROWS if size >= len(lengths))
        width = next(size for size in _WIDTHS if size >= max(map(len, candidates)))
        graph = self._graphs.get((rows, width))
        if graph is None:
            try:
                graph = self._graphs[rows, width] = _StepGraph(self.model, self.pool, self.decoder, rows, width)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise GraphError(f"a step of {rows} x {width} candidates was not recorded: {error}") from error
        return graph.run(blocks, lengths, candidates)


class _StepGraph:
    """Static buffers for ``rows`` rows of ``width`` candidates and the step that reads and fills them."""

    def __init__(self, model: LengthValueModel, pool: BlockPool, decoder: StepDecoder, rows: int, width: int) -> None:
        self.model, self.pool, self.decoder = model, pool, decoder
        self.rows, self.width = rows, width
        device, on_gpu = pool.device, pool.device.type == "cuda"
        columns = pool.blocks_for(model.context)
        # One buffer and one copy from the host: a row is its prefix's length, its candidates and its blocks.
        self.sent = torch.zeros(rows, 1 + width + columns, dtype=torch.int32, pin_memory=on_gpu)
        self.inputs = self.sent.to(device)
        self.host: NDArray[np.int32] = self.sent.numpy()
        self.starts = torch.arange(rows + 1, device=device) * width
        self.step = captured(self._step) if on_gpu else self._step
        if not on_gpu:
            self._step()
        self.received = torch.empty(self.numbers.shape, dtype=self.numbers.dtype, pin_memory=on_gpu)
        self.done = torch.cuda.Event() if on_gpu else None

    def _step(self) -> None:
        lengths = self.inputs[:, 0].long()
        ids = self.inputs[:, 1 : 1 + self.width].reshape(-1).long()
        positions = lengths.repeat_interleave(self.width, output_size=self.rows * self.width)
        plan = Plan(
            pool=self.pool,
            input_ids=ids,
            positions=positions,
            write_tokens=None,
            write_blocks=None,
            write_offsets=None,
            tables=self.inputs[:, 1 + self.width :],
            prefix_lens=lengths,
            starts=self.starts,
            width=self.width,
            capture_all=True,
        )
        head = self.model.head(self.decoder(ids, positions, plan))
        parts = [head.logits[:, None]] if head.bin_logprobs is None else [head.logits[:, None], head.bin_logprobs]
        self.numbers = torch.cat(parts, dim=-1)
        self.keys, self.values = torch.stack(plan.captured_keys), torch.stack(plan.captured_values)

    def run(
        self, blocks: Sequence[Sequence[int]], lengths: Sequence[int], candidates: Sequence[Sequence[int]]
    ) -> StepNumbers:
        """See :meth:`StepGraphs.run`. Rows that nobody asked for have no prefix."""
        host, first = self.host, 1 + self.width
        host[len(lengths) :, 0] = 0
        host[: len(lengths), 0] = lengths
        for row, (own, ids) in enumerate(zip(blocks, candidates, strict=True)):
            host[row, 1 : 1 + len(ids)] = ids
            host[row, first : first + len(own)] = own
        self.inputs.copy_(self.sent, non_blocking=True)
        self.step()
        # The next replay fills these buffers anew, and states keep what they were scored with.
        keys, values = self.keys.clone(), self.values.clone()
        self.received.copy_(self.numbers, non_blocking=True)
        if self.done is not None:
            self.done.record()
            self.done.synchronize()
        numbers = self.received.numpy().astype(np.float64).reshape(self.rows, self.width, -1)
        return StepNumbers(numbers, keys.transpose(1, 2), values.transpose(1, 2), self.width)
