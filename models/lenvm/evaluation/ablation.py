"""``lenvm eval ablation``: what matters in training a value model (paper Fig. 5 and 6). Variants and their summary.

Each variant changes one thing of the same base: the paper's value head alone, the bounded return at gamma 0.997, Monte
Carlo returns, shuffled batches, low-rank adapters on a frozen backbone. Precision is compared with all weights trained,
since adapters are float32 whatever the backbone is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.experiments import Bench, Progress, Spec, run_specs
from lenvm.evaluation.stats import paired_bootstrap
from lenvm.evaluation.targets import TARGETS

__all__ = ["BASE", "GROUPS", "ablation_specs", "average", "best_reading", "summarise", "summarise_runs"]

BASE = "return"
GAMMAS = (0.99, 0.995, 0.999, 0.9995)


def _variants() -> dict[str, list[Spec]]:
    base = Spec(BASE)
    return {
        "target": [base, *(Spec(name, settings={"target": name}) for name in TARGETS)],
        "order": [base, Spec("grouped", settings={"order": "grouped"})],
        "head": [base, Spec("bins alone", head="bins"), Spec("value and bins", head="both")],
        "gamma": [base, *(Spec(f"gamma {gamma:g}", gamma=gamma) for gamma in GAMMAS)],
        "precision": [
            Spec("full mixed", settings={"mode": "full", "dtype": "mixed"}),
            Spec("full bfloat16", settings={"mode": "full", "dtype": "bfloat16"}),
            Spec("full float32", settings={"mode": "full", "dtype": "float32"}),
        ],
        "lambda": [base, Spec("lambda 0.95", settings={"lam": 0.95}), Spec("lambda 0.99", settings={"lam": 0.99})],
    }


# Group -> names of its variants, the one that the others are compared with first.
GROUPS: Mapping[str, tuple[str, ...]] = {
    group: tuple(spec.name for spec in specs) for group, specs in _variants().items()
}
_MAIN = ("target", "order", "head")  # groups whose noise is measured with every seed


def ablation_specs(only: Sequence[str] | None = None, *, seeds: int = 2) -> list[Spec]:
    """The models to train: ``only`` names groups or variants (None: all). One seed outside the main comparison.

    All of seed 0 come first. Raises InvalidRequestError for a name that is neither.
    """
    variants = _variants()
    known = {spec.name for specs in variants.values() for spec in specs}
    unknown = [name for name in only or () if name not in variants and name not in known]
    if unknown:
        raise InvalidRequestError(
            f"there is no ablation {unknown[0]!r}: choose from {', '.join(variants)} or a variant of them", param="only"
        )
    chosen: dict[tuple[int, str], Spec] = {}
    for seed in range(seeds):
        for group, specs in variants.items():
            for spec in specs:
                wanted = only is None or group in only or spec.name in only
                repeated = seed == 0 or group in _MAIN or (only is not None and spec.name in only)
                if wanted and repeated:
                    chosen.setdefault((seed, spec.name), replace(spec, seed=seed))
    return list(chosen.values())


def summarise(
    bench: Bench,
    only: Sequence[str] | None = None,
    *,
    seeds: int = 2,
    work: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, measure, and turn the runs into the ``metrics`` of ``reports/ablation.json``."""
    runs = run_specs(bench, ablation_specs(only, seeds=seeds), work=work, progress=progress)
    variants = summarise_runs(runs)
    groups = {group: [name for name in names if name in variants] for group, names in GROUPS.items()}
    for group, names in groups.items():
        for name in names[1:]:
            # The base of a group is its first variant; where it did not run there is nothing to compare with.
            if names[0] == GROUPS[group][0]:
                variants[name].setdefault("against", {})[names[0]] = _difference(
                    runs, name, names[0], bench.test.domains
                )
    for row in variants.values():
        row.pop("prompt_errors", None)
    return {
        "base": BASE,
        "groups": {group: names for group, names in groups.items() if len(names) > 1},
        "variants": variants,
        "failed": [run for run in runs if "error" in run],
    } | describe(bench)


