"""Buckets and padding of prompts that run as graphs; the layers themselves are tested with the kernels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from lenvm.paged import BlockPool, PoolShape, Row, build_plan
from lenvm.paged.attention import HostPlan, Plan
from lenvm.scoring.prompt_graph import PromptGraphs


class Layers:
    """Gives each token's id back, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def prompts(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        starts: torch.Tensor,
        width: int,
        pool: BlockPool,
    ) -> torch.Tensor:
        given = {"ids": ids, "positions": positions, "blocks": blocks, "offsets": offsets, "starts": starts}
        self.calls.append({**{name: value.clone() for name, value in given.items()}, "width": width})
        return ids[:, None].float()


class Head:
    """Gives the state of each row back, and twice that."""

    width = 2

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        out[:, 0], out[:, 1] = hidden[:, 0], 2 * hidden[:, 0]


@pytest.fixture
def graphs() -> PromptGraphs:
    pool = BlockPool(PoolShape(1, 1, 8), max_blocks=600, initial_blocks=600)  # on the CPU a graph is the step itself
    return PromptGraphs(Layers(), Head(), pool)  # type: ignore[arg-type]


def calls(graphs: PromptGraphs) -> list[dict[str, Any]]:
    return graphs.layers.calls  # type: ignore[attr-defined,no-any-return]


def plan(graphs: PromptGraphs, *sizes: int) -> Plan:
    """As on a GPU, where a plan of whole prompts says where its tokens stand."""
    pool = graphs.pool
    found = build_plan(pool, [Row(pool.fork([], 0, size), 0, list(range(1, 1 + size))) for size in sizes])
    assert found.write_blocks is not None
    assert found.write_offsets is not None
    given = (found.input_ids, found.positions, found.write_blocks, found.write_offsets, found.starts)
    return replace(found, host=HostPlan(*(tensor.numpy() for tensor in given)))


def test_tokens_and_rows_are_padded(graphs: PromptGraphs) -> None:
    asked = plan(graphs, 100, 40, 3)
    hidden = graphs(asked)
    assert hidden is not None
    assert torch.equal(hidden[:, 0], asked.input_ids.float())
    call = calls(graphs)[-1]
    assert call["starts"].tolist() == [0, 100, 140, 143] + [143] * 5
    assert call["width"] == 128
    assert len(call["ids"]) == 256
    assert asked.write_blocks is not None
    assert asked.write_offsets is not None
    assert torch.equal(call["blocks"][:143].long(), asked.write_blocks)
    assert torch.equal(call["offsets"][:143].long(), asked.write_offsets)
    assert torch.equal(call["positions"][:143].long(), asked.positions)
    assert not call["blocks"][143:].any()


def test_a_smaller_batch_leaves_nothing_of_the_one_before(graphs: PromptGraphs) -> None:
    graphs(plan(graphs, 120, 130))
    graphs(plan(graphs, 60, 129))
    call = calls(graphs)[-1]
    assert call["width"] == 1024
    assert call["starts"].tolist() == [0, 60] + [189] * 7
    assert not call["blocks"][189:].any()
    graphs(plan(graphs, 120, 80))  # by the first graph again
    graphs(plan(graphs, 120, 60))
    assert not calls(graphs)[-1]["blocks"][180:].any()
    assert calls(graphs)[-1]["blocks"][:180].all()


def test_whole_prompts_are_laid_out_as_a_plan_has_them(graphs: PromptGraphs) -> None:
    asked = plan(graphs, 100, 1, 64)
    graphs(asked)
    prompts = [list(range(1, 1 + size)) for size in (100, 1, 64)]
    assert asked.host is not None
    starts, size = asked.host.starts, graphs.pool.block_size
    blocks = [list(dict.fromkeys(asked.host.blocks[first:end].tolist())) for first, end in pairwise(starts.tolist())]
    assert [len(own) for own in blocks] == [-(-len(ids) // size) for ids in prompts]
    found = graphs.launch(prompts, blocks)
    assert found is not None
    found.wait()
    assert found.numbers.tolist() == [[100.0, 200.0], [1.0, 2.0], [64.0, 128.0]]
    before, after = calls(graphs)[-2:]
    assert before["width"] == after["width"]
    assert all(torch.equal(before[name], after[name]) for name in ("ids", "positions", "blocks", "offsets", "starts"))


def test_what_is_larger_than_every_bucket_is_left_to_others(graphs: PromptGraphs) -> None:
    assert graphs(plan(graphs, *[1] * 513)) is None
    assert graphs.launch([[1]] * 513, [[1]] * 513) is None
    assert graphs.launch([[1] * 8193], [[1] * 257]) is None
    assert graphs.launch([[1] * 8192, [1] * 8192, [1]], [[1] * 256, [1] * 256, [1]]) is None
    assert graphs(build_plan(graphs.pool, [Row(graphs.pool.fork([], 0, 4), 0, [1] * 4)])) is None  # of no GPU
    assert calls(graphs) == []


def test_graphs_are_recorded_once(graphs: PromptGraphs) -> None:
    graphs.record(700)
    recorded = dict(graphs._graphs)
    assert len(recorded) == 2 * 4  # 128, 256, 512 and 768 tokens of few rows and of many
    graphs.record(700)
    graphs(plan(graphs, 90, 90))
    assert graphs._graphs == recorded
    assert len(calls(graphs)) == 1
