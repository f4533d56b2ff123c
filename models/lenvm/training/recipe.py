"""A recipe is one TOML file that makes one checkpoint: rollouts, training, evaluation."""

from __future__ import annotations

import gc
import hashlib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lenvm.card import EVAL_FILE, update_card
from lenvm.config import CONFIG_FILE, GeneratorRef, HeadConfig
from lenvm.decoding import SamplingParams
from lenvm.distribution import LengthBins
from lenvm.errors import DataError, LenVMError
from lenvm.modeling import LengthValueModel
from lenvm.returns import check_gamma
from lenvm.rollouts import RolloutSet, read_rollouts
from lenvm.rollouts.sampling import LocalGenerator
from lenvm.rollouts.store import part_folders
from lenvm.scoring import TorchScorer
from lenvm.training.collecting import (
    BranchPlan,
    Collector,
    RolloutSettings,
    asked,
    round_of,
    stages_of,
    stored,
)
from lenvm.training.data import Source
from lenvm.training.distributed import World
from lenvm.training.loop import train
from lenvm.training.settings import TrainSettings

__all__ = ["Recipe", "RolloutSettings", "create_model", "load_recipe", "make_rollouts", "run_recipe"]

T = TypeVar("T")
_MADE_OF = re.compile(r"(#length|#branch\d+)+$")
_HELD_OUT = 50  # of given rollouts, one prompt in so many is measured, not trained on


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a checkpoint."""

    name: str
    backbone: str
    gamma: float
    generator: SamplingParams
    rollouts: RolloutSettings
    head: HeadConfig
    train: TrainSettings = field(default_factory=TrainSettings)
    about: str = ""  # licence and whatever else the card should say
    generator_backbone: str = ""  # who writes the answers; empty: the backbone itself
    model_type: str = "llama"  # transformers' name of the backbone's architecture, for a dry run
    branches: BranchPlan | None = None

    @property
    def writer(self) -> str:
        """The backbone that generates."""
        return self.generator_backbone or self.backbone


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe. ``changes``: texts like ``train.epochs=1`` or ``gamma=0.99``, applied over the file.

    Raises:
        DataError: the file is missing, not TOML, or has an unknown, missing or wrong field; a change is no KEY=VALUE.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise DataError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"recipe {path} is not valid TOML: {error}") from None
    for change in changes:
        _apply(data, change)
    try:
        head = dict(data.pop("head"))
        generator = dict(data.pop("generator"))
        bins = head.pop("bins", None)
        recipe = Recipe(
            name=data.pop("name"),
            backbone=data.pop("backbone"),
            gamma=check_gamma(data.pop("gamma")),
            generator_backbone=generator.pop("backbone", ""),
            generator=_build(SamplingParams, generator, "generator"),
            rollouts=_build(RolloutSettings, data.pop("rollouts"), "rollouts"),
            head=HeadConfig(head.pop("width"), LengthBins(**bins) if bins else None),
            train=_build(TrainSettings, data.pop("train", {}), "train"),
            about=data.pop("about", ""),
            model_type=data.pop("model_type", "llama"),
            branches=BranchPlan.from_dict(data.pop("branches")) if "branches" in data else None,
        )
    except KeyError as error:
        raise DataError(f"recipe {path} lacks {error}") from None
    except (TypeError, LenVMError) as error:
        raise DataError(f"recipe {path}: {error}") from None
    if data or head:
        raise DataError(f"recipe {path} has unknown fields: {', '.join([*data, *head])}")
    return recipe


def _apply(data: dict[str, Any], change: str) -> None:
    """Put ``a.b=VALUE`` into nested tables; VALUE is TOML, or else a plain string."""
    key, sign, text = change.partition("=")
    *path, last = key.strip().split(".")
    if not sign or not last or not all(path):
        raise DataError(f"{change!r} is no change of a recipe: write SECTION.KEY=VALUE, such as train.epochs=1")
    table: Any = data
    for name in path:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise DataError(f"{change!r}: {name} is no section of the recipe")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()


def _build(kind: type[T], values: Mapping[str, Any], section: str) -> T:
    unknown = set(values) - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise DataError(f"unknown field {', '.join(sorted(unknown))} in [{section}]")
    return kind(**values)


Progress = Callable[[str, int, int, dict[str, float]], None]


def run_recipe(
    recipe: Recipe,
    *,
    data: Path | None,
    work: Path,
    output: Path,
    device: str = "cpu",
    progress: Progress | None = None,
    rollouts: Sequence[Path] = (),
    on_resume: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Roll out, train, and write the checkpoint to ``output``; returns the summary that its ``eval.json`` holds.

    Rollouts and checkpoints already in ``work`` are used, so the command can be run again after an interruption.
    ``progress(stage, done, total, metrics)``. ``rollouts``: folders to train on instead of sampling; some of their
    prompts are held out. In a world of several processes the first one samples and writes; the others return {}.

    Raises:
        DataError: data, rollouts or work folder are missing or damaged, or rollouts come from several generators.
    """
    world, device = World.join(device)
    if rollouts:
        sets = {"train": [read_rollouts(folder) for folder in rollouts]}
        sources, split = _split(sets["train"])
        valid = [split]
    else:
        if data is None:
            raise DataError("rolling out needs the folder of prompts: pass --data, or --rollouts to train on")
        if world.first:
            make_rollouts(recipe, data=data, work=work, device=device, progress=progress)
        world.wait()
        names = _sampled(recipe)
        sets = {name: found for name in names if (found := _asked_for(recipe, name, data, work))}
        extra = recipe.branches.repeats if recipe.branches else 1
        sources = [
            Source(found, repeats=1 if name == "train" else extra) for name in names[1:] for found in sets.get(name, ())
        ]
        valid = [Source(found) for found in sets.get("valid", ())]
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    model = create_model(recipe, _generator(recipe, sets["train"]), device=device)

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if progress:
            progress("train", step, steps, metrics)

    result = train(model, sources, recipe.train, valid=valid, work=work, on_step=on_step, on_resume=on_resume)
    if not world.first:
        return {}
    result["rollouts"] = {name: _describe(found) for name, found in sets.items()}
    result["about"] = recipe.about
    model.save_pretrained(output)
    (output / EVAL_FILE).unlink(missing_ok=True)  # figures of whatever was there before
    update_card(output, "training", result)
    return result


