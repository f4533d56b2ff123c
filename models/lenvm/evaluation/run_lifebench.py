"""``lenvm eval lifebench``: length scores of every mode under one sampler, each beside what it costs the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lenvm.backbones import encode_chat
from lenvm.decoding import Guide, Request
from lenvm.errors import InvalidRequestError
from lenvm.evaluation.answers import Answer, AnswerFile, check_complete
from lenvm.evaluation.lifebench import Kind, Row, aggregate_modes, build_prompt, length_score, load_tasks
from lenvm.evaluation.lifebench_compare import Points, compare, front_metrics
from lenvm.evaluation.lifebench_draw import drawn
from lenvm.evaluation.lifebench_gates import FREE, GateRule, gate_guide
from lenvm.evaluation.lifebench_posterior import PosteriorRule
from lenvm.evaluation.lifebench_tuning import Tuning, tuning_jobs, tuning_of
from lenvm.evaluation.lifebench_work import MODES, RESAMPLED, Job, LifebenchSettings, Policy, fixed_policies, jobs_of
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.rollouts.sampling import LocalGenerator, stream_seed
from lenvm.scoring import Scorer

__all__ = ["MODES", "RESAMPLED", "LifebenchSettings", "pool_tokens", "run_lifebench"]

Progress: TypeAlias = Callable[[str, int, int], None]


def run_lifebench(
    generator: LocalGenerator,
    scorer: Scorer,
    data: Path,
    settings: LifebenchSettings,
    *,
    work: Path | None = None,
    others: Sequence[Path] = (),
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    maker: Mapping[str, Any] | None = None,
    report_only: bool = False,
) -> tuple[dict[str, Any], list[Row]]:
    """Metrics and every answer of the test.

    ``metrics`` is ``mode -> kind -> aggregate`` (gates and posterior with their ``rule``), ``comparisons`` by kind
    (paired bootstrap), ``tuning`` (every rule on the tuning tasks), ``gate_front`` (the best gates on the test, see
    ``front_metrics``) and ``limits``. With ``settings.resample`` above 1 there are the modes of ``RESAMPLED`` too (each
    with its ``resampling``), ``gate_front_resampled``, and ``tuning.posterior_resampled``.

    Answers in ``work`` and ``others`` are used again where their settings match, and new ones go to ``work``;
    ``identity`` names what else an answer depends on (checkpoint, precision, device), ``maker`` what makes
    them here; ``sampled_by`` is all that made answers. Rows in flight share a batch, whatever they are. Raises
    InvalidRequestError where no task is left to tune on and DataError for work files of other settings and, if
    ``report_only``, for a missing answer.
    """
    everything = load_tasks(data, n=None, seed=settings.seed)
    tests, tuning = everything[: settings.tasks], everything[settings.tasks : settings.tasks + settings.tuning_tasks]
    if not tuning and (settings.tunes_gates or settings.tunes_posterior):
        raise InvalidRequestError(f"all {len(everything)} tasks are in the test: the rules need some to be tuned on")
    with AnswerFile(work, _depends_on(generator, settings, identity or {}), others, maker=maker) as store:
        runner = _Runner(generator, scorer, settings, store, progress, report_only)
        policies = fixed_policies(settings)
        # What waits for nothing runs first and together; only the rules that are tuned wait.
        first = [
            job
            for (mode, kind), policy in policies.items()
            for job in jobs_of(policy, kind, tests, settings, of=settings.drawn_from(mode))
        ]
        runner.run(first + tuning_jobs(tuning, settings))
        tuned = tuning_of(store, tuning, settings)
        policies |= tuned.policies(settings)
        jobs = {
            (mode, kind): jobs_of(policies[mode, kind], kind, tests, settings, of=settings.drawn_from(mode))
            for mode in settings.modes
            for kind in settings.kinds
        }
        fronts = {
            (mode, kind): {
                rule: jobs_of(rule, kind, tests, settings, of=rule.resample, keeps_tokens=False)
                for rule in tuned.front(kind, settings, resampled=mode in RESAMPLED)
            }
            for mode in ("eos_gate", "eos_gate_resampled")
            if mode in settings.modes
            for kind in tuned.gates
        }
        runner.run(
            [job for front in fronts.values() for found in front.values() for job in found]
            + [job for found in jobs.values() for job in found]
        )

        def answers(found: Sequence[Job], of: int, tolerance: float) -> list[tuple[Job, Answer]]:
            return drawn(found, of, store, tolerance=tolerance, seed=settings.seed)

        rows = [
            _row(mode, *each)
            for (mode, kind), found in jobs.items()
            for each in answers(found, settings.drawn_from(mode), _tolerance(policies, kind, settings))
        ]
        points = {
            which: {
                rule: _points(answers(found, rule.resample, rule.tolerance or 0.0)) for rule, found in front.items()
            }
            for which, front in fronts.items()
        }
    return _metrics(rows, policies, tuned, points, settings) | {
        "limits": _limits(rows, settings, generator.sampler.context),
        "tuning": tuned.to_dict(tuning, settings),
        "sampled_by": store.makers,
        "checkpoint": dict((identity or {}).get("files", {})),
    }, rows


def _metrics(
    rows: Sequence[Row],
    policies: Mapping[tuple[str, Kind], Policy],
    tuned: Tuning,
    points: Mapping[tuple[str, Kind], Mapping[GateRule, Points]],
    settings: LifebenchSettings,
) -> dict[str, Any]:
    metrics: dict[str, Any] = aggregate_modes(rows)
    for (mode, kind), policy in policies.items():
        if mode not in settings.modes:
            continue
        if not isinstance(policy, str):
            metrics[mode][kind]["rule"] = policy.to_dict()
        elif policy != RESAMPLED.get(mode, mode):
            metrics[mode][kind]["same_as"] = policy
        if mode in RESAMPLED:
            tolerance = _tolerance(policies, kind, settings)
            metrics[mode][kind]["resampling"] = {"answers": settings.resample, "tolerance": tolerance}
    metrics["comparisons"] = {kind: compare(rows, kind, settings.modes) for kind in settings.kinds}
    for (mode, kind), front in points.items():
        suffix = mode.removeprefix("eos_gate")
        ours = [row for row in rows if (row.mode, row.kind) == (f"posterior{suffix}", kind)]
        metrics.setdefault(f"gate_front{suffix}", {})[kind] = front_metrics(front, ours)
    return metrics


def _tolerance(policies: Mapping[tuple[str, Kind], Policy], kind: Kind, settings: LifebenchSettings) -> float:
    """How soft the target is for which one of several answers is drawn: that of the posterior rule, also for its
    rivals. (A front of gates may take what suits it.)"""
    for mode in ("posterior_resampled", "posterior"):
        if isinstance(rule := policies.get((mode, kind)), PosteriorRule):
            return rule.tolerance
    return settings.posterior_grid[0].tolerance


def pool_tokens(generator: LocalGenerator, data: Path, settings: LifebenchSettings) -> int:
    """Tokens of prefix states that a full batch of this run may hold at most: what the scorer's pool must offer."""
    tasks = load_tasks(data, n=None, seed=settings.seed)[: settings.tasks + settings.tuning_tasks]
    target = max(settings.targets)
    prompt = max(len(encode_chat(generator.tokenizer, build_prompt(task, "equal_to", target))) for task in tasks)
    room = settings.cut * target + 128  # a wording that is a little longer, and the block that a child begins
    return generator.sampler.max_rows * (min(prompt + room, generator.sampler.context) + 64)


