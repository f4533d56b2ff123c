"""Priorities, request fields, headers and budgets, by the rules of the servers that read them."""

from __future__ import annotations

import heapq
from typing import Any

import pytest

from lenvm_client import (
    BudgetPlanner,
    InvalidRequestError,
    OverloadedError,
    Prediction,
    RowError,
    TokenBudget,
    predicted_tokens,
    prediction_headers,
    priority_for,
    request_fields,
)


def predicted(p50: int, p90: int | None = None, p95: int | None = None, **fields: Any) -> Prediction:
    quantiles = {"0.5": p50, "0.9": p90 or 2 * p50, "0.95": p95 or 3 * p50}
    given = {"index": 0, "prompt_tokens": 10, "cached_tokens": 0, "value": -0.1, "horizon": 1.0, "rank_key": 7.5}
    return Prediction(**{**given, "quantiles": quantiles, "saturated": False, "mean": float(p50), **fields})


NO_BINS = predicted(1, quantiles=None, mean=None, saturated=None)
TOP = 2**30
FAILED = RowError(index=0, type="overloaded", message="full", retryable=True)


def order(backend: Any, rows: list[Prediction], **options: Any) -> list[int]:
    """As the backend takes waiting requests: its own sign, ties by arrival."""
    highest_first = (backend in ("sglang", "dynamo")) != bool(options.get("low_first"))
    priorities = [priority_for(backend, row, **options) for row in rows]
    heap = [((-p if highest_first else p), at) for at, p in enumerate(priorities)]
    heapq.heapify(heap)
    return [heapq.heappop(heap)[1] for _ in rows]


@pytest.mark.parametrize("backend", ["vllm", "sglang", "dynamo", "litellm"])
def test_the_shortest_goes_first_everywhere(backend: Any) -> None:
    rows = [predicted(300), predicted(20), predicted(100)]
    assert order(backend, rows) == [1, 2, 0]
    assert all(type(priority_for(backend, row)) is int for row in rows)


def test_the_polarity_of_each_backend() -> None:
    row = predicted(120)
    assert priority_for("vllm", row) == priority_for("litellm", row) == 120
    assert priority_for("sglang", row) == -120
    assert priority_for("dynamo", row) == TOP - 120  # its router takes what is below 0 for 0
    assert priority_for("sglang", row, low_first=True) == 120
    with pytest.raises(InvalidRequestError, match="no such backend: 'tgi'; known are vllm, sglang, dynamo, litellm"):
        priority_for("tgi", row)  # type: ignore[arg-type]


def test_uncertainty_moves_a_request_back() -> None:
    sure, unsure = predicted(100, 110), predicted(90, 900)
    assert order("vllm", [sure, unsure]) == [1, 0]
    assert order("vllm", [sure, unsure], uncertainty=0.5) == [0, 1]
    assert predicted_tokens(unsure) == 90.0
    assert predicted_tokens(unsure, uncertainty=0.5) == 495.0
    assert predicted_tokens(unsure, uncertainty=1.0) == predicted_tokens(unsure, 0.9) == 900.0


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_ageing_needs_no_update(backend: Any) -> None:
    """A long request of long ago goes before short ones that come later, although its number never changes."""

    def priority(tokens: int, arrived: float) -> int:
        return priority_for(backend, predicted(tokens), ageing=10.0, arrived=arrived)

    def sooner(a: int, b: int) -> bool:
        return a > b if backend == "sglang" else a < b

    long = priority(1000, 0.0)
    assert sooner(priority(20, 97.0), long)  # 20 + 970 < 1000
    assert sooner(long, priority(20, 99.0))
    with pytest.raises(InvalidRequestError, match="ageing needs arrived"):
        priority_for(backend, predicted(1), ageing=1.0)
    with pytest.raises(InvalidRequestError, match="at least 0"):
        priority_for(backend, predicted(1), ageing=-1.0, arrived=0.0)


def test_without_a_distribution_the_rank_key_stands_in() -> None:
    assert priority_for("vllm", NO_BINS) == 8
    with pytest.raises(InvalidRequestError, match="no length distribution"):
        predicted_tokens(NO_BINS)
    with pytest.raises(InvalidRequestError, match=r"ask for it by quantiles=\[0.75, ...\]"):
        predicted_tokens(predicted(1), 0.75)