def create_model(recipe: Recipe, generator: GeneratorRef, *, device: str) -> LengthValueModel:
    """The untrained model of a recipe; the same weights in every run and process."""
    torch.manual_seed(recipe.train.seed)
    place = torch.device(device)
    return LengthValueModel.create(
        recipe.backbone,
        name=recipe.name,
        head=recipe.head,
        gamma=recipe.gamma,
        generator=generator,
        device=device,
        dtype=recipe.train.weight_dtype(place),
    )


def make_rollouts(
    recipe: Recipe,
    *,
    data: Path,
    work: Path,
    device: str,
    progress: Progress | None = None,
    only: Sequence[str] = (),
    part: tuple[int, int] = (0, 1),
) -> None:
    """Sample what the recipe trains on into ``work/rollouts-STAGE``: "valid", "train" and, where the recipe has
    branches, "sentences", "guide" (the model that guides them, trained) and "branches", the latter two once a round
    ("guide-2", "branches-2").

    ``only`` some of these (none: all), and of their prompts only the i-th of n parts: so several GPUs share the work.
    What is there is used; a stage that was made in parts is left alone. Raises DataError for an unknown stage or a
    missing part.
    """
    stages = stages_of(recipe.branches)
    for name in only:
        if name not in stages:
            raise DataError(f"this recipe has no stage {name!r}: choose from {', '.join(stages)}")
        if name.startswith("guide"):
            _guide(recipe, round_of(name), data=data, work=work, device=device, progress=progress)
    # Without being named, a guide is trained where it is needed, just before its branches.
    wanted = [name for name in _sampled(recipe) if not only or name in only]
    if part == (0, 1):
        wanted = [name for name in wanted if not part_folders(work / f"rollouts-{name}")]
    if not wanted:
        return
    if part != (0, 1):
        for name in wanted:
            if round_of(name) and not (_guide_folder(work, round_of(name)) / CONFIG_FILE).exists():
                missing = _guide_folder(work, round_of(name)).name
                raise DataError(f"the parts share one guide, which is not there yet: run --only {missing} first")
    generator = LocalGenerator(recipe.writer, device=device, max_rows=recipe.rollouts.max_rows)
    collector = Collector(generator, recipe.rollouts, recipe.generator, data, work, recipe.branches, part, progress)
    for name in wanted:
        if round_of(name) and recipe.branches:
            generator.sampler.max_rows = recipe.branches.max_rows
            # Training needs the memory that the sampler holds, and the sampler what training leaves behind.
            generator.sampler.release_pool()
            guide = _guide(recipe, round_of(name), data=data, work=work, device=device, progress=progress)
            on_gpu = device.startswith("cuda")
            model = LengthValueModel.from_pretrained(
                guide, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32
            )
            collector.collect(name, scorer=TorchScorer(model), guide_name=f"{recipe.name} guide")
        else:
            collector.collect(name)


