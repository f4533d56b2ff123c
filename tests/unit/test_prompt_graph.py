"""Buckets and padding of prompts that run as graphs; the layers themselves are tested with the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lenvm.paged import BlockPool, PoolShape, Row, build_plan
from lenvm.scoring import prompt_graph
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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> PromptGraphs:
    def run_as_it_is(step: Any, pool: Any = None) -> Any:
        step()
        return step

    monkeypatch.setattr(prompt_graph, "captured", run_as_it_is)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    pool = BlockPool(PoolShape(1, 1, 8), max_blocks=600, initial_blocks=600)
    return PromptGraphs(Layers(), pool)  # type: ignore[arg-type]


def rows(graphs: PromptGraphs, *sizes: int) -> list[Row]:
    pool = graphs.pool
    return [Row(pool.fork([], 0, size), 0, list(range(1, 1 + size))) for size in sizes]


def test_tokens_and_rows_are_padded(graphs: PromptGraphs) -> None:
    plan = build_plan(graphs.pool, rows(graphs, 100, 40, 3))
    hidden = graphs(plan)
    assert hidden is not None
    assert torch.equal(hidden[:, 0], plan.input_ids.float())
    call = graphs.layers.calls[-1]  # type: ignore[attr-defined]
    assert call["starts"].tolist() == [0, 100, 140, 143] + [143] * 5
    assert call["width"] == 128
    assert len(call["ids"]) == 256
    assert plan.write_blocks is not None
    assert plan.write_offsets is not None
    assert torch.equal(call["blocks"][:143], plan.write_blocks)
    assert torch.equal(call["offsets"][:143], plan.write_offsets)
    assert torch.equal(call["positions"][:143], plan.positions)
    assert not call["blocks"][143:].any()


def test_a_smaller_batch_leaves_nothing_of_the_one_before(graphs: PromptGraphs) -> None:
    graphs(build_plan(graphs.pool, rows(graphs, 120, 130)))
    graphs(build_plan(graphs.pool, rows(graphs, 60, 129)))
    call = graphs.layers.calls[-1]  # type: ignore[attr-defined]
    assert call["width"] == 1024
    assert call["starts"].tolist() == [0, 60] + [189] * 7
    assert not call["blocks"][189:].any()


def test_what_is_larger_than_every_bucket_is_left_to_others(graphs: PromptGraphs) -> None:
    assert graphs(build_plan(graphs.pool, rows(graphs, *[1] * 513))) is None
    assert graphs.layers.calls == []  # type: ignore[attr-defined]


def test_graphs_are_recorded_once(graphs: PromptGraphs) -> None:
    graphs.record(700)
    recorded = len(graphs.layers.calls)  # type: ignore[attr-defined]
    assert recorded == 2 * 4  # 128, 256, 512 and 768 tokens of few rows and of many
    graphs.record(700)
    assert len(graphs.layers.calls) == recorded  # type: ignore[attr-defined]
    graphs(build_plan(graphs.pool, rows(graphs, 90, 90)))
    assert len(graphs.layers.calls) == recorded + 1  # type: ignore[attr-defined]
