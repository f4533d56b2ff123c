"""LIFEBench modes set beside each other: posterior against every mode, and against gates at no more text cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lenvm.evaluation.lifebench import Kind, Row, compare_modes, length_score
from lenvm.evaluation.lifebench_gates import GateRule, RuleScore, mix_at_cost
from lenvm.evaluation.stats import paired_bootstrap

__all__ = ["Points", "compare", "front_metrics"]

Points = Sequence[tuple[float, float]]
"""Length score and text cost of answers, one pair each, in the order of the run: task, target, sample."""


def compare(rows: Sequence[Row], kind: Kind, modes: Sequence[str]) -> dict[str, Any]:
    """``posterior`` against every other mode of single answers; ``posterior_resampled`` against the modes that have as
    many answers, and against ``posterior``. Differences with 95 % intervals, resampled by task."""
    return {
        f"{ours}_minus_{other}": {
            measure: list(compare_modes(rows, kind, ours, other, measure)) for measure in ("ls", "kl_per_sequence")
        }
        for ours in ("posterior", "posterior_resampled")
        if ours in modes
        for other in modes
        if other != ours and (other.endswith("_resampled") == ours.endswith("_resampled") or other == "posterior")
    }


def front_metrics(gates: Mapping[GateRule, Points], posterior: Sequence[Row]) -> dict[str, Any]:
    """The front's ``rules`` on the test tasks and, where posterior ran, the gates that cost no more than it does.

    ``equal_cost`` is the best gate at exactly that cost: it follows one rule for a share of the answers and another for
    the rest. ``no_more_cost`` is the best single rule within it. Both are chosen on the test itself: what luck there is
    in the choice is the gate's. ``posterior_minus_gate``: length score with its 95 % interval, paired by task.
    ``by_target`` repeats ``equal_cost`` within each target, where the gate may choose anew.
    """
    everything = range(len(next(iter(gates.values()), ())))
    found: dict[str, Any] = {"rules": [score.to_dict() for score in _scores(gates, everything)]}
    if not posterior:
        return found
    found["equal_cost"] = _equal_cost(gates, posterior, everything)
    scores = _scores(gates, everything)
    within = [score for score in scores if score.kl_per_sequence <= _cost(posterior, everything) + 1e-9]
    if within:  # costs are estimates: where posterior's is about zero, no gate need lie below it
        best = max(within, key=lambda score: (score.ls, -score.kl_per_sequence))
        theirs = [ls for ls, _ in gates[best.rule]]
        found["no_more_cost"] = {
            **best.to_dict(),
            "posterior_minus_gate": list(paired_bootstrap(_ls(posterior), theirs, [row.task_id for row in posterior])),
        }
    targets = [row.target for row in posterior]
    found["by_target"] = {
        str(target): _equal_cost(gates, posterior, [at for at in everything if targets[at] == target])
        for target in sorted(set(targets))
    }
    return found


def _scores(gates: Mapping[GateRule, Points], at: Sequence[int]) -> list[RuleScore]:
    return [RuleScore(rule, *np.asarray(points)[list(at)].mean(axis=0).tolist()) for rule, points in gates.items()]


def _ls(rows: Sequence[Row]) -> list[float]:
    return [length_score(len(row.token_ids), row.target, row.kind) for row in rows]


def _cost(rows: Sequence[Row], at: Sequence[int]) -> float:
    return float(np.mean([rows[index].text_cost for index in at]))


def _equal_cost(gates: Mapping[GateRule, Points], posterior: Sequence[Row], at: Sequence[int]) -> dict[str, Any]:
    cost, scores = _cost(posterior, at), _scores(gates, at)
    mix = mix_at_cost(scores, cost)
    cheap, dear = scores[mix.cheap], scores[mix.dear]
    first, second = gates[cheap.rule], gates[dear.rule]
    # Expectations, not draws: an answer of the mix scores the one rule's and the other's by their shares.
    mixed = [(1 - mix.share) * first[index][0] + mix.share * second[index][0] for index in at]
    rows = [posterior[index] for index in at]
    return {
        "kl_per_sequence": (1 - mix.share) * cheap.kl_per_sequence + mix.share * dear.kl_per_sequence,
        "ls": float(np.mean(mixed)),
        "rules": [cheap.rule.to_dict(), dear.rule.to_dict()],
        "share": mix.share,
        "posterior_kl_per_sequence": cost,
        "posterior_minus_gate": list(paired_bootstrap(_ls(rows), mixed, [row.task_id for row in rows])),
    }
