"""A decoding step of the scorer as one CUDA graph: chosen candidates into the pool, then every row's new candidates
over its paged prefix, one launch for all.

A step is a few hundred small kernels: launched one by one they cost more than the GPU takes for them. Shapes are
rounded up to buckets, each with a graph of its own that is captured when it is first needed.
"""

from __future__ import annotations

import bisect
import math
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.cuda_graph import captured
from lenvm.modeling import LengthValueModel
from lenvm.paged import BlockPool
from lenvm.scoring.step_layers import SHORT, StepHead, StepLayers

if TYPE_CHECKING:
    from lenvm.paged.kernels import StepScratch

__all__ = ["StepGraphs", "StepNumbers"]

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WIDTHS = (1, 4, 8, 16, 24, 32, 64)


@dataclass(eq=False, slots=True, weakref_slot=True)
class StepNumbers:
    """What a step gives, once :meth:`wait` has returned: ``numbers [rows, width, 1 + n]`` (value logit, bin log-probs),
    and expected utilities ``means [rows, width]`` where these were asked for; float32, as the head computes them. A row
    owns ``width`` places of ``kept``."""

    numbers: NDArray[np.float32]
    means: NDArray[np.float32] | None
    width: int
    done: torch.cuda.Event | None
    buffer: torch.Tensor  # of the graph, which its next replay fills anew
    copied: torch.Tensor | None = None

    def kept(self) -> torch.Tensor:
        """Keys and values of all candidates ``[2, layers, rows x width, kv_heads, head_dim]``, in memory of their own:
        copied when they are first asked for, since no answer waits for them, or before the graph's next replay."""
        if self.copied is None:
            self.copied = self.buffer.clone()
        return self.copied

    def wait(self) -> None:
        """Until the numbers are there."""
        if self.done is not None:
            self.done.synchronize()


class StepGraphs:
    """The graphs of one model and its pool, whose tensors must never move."""

    def __init__(self, model: LengthValueModel, pool: BlockPool, layers: StepLayers) -> None:
        self.model, self.pool, self.layers = model, pool, layers
        self.head = StepHead(model.head, model.dtype)
        self._graphs: dict[tuple[int, int, bool], _StepGraph] = {}

    @staticmethod
    def fits(rows: int, width: int) -> bool:
        """Whether there is a bucket for so many rows of so many candidates."""
        return 0 < rows <= _ROWS[-1] and 0 < width <= _WIDTHS[-1]

    def recorded(self, rows: int, width: int, longest: int) -> bool:
        """Whether there is a graph for so many rows of so many candidates after prefixes of so many tokens."""
        return self._bucket(rows, width, longest) in self._graphs

    @staticmethod
    def _bucket(rows: int, width: int, longest: int) -> tuple[int, int, bool]:
        return _ROWS[bisect.bisect_left(_ROWS, rows)], _WIDTHS[bisect.bisect_left(_WIDTHS, width)], longest > SHORT

    def launch(
        self,
        blocks: Sequence[Sequence[int]],
        lengths: Sequence[int],
        counts: Sequence[int],
        ids: NDArray[np.int32],
        promotions: Sequence[int],
        utilities: NDArray[np.float32] | None = None,
    ) -> StepNumbers:
        """Score each row's candidates, ``counts[row]`` of ``ids``, after its prefix of ``lengths[row]`` tokens, which
        lie in ``blocks[row]``, after copying what ``promotions`` say (``lenvm.paged.kernels.promote_tokens``; five
        numbers a row). ``utilities [n]``: of each bin, to all rows. The numbers are there after ``wait``, before which
        no other step may be launched.

        Raises:
            GraphError: the step cannot be recorded here; nothing is done. What goes wrong in a replay is raised as it
                is.
        """
        bucket = rows, width, long = self._bucket(len(lengths), max(counts), max(lengths))
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = _StepGraph(self, rows, width, long=long)
        return graph.launch(blocks, lengths, counts, ids, promotions, utilities)


