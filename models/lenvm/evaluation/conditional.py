"""Is a guided answer a sample from the conditional? Guided lengths ranked among unguided ones, weighted by acceptance.

Posterior guidance aims at ``p(y) u(L(y))``: sample unguided answers, accept each with probability ``u(L)``, and what is
left follows that law. So an unguided answer of length L stands in the comparison with weight ``u(L)``.

A guided length g among unguided lengths ``L_1..L_m`` has the rank ``(W(L < g) + U (W(L = g) + u(g))) / (W + u(g))``,
W the weight of the unguided answers concerned, U uniform. Given the set of all m + 1 lengths, an exact conditional
sampler's g is each of them with probability proportional to its weight (weighted exchangeability: Tibshirani et al.
2019, arXiv 1904.06019), so that the rank is uniform for every m, ties or not. That holds for targets that were not
chosen from ``L_1..L_m``: they come from answers that are set apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.lifebench import Kind
from lenvm.evaluation.stats import paired_bootstrap
from lenvm.guidance import Objective, log_utility

__all__ = [
    "LEAST_ACCEPTED",
    "Pair",
    "Sampled",
    "accepted",
    "conditional_metrics",
    "draw_target",
    "ks_uniform",
    "null_ranks",
    "rank",
    "utility",
]

FloatArray = NDArray[np.float64]

LEAST_ACCEPTED = 0.1
"""Share of a prompt's unguided answers that must satisfy the constraint."""
_QUANTILES: Mapping[Kind, tuple[float, float]] = {"at_most": (0.1, 0.5), "at_least": (0.5, 0.9), "equal_to": (0.1, 0.9)}
_NEGLIGIBLE = 5.0  # nats under its peak to which u must have fallen at the cut, where lengths are no longer known
_TRIES = 20


@dataclass(frozen=True)
class Sampled:
    """Figures of one answer; one that did not end was cut at ``length`` tokens. ``logprob``: temperature 1, nats."""

    length: int
    finished: bool
    forced_stop: bool = False
    text_cost: float = 0.0
    logprob: float = 0.0

    @property
    def logprob_per_token(self) -> float:
        """NaN for an empty answer."""
        return self.logprob / self.length if self.length else math.nan


@dataclass(frozen=True)
class Pair:
    """One guided answer beside the unguided answers that its target was not chosen from."""

    prompt_id: str
    kind: Kind
    target: int
    tolerance: float
    guided: Sampled
    unguided: Sequence[Sampled]


def utility(lengths: ArrayLike, kind: Kind, target: int, tolerance: float) -> FloatArray:
    """``u(L)`` of posterior guidance, 0 to 1: the probability with which rejection would accept a length."""
    return np.asarray(np.exp(log_utility(Objective(kind, target, tolerance=tolerance), lengths)), dtype=np.float64)


def accepted(lengths: ArrayLike, kind: Kind, target: int, tolerance: float) -> NDArray[np.bool_]:
    """Which lengths satisfy the constraint: on the allowed side, or within ``max(1, tolerance * target)``."""
    length = np.asarray(lengths, dtype=np.float64)
    if kind == "at_most":
        return np.asarray(length <= target)
    if kind == "at_least":
        return np.asarray(length >= target)
    return np.asarray(np.abs(length - target) <= max(1.0, tolerance * target))


def draw_target(
    apart: Sequence[Sampled],
    everything: Sequence[Sampled],
    kind: Kind,
    *,
    tolerance: float,
    cap: int,
    rng: np.random.Generator,
) -> int | None:
    """A target at a random quantile of the answers that are set ``apart`` (at_most: 0.1 to 0.5, at_least: 0.5 to 0.9,
    equal_to: 0.1 to 0.9), which at least a tenth of ``everything`` satisfies; None where twenty draws find none.

    Only lengths of answers that ended are targets, and for equal_to and at_most only those at which ``u`` has vanished
    by ``cap``, where answers are cut: the guided sampler would weigh lengths there that nobody knows.
    """
    lengths = np.array([answer.length if answer.finished else math.inf for answer in apart])
    known = np.array([answer.length for answer in everything])
    for _ in range(_TRIES):
        level = rng.uniform(*_QUANTILES[kind])
        found = float(np.quantile(lengths, level, method="inverted_cdf"))
        if not 1 <= found < math.inf:
            continue
        target = int(found)
        if kind != "at_least" and utility(cap, kind, target, tolerance) > math.exp(-_NEGLIGIBLE):
            continue
        if accepted(known, kind, target, tolerance).mean() >= LEAST_ACCEPTED:
            return target
    return None


