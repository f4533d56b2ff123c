"""What a recipe samples: answers of train and validation prompts, of prompts with a length sentence, and branches.

Every stage goes on where an earlier call ended; what an earlier, larger request left in a folder is not trained on
(``asked``). ``part = (i, n)`` does the i-th of n shares of the prompts into a
folder of its own, so that several GPUs can share a stage; ``read_rollouts`` takes all parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

from lenvm.decoding import SamplingParams
from lenvm.errors import DataError
from lenvm.prompts import Prompt, load_prompts, select
from lenvm.rollouts import RolloutSet, read_rollouts
from lenvm.rollouts.branches import BranchSettings, branch_key, branch_rollouts, sentence_prompts
from lenvm.rollouts.records import Key
from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts, stream_seed
from lenvm.rollouts.store import COMPLETE, part_folder
from lenvm.scoring import Scorer

__all__ = ["BranchPlan", "Collector", "RolloutSettings", "asked", "round_of", "stages_of", "stored"]

Progress: TypeAlias = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class RolloutSettings:
    """Which prompts are sampled, and how often. ``prompts``: domain -> number of train prompts (0: all)."""

    prompts: Mapping[str, int]
    samples: int = 4
    valid_prompts: int = 100
    max_prompt_tokens: int = 1024
    max_rows: int = 1024
    seed: int = 1


@dataclass(frozen=True)
class BranchPlan:
    """The recipe's part on states that guidance visits.

    Args:
        prompts: train prompts that are guided and cut, in every round others.
        sentences: train prompts that get a length sentence and are answered unguided.
        guide_answers: share of the train rollouts on which the guide of the branches is trained first, for one epoch.
        rounds: how often a guide is trained and its branches sampled; a later guide has also seen the answers to length
            sentences and all branches before it, so that its branches start where a better model leads.
        repeats: how often an epoch sees a branch or an answer to a length sentence.
        settings: how answers are guided and cut.
    """

    prompts: int
    sentences: int = 0
    guide_answers: float = 0.25
    rounds: int = 1
    repeats: int = 1
    max_rows: int = 768
    settings: BranchSettings = field(default_factory=BranchSettings)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BranchPlan:
        """From the recipe's ``[branches]``, in which the fields of BranchSettings stand beside ours.

        Raises:
            DataError: a field is unknown or missing.
        """
        own = {f.name for f in fields(cls)} - {"settings"}
        nested = {f.name for f in fields(BranchSettings)}
        unknown = set(data) - own - nested
        if unknown or "prompts" not in data:
            problem = f"unknown field {', '.join(sorted(unknown))}" if unknown else "no field prompts"
            raise DataError(f"{problem} in [branches]")
        if not isinstance(data.get("rounds", 1), int) or data.get("rounds", 1) < 1:
            raise DataError(f"rounds in [branches] must be a whole number from 1, not {data['rounds']!r}")
        inner: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in nested}
        return cls(**{k: v for k, v in data.items() if k in own}, settings=BranchSettings(**inner))


def stages_of(branches: BranchPlan | None) -> list[str]:
    """The stages of a recipe in their order: each ``branches`` follows the ``guide`` that it needs."""
    rounds = (
        [f"{name}{_suffix(at)}" for at in range(1, branches.rounds + 1) for name in ("guide", "branches")]
        if branches
        else []
    )
    return ["valid", "train", *(["sentences"] if branches else []), *rounds]


def _suffix(number: int) -> str:
    return f"-{number}" if number > 1 else ""


def round_of(stage: str) -> int:
    """Which round of branches a stage belongs to: 1 for ``guide`` and ``branches``, 2 for ``branches-2``; 0: none."""
    name, _, number = stage.partition("-")
    return int(number or 1) if name in ("guide", "branches") else 0


@dataclass
class Collector:
    """Samples the stages of one recipe with one generator, which is loaded once."""

    generator: LocalGenerator
    rollouts: RolloutSettings
    params: SamplingParams
    data: Path
    work: Path
    branches: BranchPlan | None = None
    part: tuple[int, int] = (0, 1)
    progress: Progress | None = None

    def collect(self, stage: str, *, scorer: Scorer | None = None, guide_name: str = "") -> RolloutSet:
        """Sample one stage (this part of it); ``branches`` needs the guide's scorer and its name."""
        prompts = stage_prompts(stage, self.rollouts, self.data, self.branches)
        index, parts = self.part
        own = prompts[index::parts]
        folder = part_folder(self.work / f"rollouts-{stage}", self.part)
        if not own:
            return RolloutSet(())
        each = self.rollouts.samples if stage in ("train", "valid") else 1
        if round_of(stage) and self.branches is not None:
            each = self.branches.settings.points
        counts = {"done": 0, "tokens": 0}

        def on_done(answers: int, tokens: int) -> None:
            counts["done"] += answers
            counts["tokens"] += tokens
            if self.progress:
                self.progress(f"rollouts-{stage}", counts["done"], len(own) * each, {"tokens": counts["tokens"]})

        shared: dict[str, Any] = {
            "params": self.params,
            "seed": _seed(self.rollouts, stage),
            "max_prompt_tokens": self.rollouts.max_prompt_tokens,
            "on_done": on_done,
        }
        if not round_of(stage):
            found = sample_rollouts(self.generator, own, folder, samples=each, **shared)
        elif self.branches is None or scorer is None:
            raise DataError("branches need a [branches] section and a guide")
        else:
            found = branch_rollouts(
                self.generator, scorer, own, folder, settings=self.branches.settings, guide_name=guide_name, **shared
            )
        if parts > 1:
            (folder / COMPLETE).touch()
        return found


