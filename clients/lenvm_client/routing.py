"""One request, several models: what each would take and cost, in one call.

Tokens of two models do not compare (another tokenizer, another way of answering), and neither do their ``rank_key``s:
money and seconds do. The service answers for each model in its own tokens, a ``Route`` says what one of these is worth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lenvm_client._types import PredictInput, Prediction, RowError
from lenvm_client._wire import input_rows
from lenvm_client.batching import predict_rows, predict_rows_async
from lenvm_client.errors import InvalidRequestError
from lenvm_client.scheduling import BudgetPlanner, Estimate

if TYPE_CHECKING:
    from lenvm_client.async_client import AsyncClient
    from lenvm_client.client import Client

__all__ = ["Route", "RouteEstimate", "best_route", "compare_routes", "compare_routes_async"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """A backbone that a request could go to.

    Args:
        model: the Length Value Model of that backbone, as the service names it.
        planner: its prices, its limit and the quantile of its upper estimates.
        seconds_per_token: how long a token takes there; 0: not known.
        first_token_s: how long the first one takes beside that, queue included.
    """

    model: str
    planner: BudgetPlanner = field(default_factory=BudgetPlanner)
    seconds_per_token: float = 0.0
    first_token_s: float = 0.0


@dataclass(frozen=True)
class RouteEstimate:
    """What a route would take: ``cost`` in the currency of the prices, and ``seconds``; each on average and at the
    planner's quantile. Both are None where ``row`` is an error, or of a model without a length distribution."""

    route: Route
    row: Prediction | RowError
    cost: Estimate | None = None
    seconds: Estimate | None = None


def compare_routes(
    client: Client,
    input: str | Mapping[str, Any] | PredictInput,
    routes: Sequence[Route],
    *,
    budget_s: float | None = 0.4,
    **options: Any,
) -> list[RouteEstimate]:
    """Estimates aligned with ``routes``: one prediction from each model, asked for at once; a model that fails is an
    estimate with a ``RowError``. ``budget_s`` and ``options``: see ``predict_rows``.

    Raises InvalidRequestError for token ids or sessions, which are one model's own: give text or messages.
    """
    from concurrent.futures import ThreadPoolExecutor

    _check(input, routes)

    def ask(route: Route) -> Prediction | RowError:
        return predict_rows(client, [input], budget_s=budget_s, **_options(route, options))[0]

    with ThreadPoolExecutor(len(routes)) as pool:
        return [_estimate(route, row) for route, row in zip(routes, pool.map(ask, routes), strict=True)]


async def compare_routes_async(
    client: AsyncClient,
    input: str | Mapping[str, Any] | PredictInput,
    routes: Sequence[Route],
    *,
    budget_s: float | None = 0.4,
    **options: Any,
) -> list[RouteEstimate]:
    """``compare_routes`` over an ``AsyncClient``."""
    _check(input, routes)
    answers = await asyncio.gather(
        *(predict_rows_async(client, [input], budget_s=budget_s, **_options(route, options)) for route in routes)
    )
    return [_estimate(route, row) for route, (row,) in zip(routes, answers, strict=True)]


def best_route(
    estimates: Sequence[RouteEstimate], *, max_seconds: float | None = None, max_cost: float | None = None
) -> RouteEstimate | None:
    """The cheapest on average among those whose upper estimates keep within the limits, the faster of equals; None
    where none does or none has a prediction."""
    fitting = [
        (one.cost.expected, one.seconds.expected, at)
        for at, one in enumerate(estimates)
        if one.cost is not None
        and one.seconds is not None
        and (max_seconds is None or one.seconds.high <= max_seconds)
        and (max_cost is None or one.cost.high <= max_cost)
    ]
    return estimates[min(fitting)[2]] if fitting else None


def _check(input: str | Mapping[str, Any] | PredictInput, routes: Sequence[Route]) -> None:
    if not routes:
        raise InvalidRequestError("give at least one route", param="routes")
    row = input_rows(input, PredictInput)
    own = next((name for name in ("token_ids", "session", "inputs") if row.get(name) is not None), None)
    if own is not None:
        raise InvalidRequestError(f"{own} cannot go to several models: give one prompt or its messages", param=own)


def _options(route: Route, options: Mapping[str, Any]) -> dict[str, Any]:
    levels = {0.5, 0.9, 0.95, route.planner.quantile, *options.get("quantiles", ())}
    return {**options, "model": route.model, "quantiles": sorted(levels)}


def _estimate(route: Route, row: Prediction | RowError) -> RouteEstimate:
    if isinstance(row, RowError) or row.quantiles is None:
        return RouteEstimate(route, row)
    limit = route.planner.max_tokens(row)
    mean = limit if row.mean is None else min(row.mean, float(limit))
    seconds = [route.first_token_s + route.seconds_per_token * tokens for tokens in (mean, limit)]
    return RouteEstimate(route, row, route.planner.cost(row), Estimate(*seconds))