def rank(guided: float, unguided: ArrayLike, weights: ArrayLike, own: float, draw: float) -> float:
    """Where ``guided`` stands among ``unguided`` [m], 0 to 1: the module's formula. ``own`` is ``u(guided)``, ``draw``
    uniform. Where nothing has weight the rank is the draw itself."""
    lengths, weight = np.asarray(unguided, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    total = float(weight.sum()) + own
    if not total > 0.0:
        return draw
    return float((weight[lengths < guided].sum() + draw * (weight[lengths == guided].sum() + own)) / total)


def ks_uniform(ranks: ArrayLike) -> float:
    """Largest distance between the distribution of ``ranks`` [n] and the uniform one (Kolmogorov-Smirnov); NaN for
    none."""
    ordered = np.sort(np.asarray(ranks, dtype=np.float64))
    count = len(ordered)
    if not count:
        return math.nan
    steps = np.arange(count + 1) / count
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def null_ranks(
    pairs: Sequence[Pair], rng: np.random.Generator, repeats: int = 1, *, control: bool = False
) -> FloatArray:
    """Ranks [repeats, n] that an exact conditional sampler would get here: for each pair one unguided answer, drawn by
    its weight, plays the guided one among the others.

    Pairs of one prompt share their unguided answers, so they draw different ones together (by rejection), as distinct
    answers of an exact sampler would be. ``control``: answers are drawn without their weights, by a sampler that heard
    of no constraint; its ranks must not be uniform.
    """
    ranks = np.empty((repeats, len(pairs)))
    by_prompt: dict[str, list[int]] = {}
    for at, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt_id, []).append(at)
    for members in by_prompt.values():
        lengths = np.array([answer.length for answer in pairs[members[0]].unguided], dtype=np.float64)
        weights = [_weights(pairs[at], lengths) for at in members]
        cumulative = [np.cumsum(np.ones_like(weight) if control else weight) for weight in weights]
        for repeat in range(repeats):
            chosen = _distinct(cumulative, rng)
            others = np.ones(len(lengths), dtype=np.bool_)
            others[chosen] = False
            for at, weight, own in zip(members, weights, chosen, strict=True):
                ranks[repeat, at] = rank(
                    lengths[own], lengths[others], weight[others], float(weight[own]), rng.uniform()
                )
    return ranks


def _distinct(cumulative: Sequence[FloatArray], rng: np.random.Generator) -> list[int]:
    """One index for each table of cumulative weights, no two the same where a hundred tries allow it."""
    chosen: list[int] = []
    for _ in range(100):
        chosen = [int(np.searchsorted(table, rng.uniform() * table[-1], side="right")) for table in cumulative]
        chosen = [min(index, len(table) - 1) for index, table in zip(chosen, cumulative, strict=True)]
        if len(set(chosen)) == len(chosen):
            break
    return chosen


def _weights(pair: Pair, lengths: ArrayLike) -> FloatArray:
    return utility(lengths, pair.kind, pair.target, pair.tolerance)


