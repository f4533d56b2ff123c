"""One request compared across models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx2
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
    OverloadedError,
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


ROW = {"index": 0, "prompt_tokens": 9, "cached_tokens": 0, "value": -0.1, "horizon": 1.0, "rank_key": 1.0}


def answer(request: MockRequest) -> Any:
    results: list[dict[str, Any]] = []
    for at, model in enumerate(request.body["models"]):
        if model not in TOKENS:
            error = {"type": "model_not_found", "message": f"no model {model}"}
            results.append({"index": at, "model": model, "error": error})
            continue
        high = TOKENS[model]
        quantiles = {f"{level:.12g}": high for level in request.body["quantiles"]}
        row = {**ROW, "mean": high / 2, "quantiles": quantiles, "saturated": False}
        results.append({"index": at, "model": model, "predictions": [row]})
    return {"results": results, "timings_ms": {"queue": 0.0, "inference": 0.0, "total": 0.0}}


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


def test_one_call_asks_each_model_once_and_compares_by_money_and_time(compare: Any) -> None:
    transport = MockTransport(answer)
    found = compare(transport, {"messages": [{"role": "user", "content": "Why?"}]}, ROUTES, priority=2)
    (request,) = transport.requests
    assert request.body == {
        "messages": [{"role": "user", "content": "Why?"}],
        "models": ["terse", "chatty", "slow", "gone"],
        "quantiles": [0.5, 0.8, 0.9, 0.95],
        "priority": 2,
    }
    assert [one.route.model for one in found] == ["terse", "chatty", "slow", "gone"]
    assert [type(one.row) for one in found] == [Prediction, Prediction, Prediction, RowError]
    assert [one.cost for one in found] == [Estimate(500, 1000), Estimate(200, 400), Estimate(30, 40), None]
    for one, seconds in zip(found, [(1.0, 1.5), (0.2, 0.4), (30.0, 40.0), None], strict=True):
        assert (one.seconds and (one.seconds.expected, one.seconds.high)) == pytest.approx(seconds)
    assert found[3].row.type == "model_not_found"


def test_two_routes_may_share_a_model(compare: Any) -> None:
    """The same backbone at two providers, say: it is asked once."""
    transport = MockTransport(answer)
    dear = Route(model="terse", planner=BudgetPlanner(output_price=20e6))
    found = compare(transport, "Why?", [ROUTES[1], ROUTES[0], dear], budget_s=60.0)
    assert transport.requests[0].body["models"] == ["chatty", "terse"]
    assert 0 < transport.requests[0].body["deadline_ms"] <= 60_000
    assert [one.cost for one in found] == [Estimate(200, 400), Estimate(500, 1000), Estimate(1000, 2000)]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ModelNotFoundError("none of them"), "model_not_found"),
        (OverloadedError("full"), "overloaded"),
        (httpx2.ConnectError("refused"), "unreachable"),
        (httpx2.ReadTimeout("slow"), "timeout"),
    ],
)
def test_a_call_that_fails_is_an_error_of_every_route(compare: Any, failure: Exception, kind: str) -> None:
    found = compare(MockTransport({"/predict_length": failure}), "Why?", ROUTES)
    assert [(one.route.model, one.row.type, one.cost) for one in found] == [(r.model, kind, None) for r in ROUTES]
    assert best_route(found) is None


def test_the_budget_ends_an_asynchronous_call() -> None:
    class Silent(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            return await asyncio.get_running_loop().create_future()

    async def main() -> list[RouteEstimate]:
        async with AsyncClient(transport=Silent(), max_retries=0) as client:
            return await compare_routes_async(client, "Why?", ROUTES, budget_s=0.05, timeout=60.0)

    assert [one.row.type for one in asyncio.run(main())] == ["timeout"] * 4


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
    bare = {"results": [{"index": 0, "model": "m", "predictions": [ROW]}]}
    (found,) = compare(MockTransport({"/predict_length": bare}), "Why?", [Route(model="m")])
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
