"""Predictions for schedulers, gateways and budgets: which field, which polarity, and plain arithmetic.

Tokens are those that a backbone still makes, EOS included: what ``max_tokens`` must cover. A model without a length
distribution has no quantiles; where one is needed, InvalidRequestError says so.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lenvm_client._types import Prediction, RowError
from lenvm_client.errors import InvalidRequestError

__all__ = [
    "Admission",
    "Backend",
    "BudgetPlanner",
    "Estimate",
    "Reservation",
    "TokenBudget",
    "predicted_tokens",
    "prediction_headers",
    "priority_for",
    "request_fields",
]

Backend: TypeAlias = Literal["vllm", "sglang", "dynamo", "litellm"]
Row: TypeAlias = Prediction | RowError | None

# Is the request of the larger priority served first?
_HIGHER_FIRST: Mapping[str, bool] = {"vllm": False, "sglang": True, "dynamo": True, "litellm": False}
_INT32 = 2**31 - 1  # Dynamo reads no more; nobody needs more
_DYNAMO_TOP = 2**30  # its router takes negative priorities for none, so that the longest must stay above 0


def predicted_tokens(prediction: Prediction, quantile: float = 0.5, *, uncertainty: float = 0.0) -> float:
    """Tokens at a quantile, and ``uncertainty`` times what the 90 % quantile lies above it: 0 ranks by the quantile
    alone, 1 by the 90 % quantile, so that a request of uncertain length goes later.

    Raises InvalidRequestError where the prediction does not hold these quantiles (they are the call's ``quantiles``).
    """
    tokens = _quantile(prediction, quantile)
    return tokens + uncertainty * (_quantile(prediction, 0.9) - tokens) if uncertainty else float(tokens)


def priority_for(
    backend: Backend,
    prediction: Prediction,
    *,
    quantile: float = 0.5,
    uncertainty: float = 0.0,
    ageing: float = 0.0,
    arrived: float | None = None,
    low_first: bool | None = None,
) -> int:
    """The priority with which ``backend`` serves the shortest request first.

    vLLM (which needs ``--scheduling-policy priority``, and refuses priorities without) and LiteLLM serve the lowest
    number first, Dynamo the highest, and SGLang (``--enable-priority-scheduling``) the highest unless
    ``--schedule-low-priority-values-first`` is set: say so by ``low_first=True``. SGLang also preempts a running
    request for one that is better by more than its ``--priority-scheduling-preemption-threshold``, here in tokens.
    Dynamo's numbers count down from 2^30; its router reads them as seconds of earlier arrival, which is another token
    of ageing a second. Requests without a priority go first in vLLM and last in Dynamo: give one to all or to none.

    Args:
        quantile, uncertainty: see ``predicted_tokens``. For a model without a length distribution its ``rank_key``
            stands in.
        ageing: tokens of rank that a second of waiting is worth; 0 lets long requests starve under overload. The
            priority is set once, so waiting must not change it: since all that wait gain alike, a request that arrives
            later is as good as one that is longer by ``ageing`` tokens a second.
        arrived: seconds of any clock that all requests share (e.g. ``time.monotonic()`` in one gateway); needed with
            ageing. Start it near 0 where the numbers get large: priorities are cut to 32 bits.
        low_first: overrides the backend's polarity.
    """
    if backend not in _HIGHER_FIRST:
        known = ", ".join(_HIGHER_FIRST)
        raise InvalidRequestError(f"no such backend: {backend!r}; known are {known}", param="backend")
    if not all(0.0 <= value < math.inf for value in (ageing, uncertainty)):
        raise InvalidRequestError("ageing and uncertainty must be finite and at least 0", param="ageing")
    if ageing and arrived is None:
        raise InvalidRequestError("ageing needs arrived: when the request came, in seconds", param="arrived")
    if prediction.quantiles is None:
        rank = prediction.rank_key
    else:
        rank = predicted_tokens(prediction, quantile, uncertainty=uncertainty)
    rank += ageing * (arrived or 0.0)
    if backend == "dynamo" and not low_first:
        return max(0, min(_INT32, _DYNAMO_TOP - round(rank)))
    lower_first = not _HIGHER_FIRST[backend] if low_first is None else low_first
    return max(-_INT32, min(_INT32, round(rank if lower_first else -rank)))


def request_fields(backend: Backend, prediction: Prediction, **options: Any) -> dict[str, Any]:
    """What to merge into the request's JSON: the priority (``options`` go to ``priority_for``) where the backend looks
    for it, for Dynamo with the predicted output length (``osl``)."""
    priority = priority_for(backend, prediction, **options)
    if backend != "dynamo":
        return {"priority": priority}
    hints = {"priority": priority}
    if prediction.quantiles is not None:
        hints["osl"] = math.ceil(predicted_tokens(prediction, options.get("quantile", 0.5)))
    return {"nvext": {"agent_hints": hints}}


def prediction_headers(prediction: Prediction, quantile: float = 0.5, high: float = 0.95) -> dict[str, str]:
    """Header form for gateways: the predicted tokens at ``quantile`` and at ``high``."""
    name = "x-predicted-output-tokens"
    return {
        name: str(_quantile(prediction, quantile)),
        f"{name}-p{100 * high:.12g}": str(_quantile(prediction, high)),
    }


# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """Of a cost or a time: on average (``expected``) and at the planner's quantile (``high``)."""

    expected: float
    high: float


@dataclass(frozen=True)
class Reservation:
    """Room for the keys and values of prompt and answer: ``tokens`` in whole ``blocks``, and their ``bytes``."""

    tokens: int
    blocks: int
    bytes: int


@dataclass(frozen=True)
class Admission:
    """Which rows got room (``admitted``) and which must wait (``deferred``), by index, shortest first; ``tokens`` were
    reserved for each of the admitted."""

    admitted: tuple[int, ...]
    deferred: tuple[int, ...]
    tokens: Mapping[int, int] = field(default_factory=dict)


class TokenBudget:
    """A capacity in tokens (of a key/value cache, say) that requests share; thread-safe."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise InvalidRequestError(f"a budget must hold at least one token, not {capacity}", param="capacity")
        self.capacity = capacity
        self._used = 0
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Tokens that nobody holds."""
        return self.capacity - self._used

    def reserve(self, tokens: int) -> bool:
        """Take ``tokens`` if that many are free."""
        with self._lock:
            if not 0 <= tokens <= self.capacity - self._used:
                return False
            self._used += tokens
            return True

    def release(self, tokens: int) -> None:
        """Give back what was reserved, e.g. when the answer has ended. Raises ValueError for more than is taken."""
        with self._lock:
            if not 0 <= tokens <= self._used:
                raise ValueError(f"{tokens} tokens are given back, {self._used} are taken")
            self._used -= tokens


@dataclass(frozen=True, kw_only=True)
class BudgetPlanner:
    """Limits, costs and room for requests from their predictions.

    A row without a prediction (a ``RowError``, or None) gets ``ceiling``, and so does one whose quantile lies beyond
    what the model tells apart (``saturated``). Without a ceiling a failed row's error is raised.

    Args:
        quantile: the share of answers that ``max_tokens`` should let end by themselves.
        ceiling: never more tokens than this.
        floor: never fewer.
        input_price, output_price: of a million tokens.
        block_size: tokens in a block of the key/value cache.
        kv_bytes_per_token: of the backbone; 0 leaves ``Reservation.bytes`` at 0.
    """

    quantile: float = 0.95
    ceiling: int | None = None
    floor: int = 1
    input_price: float = 0.0
    output_price: float = 0.0
    block_size: int = 16
    kv_bytes_per_token: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise InvalidRequestError(f"quantile must lie between 0 and 1, not {self.quantile}", param="quantile")
        if self.floor < 1 or self.block_size < 1 or (self.ceiling is not None and self.ceiling < self.floor):
            raise InvalidRequestError("floor and block_size must be at least 1, ceiling at least floor", param="floor")

    def max_tokens(self, row: Row) -> int:
        """The limit to give the backbone."""
        if not isinstance(row, Prediction):
            return self._ceiling_for(row)
        tokens = _quantile(row, self.quantile)
        beyond = row.saturated and tokens >= max((row.quantiles or {}).values())
        if beyond and self.ceiling is not None:
            return self.ceiling
        return max(self.floor, tokens if self.ceiling is None else min(tokens, self.ceiling))

    def cost(self, row: Prediction) -> Estimate:
        """What the request will cost, in the currency of the prices; ``expected`` is cut at the limit too."""
        limit = self.max_tokens(row)
        mean = limit if row.mean is None else min(row.mean, float(limit))
        prompt = self.input_price * row.prompt_tokens / 1e6
        return Estimate(prompt + self.output_price * mean / 1e6, prompt + self.output_price * limit / 1e6)

    def reservation(self, row: Row, prompt_tokens: int | None = None) -> Reservation:
        """Room for the prompt and ``max_tokens``; ``prompt_tokens`` for a row that does not tell."""
        if prompt_tokens is None:
            prompt_tokens = row.prompt_tokens if isinstance(row, Prediction) else 0
        blocks = -(-(prompt_tokens + self.max_tokens(row)) // self.block_size)
        tokens = blocks * self.block_size
        return Reservation(tokens, blocks, tokens * self.kv_bytes_per_token)

    def admit(self, rows: Sequence[Row], budget: TokenBudget) -> Admission:
        """Reserve room in ``budget``, smallest first (most requests get in so); whoever does not fit must wait.

        The caller gives back ``tokens[index]`` when that answer has ended.
        """
        wanted = sorted((self.reservation(row).tokens, at) for at, row in enumerate(rows))
        admitted: dict[int, int] = {}
        deferred: list[int] = []
        for tokens, at in wanted:
            if budget.reserve(tokens):
                admitted[at] = tokens
            else:
                deferred.append(at)
        return Admission(tuple(admitted), tuple(deferred), admitted)

    def _ceiling_for(self, row: RowError | None) -> int:
        if self.ceiling is not None:
            return self.ceiling
        if row is not None:
            raise row.to_exception()
        raise InvalidRequestError("without a prediction a planner needs a ceiling", param="ceiling")


def _quantile(prediction: Prediction, level: float) -> int:
    name = f"{level:.12g}"
    quantiles = prediction.quantiles
    if quantiles is None:
        message = "the model has no length distribution: there are no quantiles to plan with"
        raise InvalidRequestError(message, code="no_quantiles", param="quantiles")
    if name not in quantiles:
        message = f"the prediction has no quantile {name}: ask for it by quantiles=[{name}, ...]"
        raise InvalidRequestError(message, code="no_such_quantile", param="quantiles")
    return quantiles[name]
