"""``lenvm eval lifebench``: length scores of every mode under one sampler, each beside what it costs the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lenvm.backbones import encode_chat
from lenvm.decoding import Guide, Request, SamplingParams
from lenvm.errors import InvalidRequestError
from lenvm.evaluation.lifebench import (
    KINDS,
    Kind,
    Row,
    Task,
    aggregate_modes,
    build_prompt,
    compare_modes,
    length_score,
    load_tasks,
)
from lenvm.evaluation.lifebench_gates import FREE, GRIDS, GateRule, RuleScore, best_rule, front, gate_guide, mix_at_cost
from lenvm.evaluation.lifebench_work import Job, Policy, WorkFile
from lenvm.evaluation.stats import paired_bootstrap
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.rollouts.sampling import LocalGenerator, stream_seed
from lenvm.scoring import Scorer

__all__ = ["MODES", "LifebenchSettings", "pool_tokens", "run_lifebench"]

MODES = ("unguided", "eos_gate", "paper_value", "paper_length", "posterior")
_VALUE_MODES = ("paper_value", "paper_length", "posterior")

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LifebenchSettings:
    """What is generated: ``tasks`` x ``targets`` x ``samples`` answers a mode and kind, all with the same ``params``.

    ``grids`` are the gates to choose from, tried on ``tuning_tasks`` tasks that are not in the test."""

    targets: Sequence[int] = (64, 128, 256)
    tasks: int = 100
    tuning_tasks: int = 16
    samples: int = 1
    modes: Sequence[str] = MODES
    kinds: Sequence[Kind] = KINDS
    tolerance: float = 0.05
    seed: int = 0
    cut: int = 4  # answers are cut at this many times the target, where Equal To's score is 0.2 of 100 anyway
    # One sampler for all modes.
    params: SamplingParams = field(default_factory=lambda: SamplingParams(0.7, top_k=16))
    grids: Mapping[Kind, Sequence[GateRule]] = field(default_factory=lambda: GRIDS)

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("kind", KINDS)):
            given = getattr(self, f"{name}s")
            unknown = set(given) - set(known)
            if unknown or not given:
                shown = ", ".join(sorted(unknown)) or "(none)"
                raise InvalidRequestError(f"unknown {name} {shown}: use {', '.join(known)}", param=f"{name}s")


Table: TypeAlias = Mapping[Kind, Sequence[RuleScore]]


def run_lifebench(
    generator: LocalGenerator,
    scorer: Scorer,
    data: Path,
    settings: LifebenchSettings,
    *,
    work: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Metrics and every answer of the test.

    ``metrics`` is ``mode -> kind -> aggregate`` (the gate with its ``rule``), ``comparisons`` by kind (paired
    bootstrap), ``tuning`` (every gate on the tuning tasks) and ``gate_front`` (the best of them on the test, see
    ``_front_metrics``). Answers in ``work`` are used again where its settings match; ``identity`` names what else an
    answer depends on (checkpoint, precision, device). Rows in flight share a batch, whatever they are.
    """
    everything = load_tasks(data, n=None, seed=settings.seed)
    tests, tuning = everything[: settings.tasks], everything[settings.tasks : settings.tasks + settings.tuning_tasks]
    with_gates = "eos_gate" in settings.modes
    if with_gates and not tuning:
        raise InvalidRequestError(f"all {len(everything)} tasks are in the test: the gates need some to be tuned on")
    with WorkFile(work, _depends_on(generator, settings, identity or {})) as store:
        runner = _Runner(generator, scorer, settings, store, progress)
        # What waits for nothing runs first and together; only the gates of the front wait for the tuning.
        jobs = {mode: _mode_jobs(mode, tests, settings) for mode in settings.modes if mode != "eos_gate"}
        runner.run(
            [job for mode in jobs for job in jobs[mode]] + (_tuning_jobs(tuning, settings) if with_gates else [])
        )
        tuned = _tuned(store, tuning, settings) if with_gates else {}
        # The rule with the best score ends the front of its kind.
        fronts = {kind: front(table) for kind, table in tuned.items()}
        gates = {kind: [_jobs(rule, kind, tests, settings) for rule in rules] for kind, rules in fronts.items()}
        runner.run([job for lists in gates.values() for found in lists for job in found])
        if with_gates:
            jobs["eos_gate"] = [job for lists in gates.values() for job in lists[-1]]
        rows = [_row(mode, job, store) for mode in settings.modes for job in jobs[mode]]
        on_front = {
            kind: [[_row("gate", job, store) for job in found] for found in lists] for kind, lists in gates.items()
        }
    metrics: dict[str, Any] = aggregate_modes(rows)
    for mode in settings.modes:
        for kind in settings.kinds:
            if mode == "eos_gate":
                metrics[mode][kind]["rule"] = best_rule(tuned[kind]).rule.to_dict()
            if _policy(mode, kind) != mode:
                metrics[mode][kind]["same_as"] = _policy(mode, kind)
    metrics["comparisons"] = {kind: _compare(rows, kind, settings) for kind in settings.kinds}
    if with_gates:
        gate_tables = {kind: [score.to_dict() for score in table] for kind, table in tuned.items()}
        metrics["tuning"] = {"tasks": len(tuning), "gates": gate_tables}
        metrics["gate_front"] = {
            kind: _front_metrics(fronts[kind], on_front[kind], [r for r in rows if r.kind == kind]) for kind in fronts
        }
    return metrics, rows