class _StepGraph:
    """Static buffers for ``rows`` rows of ``width`` candidates and the step that reads and fills them."""

    def __init__(self, steps: StepGraphs, rows: int, width: int, *, long: bool) -> None:
        self.steps, self.rows, self.width, self.long = steps, rows, width, long
        pool = self.pool = steps.pool
        device, on_gpu = pool.device, pool.device.type == "cuda"
        # Less to copy where no prefix is long.
        columns = pool.blocks_for(steps.model.context if long else min(SHORT, steps.model.context))
        bins = steps.model.config.head.num_bins
        # One buffer and one copy from the host: promotions, lengths of prefixes, candidates, blocks (all rows of each
        # together) and utilities of bins.
        shapes = ((rows, 5), (rows,), (rows, width), (rows, columns), (bins,))
        kinds = (torch.int64, torch.int32, torch.int32, torch.int32, torch.float32)
        sizes = [math.prod(shape) * kind.itemsize for shape, kind in zip(shapes, kinds, strict=True)]
        self.sent = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        self.inputs = self.sent.to(device)

        def views(buffer: torch.Tensor) -> list[torch.Tensor]:
            parts = zip(buffer.split(sizes), kinds, shapes, strict=True)
            return [part.view(kind).view(shape) for part, kind, shape in parts]

        self.promotions, self.lengths, self.ids, self.tables, self.utilities = views(self.inputs)
        (
            self.host_promotions,
            self.host_lengths,
            self.host_ids,
            self.host_tables,
            self.host_utilities,
        ) = (x.numpy() for x in views(self.sent))
        self.pack = struct.Struct(f"{5 * rows}q").pack_into
        self.written: list[Sequence[int]] = [()] * rows  # the blocks that stand in the host's buffer
        self.last: weakref.ref[StepNumbers] | None = None  # whose keys and values stand in ``kept``
        shape = pool.shape
        self.kept = torch.zeros(
            2, shape.layers, rows * width, shape.kv_heads, shape.head_dim, dtype=pool.dtype, device=device
        )
        self.scratch: StepScratch | None = None
        numbers = steps.model.head.output.out_features
        self.numbers = torch.zeros(rows * width, numbers, dtype=torch.float32, device=device)
        self.means = torch.zeros(rows * width, dtype=torch.float32, device=device)
        self.step = captured(self._step) if on_gpu else self._step
        self.done = torch.cuda.Event() if on_gpu else None

    @torch.inference_mode()
    def _step(self) -> None:
        from lenvm.paged.kernels import promote_tokens

        self.inputs.copy_(self.sent, non_blocking=True)
        promote_tokens(self.promotions, *self.pool.stacked)
        layers, kept, long = self.steps.layers, self.kept, self.long
        if self.scratch is None:  # at the first warm-up
            self.scratch = layers.scratch(self.rows, self.width, self.pool, long=long)
        hidden = layers(self.ids.view(-1), self.lengths, self.tables, self.pool, kept, long=long, scratch=self.scratch)
        utilities = self.utilities if self.utilities.numel() else None
        self.steps.head(hidden, self.numbers, utilities, self.means)

    def launch(
        self,
        blocks: Sequence[Sequence[int]],
        lengths: Sequence[int],
        counts: Sequence[int],
        ids: NDArray[np.int32],
        promotions: Sequence[int],
        utilities: NDArray[np.float32] | None,
    ) -> StepNumbers:
        """See :meth:`StepGraphs.launch`. Rows that nobody asked for have no prefix."""
        rows, width, on_gpu = len(lengths), counts[0], self.done is not None
        self.host_lengths[:rows] = lengths
        if rows < self.rows:
            self.host_lengths[rows:] = 0
            promotions = [*promotions, *(0,) * (5 * (self.rows - rows))]
        self.pack(self.host_promotions.data, 0, *promotions)
        if len(ids) == rows * width and counts.count(width) == rows:
            self.host_ids[:rows, :width] = ids.reshape(rows, width)
        else:
            at = 0
            for row, count in enumerate(counts):
                self.host_ids[row, :count] = ids[at : at + count]
                at += count
        if utilities is not None:
            self.host_utilities[:] = utilities
        for row, own in enumerate(blocks):
            # States of one sequence share the list until they need one more block.
            if self.written[row] is not own:
                self.host_tables[row, : len(own)] = own
                self.written[row] = own
        if self.last is not None and (last := self.last()) is not None:
            last.kept()  # somebody may still ask for it
        self.step()
        try:
            # Memory of its own for each step, which its states keep as long as they like: the host copies nothing.
            shape = (self.rows, self.width, self.numbers.shape[-1])
            received = torch.empty(shape, dtype=torch.float32, pin_memory=on_gpu)
            received.view(self.numbers.shape).copy_(self.numbers, non_blocking=True)
            means = None
            if utilities is not None:
                means = torch.empty(shape[:2], dtype=torch.float32, pin_memory=on_gpu)
                means.view(-1).copy_(self.means, non_blocking=True)
            if self.done is not None:
                self.done.record()
        except BaseException:
            if on_gpu:  # or the next step's inputs could be written while this one still reads its own
                torch.cuda.synchronize(self.pool.device)
            raise
        found = StepNumbers(
            received.numpy(), None if means is None else means.numpy(), self.width, self.done, self.kept
        )
        self.last = weakref.ref(found)
        return found
