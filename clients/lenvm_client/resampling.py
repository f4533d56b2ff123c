"""One guided answer out of several, by importance weight: what the value model gets wrong is put right."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_client.errors import InvalidRequestError

__all__ = ["Resampled", "resample"]

_TOLERANCE = 0.05  # the service's default


@dataclass(frozen=True)
class Resampled:
    """The answer that was drawn: its ``index``; ``text_cost``, nats, which counts the choice too (its mean is no less
    than the KL of the drawn answers from unguided ones); the ``probabilities`` that it was drawn by; and the
    ``effective_sample_size``, of how many answers there was a choice (1 to as many as were given)."""

    index: int
    text_cost: float
    probabilities: tuple[float, ...]
    effective_sample_size: float


def resample(
    objective: Mapping[str, Any],
    lengths: Sequence[int],
    text_costs: Sequence[float],
    *,
    rng: random.Random | None = None,
) -> Resampled:
    """Draw one of several independent guided answers (of different seeds) to the same prompt and objective, so that it
    follows the law that guidance aims at more closely than any single one: the generator's own answers, each accepted
    by its length (sampling importance resampling, Rubin 1987).

    Args:
        objective: as it was sent; method posterior, kind equal_to, at_most, at_least or tilt.
        lengths: of each answer, in the objective's unit (content tokens unless it says another); of one that was cut,
            what it has.
        text_costs: ``RowReport.text_cost`` of each, nats.
        rng: what draws; by default the module's own generator.

    Raises InvalidRequestError for no answers, lists of different lengths, answers without a text cost (greedy decoding,
    beams), and objectives that say nothing about one answer's length (paper, scale) or are none.
    """
    count = len(lengths)
    if not count or len(text_costs) != count:
        message = f"{count} lengths and {len(text_costs)} text costs: give one of each for every answer"
        raise InvalidRequestError(message, param="text_costs")
    if not all(math.isfinite(cost) for cost in text_costs):
        raise InvalidRequestError("text costs must be finite: sample, without beams", param="text_costs")
    log_u = [_log_utility(objective, length) for length in lengths]
    weights = [own - cost for own, cost in zip(log_u, text_costs, strict=True)]
    peak = max(weights)
    total = peak + math.log(math.fsum(math.exp(weight - peak) for weight in weights))
    probabilities = tuple(math.exp(weight - total) for weight in weights)
    index = (rng or random).choices(range(count), probabilities)[0]
    cost = log_u[index] - total + math.log(count)
    return Resampled(index, cost, probabilities, 1.0 / math.fsum(p * p for p in probabilities))


def _log_utility(objective: Mapping[str, Any], length: int) -> float:
    """Natural log of what the objective makes of an answer's length, as the service weighs its end."""
    kind = objective.get("kind")
    if objective.get("method", "posterior") != "posterior" or kind not in ("equal_to", "at_most", "at_least", "tilt"):
        raise InvalidRequestError(
            "answers are weighed for posterior equal_to, at_most, at_least and tilt alone", param="objective"
        )
    if kind == "tilt":
        return -_number(objective, "lambda", -math.inf) * length
    target = _number(objective, "target", 0.0)
    tolerance = _TOLERANCE if objective.get("tolerance") is None else _number(objective, "tolerance", 0.0)
    beyond = (length - target) / max(1.0, tolerance * target)
    if (kind == "at_most" and beyond < 0.0) or (kind == "at_least" and beyond > 0.0):
        return 0.0
    return -abs(beyond)


def _number(objective: Mapping[str, Any], name: str, least: float) -> float:
    value = objective.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        wanted = "a finite number" + (f" of at least {least:g}" if math.isfinite(least) else "")
        raise InvalidRequestError(f"{name} must be {wanted}, got {value!r}", param=name)
    return float(value)
