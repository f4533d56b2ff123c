"""A recipe is one TOML file that makes one checkpoint: rollouts, training, evaluation."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from lenvm.card import EVAL_FILE, update_card
from lenvm.config import GeneratorRef, HeadConfig
from lenvm.decoding import SamplingParams
from lenvm.distribution import LengthBins
from lenvm.errors import DataError, LenVMError
from lenvm.modeling import LengthValueModel
from lenvm.prompts import load_prompts, select
from lenvm.returns import check_gamma
from lenvm.rollouts import RolloutSet
from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts
from lenvm.training.loop import TrainSettings, train

__all__ = ["Recipe", "RolloutSettings", "load_recipe", "run_recipe"]

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutSettings:
    """Which prompts are sampled, and how often. ``prompts``: domain -> number of train prompts."""

    prompts: Mapping[str, int]
    samples: int = 4
    valid_prompts: int = 100
    max_prompt_tokens: int = 1024
    max_rows: int = 1024
    seed: int = 1


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


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        DataError: the file is missing, not TOML, or has an unknown, missing or wrong field.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise DataError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"recipe {path} is not valid TOML: {error}") from None
    try:
        head = dict(data.pop("head"))
        bins = head.pop("bins", None)
        recipe = Recipe(
            name=data.pop("name"),
            backbone=data.pop("backbone"),
            gamma=check_gamma(data.pop("gamma")),
            generator=_build(SamplingParams, data.pop("generator"), "generator"),
            rollouts=_build(RolloutSettings, data.pop("rollouts"), "rollouts"),
            head=HeadConfig(head.pop("width"), LengthBins(**bins) if bins else None),
            train=_build(TrainSettings, data.pop("train", {}), "train"),
            about=data.pop("about", ""),
        )
    except KeyError as error:
        raise DataError(f"recipe {path} lacks {error}") from None
    except (TypeError, LenVMError) as error:
        raise DataError(f"recipe {path}: {error}") from None
    if data or head:
        raise DataError(f"recipe {path} has unknown fields: {', '.join([*data, *head])}")
    return recipe


def _build(kind: type[T], values: Mapping[str, Any], section: str) -> T:
    unknown = set(values) - {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise DataError(f"unknown field {', '.join(sorted(unknown))} in [{section}]")
    return kind(**values)


Progress = Callable[[str, int, int, dict[str, float]], None]


def run_recipe(
    recipe: Recipe, *, data: Path, work: Path, output: Path, device: str = "cpu", progress: Progress | None = None
) -> dict[str, Any]:
    """Roll out, train, and write the checkpoint to ``output``; returns the summary that its ``eval.json`` holds.

    Rollouts already in ``work`` are used, so the command can be run again after an interruption.
    ``progress(stage, done, total, metrics)``.
    """
    sets = make_rollouts(recipe, data=data, work=work, device=device, progress=progress)
    generator = GeneratorRef(
        recipe.backbone, recipe.generator.temperature, recipe.generator.top_p, recipe.generator.max_new_tokens
    )
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.set_float32_matmul_precision("high")
    model = LengthValueModel.create(
        recipe.backbone,
        name=recipe.name,
        head=recipe.head,
        gamma=recipe.gamma,
        generator=generator,
        device=device,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    work.mkdir(parents=True, exist_ok=True)

    def on_step(step: int, steps: int, metrics: dict[str, float]) -> None:
        if progress:
            progress("train", step, steps, metrics)

    log = work / "train.jsonl"
    result = train(model, list(sets["train"]), recipe.train, valid=list(sets["valid"]), log=log, on_step=on_step)
    result["rollouts"] = {name: _describe(rollouts) for name, rollouts in sets.items()}
    result["about"] = recipe.about
    model.save_pretrained(output)
    (output / EVAL_FILE).unlink(missing_ok=True)  # figures of whatever was there before
    update_card(output, "training", result)
    return result


def make_rollouts(
    recipe: Recipe, *, data: Path, work: Path, device: str, progress: Progress | None = None
) -> dict[str, RolloutSet]:
    """Rollouts of the train and validation prompts in ``work/rollouts-train`` and ``work/rollouts-valid``."""
    settings = recipe.rollouts
    generator = LocalGenerator(recipe.backbone, device=device, max_rows=settings.max_rows)
    sets: dict[str, RolloutSet] = {}
    for split in ("valid", "train"):
        # Validation prompts come from the calibration carve: code and instruction have too few of their own.
        wanted = {domain: settings.valid_prompts if split == "valid" else n for domain, n in settings.prompts.items()}
        source = "calibration" if split == "valid" else "train"
        prompts = [p for domain, n in wanted.items() for p in select(load_prompts(data, domain, source), n, seed=0)]
        # Prompts of all domains side by side: a batch that is all code would finish in one long tail.
        prompts = select(prompts, None, seed=1)
        total, state = len(prompts) * settings.samples, {"done": 0, "tokens": 0}

        def on_done(answers: int, tokens: int, split: str = split, total: int = total, state: Any = state) -> None:
            state["done"] += answers
            state["tokens"] += tokens
            if progress:
                progress(f"rollouts-{split}", state["done"], total, {"tokens": state["tokens"]})

        sets[split] = sample_rollouts(
            generator,
            prompts,
            work / f"rollouts-{split}",
            samples=settings.samples,
            params=recipe.generator,
            seed=settings.seed,
            max_prompt_tokens=settings.max_prompt_tokens,
            on_done=on_done,
        )
    return sets


def _describe(rollouts: RolloutSet) -> dict[str, float]:
    return {
        "answers": len(rollouts),
        "tokens": int(rollouts.lengths.sum()),
        "mean": float(rollouts.lengths.mean()),
        "cut_share": float(1 - rollouts.finished.mean()),
    }
