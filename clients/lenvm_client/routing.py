"""One request, several models: what each would take and cost, in one call.

Tokens of two models do not compare (another tokenizer, another way of answering), and neither do their ``rank_key``s:
money and seconds do. The service answers for each model in its own tokens, a ``Route`` says what one of these is worth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lenvm_client._types import PredictInput, Prediction, PredictModelsResponse, RowError
from lenvm_client._wire import input_rows
from lenvm_client.batching import row_error, too_late, within_budget
from lenvm_client.errors import InvalidRequestError, LenVMClientError
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
    """Estimates aligned with ``routes``: one call in which the service asks all models at once; a model that fails is
    an estimate with a ``RowError``, and so is every one where the call fails. ``budget_s`` bounds it, in seconds (None:
    no bound); ``options`` go to ``predict_length``. Give the client ``max_retries=0``: its waits would count.

    Raises InvalidRequestError for token ids or sessions, which are one tokenizer's own: give text or messages.
    """
    asked = _options(input, routes, options)
    try:
        return _estimates(routes, client.predict_length(input, **within_budget(budget_s, asked)))
    except LenVMClientError as error:
        return _failed(routes, error)


async def compare_routes_async(
    client: AsyncClient,
    input: str | Mapping[str, Any] | PredictInput,
    routes: Sequence[Route],
    *,
    budget_s: float | None = 0.4,
    **options: Any,
) -> list[RouteEstimate]:
    """``compare_routes`` over an ``AsyncClient``; ``budget_s`` is exact."""
    asked = _options(input, routes, options)
    try:
        async with asyncio.timeout(budget_s):
            return _estimates(routes, await client.predict_length(input, **within_budget(budget_s, asked)))
    except LenVMClientError as error:
        return _failed(routes, error)
    except TimeoutError:
        return _failed(routes, too_late())


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


def _options(
    input: str | Mapping[str, Any] | PredictInput, routes: Sequence[Route], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Each model once, with the quantiles of all planners."""
    if not routes:
        raise InvalidRequestError("give at least one route", param="routes")
    row = input_rows(input, PredictInput)
    own = next((name for name in ("token_ids", "session", "inputs") if row.get(name) is not None), None)
    if own is not None:
        raise InvalidRequestError(f"{own} cannot go to several models: give one prompt or its messages", param=own)
    levels = {0.5, 0.9, 0.95, *(route.planner.quantile for route in routes), *options.get("quantiles", ())}
    return {**options, "models": list(dict.fromkeys(route.model for route in routes)), "quantiles": sorted(levels)}


def _estimates(routes: Sequence[Route], answer: PredictModelsResponse) -> list[RouteEstimate]:
    models = dict.fromkeys(route.model for route in routes)
    rows = {
        model: replace(part, index=0) if isinstance(part, RowError) else part.predictions[0]
        for model, part in zip(models, answer.results, strict=True)
    }
    return [_estimate(route, rows[route.model]) for route in routes]


def _failed(routes: Sequence[Route], error: LenVMClientError) -> list[RouteEstimate]:
    return [RouteEstimate(route, row_error(0, error)) for route in routes]


def _estimate(route: Route, row: Prediction | RowError) -> RouteEstimate:
    if isinstance(row, RowError) or row.quantiles is None:
        return RouteEstimate(route, row)
    limit = route.planner.max_tokens(row)
    mean = limit if row.mean is None else min(row.mean, float(limit))
    seconds = [route.first_token_s + route.seconds_per_token * tokens for tokens in (mean, limit)]
    return RouteEstimate(route, row, route.planner.cost(row), Estimate(*seconds))
