"""``lenvm eval lifebench``: length scores of every mode under one sampler, each beside what it costs the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenvm.backbones import encode_chat
from lenvm.decoding import Generation, Guide, Request, SamplingParams
from lenvm.errors import InvalidRequestError
from lenvm.evaluation.lifebench import (
    Kind,
    Row,
    Task,
    aggregate,
    aggregate_modes,
    build_prompt,
    compare_modes,
    load_tasks,
)
from lenvm.guidance import Objective
from lenvm.guides import EosGateGuide, ValueGuide
from lenvm.rollouts.sampling import LocalGenerator, stream_seed
from lenvm.scoring import Scorer

__all__ = ["MODES", "LifebenchSettings", "run_lifebench"]

MODES = ("unguided", "eos_gate", "paper_value", "paper_length", "posterior")
KIND: Kind = "equal_to"
# The gate's rules to choose from: (slack, threshold). It stops at (1 + slack) N at the latest.
_GATES = [(slack, threshold) for slack in (0.05, 0.1, 0.2) for threshold in (0.003, 0.02, 0.1)]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LifebenchSettings:
    """What is generated: ``tasks`` x ``targets`` x ``samples`` answers a mode, all with the same ``params``."""

    targets: Sequence[int] = (64, 128, 256)
    tasks: int = 50
    tuning_tasks: int = 6
    samples: int = 1
    modes: Sequence[str] = MODES
    tolerance: float = 0.05
    seed: int = 0
    cut: int = 4  # answers are cut at this many times the target, where the score is 0.2 of 100 anyway
    # One sampler for all modes.
    params: SamplingParams = field(default_factory=lambda: SamplingParams(0.7, top_k=16))

    def __post_init__(self) -> None:
        unknown = set(self.modes) - set(MODES)
        if unknown:
            raise InvalidRequestError(
                f"unknown mode {', '.join(sorted(unknown))}: use {', '.join(MODES)}", param="modes"
            )


def run_lifebench(
    generator: LocalGenerator,
    scorer: Scorer,
    data: Path,
    settings: LifebenchSettings,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Metrics (modes, comparisons with paired bootstrap intervals, the gate that was chosen) and every answer."""
    everything = load_tasks(data, n=None, seed=settings.seed)
    tasks, tuning = everything[: settings.tasks], everything[settings.tasks : settings.tasks + settings.tuning_tasks]
    if "eos_gate" in settings.modes and not tuning:
        raise InvalidRequestError(f"all {len(everything)} tasks are in the test: the gate needs some to be tuned on")
    gate = _tune_gate(generator, tuning, settings) if "eos_gate" in settings.modes else None
    rows: list[Row] = []
    for mode in settings.modes:
        plan = [(task, n, sample) for task in tasks for n in settings.targets for sample in range(settings.samples)]
        guide = _guide(mode, [n for _, n, _ in plan], scorer, settings, gate)
        done = [0]

        def on_done(_: int, __: Generation, mode: str = mode, done: list[int] = done, total: int = len(plan)) -> None:
            done[0] += 1
            if progress:
                progress(mode, done[0], total)

        answers = _generate(generator, plan, settings, guide, on_done)
        rows += [_row(task, n, mode, answer) for (task, n, _), answer in zip(plan, answers, strict=True)]
    metrics: dict[str, Any] = aggregate_modes(rows)
    metrics["comparisons"] = _compare(rows, settings)
    if gate is not None:
        metrics["eos_gate"]["tuned"] = {"slack": gate[0], "threshold": gate[1], "tasks": len(tuning)}
    return metrics, rows


def _generate(
    generator: LocalGenerator,
    plan: Sequence[tuple[Task, int, int]],
    settings: LifebenchSettings,
    guide: Guide | None,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    requests = [
        Request(
            encode_chat(generator.tokenizer, build_prompt(task, KIND, target)),
            stream_seed(f"{task.id}/{target}", sample, settings.seed),
            settings.cut * target,
        )
        for task, target, sample in plan
    ]
    return generator.sampler.generate(requests, settings.params, guide=guide, on_done=on_done)


def _guide(
    mode: str, targets: Sequence[int], scorer: Scorer, settings: LifebenchSettings, gate: tuple[float, float] | None
) -> Guide | None:
    if mode == "unguided":
        return None
    if mode == "eos_gate" and gate is not None:
        return EosGateGuide(targets, slack=gate[0], threshold=gate[1])
    objectives = [
        Objective(kind=KIND, target=n, tolerance=settings.tolerance)
        if mode == "posterior"
        else Objective(kind=KIND, target=n, method="paper", space="length" if mode == "paper_length" else "value")
        for n in targets
    ]
    return ValueGuide(scorer, objectives)


def _tune_gate(generator: LocalGenerator, tasks: Sequence[Task], settings: LifebenchSettings) -> tuple[float, float]:
    """The rule with the best length score on tasks outside the test; all rules share one batch."""
    plan = [(task, n, 0) for task in tasks for n in settings.targets]
    rules = [rule for rule in _GATES for _ in plan]
    guide = EosGateGuide(
        [n for _ in _GATES for _, n, _ in plan], slack=[s for s, _ in rules], threshold=[t for _, t in rules]
    )
    answers = _generate(generator, plan * len(_GATES), settings, guide)
    scores = {}
    for at, rule in enumerate(_GATES):
        group = answers[at * len(plan) : (at + 1) * len(plan)]
        rows = [_row(task, n, "eos_gate", answer) for (task, n, _), answer in zip(plan, group, strict=True)]
        scores[rule] = aggregate(rows)["ls"]
    return max(scores, key=lambda rule: scores[rule])


def _row(task: Task, target: int, mode: str, answer: Generation) -> Row:
    return Row(
        task.id,
        KIND,
        target,
        mode,
        answer.token_ids,
        answer.finished,
        answer.forced_stop,
        answer.text_cost,
        answer.logprob,
    )


def _compare(rows: Sequence[Row], settings: LifebenchSettings) -> dict[str, Any]:
    """``posterior`` against every other mode: difference and 95 % interval, resampled by task."""
    found: dict[str, Any] = {}
    if "posterior" not in settings.modes:
        return found
    for other in settings.modes:
        if other != "posterior":
            found[f"posterior_minus_{other}"] = {
                measure: list(compare_modes(rows, KIND, "posterior", other, measure))
                for measure in ("ls", "kl_per_sequence")
            }
    return found
