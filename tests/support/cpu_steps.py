"""Decoding steps of the torch scorer as graphs have them, but computed on the CPU by the ordinary forward."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from lenvm.modeling import LengthValueModel
from lenvm.paged import Row, build_plan, packed_forward
from lenvm.scoring import TorchScorer
from lenvm.scoring.step_graph import StepGraphs, _StepGraph

__all__ = ["compute_on_cpu", "with_graphs"]


def with_graphs(scorer: TorchScorer) -> TorchScorer:
    """The scorer with graphs of steps, whose step ``compute_on_cpu`` must stand in for."""
    scorer._steps = StepGraphs(scorer.model, scorer.pool, None)  # type: ignore[arg-type]
    return scorer


def compute_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph's buffers say is done by packed forwards of the same model."""
    monkeypatch.setattr(_StepGraph, "_step", _step)


@torch.inference_mode()
def _step(self: _StepGraph) -> None:
    self.inputs.copy_(self.sent)
    pool, model = self.pool, self.steps.model
    for keys, values, stride, block, offset in self.promotions.tolist():
        if keys:
            stored = [
                torch.stack([_at(start + layer * stride * 4, pool.shape) for layer in range(pool.shape.layers)])[
                    :, None
                ]
                for start in (keys, values)
            ]
            pool.write([(block, offset)], *stored)
    for row, length in enumerate(self.lengths.tolist()):
        if length:
            _score(self, model, row, length)


def _score(graph: _StepGraph, model: LengthValueModel, row: int, length: int) -> None:
    pool, width = graph.pool, graph.width
    blocks = graph.tables[row, : math.ceil(length / pool.block_size)].tolist()
    ids = graph.ids[row].clamp(0, model.decoder.config.vocab_size - 1)  # as the graph does with ids that are none
    plan = build_plan(pool, [Row(blocks, length, [], ids.tolist())])
    head = model.head(packed_forward(model.decoder, plan))
    place = slice(row * width, (row + 1) * width)
    graph.numbers[place, 0] = head.logits.float()
    if head.bin_logprobs is not None:
        graph.numbers[place, 1:] = head.bin_logprobs.float()
        graph.means[place] = (head.bin_logprobs.exp() * graph.utilities).sum(-1)
    graph.kept[0][:, place] = torch.stack(plan.captured_keys)
    graph.kept[1][:, place] = torch.stack(plan.captured_values)


def _at(address: int, shape: object) -> torch.Tensor:
    """``[kv_heads, head_dim]`` float32 at an address."""
    kv_heads, dim = shape.kv_heads, shape.head_dim  # type: ignore[attr-defined]
    raw = (ctypes.c_char * (4 * kv_heads * dim)).from_address(address)
    return torch.frombuffer(raw, dtype=torch.float32).view(kv_heads, dim).clone()
