"""Branch rollouts: what happens, unguided, in the states that guidance visits.

A value model that has only seen unguided answers is asked about others once it guides: prompts that name a length, and
prefixes that were steered. So answers are guided first, then cut at some tokens, and from there the generator goes on
alone. The rollout that is stored has the prompt and the guided prefix as its prompt: training supervises the states
from the cut on, whose remaining lengths are the generator's, as everywhere (the idea of DAgger, Ross et al., 2011).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.backbones import encode_chat
from lenvm.decoding import Request, SamplingParams
from lenvm.errors import InvalidRequestError
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.prompts import Prompt
from lenvm.rollouts.records import Key, Rollout, RolloutSet
from lenvm.rollouts.sampling import LocalGenerator, stream_seed
from lenvm.rollouts.store import RolloutWriter, completed, read_rollouts
from lenvm.scoring import Scorer

__all__ = ["BranchSettings", "branch_key", "branch_rollouts", "length_sentence", "sentence_prompts"]

_SENTENCES: Mapping[str, Sequence[str]] = {
    "equal_to": (
        "Your answer must be equal to {n} {unit} long.",
        "Answer in exactly {n} {unit}.",
        "Write {n} {unit}, no more and no less.",
        "The length of the response should be {n} {unit}.",
        "Please use about {n} {unit}.",
        "Length: {n} {unit}.",
    ),
    "at_most": (
        "Your answer must be at most {n} {unit} long.",
        "Use no more than {n} {unit}.",
        "Keep it under {n} {unit}.",
        "Limit the response to {n} {unit}.",
    ),
    "at_least": (
        "Your answer must be at least {n} {unit} long.",
        "Write no fewer than {n} {unit}.",
        "Use at least {n} {unit}.",
        "The response should be longer than {n} {unit}.",
    ),
}
_LAYOUTS = (
    "{task}\n\n{sentence}",
    "{task} {sentence}",
    "[Task] {task}\n\n[Requirement] {sentence}",
    "{sentence}\n\n{task}",
)


@dataclass(frozen=True)
class BranchSettings:
    """How branches are made.

    Args:
        targets: shortest and longest target, content tokens; drawn log-uniformly.
        kinds: how often each objective is drawn.
        tolerances: of the posterior objectives; one is drawn.
        min_eos_probs: likewise (see ``lenvm.guidance.Objective``); one is drawn for each answer.
        sentence_share: prompts that carry a length sentence; the others are guided as they are.
        points: cuts of each guided answer; half of them, rounded down, in its last third, where its end is decided.
        max_new_tokens: of a continuation; what goes on longer is cut, and censored in training.
        top_k: of the guided sampler.
    """

    targets: tuple[int, int] = (16, 1024)
    kinds: Mapping[str, float] = field(default_factory=lambda: {"equal_to": 0.6, "at_most": 0.2, "at_least": 0.2})
    tolerances: tuple[float, ...] = (0.03, 0.05, 0.1)
    min_eos_probs: tuple[float, ...] = (0.0,)
    sentence_share: float = 0.7
    points: int = 3
    max_new_tokens: int = 1024
    top_k: int = 16

    def __post_init__(self) -> None:
        low, high = self.targets
        if not 1 <= low <= high or self.points < 1 or not self.tolerances or not self.min_eos_probs:
            raise InvalidRequestError(
                "targets must ascend from 1, with at least one point, tolerance and min_eos_prob", param="targets"
            )
        if set(self.kinds) - set(_SENTENCES) or not sum(self.kinds.values()) > 0:
            raise InvalidRequestError(f"kinds are some of {', '.join(_SENTENCES)}, with weights", param="kinds")


@dataclass(frozen=True)
class _Plan:
    """What is drawn for one prompt, by its id and the seed alone."""

    prompt: Prompt
    kind: str
    target: int
    tolerance: float
    min_eos_prob: float
    text: str
    cuts: tuple[float, ...]  # fractions of the guided answer


def length_sentence(kind: str, target: int, rng: np.random.Generator) -> str:
    """A sentence that asks for a length, in tokens or in words (three quarters as many)."""
    unit = "tokens" if rng.random() < 0.7 else "words"
    number = target if unit == "tokens" else max(1, round(0.75 * target))
    choices = _SENTENCES[kind]
    return choices[int(rng.integers(len(choices)))].format(n=number, unit=unit)


def sentence_prompts(prompts: Sequence[Prompt], settings: BranchSettings, *, seed: int) -> list[Prompt]:
    """The same prompts, each with a length sentence; their ids end in ``#length``."""
    made = []
    for prompt in prompts:
        rng = _rng(f"sentence:{seed}:{prompt.id}")
        kind, target = _draw_objective(settings, rng)
        text = _with_sentence(prompt.text, length_sentence(kind, target, rng), rng)
        made.append(Prompt(f"{prompt.id}#length", prompt.domain, prompt.source, text))
    return made