def _asked_for(recipe: Recipe, stage: str, data: Path, work: Path) -> list[RolloutSet]:
    """The rollouts of a stage that this recipe asks for, whatever else an earlier one left in the folder."""
    return stored(work, stage, asked(stage, recipe.rollouts, data, recipe.branches))


def _sampled(recipe: Recipe) -> tuple[str, ...]:
    """The stages that are sampled: all but the guides."""
    return tuple(name for name in stages_of(recipe.branches) if not name.startswith("guide"))


def _guide_folder(work: Path, number: int) -> Path:
    return work / (f"guide-{number}" if number > 1 else "guide")


def _guide(recipe: Recipe, number: int, *, data: Path, work: Path, device: str, progress: Progress | None) -> Path:
    """The checkpoint that guides the branches of a round: trained for one epoch on a share of the train rollouts and,
    after the first round, on the answers to length sentences and the branches of the rounds before; once."""
    folder = _guide_folder(work, number)
    if (folder / CONFIG_FILE).exists():
        return folder
    assert recipe.branches is not None
    rng = np.random.default_rng(recipe.train.seed)
    sets = _asked_for(recipe, "train", data, work)
    sources = [
        Source(found, rows=np.sort(rng.permutation(len(found))[: round(len(found) * recipe.branches.guide_answers)]))
        for found in sets
    ]
    if number > 1:
        earlier = [name for name in _sampled(recipe)[2:] if round_of(name) < number]
        sources += [Source(found) for name in earlier for found in _asked_for(recipe, name, data, work)]
    model = create_model(recipe, _generator(recipe, sets), device=device)

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if progress:
            progress(f"train-{folder.name}", step, steps, metrics)

    # By this process alone: in a world of several, the others wait for what it samples.
    train(
        model,
        sources,
        replace(recipe.train, epochs=1),
        work=work / f"{folder.name}-run",
        on_step=on_step,
        world=World(),
    )
    model.save_pretrained(folder)
    del model
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    return folder


def _split(sets: Sequence[RolloutSet]) -> tuple[list[Source], Source]:
    """Training sources, and the held-out prompts of the first set, chosen by their ids' digests."""
    sources, valid = [], Source(())
    for index, found in enumerate(sets):
        # Branches and answers to length sentences go with the prompt that they were made of.
        origins = [_MADE_OF.sub("", key) for key in found.prompt_keys]
        digests = [int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % _HELD_OUT for key in origins]
        held_out = np.asarray(digests, dtype=np.int64) == 0
        sources.append(Source(found, rows=np.flatnonzero(~held_out)))
        if index == 0:
            valid = Source(found, rows=np.flatnonzero(held_out))
    return sources, valid


def _generator(recipe: Recipe, sets: Sequence[RolloutSet]) -> GeneratorRef:
    """The generator that the rollouts name; what they do not name is the recipe's."""
    stated = GeneratorRef(
        recipe.writer, recipe.generator.temperature, recipe.generator.top_p, recipe.generator.max_new_tokens
    )
    known = {f.name for f in fields(GeneratorRef)}
    found = [
        replace(stated, **{name: value for name, value in rollouts.generator.items() if name in known})
        for rollouts in sets
    ]
    # Where answers were cut is not what they follow: branches are cut sooner.
    longest = max((other.max_new_tokens for other in found), default=stated.max_new_tokens)
    found = [replace(other, max_new_tokens=longest) for other in found]
    if any(other != found[0] for other in found):
        raise DataError("the rollout folders come from different generators: a value model is valid for one")
    return found[0] if found else stated


def _describe(sets: Sequence[RolloutSet]) -> dict[str, float]:
    lengths = np.concatenate([found.lengths for found in sets])
    finished = np.concatenate([found.finished for found in sets])
    return {
        "answers": len(lengths),
        "tokens": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "cut_share": float(1 - finished.mean()),
    }
