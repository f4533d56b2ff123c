"""``lenvm eval scaling``: a larger backbone, more prompts, more answers a prompt (paper Fig. 3). Points and summary.

Every model gets the same number of steps: fewer prompts or answers are seen more often, so that what is compared is
the data and not the compute. That takes at least one epoch of all the answers; ``epochs`` of each point (how often it
sees its own) tells where a budget is smaller, and points then differ by less data than their place says. The backbones
are the first layers of the one backbone there is, with its final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.ablation import describe, summarise_runs
from lenvm.evaluation.experiments import Bench, Progress, Spec, run_specs

__all__ = ["AXES", "scaling_specs", "summarise_scaling"]

AXES = ("depth", "prompts", "samples")
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
SAMPLES = (1, 2, 4)


def depths_of(layers: int) -> list[int]:
    """A sixth, a third, two thirds and all of the layers."""
    return sorted({max(1, layers // 6), max(1, layers // 3), max(1, 2 * layers // 3), layers})


def scaling_specs(
    layers: int, most_samples: int, axes: Sequence[str] = AXES, *, seeds: int = 1
) -> list[tuple[str, float, Spec]]:
    """``(axis, place on it, model)``; the full model stands on every axis and is trained once a seed.

    ``most_samples``: answers of each train prompt. All models carry value head and bins, as the shipped one does.
    """
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise InvalidRequestError(f"there is no axis {unknown[0]!r}: choose from {', '.join(AXES)}", param="axes")
    full = Spec("full", head="both")
    samples = sorted({count for count in SAMPLES if count < most_samples} | {most_samples})
    points: list[tuple[str, float, Spec]] = []
    made: list[tuple[float, Spec]]
    for seed in range(seeds):
        for axis in axes:
            if axis == "depth":
                made = [(depth, replace(full, name=f"{depth} layers", depth=depth)) for depth in depths_of(layers)]
            elif axis == "prompts":
                made = [(share, replace(full, name=f"{share:g} of the prompts", share=share)) for share in SHARES]
            else:
                made = [(n, replace(full, name=f"{n} answers a prompt", samples=n)) for n in samples]
            whole = {"depth": layers, "prompts": 1.0, "samples": most_samples}[axis]
            points += [(axis, at, replace(full if at == whole else spec, seed=seed)) for at, spec in made]
    return points


def summarise_scaling(
    bench: Bench,
    axes: Sequence[str] = AXES,
    *,
    seeds: int = 1,
    work: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, measure, and turn the runs into the ``metrics`` of ``reports/scaling.json``."""
    layers = len(bench.decoder.layers)
    most = max(len(indices) for indices in bench.train.by_prompt().values())
    points = scaling_specs(layers, most, axes, seeds=seeds)
    specs = list({(spec.seed, spec.name): spec for _, _, spec in points}.values())
    runs = run_specs(bench, specs, work=work, progress=progress)
    variants = summarise_runs(runs)
    parameters = {run["name"]: run["parameters"] for run in runs if "error" not in run}
    report: dict[str, Any] = {axis: [] for axis in axes}
    prompts = len(bench.train.by_prompt())
    for axis, at, spec in points:
        if spec.seed or spec.name not in variants:
            continue
        row = {key: value for key, value in variants[spec.name].items() if key not in ("prompt_errors", "spec")}
        place = {"depth": at, "prompts": round(at * prompts), "samples": at}[axis]
        report[axis].append({"at": place, "name": spec.name, "parameters": parameters[spec.name], **row})
    return {"axes": report, "layers": layers, "failed": [run for run in runs if "error" in run]} | describe(bench)