@dataclass(frozen=True)
class _Runner:
    """Makes the answers that the work file does not hold yet."""

    generator: LocalGenerator
    scorer: Scorer
    settings: LifebenchSettings
    store: AnswerFile
    progress: Progress | None
    report_only: bool = False
    prompts: dict[tuple[str, Kind, int], list[int]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Two batches: jobs that the value model guides, and the others."""
        for stage, guided in (("guided by value", True), ("unguided and gates", False)):
            family = [job for job in jobs if job.guided == guided]
            missing: dict[Any, Job] = {}
            for job in family:
                if job not in self.store and (job.keeps_tokens or job.key not in missing):
                    missing[job.key] = job
            check_complete(list(missing), report_only=self.report_only)
            if missing:
                # The longest first: a batch must not end with a few rows that have everything before them. Then by
                # task: neighbours with one prompt share its keys and values.
                ordered = sorted(missing.values(), key=lambda job: (job.kind != "at_least", -job.target, job.task.id))
                self._sample(stage, ordered, len(family) - len(ordered))

    def _sample(self, stage: str, jobs: Sequence[Job], done: int) -> None:
        requests = [
            Request(
                self._prompt(job),
                stream_seed(f"{job.task.id}/{job.target}", job.sample, self.settings.seed),
                self.settings.cut * job.target,  # the sampler itself stops at the end of its context
            )
            for job in jobs
        ]
        total = len(jobs) + done
        for index, generation in self.generator.sampler.stream(requests, self.settings.params, guide=self._guide(jobs)):
            self.store.add(jobs[index], generation)
            done += 1
            if self.progress:
                self.progress(stage, done, total)

    def _prompt(self, job: Job) -> list[int]:
        named = job.task.id, job.kind, job.target
        if named not in self.prompts:
            self.prompts[named] = encode_chat(self.generator.tokenizer, build_prompt(job.task, job.kind, job.target))
        return self.prompts[named]

    def _guide(self, jobs: Sequence[Job]) -> Guide:
        if jobs[0].guided:
            return ValueGuide(self.scorer, [_objective(job) for job in jobs])
        # Unguided is the gate that does nothing, so that it shares the batch.
        rules = [job.policy if isinstance(job.policy, GateRule) else FREE for job in jobs]
        return gate_guide([job.target for job in jobs], [job.kind for job in jobs], rules)


def _objective(job: Job) -> Objective:
    if isinstance(job.policy, PosteriorRule):
        rule = job.policy
        return Objective(kind=job.kind, target=job.target, **rule.to_dict())
    by_length = job.policy == "paper_length"
    return Objective(kind=job.kind, target=job.target, method="paper", space="length" if by_length else "value")


def _depends_on(generator: LocalGenerator, settings: LifebenchSettings, identity: Mapping[str, Any]) -> dict[str, Any]:
    params = asdict(settings.params)
    shared = {"seed": settings.seed, "cut": settings.cut, "sampler": params}
    return {**identity, **shared, "generator": generator.describe(settings.params)["sha256"]}


def _row(mode: str, job: Job, answer: Answer) -> Row:
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


def _points(answers: Sequence[tuple[Job, Answer]]) -> Points:
    return [(length_score(answer.length, job.target, job.kind), answer.text_cost) for job, answer in answers]


def _limits(rows: Sequence[Row], settings: LifebenchSettings, context: int) -> dict[str, int]:
    """Where answers were cut: ``cut`` targets, but for those that met the end of the backbone's context before."""
    short = [row for row in rows if not row.finished and len(row.token_ids) < settings.cut * row.target]
    return {"cut": settings.cut, "context": context, "limited_by_context": len(short)}
