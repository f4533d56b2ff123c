"""One request compared across models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from lenvm_client import (
    AsyncClient,
    BudgetPlanner,
    Client,
    Estimate,
    InvalidRequestError,
    MockRequest,
    MockTransport,
    ModelNotFoundError,
    Prediction,
    Route,
    RouteEstimate,
    RowError,
    best_route,
    compare_routes,
    compare_routes_async,
)

# What three models say of the same prompt: p95 in their own tokens; the mean is half of it.
TOKENS = {"terse": 100, "chatty": 400, "slow": 60}
ROUTES = [
    Route(model="terse", planner=BudgetPlanner(output_price=10e6), seconds_per_token=0.01, first_token_s=0.5),
    Route(model="chatty", planner=BudgetPlanner(output_price=1e6, quantile=0.8), seconds_per_token=0.001),
    Route(model="slow", planner=BudgetPlanner(output_price=1e6, ceiling=40), seconds_per_token=1.0),
    Route(model="gone"),
]


def answer(request: MockRequest) -> Any:
    model = request.body["model"]
    if model not in TOKENS:
        return ModelNotFoundError(f"no model {model}", status=404)
    high = TOKENS[model]
    row = {"index": 0, "prompt_tokens": 9, "cached_tokens": 0, "value": -0.1, "horizon": 1.0, "rank_key": 1.0}
    quantiles = {f"{level:.12g}": high for level in request.body["quantiles"]}
    return {"model": model, "predictions": [{**row, "mean": high / 2, "quantiles": quantiles, "saturated": False}]}


@pytest.fixture(params=["sync", "async"])
def compare(request: pytest.FixtureRequest) -> Any:
    def call(transport: MockTransport, input: Any, routes: Sequence[Route], **options: Any) -> list[RouteEstimate]:
        options = {"budget_s": None, **options}
        if request.param == "sync":
            with Client(transport=transport, max_retries=0) as client:
                return compare_routes(client, input, routes, **options)

        async def main() -> list[RouteEstimate]:
            async with AsyncClient(transport=transport, max_retries=0) as client:
                return await compare_routes_async(client, input, routes, **options)

        return asyncio.run(main())

    return call


def test_each_model_is_asked_once_and_compared_by_money_and_time(compare: Any) -> None:
    transport = MockTransport(answer)
    found = compare(transport, {"messages": [{"role": "user", "content": "Why?"}]}, ROUTES, priority=2)
    assert sorted(request.body["model"] for request in transport.requests) == ["chatty", "gone", "slow", "terse"]
    assert all(request.body["priority"] == 2 for request in transport.requests)
    (chatty,) = (request for request in transport.requests if request.body["model"] == "chatty")
    assert chatty.body["quantiles"] == [0.5, 0.8, 0.9, 0.95]
    assert [one.route.model for one in found] == ["terse", "chatty", "slow", "gone"]
    assert [type(one.row) for one in found] == [Prediction, Prediction, Prediction, RowError]
    assert [one.cost for one in found] == [Estimate(500, 1000), Estimate(200, 400), Estimate(30, 40), None]
    for one, seconds in zip(found, [(1.0, 1.5), (0.2, 0.4), (30.0, 40.0), None], strict=True):
        assert (one.seconds and (one.seconds.expected, one.seconds.high)) == pytest.approx(seconds)
    assert found[3].row.type == "model_not_found"


def test_the_cheapest_within_the_limits(compare: Any) -> None:
    found = compare(MockTransport(answer), "Why?", ROUTES)

    def best(**limits: float) -> str | None:
        one = best_route(found, **limits)
        return None if one is None else one.route.model

    assert best() == "slow"
    assert best(max_seconds=10.0) == "chatty"
    assert best(max_seconds=0.3) is None
    assert best(max_seconds=39.0, max_cost=399.0) is None
    assert best_route(found[3:]) is None
    free = [Route(model="slow", seconds_per_token=1.0), Route(model="chatty", seconds_per_token=0.001)]
    assert best_route(compare(MockTransport(answer), "Why?", free)).route.model == "chatty"  # the faster of equals


def test_a_model_without_a_distribution_has_no_estimate(compare: Any) -> None:
    def bare(request: MockRequest) -> Any:
        row = {"index": 0, "prompt_tokens": 9, "cached_tokens": 0, "value": -0.1, "horizon": 1.0, "rank_key": 1.0}
        return {"model": "m", "predictions": [row]}

    (found,) = compare(MockTransport(bare), "Why?", [Route(model="m")])
    assert isinstance(found.row, Prediction)
    assert (found.cost, found.seconds, best_route([found])) == (None, None, None)


@pytest.mark.parametrize(
    "input", [{"token_ids": [1]}, {"session": "s"}, ["a", "b"]], ids=["token_ids", "session", "several"]
)
def test_what_belongs_to_one_model_is_refused(compare: Any, input: Any) -> None:
    transport = MockTransport(answer)
    with pytest.raises(InvalidRequestError, match="cannot go to several models"):
        compare(transport, input, ROUTES)
    with pytest.raises(InvalidRequestError, match="at least one route"):
        compare(transport, "Why?", [])
    assert transport.requests == []


def test_the_models_are_asked_at_once() -> None:
    """All calls are on their way before any is answered."""
    gate = threading.Barrier(len(ROUTES))

    def together(request: MockRequest) -> Any:
        gate.wait(timeout=60.0)
        return answer(request)

    with Client(transport=MockTransport(together), max_retries=0) as client:
        assert len(compare_routes(client, "Why?", ROUTES, budget_s=None)) == len(ROUTES)
