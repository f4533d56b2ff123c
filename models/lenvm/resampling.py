"""One answer out of several guided ones, by its importance weight: what the value model gets wrong is put right.

Posterior guidance aims at ``p(y) u(L(y))`` and reaches it exactly only with exact values. But each answer tells how far
off it is: guidance made it ``exp(text_cost)`` times as likely as the generator would, so that it stands for
``w = u(L) exp(-text_cost)`` of the law that was aimed at. Of K independent answers one is drawn by these weights
(sampling importance resampling: Rubin 1987, *JASA* 82, 543-546); as K grows its law becomes ``p(y) u(L(y))`` itself,
whatever the values are. That is so among the answers that may be sampled at all: ``p`` is the generator with the
sampler's truncation and ``max_new_tokens``, and without the ends that ``min_eos_prob`` takes away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.errors import InvalidRequestError
from lenvm.guidance import Objective, log_utility

__all__ = ["Resampled", "resample", "resample_answers"]

T = TypeVar("T")


@dataclass(frozen=True)
class Resampled:
    """The answer that was drawn.

    ``text_cost`` (nats) is ``log u(L) - log mean w``: its own text cost and what the choice adds, ``log(K x its
    probability)``. Its mean is never below the KL divergence of the drawn answers' law from the generator's (it is the
    KL of draw and proposals together, at most ``log K`` above it), and with one answer it is that answer's text cost.
    ``probabilities`` [K] are what was drawn from; ``effective_sample_size`` is ``(sum w)^2 / sum w^2``, 1 to K: of how
    many answers there was a choice.
    """

    index: int
    text_cost: float
    probabilities: NDArray[np.float64]
    effective_sample_size: float


def resample(objective: Objective, lengths: ArrayLike, text_costs: ArrayLike, draw: float) -> Resampled:
    """Draw one of K independent answers to the same prompt: ``lengths`` [K] in content tokens (of an answer that was
    cut, those it has), ``text_costs`` [K] in nats, ``draw`` uniform in [0, 1).

    The objective's ``strength`` and ``min_eos_prob`` shape what is sampled; ``u`` depends on kind, target and tolerance
    (or lambda) alone. Raises InvalidRequestError for no answers, shapes that disagree, text costs that are not finite
    (greedy answers follow no distribution), method paper, and a scale that was not resolved.
    """
    if objective.method != "posterior" or objective.kind == "scale":
        raise InvalidRequestError(
            "answers are weighed for posterior objectives, scale resolved: see resolve_scale", param="objective"
        )
    length, cost = np.asarray(lengths, dtype=np.float64), np.asarray(text_costs, dtype=np.float64)
    if length.ndim != 1 or length.shape != cost.shape or not len(length):
        raise InvalidRequestError(
            f"lengths {length.shape} and text costs {cost.shape} must be [K], one of each for every answer",
            param="text_costs",
        )
    if not (np.isfinite(length).all() and np.isfinite(cost).all()):
        raise InvalidRequestError("text costs must be finite: greedy answers have none", param="text_costs")
    log_u = log_utility(objective, length)
    weights = log_u - cost
    total = float(np.logaddexp.reduce(weights))
    probabilities = np.exp(weights - total)
    reached = np.cumsum(probabilities)
    index = min(int(np.searchsorted(reached, draw * reached[-1], side="right")), len(reached) - 1)
    return Resampled(
        index=index,
        text_cost=float(log_u[index]) - (total - math.log(len(length))),
        probabilities=probabilities,
        effective_sample_size=float(1.0 / (probabilities**2).sum()),
    )


def resample_answers(objective: Objective, answers: Sequence[T], draw: float) -> tuple[T, Resampled]:
    """``resample`` for answers that are dataclasses with ``length`` and ``text_cost``, as the sampler's are: the one
    that was drawn, with the text cost of the draw."""
    known: Sequence[Any] = answers
    found = resample(objective, [each.length for each in known], [each.text_cost for each in known], draw)
    return replace(known[found.index], text_cost=found.text_cost), found