def conditional_metrics(pairs: Sequence[Pair], *, seed: int = 0, nulls: int = 200) -> dict[str, Any]:
    """The figures of one objective.

    ``ks`` is the distance of the weighted ranks from uniform; ``ks_null`` its mean for an exact sampler with the same
    pairs (``ks_null_95``: what 5 % of such runs exceed) and ``ks_control`` for one that ignores the constraint.
    ``ks_hard`` ranks every guided length among the answers that satisfy the constraint, all alike, as if ``u`` were 0
    or 1; ``ks_satisfied`` does so for the guided answers that satisfy it themselves, weighted. ``logprob_gap``: nats a
    token, guided minus accepted unguided, with its interval. ``NAME_exact`` is what an exact sampler would reach, as
    the unguided answers estimate it; of the text cost that is ``E_q[ln u] - ln E_p[u]``. Raises InvalidRequestError for
    no pairs.
    """
    if not pairs:
        raise InvalidRequestError("there is no pair to rank: sample more prompts or raise --max-new-tokens")
    rng = np.random.default_rng(seed)
    rows = [_ranked(pair, rng) for pair in pairs]
    ranks, hard, inside = (np.array([row[name] for row in rows]) for name in ("rank", "hard", "inside"))
    null = [ks_uniform(row) for row in null_ranks(pairs, rng, nulls)]
    control = [ks_uniform(row) for row in null_ranks(pairs, rng, 10, control=True)]
    gaps = [(row["ours"], row["theirs"], pair.prompt_id) for row, pair in zip(rows, pairs, strict=True)]
    gaps = [gap for gap in gaps if math.isfinite(gap[0]) and math.isfinite(gap[1])]
    ours, theirs, prompts = ([gap[at] for gap in gaps] for at in range(3))
    difference = paired_bootstrap(ours, theirs, prompts) if gaps else (math.nan,) * 3

    def mean(values: Sequence[float] | FloatArray) -> float:
        return float(np.mean(values))

    return {
        "ks": ks_uniform(ranks),
        "ks_null": mean(null),
        "ks_null_95": float(np.quantile(null, 0.95)),
        "ks_control": mean(control),
        "ks_hard": ks_uniform(hard),
        "ks_satisfied": ks_uniform(inside[np.isfinite(inside)]),
        "pairs": len(pairs),
        "prompts": len({pair.prompt_id for pair in pairs}),
        "logprob_gap": difference[0],
        "logprob_gap_ci": list(difference[1:]),
        "natural_end_rate": mean([pair.guided.finished and not pair.guided.forced_stop for pair in pairs]),
        "finished_rate": mean([pair.guided.finished for pair in pairs]),
        "forced_stop_rate": mean([pair.guided.forced_stop for pair in pairs]),
        "satisfied_rate": mean([row["satisfied"] for row in rows]),
        "satisfied_rate_exact": float(np.nanmean([row["satisfied_exact"] for row in rows])),
        "accepted_share": mean([row["share"] for row in rows]),
        "effective_unguided": mean([row["effective"] for row in rows]),
        "text_cost": mean([pair.guided.text_cost for pair in pairs]),
        "text_cost_exact": float(np.nanmean([row["cost"] for row in rows])),
        "mean_target": mean([pair.target for pair in pairs]),
        "mean_length": mean([pair.guided.length for pair in pairs]),
        "rank_histogram": np.histogram(ranks, bins=20, range=(0.0, 1.0))[0].tolist(),
    }


def _ranked(pair: Pair, rng: np.random.Generator) -> dict[str, float]:
    guided = pair.guided.length
    lengths = np.array([answer.length for answer in pair.unguided], dtype=np.float64)
    weights, own = _weights(pair, lengths), float(_weights(pair, guided))
    inside = accepted(lengths, pair.kind, pair.target, pair.tolerance)
    satisfied = bool(accepted(guided, pair.kind, pair.target, pair.tolerance))
    draw = rng.uniform()
    total = float(weights.sum())
    per_token = np.array([answer.logprob_per_token for answer in pair.unguided])
    usable = np.isfinite(per_token) & (weights > 0.0)
    return {
        "rank": rank(guided, lengths, weights, own, draw),
        "hard": rank(guided, lengths[inside], np.ones(int(inside.sum())), 1.0, draw),
        "inside": rank(guided, lengths[inside], weights[inside], own, draw) if satisfied else math.nan,
        "satisfied": float(satisfied),
        # Of an exact sampler, as the unguided answers estimate it.
        "satisfied_exact": float(weights[inside].sum()) / total if total > 0.0 else math.nan,
        "share": float(inside.mean()),
        "effective": total**2 / float((weights**2).sum()) if total > 0.0 else 0.0,
        "cost": _exact_cost(weights),
        "ours": pair.guided.logprob_per_token,
        "theirs": float(np.average(per_token[usable], weights=weights[usable])) if usable.any() else math.nan,
    }


def _exact_cost(weights: FloatArray) -> float:
    """KL from the unguided law to the one of ``weights`` [m] over unguided answers, in nats."""
    share = weights / weights.sum() if weights.sum() > 0.0 else np.zeros(0)
    share = share[share > 0.0]
    return float((share * np.log(share * len(weights))).sum()) if len(share) else math.nan