def pool_tokens(generator: LocalGenerator, data: Path, settings: LifebenchSettings) -> int:
    """Tokens of prefix states that a full batch of this run may hold at most: what the scorer's pool must offer."""
    tasks = load_tasks(data, n=None, seed=settings.seed)[: settings.tasks + settings.tuning_tasks]
    target = max(settings.targets)
    prompt = max(len(encode_chat(generator.tokenizer, build_prompt(task, "equal_to", target))) for task in tasks)
    room = settings.cut * target + 128  # a wording that is a little longer, and the block that a child begins
    return generator.sampler.max_rows * (min(prompt + room, generator.sampler.context) + 64)


def _policy(mode: str, kind: Kind) -> str:
    """What is sampled for a mode: the paper's space matters to Equal To alone, so nothing is sampled twice."""
    return "paper_value" if mode == "paper_length" and kind != "equal_to" else mode


def _mode_jobs(mode: str, tasks: Sequence[Task], settings: LifebenchSettings) -> list[Job]:
    return [job for kind in settings.kinds for job in _jobs(_policy(mode, kind), kind, tasks, settings)]


def _jobs(
    policy: Policy, kind: Kind, tasks: Sequence[Task], settings: LifebenchSettings, *, tuning: bool = False
) -> list[Job]:
    return [
        Job(policy, task, kind, target, sample, tuning=tuning)
        for task in tasks
        for target in settings.targets
        for sample in range(1 if tuning else settings.samples)
    ]


def _tuning_jobs(tasks: Sequence[Task], settings: LifebenchSettings) -> list[Job]:
    return [
        job
        for kind in settings.kinds
        for rule in settings.grids[kind]
        for job in _jobs(rule, kind, tasks, settings, tuning=True)
    ]


def _tuned(store: WorkFile, tasks: Sequence[Task], settings: LifebenchSettings) -> Table:
    """Every gate of the grids on the tuning tasks (pairs are as many for every target)."""
    found: dict[Kind, list[RuleScore]] = {}
    for kind in settings.kinds:
        for rule in settings.grids[kind]:
            answers = [(job, store[job]) for job in _jobs(rule, kind, tasks, settings, tuning=True)]
            scores = [length_score(answer.length, job.target, kind) for job, answer in answers]
            costs = [answer.text_cost for _, answer in answers]
            found.setdefault(kind, []).append(RuleScore(rule, float(np.mean(scores)), float(np.mean(costs))))
    return found


@dataclass(frozen=True)
class _Runner:
    """Makes the answers that the work file does not hold yet."""

    generator: LocalGenerator
    scorer: Scorer
    settings: LifebenchSettings
    store: WorkFile
    progress: Progress | None

    def run(self, jobs: Sequence[Job]) -> None:
        """Two batches: jobs that the value model guides, and the others."""
        for stage, guided in (("guided by value", True), ("unguided and gates", False)):
            family = [job for job in jobs if (job.policy in _VALUE_MODES) == guided]
            missing = list({job.key: job for job in family if job not in self.store}.values())
            # The longest first: a batch must not end with a few rows that have everything before them.
            missing.sort(key=lambda job: (job.kind != "at_least", -job.target))
            if missing:
                self._sample(stage, missing, len(family) - len(missing))

    def _sample(self, stage: str, jobs: Sequence[Job], done: int) -> None:
        requests = [
            Request(
                encode_chat(self.generator.tokenizer, build_prompt(job.task, job.kind, job.target)),
                stream_seed(f"{job.task.id}/{job.target}", job.sample, self.settings.seed),
                self.settings.cut * job.target,
            )
            for job in jobs
        ]
        total = len(jobs) + done
        for index, generation in self.generator.sampler.stream(requests, self.settings.params, guide=self._guide(jobs)):
            self.store.add(jobs[index], generation)
            done += 1
            if self.progress:
                self.progress(stage, done, total)

    def _guide(self, jobs: Sequence[Job]) -> Guide:
        if jobs[0].policy in _VALUE_MODES:
            return ValueGuide(self.scorer, [_objective(job, self.settings.tolerance) for job in jobs])
        # Unguided is the gate that does nothing, so that it shares the batch.
        rules = [job.policy if isinstance(job.policy, GateRule) else FREE for job in jobs]
        return gate_guide([job.target for job in jobs], [job.kind for job in jobs], rules)