def branch_rollouts(
    generator: LocalGenerator,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    settings: BranchSettings,
    params: SamplingParams,
    guide_name: str,
    seed: int = 0,
    max_prompt_tokens: int = 1024,
    on_done: Callable[[int, int], None] | None = None,
) -> RolloutSet:
    """Guide one answer to each prompt, cut it, and let the generator go on from there.

    ``params`` is the generator's policy for the continuations. A rerun goes on with the prompts whose branches the
    folder does not hold yet. The ids of the rollouts are ``PROMPT#branchI``, so that a split by prompt can be kept.

    Raises:
        DataError: the folder belongs to other settings.
    """
    limit = SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p, settings.max_new_tokens)
    description = generator.describe(limit) | {"seed": seed, "guide": guide_name, "branches": asdict(settings)}
    done = completed(folder, description)
    todo = []
    for plan in (_plan(prompt, settings, seed) for prompt in prompts):
        keys = [branch_key(plan.prompt, index, seed) for index in range(settings.points)]
        if not all(key in done for key in keys):
            todo.append(plan)
    if on_done:
        on_done(len(done), 0)
    encoded = [encode_chat(generator.tokenizer, plan.text) for plan in todo]
    kept = [(plan, ids) for plan, ids in zip(todo, encoded, strict=True) if len(ids) <= max_prompt_tokens]
    # The longest first: a batch must not end with a few rows that have everything before them.
    kept.sort(key=lambda item: (-item[0].target, item[0].prompt.id))
    guided = generator.sampler.generate(
        [
            Request(ids, stream_seed(f"{plan.prompt.id}#guided", 0, seed), plan.target + plan.target // 2 + 32)
            for plan, ids in kept
        ],
        SamplingParams(params.temperature, settings.top_k, max_new_tokens=params.max_new_tokens),
        guide=ValueGuide(scorer, [_objective(plan) for plan, _ in kept]),
    )
    starts: list[tuple[_Plan, int, list[int]]] = []
    for (plan, ids), answer in zip(kept, guided, strict=True):
        for index, fraction in enumerate(plan.cuts):
            cut = min(len(answer.token_ids), math.ceil(fraction * (len(answer.token_ids) + 1)))
            cut = min(cut, generator.sampler.context - len(ids) - 1)  # room for one token at least
            if (key := branch_key(plan.prompt, index, seed)) not in done:
                done.add(key)
                starts.append((plan, index, [*ids, *answer.token_ids[:cut]]))
    # Neighbours of like length: prompts are stored in batches of one width.
    starts.sort(key=lambda start: -len(start[2]))
    requests = [Request(ids, branch_key(plan.prompt, index, seed)[1]) for plan, index, ids in starts]
    with RolloutWriter(folder, description) as writer:
        for at, answer in generator.sampler.stream(requests, limit):
            plan, index, ids = starts[at]
            name, branch_seed = branch_key(plan.prompt, index, seed)
            writer.add(Rollout(name, plan.prompt.domain, ids, answer.token_ids, answer.finished, branch_seed))
            if on_done:
                on_done(1, len(answer.token_ids))
    return read_rollouts(folder)


def _plan(prompt: Prompt, settings: BranchSettings, seed: int) -> _Plan:
    rng = _rng(f"branch:{seed}:{prompt.id}")
    kind, target = _draw_objective(settings, rng)
    tolerance = settings.tolerances[int(rng.integers(len(settings.tolerances)))]
    text = prompt.text
    if rng.random() < settings.sentence_share:
        text = _with_sentence(text, length_sentence(kind, target, rng), rng)
    late = settings.points // 2
    cuts = [rng.random() for _ in range(settings.points - late)] + [2 / 3 + rng.random() / 3 for _ in range(late)]
    # Drawn last: recipes without this choice keep the plans that they had.
    least = settings.min_eos_probs[int(rng.integers(len(settings.min_eos_probs)))]
    return _Plan(prompt, kind, target, tolerance, least, text, tuple(cuts))


def _draw_objective(settings: BranchSettings, rng: np.random.Generator) -> tuple[str, int]:
    kinds = list(settings.kinds)
    weights = np.array([settings.kinds[kind] for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    low, high = settings.targets
    return kind, round(math.exp(rng.uniform(math.log(low), math.log(high))))


def _objective(plan: _Plan) -> Objective:
    kind: Any = plan.kind
    return Objective(kind, target=plan.target, tolerance=plan.tolerance, min_eos_prob=plan.min_eos_prob)


def _with_sentence(text: str, sentence: str, rng: np.random.Generator) -> str:
    # Not str.format on the task: it may hold braces of its own.
    layout = _LAYOUTS[int(rng.integers(len(_LAYOUTS)))]
    return layout.replace("{sentence}", sentence).replace("{task}", text)


def branch_key(prompt: Prompt, index: int, seed: int) -> Key:
    """Id and seed of the ``index``-th branch of a prompt's guided answer."""
    name = f"{prompt.id}#branch{index}"
    return name, stream_seed(name, 0, seed)


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
