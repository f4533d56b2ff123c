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
from lenvm.evaluation.lifebench_gates import (
    FREE,
    GRIDS,
    GateRule,
    RuleScore,
    best_rule,
    gate_guide,
    matched_rule,
)
from lenvm.evaluation.lifebench_work import Job, Policy, WorkFile
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.rollouts.sampling import LocalGenerator, stream_seed
from lenvm.scoring import Scorer

__all__ = ["MODES", "LifebenchSettings", "pool_tokens", "run_lifebench"]

MODES = ("unguided", "eos_gate", "eos_gate_matched", "paper_value", "paper_length", "posterior")
_VALUE_MODES = ("paper_value", "paper_length", "posterior")
_GATE_MODES = ("eos_gate", "eos_gate_matched")
_BUDGET_SAMPLES = 4  # answers of posterior for each tuning pair: its text cost is the matched gate's budget

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


@dataclass(frozen=True)
class _Tuning:
    """Figures on the tuning tasks by kind: every gate of the grid and, where a budget was wanted, posterior's."""

    tasks: int
    gates: dict[Kind, list[RuleScore]]
    posterior: dict[Kind, tuple[float, float]]

    def rule(self, mode: str, kind: Kind) -> RuleScore:
        if mode == "eos_gate":
            return best_rule(self.gates[kind])
        return matched_rule(self.gates[kind], self.posterior[kind][1])

    def to_dict(self) -> dict[str, Any]:
        """``gates``: the whole table, from which the front of length score against text cost can be read."""
        return {
            "tasks": self.tasks,
            "gates": {kind: [score.to_dict() for score in table] for kind, table in self.gates.items()},
            "posterior": {kind: {"ls": ls, "kl_per_sequence": kl} for kind, (ls, kl) in self.posterior.items()},
        }


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

    ``metrics`` is ``mode -> kind -> aggregate`` (gates with their ``rule``), ``comparisons`` by kind (paired bootstrap)
    and ``tuning``. Answers in ``work`` are used again where its settings match; ``identity`` names what else an answer
    depends on (checkpoint, precision, device). Rows in flight share a batch whatever their mode, kind and target.
    """
    everything = load_tasks(data, n=None, seed=settings.seed)
    tests, tuning = everything[: settings.tasks], everything[settings.tasks : settings.tasks + settings.tuning_tasks]
    gates = [mode for mode in _GATE_MODES if mode in settings.modes]
    if gates and not tuning:
        raise InvalidRequestError(f"all {len(everything)} tasks are in the test: the gates need some to be tuned on")
    with WorkFile(work, _depends_on(generator, settings, identity or {})) as store:
        runner = _Runner(generator, scorer, settings, store, progress)
        # What waits for nothing runs first and together; only the chosen gates' answers wait for the tuning.
        first = [
            job for mode in settings.modes if mode not in _GATE_MODES for job in _jobs(mode, None, tests, settings)
        ]
        wants_budget = "eos_gate_matched" in gates
        runner.run(first + (_tuning_jobs(tuning, settings, budget=wants_budget) if gates else []))
        tuned = _tuned(store, tuning, settings, budget=wants_budget) if gates else None
        jobs = {mode: _jobs(mode, tuned, tests, settings) for mode in settings.modes}
        runner.run([job for mode in gates for job in jobs[mode]])
        rows = [_row(mode, job, store) for mode in settings.modes for job in jobs[mode]]
    metrics: dict[str, Any] = aggregate_modes(rows)
    for mode in settings.modes:
        for kind in settings.kinds:
            if tuned is not None and mode in gates:
                metrics[mode][kind]["rule"] = tuned.rule(mode, kind).rule.to_dict()
            if _policy(mode, kind) != mode and mode in _VALUE_MODES:
                metrics[mode][kind]["same_as"] = _policy(mode, kind)
    metrics["comparisons"] = {kind: _compare(rows, kind, settings) for kind in settings.kinds}
    if tuned is not None:
        metrics["tuning"] = tuned.to_dict()
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


def _jobs(mode: str, tuned: _Tuning | None, tasks: Sequence[Task], settings: LifebenchSettings) -> list[Job]:
    found = []
    for kind in settings.kinds:
        policy: Policy = _policy(mode, kind)
        if mode in _GATE_MODES:
            assert tuned is not None
            policy = tuned.rule(mode, kind).rule
        found += [
            Job(policy, task, kind, target, sample)
            for task in tasks
            for target in settings.targets
            for sample in range(settings.samples)
        ]
    return found


def _tuning_jobs(tasks: Sequence[Task], settings: LifebenchSettings, *, budget: bool) -> list[Job]:
    found = []
    for kind in settings.kinds:
        policies: list[tuple[Policy, int]] = [(rule, 1) for rule in settings.grids[kind]]
        policies += [("posterior", _BUDGET_SAMPLES)] if budget else []
        found += [
            Job(policy, task, kind, target, sample, tuning=True)
            for policy, samples in policies
            for task in tasks
            for target in settings.targets
            for sample in range(samples)
        ]
    return found


def _tuned(store: WorkFile, tasks: Sequence[Task], settings: LifebenchSettings, *, budget: bool) -> _Tuning:
    """Mean length score and text cost of each policy that was tried (pairs are as many for every target)."""
    scores: dict[tuple[Kind, Policy], list[tuple[float, float]]] = {}
    for job in _tuning_jobs(tasks, settings, budget=budget):
        answer = store[job]
        score = length_score(answer.length, job.target, job.kind), answer.text_cost
        scores.setdefault((job.kind, job.policy), []).append(score)
    gates: dict[Kind, list[RuleScore]] = {kind: [] for kind in settings.kinds}
    posterior: dict[Kind, tuple[float, float]] = {}
    for (kind, policy), found in scores.items():
        ls, cost = (float(mean) for mean in np.mean(found, axis=0))
        if isinstance(policy, GateRule):
            gates[kind].append(RuleScore(policy, ls, cost))
        else:
            posterior[kind] = ls, cost
    return _Tuning(len(tasks), gates, posterior)


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
