"""Training a Length Value Model from rollouts."""

from __future__ import annotations

from lenvm.training.loop import TrainSettings, evaluate_loss, train
from lenvm.training.loss import Targets, length_loss
from lenvm.training.packing import PackedBatch, pack
from lenvm.training.recipe import Recipe, load_recipe, run_recipe

__all__ = [
    "PackedBatch",
    "Recipe",
    "Targets",
    "TrainSettings",
    "evaluate_loss",
    "length_loss",
    "load_recipe",
    "pack",
    "run_recipe",
    "train",
]
