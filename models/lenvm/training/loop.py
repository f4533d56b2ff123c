"""The training loop: packed batches, AdamW, warm-up and cosine decay; one process or several; goes on after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lenvm.errors import DataError, InvalidRequestError
from lenvm.modeling import LengthValueModel
from lenvm.training.checkpoints import Checkpoints, Position
from lenvm.training.data import Samples, SampleTable, Source, as_sources
from lenvm.training.distributed import World, clip_gradients
from lenvm.training.engine import Engine
from lenvm.training.feed import Feed, Step
from lenvm.training.logs import TrainLog
from lenvm.training.packing import BatchShape, plan
from lenvm.training.settings import TrainSettings
from lenvm.training.targets import ValueTarget

__all__ = ["TrainSettings", "Trainer", "evaluate_loss", "train"]

OnStep = Callable[[int, int, dict[str, float]], None]
_PARTS = ("total", "value", "bins")


def train(
    model: LengthValueModel,
    data: Samples | Source | Sequence[Samples | Source],
    settings: TrainSettings,
    *,
    valid: Samples | Source | Sequence[Source] = (),
    work: Path | None = None,
    log: Path | None = None,
    on_step: OnStep | None = None,
    on_resume: Callable[[int, int], None] | None = None,
    target: ValueTarget | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place; returns the last training losses, the validation losses and the throughput.

    Args:
        data: one rollout set (or sequence of samples), or several, each bare or a ``Source`` with its repeats.
        valid: held-out samples, measured at the end.
        work: a folder for checkpoints, ``train.jsonl`` and TensorBoard events; the same call goes on from there.
        log: the JSON lines go here instead.
        on_step: ``on_step(step, steps, metrics)`` at every log line; drives a progress bar.
        on_resume: ``on_resume(step, steps)`` where an earlier run is continued.
        target: the value part's space, in place of the one that ``settings.target`` names.
        world: the processes that train together; default: all there are.

    Raises:
        DataError: there is no sample, one does not fit in a micro-batch, or ``work`` cannot be written.
        InvalidRequestError: settings that do not go together, or with this model.
    """
    trainer = Trainer(model, data, settings, valid=valid, target=target, world=world)
    return trainer.run(work=work, log=log, on_step=on_step, on_resume=on_resume)


