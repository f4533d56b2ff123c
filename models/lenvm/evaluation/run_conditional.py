"""``lenvm eval conditional``: unguided answers, targets that they reach now and then, and guided answers for those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lenvm.backbones import encode_chat
from lenvm.decoding import Guide, Request, SamplingParams
from lenvm.errors import DataError, InvalidRequestError
from lenvm.evaluation.answers import AnswerFile, Key, check_complete
from lenvm.evaluation.conditional import Pair, Sampled, conditional_metrics, draw_target
from lenvm.evaluation.lifebench import KINDS, Kind, load_tasks, without_requirement
from lenvm.evaluation.lifebench_gates import FREE, gate_guide
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.prompts import DOMAINS, Prompt, load_prompts, select
from lenvm.resampling import resample_answers
from lenvm.rollouts.sampling import LocalGenerator, stream_seed
from lenvm.scoring import Scorer

__all__ = ["ConditionalSettings", "pool_tokens", "run_conditional"]

Progress: TypeAlias = Callable[[str, int, int], None]

_BY_DOMAIN = ("ks", "ks_null", "ks_null_95", "pairs", "logprob_gap", "natural_end_rate")


@dataclass(frozen=True)
class ConditionalSettings:
    """What is sampled: ``samples`` unguided answers of each prompt, then ``pairs_per_prompt`` guided ones an objective.

    With ``resample`` above 1 there are so many guided answers a pair, of which one is drawn by importance weight
    (``lenvm.resampling``); the first one alone is measured as well.
    ``prompts`` test prompts, as many of each domain, and ``tasks`` LIFEBench tasks without their requirement. ``apart``
    of the unguided answers choose the targets and the others are ranked among: a quarter unless given. ``part`` (k, n):
    every n-th prompt alone, for one of n processes.
    """

    prompts: int = 300
    tasks: int = 0
    samples: int = 64
    pairs_per_prompt: int = 3
    resample: int = 1
    kinds: Sequence[Kind] = KINDS
    tolerances: Mapping[Kind, float] = field(
        default_factory=lambda: {"equal_to": 0.1, "at_most": 0.05, "at_least": 0.05}
    )
    strength: float = 1.0
    min_eos_prob: float = 0.0
    max_new_tokens: int = 512
    most_cut: float = 0.5
    seed: int = 0
    part: tuple[int, int] = (1, 1)
    apart: int | None = None
    params: SamplingParams = field(default_factory=lambda: SamplingParams(0.7, top_k=16))

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            shown = ", ".join(sorted(unknown)) or "(none)"
            raise InvalidRequestError(f"unknown kind {shown}: use {', '.join(KINDS)}", param="kinds")
        if not 1 <= self.part[0] <= self.part[1]:
            raise InvalidRequestError(f"part {self.part[0]}/{self.part[1]} is none of 1/n to n/n", param="part")
        if not 1 <= self.targets_from < self.samples:
            raise InvalidRequestError("some answers choose targets and some are ranked among: raise samples or change "
                                      "apart", param="samples")  # fmt: skip
        if self.resample < 1:
            raise InvalidRequestError(f"resample must be at least 1, not {self.resample}", param="resample")
        for kind in self.kinds:
            self.objective(kind, 1, self.tolerances[kind])  # raises for a bad number

    def objective(self, kind: Kind, target: int, tolerance: float) -> Objective:
        """What a guided answer is asked for."""
        return Objective(kind, target, tolerance=tolerance, strength=self.strength, min_eos_prob=self.min_eos_prob)

    @property
    def targets_from(self) -> int:
        """Answers of each prompt that are set apart to choose targets."""
        return max(1, self.samples // 4) if self.apart is None else self.apart


@dataclass(frozen=True)
class _Asked:
    """A prompt and its token ids."""

    id: str
    domain: str
    ids: Sequence[int]


@dataclass(frozen=True)
class _Job:
    """One answer to make; ``kind`` None is unguided. ``answer``: which of a pair's guided ones."""

    prompt: _Asked
    number: int
    kind: Kind | None = None
    target: int = 0
    tolerance: float = 0.0
    strength: float = 1.0
    min_eos_prob: float = 0.0
    answer: int = 0
    keeps_tokens: bool = False

    @property
    def key(self) -> Key:
        if self.kind is None:
            return "unguided", self.prompt.id, self.number
        rule = f"{self.kind} tolerance={self.tolerance:g} strength={self.strength:g}"
        if self.min_eos_prob:  # files of before know nothing of it
            rule += f" min_eos_prob={self.min_eos_prob:g}"
        pair = rule, self.prompt.id, self.target, self.number
        return (*pair, self.answer) if self.answer else pair  # files of before know of one answer alone

    @property
    def stream(self) -> str:
        """What its random numbers hang on, beside its number and the run's seed."""
        if self.kind is None:
            return self.prompt.id
        return f"{self.prompt.id}/{self.kind}" + (f"/{self.answer}" if self.answer else "")

    def seed(self, run: int) -> int:
        return stream_seed(self.stream, self.number, run)