def stage_prompts(stage: str, rollouts: RolloutSettings, data: Path, branches: BranchPlan | None) -> list[Prompt]:
    """The prompts of a stage, in the order in which they are asked."""
    wanted = rollouts.prompts
    if stage == "valid":
        # Of the calibration carve: code and instruction have too few validation prompts of their own.
        found = [
            p
            for domain in wanted
            for p in select(load_prompts(data, domain, "calibration"), rollouts.valid_prompts, seed=0)
        ]
        return select(found, None, seed=1)
    found = [p for domain, n in wanted.items() for p in select(load_prompts(data, domain, "train"), n or None, seed=0)]
    if stage == "train":
        # Prompts of all domains side by side: a batch that is all code would finish in one long tail.
        return select(found, None, seed=1)
    if branches is None:
        raise DataError(f"stage {stage!r} needs a [branches] section in the recipe")
    if stage == "sentences":
        count = branches.sentences
        return sentence_prompts(select(found, count, seed=2), branches.settings, seed=1) if count else []
    return select(found, branches.prompts, seed=2 + round_of(stage))


def _seed(rollouts: RolloutSettings, stage: str) -> int:
    """Of a stage's random streams: a prompt that is drawn in two rounds is guided and cut anew."""
    return rollouts.seed + max(0, round_of(stage) - 1)


def asked(stage: str, rollouts: RolloutSettings, data: Path, branches: BranchPlan | None) -> set[Key]:
    """What a recipe asks for at a stage: (prompt id, seed), those of too long prompts among them."""
    prompts, seed = stage_prompts(stage, rollouts, data, branches), _seed(rollouts, stage)
    if round_of(stage) and branches is not None:
        return {branch_key(prompt, index, seed) for prompt in prompts for index in range(branches.settings.points)}
    each = rollouts.samples if stage in ("train", "valid") else 1
    return {(prompt.id, stream_seed(prompt.id, sample, seed)) for prompt in prompts for sample in range(each)}


def stored(work: Path, stage: str, keys: Collection[Key] | None = None) -> list[RolloutSet]:
    """The rollouts of a stage, all its parts together; none where it was not sampled. ``keys``: these alone.

    Raises:
        DataError: a folder is damaged, some of its parts are missing or not made to their end, or it holds some of a
            prompt's ``keys`` and lacks others, having been made for fewer samples.
    """
    folder = work / f"rollouts-{stage}"
    if not folder.is_dir():
        return []
    found = read_rollouts(folder)
    if keys is None:
        return [found]
    kept = found.with_keys(keys)
    # A prompt that is not there at all was too long.
    here = set(kept.prompt_keys)
    wanted = sum(prompt in here for prompt, _ in keys)
    if len(kept) < wanted:
        raise DataError(f"{folder} holds {len(kept)} of {wanted} answers to its prompts: sample the rest, or anew")
    return [kept] if len(kept) else []