def describe(bench: Bench) -> dict[str, Any]:
    """Budget and data that all models share."""
    budget = bench.budget
    return {
        "budget": {
            "steps": bench.steps,
            "batch_tokens": budget.batch_tokens,
            "learning_rate": budget.learning_rate,
            "full_learning_rate": budget.full_learning_rate,
        },
        "data": {
            "train_prompts": len(bench.train.by_prompt()),
            "train_answers": len(bench.train),
            "train_tokens": int(bench.train.lengths.sum()),
            "test_prompts": len(bench.test.truth),
            "test_answers": len(bench.test.rollouts),
        },
    }


def best_reading(run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the reading that the model was trained for: the bins where they stand alone, else the value."""
    figures: dict[str, Any] = run["figures"]["bins" if run["spec"]["head"] == "bins" else "value"]
    return figures


def summarise_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> figures averaged over seeds, with the MRE and the error over all states of each seed beside them."""
    named: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if "error" not in run:
            named.setdefault(run["name"], []).append(run)
    found = {}
    for name, same in named.items():
        figures = [best_reading(run) for run in same]
        row: dict[str, Any] = average(figures)
        row["seeds"] = [run["seed"] for run in same]
        row["mre_by_seed"] = [figure["mre"] for figure in figures]
        row["value_rmse_by_seed"] = [figure["all_states"]["value_rmse"] for figure in figures]
        row["losses"] = average([run["losses"] for run in same])
        row["steps"], row["tokens"] = same[0]["steps"], same[0]["tokens"]
        row["epochs"] = float(np.mean([run["epochs"] for run in same]))
        row["train_seconds"] = float(np.mean([run["seconds"]["train"] for run in same]))
        row["spec"] = same[0]["spec"]
        others = {reading: average([run["figures"][reading] for run in same]) for reading in same[0]["figures"]}
        if len(others) > 1:
            row["readings"] = {
                reading: {"mre": part["mre"], "value_rmse": part["all_states"]["value_rmse"]}
                for reading, part in others.items()
            }
        found[name] = row
    return found


def average(rows: Sequence[Any]) -> Any:
    """Mean of alike nested figures, leaf by leaf; lists element by element."""
    first = rows[0]
    if isinstance(first, Mapping):
        return {key: average([row[key] for row in rows]) for key in first}
    if isinstance(first, list):
        return [float(value) for value in np.mean(np.asarray(rows, dtype=np.float64), axis=0)]
    if isinstance(first, int) and all(row == first for row in rows):
        return first
    # JSON has no NaN of its own: a figure that did not exist comes back as null.
    return float(np.mean([np.nan if row is None else row for row in rows]))


def _difference(runs: Sequence[Mapping[str, Any]], name: str, base: str, domains: Sequence[str]) -> dict[str, Any]:
    """``mre`` of ``name`` less ``base_mre``, paired by prompt over the seeds that both have, with its interval.

    Like every MRE here each is a mean of the domains' means. ``other_seeds``: one of them has more seeds, so that its
    MRE in the table is another mean.
    """
    found: dict[str, dict[int, list[float]]] = {name: {}, base: {}}
    for run in runs:
        if run["name"] in found and "error" not in run:
            found[run["name"]][run["seed"]] = best_reading(run)["prompt_errors"]
    seeds = sorted(found[name].keys() & found[base].keys())
    if not seeds:
        return {}
    ours, theirs = (np.mean([found[side][seed] for seed in seeds], axis=0) for side in (name, base))
    where = np.asarray(domains)
    mre, base_mre = (
        float(np.mean([errors[where == domain].mean() for domain in dict.fromkeys(domains)]))
        for errors in (ours, theirs)
    )
    return {
        "seeds": seeds,
        "other_seeds": found[name].keys() != found[base].keys(),
        "mre": mre,
        "base_mre": base_mre,
        "mre_difference": list(paired_bootstrap(ours, theirs, strata=domains)),
    }