def run_conditional(
    generator: LocalGenerator,
    scorer: Scorer,
    data: Path,
    settings: ConditionalSettings,
    *,
    work: Path | None = None,
    others: Sequence[Path] = (),
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    maker: Mapping[str, Any] | None = None,
    report_only: bool = False,
) -> dict[str, Any]:
    """``metrics``: ``kind -> conditional_metrics`` with ``by_domain``, and ``sampling`` (what was asked and left out).
    With several answers a pair (``resample``), each kind has them for the first of these, and ``resampled`` for the one
    that was drawn.

    Answers in ``work`` and ``others`` are used again where their settings match, and new ones go to ``work``; what is
    asked of a prompt hangs on that prompt alone, so that parts add up to the whole. ``maker``: what makes answers
    here; ``sampled_by`` is all that made some. Raises DataError where every prompt is left out and, if ``report_only``,
    for a missing answer.
    """
    asked, too_long = _prompts(generator, data, settings)
    if not asked:
        raise DataError(f"no prompt leaves room for {settings.max_new_tokens} tokens: lower --max-new-tokens")
    with AnswerFile(work, _depends_on(generator, settings, identity or {}), others, maker=maker) as store:
        run = _Runner(generator, scorer, settings, store, progress, report_only)
        unguided_jobs = {prompt.id: [_Job(prompt, at) for at in range(settings.samples)] for prompt in asked}
        run.sample("unguided", [job for jobs in unguided_jobs.values() for job in jobs])
        unguided = {name: [_sampled(store, job) for job in jobs] for name, jobs in unguided_jobs.items()}
        kept = [p for p in asked if np.mean([not a.finished for a in unguided[p.id]]) <= settings.most_cut]
        jobs = [job for prompt in kept for job in _guided_jobs(prompt, unguided[prompt.id], settings)]
        run.sample("guided by value", [each for job in jobs for each in _answers_of(job, settings)])
        pairs = [(job, _pair(job, _sampled(store, job), unguided[job.prompt.id], settings)) for job in jobs]
        drawn = [(job, *_drawn(store, job, settings)) for job in jobs] if settings.resample > 1 else []
    metrics: dict[str, Any] = {kind: _metrics(kind, pairs, settings) for kind in settings.kinds}
    if settings.resample > 1:
        resampled = [(job, _pair(job, answer, unguided[job.prompt.id], settings)) for job, answer, _ in drawn]
        for kind in settings.kinds:
            found = _metrics(kind, resampled, settings)
            sizes = [size for job, _, size in drawn if job.kind == kind]
            metrics[kind]["resampled"] = found | ({"effective_sample_size": float(np.mean(sizes))} if sizes else {})
    answers = [answer for found in unguided.values() for answer in found]
    metrics["sampled_by"] = store.makers
    metrics["sampling"] = {
        "prompts": len(asked),
        "prompts_too_long": too_long,
        "prompts_mostly_cut": len(asked) - len(kept),
        "samples": settings.samples,
        "samples_for_targets": settings.targets_from,
        "resample": settings.resample,
        "max_new_tokens": settings.max_new_tokens,
        "strength": settings.strength,
        "min_eos_prob": settings.min_eos_prob,
        "unguided_cut_share": float(np.mean([not answer.finished for answer in answers])),
        "unguided_mean_length": float(np.mean([answer.length for answer in answers])),
    }
    return metrics


def _metrics(kind: Kind, pairs: Sequence[tuple[_Job, Pair]], settings: ConditionalSettings) -> dict[str, Any]:
    own = [(job.prompt.domain, pair) for job, pair in pairs if job.kind == kind]
    if not own:  # the other objectives keep their figures
        return {"pairs": 0}
    found = conditional_metrics([pair for _, pair in own], seed=settings.seed)
    found["tolerance"] = settings.tolerances[kind]
    found["by_domain"] = {}
    for domain in dict.fromkeys(name for name, _ in own):
        row = conditional_metrics([pair for name, pair in own if name == domain], seed=settings.seed)
        found["by_domain"][domain] = {name: row[name] for name in _BY_DOMAIN}
    return found


def pool_tokens(generator: LocalGenerator, settings: ConditionalSettings) -> int:
    """Tokens of prefix states that a full batch of this run may hold at most: what the scorer's pool must offer."""
    prompt = min(2048, generator.sampler.context)
    return generator.sampler.max_rows * (min(prompt + settings.max_new_tokens, generator.sampler.context) + 64)


