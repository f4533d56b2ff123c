"""The training loop: packed bf16 batches, AdamW, warm-up and cosine decay, one GPU or the CPU."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lenvm.errors import InvalidRequestError
from lenvm.lora import inject
from lenvm.modeling import LengthValueModel
from lenvm.training.attention import PACKED_ATTENTION
from lenvm.training.loss import LossParts, Targets, length_loss, survival_table
from lenvm.training.packing import PackedBatch, Sample, pack

__all__ = ["TrainSettings", "evaluate_loss", "train"]


@dataclass(frozen=True)
class TrainSettings:
    """How to train. A step sees ``batch_tokens`` tokens in micro-batches of ``micro_tokens``."""

    epochs: int = 2
    batch_tokens: int = 65536
    micro_tokens: int = 32768
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    alpha: float = 0.1
    lora_rank: int = 16
    lora_scale: float = 2.0
    seed: int = 0
    compile: bool = False
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.batch_tokens % self.micro_tokens:
            raise InvalidRequestError("batch_tokens must be a multiple of micro_tokens", param="batch_tokens")
        if self.epochs < 1 or self.learning_rate <= 0 or self.lora_rank < 1:
            raise InvalidRequestError("epochs, learning_rate and lora_rank must be positive", param="epochs")


class _Objective:
    """Runs a packed batch through the model and gives its loss."""

    def __init__(self, model: LengthValueModel, settings: TrainSettings) -> None:
        self.model, self.settings = model, settings
        bins = model.config.head.bins
        self.survival = survival_table(bins, model.device) if bins else None
        if settings.compile:
            # Layer by layer: one layer is compiled once and serves all of them; the whole model takes minutes.
            for layer in model.decoder.layers:
                layer.compile(dynamic=False)

    def _compute(self, ids: Any, positions: Any, bounds: Any, longest: int, targets: Targets) -> LossParts:
        output = self.model.decoder(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, bounds=bounds, longest=longest
        )
        return length_loss(
            self.model.head(output.last_hidden_state[0]),
            targets,
            gamma=self.model.config.gamma,
            alpha=self.settings.alpha,
            bins=self.model.config.head.bins,
            survival=self.survival,
        )

    def __call__(self, batch: PackedBatch) -> LossParts:
        device = self.model.device

        def tensor(array: Any) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        targets = Targets(tensor(batch.remaining), tensor(batch.finished), tensor(batch.supervised).float())
        ids, positions = tensor(batch.ids).long(), tensor(batch.positions).long()
        return self._compute(ids, positions, tensor(batch.bounds), batch.longest, targets)


def train(
    model: LengthValueModel,
    samples: Sequence[Sample],
    settings: TrainSettings,
    *,
    valid: Sequence[Sample] = (),
    log: Path | None = None,
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train adapters and head in place; returns the last training and validation losses and the throughput.

    ``log`` gets one JSON line a step. ``on_step(step, steps, metrics)`` drives a progress bar.
    """
    torch.manual_seed(settings.seed)
    model.decoder.set_attn_implementation(PACKED_ATTENTION)
    adapters = inject(model.decoder, rank=settings.lora_rank, scale=settings.lora_scale)
    parameters = [*adapters, *model.head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=model.device.type == "cuda",
    )
    objective = _Objective(model, settings)
    total = sum(len(s.prompt_ids) + len(s.token_ids) for s in samples)
    steps = max(1, math.ceil(1.03 * settings.epochs * total / settings.batch_tokens))
    accumulate = settings.batch_tokens // settings.micro_tokens
    metrics: dict[str, float] = {}
    started, first_done, seen, step = time.perf_counter(), 0.0, 0, 0
    lines = log.open("w") if log else None
    model.train()
    micro = _batches(samples, settings)
    while step < steps:
        group = list(islice(micro, accumulate))
        if not group:
            break
        elapsed = time.perf_counter() - (first_done or time.perf_counter())  # the first step compiles
        scale = _schedule(step, steps, settings, elapsed)
        for options in optimizer.param_groups:
            options["lr"] = settings.learning_rate * scale
        parts = []
        for batch in group:
            loss = objective(batch)
            (loss.total / len(group)).backward()
            parts.append(LossParts(loss.total.detach(), loss.value.detach(), loss.bins.detach()))
            seen += settings.micro_tokens
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        first_done = first_done or time.perf_counter()
        if step % 10 == 0 or step == steps:
            metrics = _mean(parts) | {"grad_norm": float(norm), "lr": settings.learning_rate * scale}
            metrics["tokens_per_s"] = seen / (time.perf_counter() - started)
            if lines:
                lines.write(json.dumps({"step": step, "steps": steps, **metrics}) + "\n")
                lines.flush()
            if on_step:
                on_step(step, steps, metrics)
        if scale <= 0.0:
            break
    if lines:
        lines.close()
    model.eval()
    result: dict[str, Any] = {"steps": step, "tokens": seen, "seconds": time.perf_counter() - started, "train": metrics}
    if valid:
        result["valid"] = evaluate_loss(model, valid, settings, objective=objective)
    return result


def _batches(samples: Sequence[Sample], settings: TrainSettings) -> Iterator[PackedBatch]:
    for epoch in range(settings.epochs):
        yield from pack(samples, tokens=settings.micro_tokens, seed=settings.seed + epoch)


def _schedule(step: int, steps: int, settings: TrainSettings, elapsed: float) -> float:
    """Linear warm-up, then cosine to 0. With a time limit, progress is whichever of steps and minutes is further on."""
    progress = step / steps
    if settings.max_minutes is not None:
        progress = max(progress, elapsed / (60 * settings.max_minutes))
    warm = min(1.0, (step + 1) / max(1.0, settings.warmup * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _mean(parts: Sequence[LossParts]) -> dict[str, float]:
    return {name: sum(float(getattr(p, name)) for p in parts) / len(parts) for name in ("total", "value", "bins")}


@torch.no_grad()
def evaluate_loss(
    model: LengthValueModel, samples: Sequence[Sample], settings: TrainSettings, *, objective: _Objective | None = None
) -> dict[str, float]:
    """Token-mean losses on held-out samples."""
    objective = objective or _Objective(model, settings)
    sums = {"total": 0.0, "value": 0.0, "bins": 0.0}
    weight = 0
    for batch in pack(samples, tokens=settings.micro_tokens, seed=0):
        loss, count = objective(batch), int(batch.supervised.sum())
        for name in sums:
            sums[name] += float(getattr(loss, name)) * count
        weight += count
    return {name: value / max(1, weight) for name, value in sums.items()}