class Trainer:
    """One run; :func:`train` is the usual door. ``steps`` is known before it starts."""

    def __init__(
        self,
        model: LengthValueModel,
        data: Samples | Source | Sequence[Samples | Source],
        settings: TrainSettings,
        *,
        valid: Samples | Source | Sequence[Source] = (),
        target: ValueTarget | None = None,
        world: World | None = None,
    ) -> None:
        self.model, self.settings, self.world = model, settings, world or World.current()
        if settings.accumulate % self.world.size:
            raise InvalidRequestError(
                f"batch_tokens must hold a multiple of {self.world.size} micro-batches, one for each process",
                param="batch_tokens",
            )
        torch.manual_seed(settings.seed)
        self.table = SampleTable(
            as_sources(data), max_tokens=settings.max_sample_tokens, prompt_only=settings.supervise == "prompt"
        )
        tokens, order = settings.micro_tokens, settings.order
        plans = [
            plan(self.table, tokens=tokens, seed=settings.seed + epoch, order=order) for epoch in range(settings.epochs)
        ]
        self.batches = [batch for batches in plans for batch in batches]
        if not self.batches:
            raise DataError("there is no sample to train on")
        self.steps = -(-len(self.batches) // settings.accumulate)
        self.held_out = HeldOut(valid, settings)
        self.shape = BatchShape.fitting(self.table, plans, tokens).covering(self.held_out.shape)
        self.engine = Engine(model, settings, target=target)
        self.world.share(self.engine.parameters.values())
        if self.world.size > 1 and settings.mode == "full":
            self.engine.shard()
        self.parameters = self.engine.parameters
        self.optimizer = self._optimizer()
        self._clock = _Clock()
        self._pending: list[torch.Tensor] = []  # losses of the last steps, still on the device
        self._norm = torch.zeros(())

    def run(
        self,
        *,
        work: Path | None = None,
        log: Path | None = None,
        on_step: OnStep | None = None,
        on_resume: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Train to the end; see :func:`train`."""
        digest = self.digest()
        checkpoints = Checkpoints(work / "checkpoints", digest, self.world) if work else None
        found = checkpoints.load(self.parameters, self.optimizer, self.model.device) if checkpoints else None
        position = found or Position()
        started_at = position.step
        if started_at and on_resume:
            on_resume(started_at, self.steps)
        log = work / "train.jsonl" if work and log is None else log
        events = work / "tb" / digest[:12] if work else None
        lines = TrainLog(log, events, after=started_at) if self.world.first else TrainLog(None, None, after=0)
        self._clock = _Clock(position)
        self.model.train()
        try:
            exact = _one_order(self.settings.deterministic)
            with exact, _reduced_precision(self.model.device), self._feed(started_at) as feed:
                for step in feed:
                    scale = self._schedule(position)
                    if scale <= 0.0:
                        break
                    self._step(feed, step, scale, position)
                    done = position.step == self.steps
                    if done or position.step % self.settings.log_every == 0:
                        self._report(position, lines, on_step)
                    if checkpoints and not done and self._is_due(position):
                        self._save(checkpoints, position, lines)
                if self._pending or position.counted:
                    self._report(position, lines, on_step)
                if checkpoints and position.step > started_at:
                    self._save(checkpoints, position, lines)
                result = self._result(position, started_at)
        finally:
            lines.close()
        self.engine.finish()
        self.model.eval()
        return result

    def digest(self) -> str:
        """What a checkpoint must share with this run: settings, data and model."""
        config = self.model.config
        return self.settings.digest(
            data=self.table.digest(),
            backbone=config.backbone.sha256,
            layers=len(self.model.decoder.layers),
            head=[config.head.width, config.head.bins.to_dict() if config.head.bins else None],
            gamma=config.gamma,
            target=type(self.engine.target).__qualname__,
        )

    def _feed(self, start: int) -> Feed:
        return Feed(
            self.table, self.batches, self.shape, self.settings, device=self.model.device,
            accumulate=self.settings.accumulate, start=start, rank=self.world.rank, size=self.world.size,
        )  # fmt: skip

    def _optimizer(self) -> torch.optim.AdamW:
        settings = self.settings
        head = [p for name, p in self.parameters.items() if name.startswith("head.")]
        others = [p for name, p in self.parameters.items() if not name.startswith("head.")]
        rate = settings.head_learning_rate or settings.learning_rate
        return torch.optim.AdamW(
            [{"params": others, "base": settings.learning_rate}, {"params": head, "base": rate}],
            lr=settings.learning_rate,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=self.model.device.type == "cuda",
        )

    def _step(self, feed: Feed, step: Step, scale: float, position: Position) -> None:
        """Gradients of this process's micro-batches, their mean over the processes, and one step of AdamW."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * scale
        batches, count = feed.to_device(step)
        self.engine.begin_step()
        parts = []
        for batch in batches:
            loss = self.engine(batch, count)
            # Times the processes: gradients are averaged over them, and ``count`` is that of all.
            (loss.total * self.world.size).backward()
            parts.append(torch.stack([loss.total, loss.value, loss.bins]).detach())
        self.engine.end_step()
        trained = list(self.parameters.values())
        self.world.average_gradients(trained)
        self._norm = clip_gradients(trained, self.settings.clip, self.world)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending.append(torch.stack(parts).sum(0))
        position.step += 1
        position.tokens += step.micro_batches * self.settings.micro_tokens
        self._clock.tick(position)

    def _gather(self, position: Position) -> None:
        """Bring the pending losses to the CPU, into ``position``; in every process at the same steps."""
        if self._pending:
            for row in self.world.total(torch.stack(self._pending)).tolist():
                position.sums = [a + b for a, b in zip(position.sums, row, strict=True)]
            position.counted += len(self._pending)
            self._pending = []

    def _report(self, position: Position, lines: TrainLog, on_step: OnStep | None) -> None:
        """One line: losses averaged over the steps since the last one."""
        self._gather(position)
        position.metrics = {
            **{name: total / position.counted for name, total in zip(_PARTS, position.sums, strict=True)},
            "grad_norm": float(self._norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_s": self._clock.rate(position),
        }
        position.sums, position.counted = [0.0, 0.0, 0.0], 0
        lines.write(position.step, self.steps, position.metrics)
        if on_step and self.world.first:
            on_step(position.step, self.steps, position.metrics)

    def _is_due(self, position: Position) -> bool:
        settings = self.settings
        if settings.checkpoint_every and position.step % settings.checkpoint_every == 0:
            return True
        if not settings.checkpoint_minutes or position.step % settings.log_every:
            return False
        return self.world.agree(self._clock.since_save()) > 60 * settings.checkpoint_minutes

    def _save(self, checkpoints: Checkpoints, position: Position, lines: TrainLog) -> None:
        self._gather(position)
        lines.flush()
        checkpoints.save(position, self.parameters, self.optimizer)
        self._clock.saved()

    def _schedule(self, position: Position) -> float:
        """Linear warm-up, then cosine to 0. With a time limit, whichever of steps and minutes is further on."""
        settings = self.settings
        progress = position.step / self.steps
        if settings.max_minutes is not None:
            progress = max(progress, self.world.agree(self._clock.seconds()) / (60 * settings.max_minutes))
        steps = settings.warmup * self.steps if settings.warmup_steps is None else settings.warmup_steps
        warm = min(1.0, (position.step + 1) / max(1.0, steps))
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def _result(self, position: Position, started_at: int) -> dict[str, Any]:
        result: dict[str, Any] = {
            "steps": position.step,
            "tokens": position.tokens,
            "seconds": position.seconds,
            "tokens_per_s": self._clock.rate(position),
            "train": dict(position.metrics),
        }
        if started_at:
            result["resumed_from"] = started_at
        if len(self.held_out.table):
            result["valid"] = self.held_out.losses(self.engine, self.shape, self.world)
        return result


class _Clock:
    """Seconds of training, those of earlier runs included; a first step, which compiles, does not count."""

    def __init__(self, position: Position | None = None) -> None:
        self._before = position.seconds if position else 0.0
        self._first: tuple[float, int] | None = None  # when the first step of this process was done; tokens by then
        self._save = self._made = time.perf_counter()

    def tick(self, position: Position) -> None:
        if self._first is None:
            self._first = (time.perf_counter(), position.tokens)
        position.seconds = self.seconds()

    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._first[0] if self._first else 0.0)

    def rate(self, position: Position) -> float:
        """Tokens a second after the first step; over all of it where there was but one."""
        if self._first is None:
            return 0.0
        tokens = position.tokens - self._first[1]
        if tokens:
            return tokens / max(1e-9, time.perf_counter() - self._first[0])
        return position.tokens / max(1e-9, time.perf_counter() - self._made)

    def since_save(self) -> float:
        return time.perf_counter() - self._save

    def saved(self) -> None:
        self._save = time.perf_counter()


class HeldOut:
    """Samples that are measured, not trained on."""

    def __init__(self, samples: Samples | Source | Sequence[Source], settings: TrainSettings) -> None:
        self.table = SampleTable(
            as_sources(samples), max_tokens=settings.max_sample_tokens, prompt_only=settings.supervise == "prompt"
        )
        self.settings = settings
        self.batches = plan(self.table, tokens=settings.micro_tokens, seed=0)
        self.shape = BatchShape.fitting(self.table, [self.batches], settings.micro_tokens)

    def losses(self, engine: Engine, shape: BatchShape, world: World) -> dict[str, float]:
        """Token-mean losses; the processes share the work."""
        device = engine.model.device
        sums = torch.zeros(4, dtype=torch.float64)
        engine.begin_step()
        feed = Feed(
            self.table, self.batches, shape, self.settings, device=device, accumulate=world.size, rank=world.rank,
            size=world.size,
        )  # fmt: skip
        with feed:
            for step in feed:
                (batch,), _ = feed.to_device(step)
                weight = batch.targets.weight.sum()
                # With gradients switched on, though none is taken: the compiled code is the same as in training.
                loss = engine(batch, weight)
                sums[:3] += (torch.stack([loss.total, loss.value, loss.bins]).detach() * weight).double().cpu()
                sums[3] += float(weight)
        *parts, weight = world.total(sums).tolist()
        return {name: part / max(1.0, weight) for name, part in zip(_PARTS, parts, strict=True)}


def evaluate_loss(model: LengthValueModel, samples: Samples | Source, settings: TrainSettings) -> dict[str, float]:
    """Token-mean losses on held-out samples."""
    held_out = HeldOut(samples, settings)
    return held_out.losses(Engine(model, settings), held_out.shape, World.current())


@contextmanager
def _one_order(wanted: bool) -> Iterator[None]:
    """Kernels that add in one order, where PyTorch has such; the process's own choice comes back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _reduced_precision(device: torch.device) -> Iterator[None]:
    """On a GPU the float32 products (the head's) may use TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