def _prompts(generator: LocalGenerator, data: Path, settings: ConditionalSettings) -> tuple[list[_Asked], int]:
    """The prompts of this part, and how many leave no room in the context for ``max_new_tokens``."""
    found: list[Prompt] = []
    for at, domain in enumerate(DOMAINS):
        share = (settings.prompts + len(DOMAINS) - 1 - at) // len(DOMAINS)
        if share:
            found += select(load_prompts(data, domain, "test"), share, settings.seed)
    if settings.tasks:
        tasks = load_tasks(data, n=settings.tasks, seed=settings.seed)
        found += [Prompt(task.id, "lifebench", task.category, without_requirement(task)) for task in tasks]
    index, parts = settings.part
    own = found[index - 1 :: parts]
    asked = [_Asked(prompt.id, prompt.domain, encode_chat(generator.tokenizer, prompt.text)) for prompt in own]
    room = generator.sampler.context - settings.max_new_tokens
    fitting = [prompt for prompt in asked if len(prompt.ids) <= room]
    return fitting, len(asked) - len(fitting)


def _guided_jobs(prompt: _Asked, unguided: Sequence[Sampled], settings: ConditionalSettings) -> list[_Job]:
    """What is asked of a prompt; some objectives may find no target there."""
    jobs = []
    for kind in settings.kinds:
        tolerance = settings.tolerances[kind]
        for number in range(settings.pairs_per_prompt):
            rng = np.random.default_rng(stream_seed(f"{prompt.id}/{kind}/target", number, settings.seed))
            target = draw_target(
                unguided[: settings.targets_from],
                unguided,
                kind,
                tolerance=tolerance,
                cap=settings.max_new_tokens,
                rng=rng,
            )
            if target is not None:
                jobs.append(_Job(prompt, number, kind, target, tolerance, settings.strength, settings.min_eos_prob))
    return jobs


@dataclass(frozen=True)
class _Runner:
    """Makes the answers that the work file does not hold yet."""

    generator: LocalGenerator
    scorer: Scorer
    settings: ConditionalSettings
    store: AnswerFile
    progress: Progress | None
    report_only: bool = False

    def sample(self, stage: str, jobs: Sequence[_Job]) -> None:
        """All of ``jobs`` in one stream; neighbours with one prompt share its keys and values."""
        missing = [job for job in jobs if job not in self.store]
        check_complete(missing, report_only=self.report_only)
        if not missing:
            return
        requests = [
            Request(job.prompt.ids, job.seed(self.settings.seed), self.settings.max_new_tokens) for job in missing
        ]
        done = len(jobs) - len(missing)
        for index, answer in self.generator.sampler.stream(requests, self.settings.params, guide=self._guide(missing)):
            self.store.add(missing[index], answer)
            done += 1
            if self.progress:
                self.progress(stage, done, len(jobs))

    def _guide(self, jobs: Sequence[_Job]) -> Guide:
        if jobs[0].kind is None:
            # The gate that does nothing: the same truncation as guided answers, and figures of every answer.
            return gate_guide([1] * len(jobs), ["at_most"] * len(jobs), [FREE] * len(jobs))
        objectives = [
            self.settings.objective(job.kind, job.target, job.tolerance) for job in jobs if job.kind is not None
        ]
        return ValueGuide(self.scorer, objectives)


def _sampled(store: AnswerFile, job: _Job) -> Sampled:
    answer = store[job]
    return Sampled(answer.length, answer.finished, answer.forced_stop, answer.text_cost, answer.logprob)


def _answers_of(job: _Job, settings: ConditionalSettings) -> list[_Job]:
    """The guided answers of a pair, the first one first: neighbours, so that they share their prompt's states."""
    return [replace(job, answer=at) for at in range(settings.resample)]


def _drawn(store: AnswerFile, job: _Job, settings: ConditionalSettings) -> tuple[Sampled, float]:
    """The answer of a pair that is drawn by importance weight, and the effective sample size."""
    assert job.kind is not None  # guided jobs have one
    answers = [_sampled(store, each) for each in _answers_of(job, settings)]
    draw = np.random.default_rng(stream_seed(f"{job.stream}/draw", job.number, settings.seed)).uniform()
    chosen, found = resample_answers(settings.objective(job.kind, job.target, job.tolerance), answers, draw)
    return chosen, found.effective_sample_size


def _pair(job: _Job, guided: Sampled, unguided: Sequence[Sampled], settings: ConditionalSettings) -> Pair:
    assert job.kind is not None  # guided jobs have one
    return Pair(job.prompt.id, job.kind, job.target, job.tolerance, guided, unguided[settings.targets_from :])


def _depends_on(
    generator: LocalGenerator, settings: ConditionalSettings, identity: Mapping[str, Any]
) -> dict[str, Any]:
    shared = {"seed": settings.seed, "max_new_tokens": settings.max_new_tokens, "sampler": asdict(settings.params)}
    return {**identity, **shared, "generator": generator.describe(settings.params)["sha256"]}