def test_priorities_stay_within_32_bits() -> None:
    assert priority_for("dynamo", predicted(1), ageing=1e6, arrived=1e9) == 0
    assert priority_for("sglang", predicted(1), ageing=1e6, arrived=1e9) == -(2**31 - 1)
    assert priority_for("vllm", predicted(1), ageing=1e6, arrived=1e9) == 2**31 - 1


def test_fields_and_headers() -> None:
    row = predicted(120, 240, 300)
    assert request_fields("vllm", row) == request_fields("litellm", row) == {"priority": 120}
    assert request_fields("sglang", row) == {"priority": -120}
    hints = [
        request_fields("dynamo", row)["nvext"]["agent_hints"],
        request_fields("dynamo", row, quantile=0.9)["nvext"]["agent_hints"],
        request_fields("dynamo", NO_BINS)["nvext"]["agent_hints"],
    ]
    assert hints == [{"priority": TOP - 120, "osl": 120}, {"priority": TOP - 240, "osl": 240}, {"priority": TOP - 8}]
    assert prediction_headers(row) == {"x-predicted-output-tokens": "120", "x-predicted-output-tokens-p95": "300"}
    assert prediction_headers(row, high=0.9)["x-predicted-output-tokens-p90"] == "240"


def test_limits() -> None:
    row = predicted(100, 200, 300)
    assert BudgetPlanner().max_tokens(row) == 300
    assert BudgetPlanner(quantile=0.5).max_tokens(row) == 100
    assert BudgetPlanner(ceiling=250).max_tokens(row) == 250
    assert BudgetPlanner(floor=500).max_tokens(row) == 500
    # Of a saturated quantile only a lower bound is known.
    beyond = predicted(100, 2048, 2048, saturated=True)
    assert BudgetPlanner(ceiling=8000).max_tokens(beyond) == 8000
    assert BudgetPlanner(ceiling=8000, quantile=0.5).max_tokens(beyond) == 100
    assert BudgetPlanner().max_tokens(beyond) == 2048
    # Without a prediction a request is given what it could need at most.
    assert BudgetPlanner(ceiling=700).max_tokens(FAILED) == BudgetPlanner(ceiling=700).max_tokens(None) == 700
    with pytest.raises(OverloadedError):
        BudgetPlanner().max_tokens(FAILED)
    with pytest.raises(InvalidRequestError, match="needs a ceiling"):
        BudgetPlanner().max_tokens(None)
    for bad in ({"quantile": 1.0}, {"floor": 0}, {"ceiling": 5, "floor": 6}, {"block_size": 0}):
        with pytest.raises(InvalidRequestError):
            BudgetPlanner(**bad)


def test_costs_and_room() -> None:
    planner = BudgetPlanner(input_price=2.0, output_price=10.0, kv_bytes_per_token=100)
    cost = planner.cost(predicted(100, prompt_tokens=1_000_000))
    assert cost.expected == pytest.approx(2.0 + 100 * 1e-5)
    assert cost.high == pytest.approx(2.0 + 300 * 1e-5)
    assert BudgetPlanner(ceiling=50, output_price=1e6).cost(predicted(100)).expected == 50.0  # cut there
    room = planner.reservation(predicted(100))  # 10 + 300 tokens are 20 blocks of 16
    assert (room.tokens, room.blocks, room.bytes) == (320, 20, 32_000)
    assert BudgetPlanner(ceiling=10).reservation(None, prompt_tokens=6).tokens == 16


def test_admission_under_a_budget() -> None:
    planner, budget = BudgetPlanner(ceiling=1000, block_size=10), TokenBudget(1000)
    rows = [predicted(200), predicted(30), FAILED, predicted(60)]  # 610, 100, 1000 and 190 tokens of room
    admission = planner.admit(rows, budget)
    assert (admission.admitted, admission.deferred) == ((1, 3, 0), (2,))
    assert admission.tokens == {1: 100, 3: 190, 0: 610}
    assert budget.free == 100
    assert planner.admit([FAILED], budget).admitted == ()
    for tokens in admission.tokens.values():
        budget.release(tokens)
    assert planner.admit([FAILED], budget).tokens == {0: 1000}
    assert not budget.reserve(1)
    with pytest.raises(ValueError, match="1001 tokens are given back, 1000 are taken"):
        budget.release(1001)
    with pytest.raises(InvalidRequestError):
        TokenBudget(0)
