"""What LIFEBench chooses on tasks that are not in its test: a gate and a posterior rule for every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lenvm.evaluation.answers import Answer, AnswerFile
from lenvm.evaluation.lifebench import Kind, Task, length_score
from lenvm.evaluation.lifebench_draw import drawn
from lenvm.evaluation.lifebench_gates import (
    FORCED,
    FREE,
    RESAMPLE_TOLERANCES,
    GateRule,
    RuleScore,
    best_rule,
    front,
)
from lenvm.evaluation.lifebench_posterior import PosteriorRule, PosteriorScore, choose_posterior, excess
from lenvm.evaluation.lifebench_work import Job, LifebenchSettings, Policy, jobs_of

__all__ = ["Tuning", "tuning_jobs", "tuning_of"]


@dataclass(frozen=True)
class Tuning:
    """Every rule on the tuning tasks, by kind; empty where nothing was to be chosen. ``resampled``: the posterior rules
    again, one of several answers drawn."""

    gates: Mapping[Kind, Sequence[RuleScore]] = field(default_factory=dict)
    posterior: Mapping[Kind, Sequence[PosteriorScore]] = field(default_factory=dict)
    resampled: Mapping[Kind, Sequence[PosteriorScore]] = field(default_factory=dict)

    def policies(self, settings: LifebenchSettings) -> dict[tuple[str, Kind], Policy]:
        """``(mode, kind)`` -> the rule that was chosen."""
        found: dict[tuple[str, Kind], Policy] = {}
        for kind, gates in self.gates.items():
            for mode in ("eos_gate", "eos_gate_resampled"):
                found[mode, kind] = best_rule(gates, kind).rule
        for mode, tables in (("posterior", self.posterior), ("posterior_resampled", self.resampled)):
            for kind, table in tables.items():
                found[mode, kind] = choose_posterior(table, **_caps(settings)).rule
        return found

    def front(self, kind: Kind, settings: LifebenchSettings, *, resampled: bool = False) -> list[GateRule]:
        """The gates that go to the test. ``FREE`` costs nothing on any tasks, so that there is always one that costs no
        more; ``FORCED`` is the other end. ``resampled``: each of them also with one of several answers drawn, for
        targets as soft as may be."""
        found = list(dict.fromkeys([FREE, *front(self.gates[kind], settings.front), FORCED[kind]]))
        if resampled:
            found += [
                replace(rule, resample=settings.resample, tolerance=tolerance)
                for rule in found
                for tolerance in RESAMPLE_TOLERANCES
            ]
        return found

    def to_dict(self, tasks: Sequence[Task], settings: LifebenchSettings) -> dict[str, Any]:
        """As a report holds it."""
        caps = _caps(settings)
        told: dict[str, Any] = {
            "tasks": len(tasks),
            **caps,
            "gates": {kind: [score.to_dict() for score in table] for kind, table in self.gates.items()},
        }
        for suffix, tables in (("", self.posterior), ("_resampled", self.resampled)):
            if suffix and not tables:
                continue
            told[f"posterior{suffix}"] = {kind: [score.to_dict() for score in table] for kind, table in tables.items()}
            # Where no rule stays within the caps, the one chosen goes least beyond them.
            told[f"within_caps{suffix}"] = {
                kind: min(excess(score, **caps) for score in table) == 0.0 for kind, table in tables.items()
            }
        return told


def tuning_jobs(tasks: Sequence[Task], settings: LifebenchSettings) -> list[Job]:
    """Every rule that may be chosen, on the tuning tasks."""
    return [
        job
        for kind in settings.kinds
        for rule in _grid(kind, settings)
        for job in jobs_of(rule, kind, tasks, settings, of=_most(rule, settings), tuning=True)
    ]


def tuning_of(store: AnswerFile, tasks: Sequence[Task], settings: LifebenchSettings) -> Tuning:
    """The tables of all rules (pairs are as many for every target)."""
    gates: dict[Kind, list[RuleScore]] = {}
    posterior: dict[str, dict[Kind, list[PosteriorScore]]] = {"posterior": {}, "posterior_resampled": {}}

    def answers_of(kind: Kind, rule: GateRule | PosteriorRule, of: int) -> list[tuple[Job, Answer]]:
        jobs = jobs_of(rule, kind, tasks, settings, of=of, tuning=True)
        return drawn(jobs, of, store, tolerance=0.0, seed=settings.seed)

    for kind in settings.kinds:
        for rule in _grid(kind, settings):
            if isinstance(rule, GateRule):
                answers = answers_of(kind, rule, 1)
                gates.setdefault(kind, []).append(RuleScore(rule, _mean_score(answers), _mean_cost(answers, 1)))
                continue
            for mode in settings.posterior_modes:
                answers = answers_of(kind, rule, settings.drawn_from(mode))
                cost = _mean_cost(answers, 1)
                long = cost if max(settings.targets) < 64 else _mean_cost(answers, 64)
                forced = float(np.mean([answer.forced_stop for _, answer in answers]))
                score = PosteriorScore(rule, _mean_score(answers), cost, long, forced)
                posterior[mode].setdefault(kind, []).append(score)
    return Tuning(gates, posterior["posterior"], posterior["posterior_resampled"])


def _most(rule: GateRule | PosteriorRule, settings: LifebenchSettings) -> int:
    """Answers of a rule that tuning needs: gates are chosen by single ones."""
    return 1 if isinstance(rule, GateRule) else max(settings.drawn_from(mode) for mode in settings.posterior_modes)


def _caps(settings: LifebenchSettings) -> dict[str, float]:
    return {"cost_cap": settings.cost_cap, "forced_cap": settings.forced_cap}


def _grid(kind: Kind, settings: LifebenchSettings) -> list[GateRule | PosteriorRule]:
    return [
        *(settings.grids[kind] if settings.tunes_gates else ()),
        *(settings.posterior_grid if settings.tunes_posterior else ()),
    ]


def _mean_score(answers: Sequence[tuple[Job, Answer]]) -> float:
    return float(np.mean([length_score(answer.length, job.target, job.kind) for job, answer in answers]))


def _mean_cost(answers: Sequence[tuple[Job, Answer]], shortest: int) -> float:
    return float(np.mean([answer.text_cost for job, answer in answers if job.target >= shortest]))