def _objective(job: Job, tolerance: float) -> Objective:
    if job.policy == "posterior":
        return Objective(kind=job.kind, target=job.target, tolerance=tolerance)
    by_length = job.policy == "paper_length"
    return Objective(kind=job.kind, target=job.target, method="paper", space="length" if by_length else "value")


def _depends_on(generator: LocalGenerator, settings: LifebenchSettings, identity: Mapping[str, Any]) -> dict[str, Any]:
    shared = {name: getattr(settings, name) for name in ("tolerance", "seed", "cut")}
    params = asdict(settings.params)
    return {**identity, **shared, "sampler": params, "generator": generator.describe(settings.params)["sha256"]}


def _row(mode: str, job: Job, store: WorkFile) -> Row:
    answer = store[job]
    return Row(
        job.task.id,
        job.kind,
        job.target,
        mode,
        answer.token_ids or [],
        answer.finished,
        answer.forced_stop,
        answer.text_cost,
        answer.logprob,
    )


def _compare(rows: Sequence[Row], kind: Kind, settings: LifebenchSettings) -> dict[str, Any]:
    """``posterior`` against every other mode: difference and 95 % interval, resampled by task."""
    found: dict[str, Any] = {}
    if "posterior" not in settings.modes:
        return found
    for other in settings.modes:
        if other != "posterior":
            found[f"posterior_minus_{other}"] = {
                measure: list(compare_modes(rows, kind, "posterior", other, measure))
                for measure in ("ls", "kl_per_sequence")
            }
    return found


def _front_metrics(rules: Sequence[GateRule], gates: Sequence[Sequence[Row]], rows: Sequence[Row]) -> dict[str, Any]:
    """The front's rules on the test tasks and, where posterior ran, the gate at exactly its text cost.

    That gate follows one rule for a share of the answers and another for the rest, chosen on the test itself: what luck
    there is in the choice is the gate's. ``posterior_minus_gate``: length score with its interval, paired by task.
    """
    scores = []
    for rule, own in zip(rules, gates, strict=True):
        ls = np.mean([length_score(len(row.token_ids), row.target, row.kind) for row in own])
        scores.append(RuleScore(rule, float(ls), float(np.mean([row.text_cost for row in own]))))
    found: dict[str, Any] = {"rules": [score.to_dict() for score in scores]}
    posterior = [row for row in rows if row.mode == "posterior"]
    if not posterior:
        return found
    cost = float(np.mean([row.text_cost for row in posterior]))
    mix = mix_at_cost(scores, cost)
    cheap, dear = gates[mix.cheap], gates[mix.dear]
    mixed = [
        (1 - mix.share) * length_score(len(a.token_ids), a.target, a.kind)
        + mix.share * length_score(len(b.token_ids), b.target, b.kind)
        for a, b in zip(cheap, dear, strict=True)
    ]
    ours = [length_score(len(row.token_ids), row.target, row.kind) for row in posterior]
    # Rows of all policies stand in one order: task, target, sample.
    difference = paired_bootstrap(ours, mixed, [row.task_id for row in posterior])
    found["equal_cost"] = {
        "kl_per_sequence": (1 - mix.share) * scores[mix.cheap].kl_per_sequence
        + mix.share * scores[mix.dear].kl_per_sequence,
        "ls": float(np.mean(mixed)),
        "rules": [rules[mix.cheap].to_dict(), rules[mix.dear].to_dict()],
        "share": mix.share,
        "posterior_kl_per_sequence": cost,
        "posterior_minus_gate": list(difference),
    }
    return found
