"""What ``lenvm eval ablation`` and ``lenvm eval scaling`` share: their options, and the data that they open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenvm_service.cli._options import DEFAULT_MODEL
from lenvm_service.cli._session import check_device

if TYPE_CHECKING:
    from lenvm.evaluation.experiments import Bench

__all__ = [
    "BackboneNameOption",
    "BatchOption",
    "CompileOption",
    "LearningRateOption",
    "MicroOption",
    "PromptsOption",
    "SeedsOption",
    "StepsOption",
    "TestOption",
    "TestPromptsOption",
    "TrainOption",
    "WorkFileOption",
    "bench_of",
]

TrainOption = Annotated[
    Path, typer.Option("--rollouts", metavar="DIR", help="Answers to train on, several of each prompt.")
]
TestOption = Annotated[Path, typer.Option("--test", metavar="DIR", help="Answers to the test prompts.")]
BackboneNameOption = Annotated[
    str, typer.Option("--backbone", metavar="NAME|DIR", help="The backbone that every model starts from.")
]
StepsOption = Annotated[
    int, typer.Option("--steps", min=0, help="Optimiser steps of each model. 0: one epoch of all train answers.")
]
BatchOption = Annotated[int, typer.Option("--batch-tokens", min=64, help="Tokens of a step.")]
MicroOption = Annotated[int, typer.Option("--micro-tokens", min=64, help="Tokens of a forward pass.")]
LearningRateOption = Annotated[float, typer.Option("--learning-rate", help="Of adapters and head.")]
PromptsOption = Annotated[
    int | None, typer.Option("--prompts", min=1, help="Train prompts of each domain. Default: all there are.")
]
TestPromptsOption = Annotated[
    int | None, typer.Option("--test-prompts", min=1, help="Test prompts of each domain. Default: all there are.")
]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="Models of each kind, where noise is measured.")]
CompileOption = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Compile the layers. Default: on a GPU.")
]
WorkFileOption = Annotated[
    Path | None,
    typer.Option("--work", metavar="FILE", help="Keep finished models' figures here (JSON lines); a rerun goes on."),
]
DEFAULT_ROLLOUTS = Path("runs") / DEFAULT_MODEL / "rollouts-train"
DEFAULT_TEST = Path("runs") / DEFAULT_MODEL / "rollouts-eval-test"


def bench_of(rollouts: Path, test: Path, backbone: str, device: str, *, compile: bool | None, **budget: Any) -> Bench:
    """Read both sets of answers and load the backbone."""
    from transformers.utils import logging

    from lenvm.evaluation.experiments import Budget, open_bench
    from lenvm.rollouts import read_rollouts

    logging.set_verbosity_error()
    on_gpu = check_device(device).startswith("cuda")
    chosen = Budget(compile=on_gpu if compile is None else compile, **budget)
    return open_bench(backbone, read_rollouts(rollouts), read_rollouts(test), chosen, device=device)
