"""Many small models in one process: each trained on the same answers with the same budget, each measured the same way.

The backbone is loaded once; models of one shape share compiled code. Finished runs are kept as JSON lines, so that an
interrupted command goes on with the next model.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lenvm.config import BackboneRef, GeneratorRef, HeadConfig, LenVMConfig
from lenvm.distribution import LengthBins
from lenvm.errors import DataError, InvalidRequestError
from lenvm.evaluation.states_table import StateTable, read_states, score_readings
from lenvm.modeling import LengthValueModel, ValueHead
from lenvm.rollouts import RolloutSet
from lenvm.training.data import SampleTable, Source
from lenvm.training.loop import Trainer
from lenvm.training.packing import plan
from lenvm.training.settings import TrainSettings
from lenvm.training.targets import ValueTarget, make_target

__all__ = ["Bench", "Budget", "Spec", "choose_prompts", "logit_of", "open_bench", "run_specs"]

Progress = Callable[[str, int, int, dict[str, float]], None]
Head = Literal["value", "bins", "both"]


@dataclass(frozen=True)
class Budget:
    """What every model gets: ``steps`` of ``batch_tokens``; 0 is one epoch of all train answers, which a model of fewer
    answers fills by seeing them more often. ``prompts``: train prompts a domain (None: all).

    ``test_prompts`` a domain and ``test_answers`` of each are read at all positions; the truth at the prompt takes all.
    """

    steps: int = 150
    batch_tokens: int = 65536
    micro_tokens: int = 32768
    learning_rate: float = 7e-4
    full_learning_rate: float = 1e-4
    prompts: int | None = None
    test_prompts: int | None = None
    test_answers: int = 2
    head_width: int | None = None  # None: the backbone's hidden size
    compile: bool = False


@dataclass(frozen=True)
class Spec:
    """One model. ``settings`` are changes of ``TrainSettings``; ``depth``: the backbone's first layers alone;
    ``share`` of the train prompts, ``samples`` of each (None: all)."""

    name: str
    gamma: float = 0.997
    head: Head = "value"
    settings: Mapping[str, Any] = field(default_factory=dict)
    depth: int | None = None
    share: float = 1.0
    samples: int | None = None
    seed: int = 0


def open_bench(backbone: str, train: RolloutSet, test: RolloutSet, budget: Budget, *, device: str = "cpu") -> Bench:
    """Load ``backbone`` (a name, a folder or a hub id) once for all models of a command."""
    from lenvm.backbones import backbone_sha256, load_backbone, resolve_backbone, tokenizer_sha256

    folder = resolve_backbone(backbone)
    decoder: Any = load_backbone(folder, dtype=torch.float32, device=device)
    reference = BackboneRef(backbone, backbone_sha256(folder), tokenizer_sha256(folder))
    return Bench(decoder.get_decoder(), reference, train, test, budget, folder)


class Bench:
    """Backbone, train answers and test answers, in memory once.

    Raises DataError where the two rollout sets do not come from one generator.
    """

    def __init__(
        self, decoder: Any, backbone: BackboneRef, train: RolloutSet, test: RolloutSet, budget: Budget, folder: Path
    ) -> None:
        """``decoder``: pristine, in float32, on the device; it is copied for each model."""
        made_by: dict[str, Any] = {n: test.generator.get(n) for n in ("temperature", "top_p", "max_new_tokens")}
        if {name: train.generator.get(name) for name in made_by} != made_by:
            raise DataError(f"train and test answers were sampled differently ({made_by} for test): roll out again")
        both = set(train.prompt_keys) & set(test.prompt_keys)
        if both:
            raise DataError(f"{len(both)} prompts, such as {min(both)!r}, are in train and test: give other folders")
        self.decoder, self.backbone, self.budget, self.folder = decoder, backbone, budget, folder
        self.generator = GeneratorRef(
            backbone.name, float(made_by["temperature"]), float(made_by["top_p"]), int(made_by["max_new_tokens"])
        )
        self.train = choose_prompts(train, budget.prompts)
        self.test = StateTable.of(choose_prompts(test, budget.test_prompts), budget.test_answers, self.cap)
        self._subsets: dict[tuple[float, int | None], RolloutSet] = {}

    @property
    def steps(self) -> int:
        """Steps of every model: the budget's, or those of one epoch of all train answers."""
        return self.budget.steps or self._epoch_steps

    @cached_property
    def _epoch_steps(self) -> int:
        batches = plan(SampleTable([Source(self.train)]), tokens=self.budget.micro_tokens, seed=0)
        return -(-len(batches) * self.budget.micro_tokens // self.budget.batch_tokens)

    @property
    def cap(self) -> int:
        """Most tokens that the generator makes."""
        return self.generator.max_new_tokens

    def digest(self, spec: Spec) -> str:
        """What a stored run must share with ``spec``: its settings, the budget and the answers."""
        circumstances = {"compile": None}
        facts = [
            "whole epochs",  # how answers are repeated: runs of before drew them anew
            asdict(spec), asdict(self.budget) | circumstances, self.backbone.sha256, self.train.generator,
            len(self.train), int(self.train.lengths.sum()),
            len(self.test.rollouts), int(self.test.rollouts.lengths.sum()),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def run(self, spec: Spec, on_step: Callable[[int, int, dict[str, float]], None] | None = None) -> dict[str, Any]:
        """Train and measure one model."""
        gc.collect()  # the model before this one holds itself in cycles, and a GPU's memory with it
        started = time.perf_counter()
        trainer, epochs = self._trainer(spec)
        trained = trainer.run(on_step=on_step)
        seconds = time.perf_counter() - started
        readings = read_states(trainer, self.test)
        figures = score_readings(self.test, readings, self.cap)
        return {
            "name": spec.name,
            "seed": spec.seed,
            "spec": asdict(spec),
            "steps": trained["steps"],
            "tokens": trained["tokens"],
            "epochs": epochs,
            "tokens_per_s": trained["tokens_per_s"],
            "seconds": {"train": seconds, "all": time.perf_counter() - started},
            "parameters": sum(p.numel() for p in self.decoder.layers[: spec.depth].parameters()),
            "train": trained["train"],
            **figures,
        }

    def _model(self, spec: Spec) -> LengthValueModel:
        decoder = copy.deepcopy(self.decoder)
        if spec.depth is not None:
            _truncate(decoder, spec.depth)
        bins = None if spec.head == "value" else LengthBins(cap=self.cap)
        head = HeadConfig(self.budget.head_width or int(decoder.config.hidden_size), bins)
        config = LenVMConfig(spec.name, self.backbone, head, spec.gamma, self.generator)
        torch.manual_seed(spec.seed)
        made = ValueHead(int(decoder.config.hidden_size), head)
        return LengthValueModel(decoder, made.to(next(decoder.parameters()).device), config, self.folder)

    def _trainer(self, spec: Spec) -> tuple[Trainer, float]:
        """The run, and how often it sees its answers: tokens trained on over the tokens of its data."""
        budget = self.budget
        full = spec.settings.get("mode") == "full"
        settings = TrainSettings(
            **{
                "epochs": 1,
                "batch_tokens": budget.batch_tokens,
                "micro_tokens": budget.micro_tokens,
                "learning_rate": budget.full_learning_rate if full else budget.learning_rate,
                "head_learning_rate": budget.learning_rate,
                "value_weight": 0.0 if spec.head == "bins" else 1.0,
                "alpha": {"value": 0.0, "bins": 1.0, "both": 0.1}[spec.head],
                "compile": budget.compile,
                "seed": spec.seed,
                "log_every": max(1, self.steps // 5),
                **spec.settings,
            }
        )
        answers = self._subset(spec.share, spec.samples)
        model = self._model(spec)
        # Every model starts at the same guess, the median answer: what its zero means hangs on gamma and target.
        with torch.no_grad():
            start = logit_of(make_target(settings.target, spec.gamma, settings.lam), float(np.median(answers.lengths)))
            model.head.output.bias[0] = start
        if budget.steps or answers is not self.train:  # epochs that are enough, then cut to the budget
            tokens = int(answers.lengths.sum() + sum(len(answers.prompt_tokens(i)) for i in range(len(answers))))
            settings = replace(settings, epochs=max(1, -(-self.steps * settings.batch_tokens // tokens)))
        trainer = Trainer(model, Source(answers), settings)
        if settings.epochs > 1 or budget.steps:
            trainer.batches = trainer.batches[: self.steps * settings.accumulate]
        trainer.steps = -(-len(trainer.batches) // settings.accumulate)
        trainer.shape = trainer.shape.covering(self.test.shape(budget.micro_tokens))
        lengths = trainer.table.lengths
        return trainer, sum(int(lengths[batch].sum()) for batch in trainer.batches) / int(lengths.sum())

    def _subset(self, share: float, samples: int | None) -> RolloutSet:
        """Answers of the first ``share`` of the prompts of each domain (nested: a half holds the quarter)."""
        key = (share, samples)
        if key not in self._subsets:
            part = self.train if share >= 1.0 else choose_prompts(self.train, None, share)
            if samples is not None:
                kept = [index for indices in part.by_prompt().values() for index in indices[:samples]]
                part = _part(part, kept)
            self._subsets = {key: part}  # one at a time: each holds its token ids
        return self._subsets[key]


def logit_of(target: ValueTarget, length: float) -> float:
    """The value logit that ``target`` reads as ``length`` tokens, or the nearest of -30..30; by bisection."""
    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if float(target.read(torch.tensor([middle]))[0]) < length else (low, middle)
    return (low + high) / 2.0


def _truncate(decoder: Any, depth: int) -> None:
    """Keep the first ``depth`` layers; the final norm stays."""
    if not 1 <= depth <= len(decoder.layers):
        raise InvalidRequestError(f"depth must lie between 1 and {len(decoder.layers)}, not {depth}", param="depth")
    decoder.layers = decoder.layers[:depth]
    decoder.config.num_hidden_layers = depth
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = list(decoder.config.layer_types[:depth])


def choose_prompts(rollouts: RolloutSet, per_domain: int | None, share: float = 1.0) -> RolloutSet:
    """The answers of at most ``per_domain`` prompts of each domain, or of that ``share`` of them, by hash of the id."""
    if per_domain is None and share >= 1.0:
        return rollouts
    domains: dict[str, list[tuple[str, list[int]]]] = {}
    for key, indices in rollouts.by_prompt().items():
        domains.setdefault(rollouts.domains[indices[0]], []).append((key, indices))
    kept: list[int] = []
    for found in domains.values():
        found.sort(key=lambda item: hashlib.sha256(item[0].encode()).digest())
        limit = len(found) if per_domain is None else min(per_domain, len(found))
        for _, indices in found[: max(1, math.ceil(share * limit))]:
            kept += indices
    return _part(rollouts, kept)


def _part(rollouts: RolloutSet, indices: Sequence[int]) -> RolloutSet:
    return rollouts.take(sorted(indices))


def run_specs(
    bench: Bench, specs: Sequence[Spec], *, work: Path | None = None, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Runs of ``specs`` in their order; those that ``work`` (JSON lines) holds already are read, the rest appended.

    A model that cannot be trained here (a precision that the device lacks) has ``error`` in place of its figures and is
    tried again by the next call.
    """
    stored = _stored(work)
    done = []
    for at, spec in enumerate(specs):
        label = f"{spec.name}, seed {spec.seed}"
        digest = bench.digest(spec)
        if digest not in stored:

            def on_step(step: int, steps: int, metrics: dict[str, float], label: str = label, at: int = at) -> None:
                if progress:
                    progress(f"{at + 1}/{len(specs)} {label}", step, steps, metrics)

            try:
                stored[digest] = bench.run(spec, on_step)
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                done.append({"name": spec.name, "seed": spec.seed, "error": str(error).strip().splitlines()[0][:200]})
                continue
            _append(work, digest, stored[digest])
        done.append(stored[digest])
    return done


def _stored(work: Path | None) -> dict[str, dict[str, Any]]:
    if work is None or not work.is_file():
        return {}
    found = {}
    for line in work.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found[str(row["digest"])] = row["run"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that a kill cut short: that model is trained again
    return found


def _append(work: Path | None, digest: str, run: Mapping[str, Any]) -> None:
    if work is None:
        return
    work.parent.mkdir(parents=True, exist_ok=True)
    with work.open("a+b") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":  # what a kill left behind must not swallow this line
                stream.write(b"\n")
        stream.write(json.dumps({"digest": digest, "run": run}, default=_plain).encode() + b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a run")
