"""Shipped recipes, changes of a recipe, dry runs, and training on given rollouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lenvm._resources import recipes_dir
from lenvm.errors import DataError
from lenvm.modeling import LengthValueModel
from lenvm.rollouts import Rollout, RolloutWriter
from lenvm.training import load_recipe
from lenvm.training.dry_run import dry_run
from lenvm_service.cli import main
from tests.support.training import made

pytestmark = pytest.mark.usefixtures("single_thread")
PAPER = ("qwen2.5-1.5b-on-qwen2.5-7b", "qwen3-1.7b-on-qwen3-30b-a3b")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_train_everything_and_the_value_alone(name: str) -> None:
    recipe = load_recipe(recipes_dir() / f"{name}.toml")
    assert recipe.name == name
    assert recipe.writer != recipe.backbone
    assert (recipe.head.num_bins, recipe.train.mode, recipe.train.lam) == (0, "full", 1.0)
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.train.warmup_steps) == (2e-5, 2, 50)
    assert recipe.gamma == {"qwen2": 0.997, "qwen3": 0.999}[recipe.model_type]


@pytest.mark.parametrize("name", PAPER)
def test_a_dry_run_trains_saves_and_loads_that_architecture(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(recipes_dir() / f"{name}.toml")
    result = dry_run(recipe)
    assert result["steps"] == result["checkpoints"] == 2
    assert set(result["files"]) == {"head.safetensors", "lenvm.json", "model.safetensors"}
    assert 0 < result["reload_error"] < 5e-3  # whole weights are stored in bfloat16
    assert result["plan"]["architecture"] == recipe.model_type
    assert result["plan"]["answers"] == 16 * sum(recipe.rollouts.prompts.values())


def test_a_dry_run_of_adapters_and_of_an_unknown_architecture() -> None:
    recipe = load_recipe(recipes_dir() / "smollm2-135m-instruct.toml")
    assert set(dry_run(recipe)["files"]) == {
        "head.safetensors",
        "lenvm.json",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    with pytest.raises(DataError, match="no-such"):
        dry_run(replace(recipe, model_type="no-such"))


def test_dry_run_on_the_command_line(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("train", PAPER[0], "--dry-run", "--set", "train.learning_rate=1e-4")
    assert status == 0, err
    assert "Qwen/Qwen2.5-7B-Instruct" in out
    assert "0.0001" in out
    assert "2 steps" in out
    document = json.loads(run("train", PAPER[1], "--dry-run", "--json")[1])
    assert document["plan"]["gamma"] == 0.999
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_changes_are_toml_or_plain_text() -> None:
    path = recipes_dir() / "smollm2-135m-instruct.toml"
    changes = ["train.epochs=1", "gamma=0.99", "train.order=grouped", "rollouts.prompts.math=7", "branches.prompts=5"]
    recipe = load_recipe(path, changes)
    assert (recipe.train.epochs, recipe.gamma, recipe.train.order) == (1, 0.99, "grouped")
    assert recipe.rollouts.prompts["math"] == 7
    assert recipe.branches is not None
    assert recipe.branches.prompts == 5
    for wrong in (
        "train.epochs",
        "=1",
        "train..epochs=1",
        "gamma.x=1",
        "train.epoch=1",
        "train.order=sorted",
        "branches.point=2",
    ):
        with pytest.raises(DataError):
            load_recipe(path, [wrong])


RECIPE = """
name = "tiny"
backbone = "{backbone}"
gamma = 0.97
generator = {{ temperature = 0.7, max_new_tokens = 40 }}
rollouts = {{ prompts = {{ math = 4 }} }}
head = {{ width = 8 }}
train = {{ mode = "full", epochs = 1, batch_tokens = 512, micro_tokens = 512, learning_rate = 1e-3 }}
"""


def write_rollouts(folder: Path, name: str, temperature: float = 0.6) -> None:
    generator = {"backbone": "someone/else", "temperature": temperature, "top_p": 1.0, "max_new_tokens": 64}
    with RolloutWriter(folder, generator) as writer:
        for index, sample in enumerate(made(120)):
            row = Rollout(f"{name}{index}", "math", sample.prompt_ids, sample.token_ids, sample.finished, index)
            writer.add(row)


def test_training_on_given_rollouts(run: Any, tiny_backbone: Path, tmp_path: Path) -> None:
    recipe, output = tmp_path / "tiny.toml", tmp_path / "out"
    recipe.write_text(RECIPE.format(backbone=tiny_backbone))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_rollouts(folder, folder.name)
    options = ["train", recipe, "--work", tmp_path / "work", "--output", output, "--name", "other"]
    status, out, err = run(*options)
    assert (status, out) == (1, "")
    assert "--rollouts" in err
    status, out, err = run(*options, "--rollouts", folders[0], "--rollouts", folders[1], "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert result["rollouts"]["train"]["answers"] == 240
    assert result["valid"]["value"] > 0  # some prompts of the first folder were held out
    assert result["tokens"] < 1.02 * result["rollouts"]["train"]["tokens"] + 240 * 9
    model = LengthValueModel.from_pretrained(output)
    assert model.own_weights
    assert (model.config.name, model.config.generator.backbone) == ("other", "someone/else")
    assert (model.config.generator.temperature, model.config.generator.max_new_tokens) == (0.6, 64)
    assert "fully fine-tuned" in (output / "README.md").read_text()
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()

    write_rollouts(tmp_path / "c", "c", temperature=1.0)
    status, out, err = run(*options, "--rollouts", folders[0], "--rollouts", tmp_path / "c")
    assert (status, out) == (1, "")
    assert "different generators" in err
