"""What a recipe samples, stage by stage and in parts, and the training on all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lenvm.errors import DataError
from lenvm.modeling import LengthValueModel
from lenvm.rollouts import Rollout, RolloutSet
from lenvm.rollouts.store import part_folders
from lenvm.training import load_recipe, run_recipe
from lenvm.training.collecting import BranchPlan, stored
from lenvm.training.recipe import Recipe, _split, make_rollouts

pytestmark = pytest.mark.unit
RECIPE = """
name = "tiny"
backbone = "{backbone}"
gamma = 0.97
generator = {{ max_new_tokens = 24 }}
rollouts = {{ prompts = {{ math = 5, code = 0 }}, samples = 2, valid_prompts = 1, max_rows = 16 }}
head = {{ width = 8, bins = {{ cap = 64 }} }}
train = {{ epochs = 1, batch_tokens = 512, micro_tokens = 512, learning_rate = 1e-3, lora_rank = 2 }}
[branches]
prompts = 4
sentences = 3
guide_answers = 0.5
max_rows = 8
targets = [4, 10]
points = 2
max_new_tokens = 6
"""


@pytest.fixture
def recipe(tiny_backbone: Path, tmp_path: Path) -> Recipe:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(backbone=tiny_backbone))
    return load_recipe(path)


def test_parts_together_are_the_whole(recipe: Recipe, tiny_data: Path, tmp_path: Path, single_thread: None) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    stages: list[str] = []

    def progress(stage: str, *_: Any) -> None:
        if stage not in stages:
            stages.append(stage)

    result = run_recipe(recipe, data=tiny_data, work=whole, output=tmp_path / "out", progress=progress)
    names = ["valid", "train", "sentences", "guide", "branches"]
    assert stages == [f"rollouts-{n}" if n != "guide" else "train-guide" for n in names] + ["train"]
    assert {name: row["answers"] for name, row in result["rollouts"].items()} == {
        "valid": 4,
        "train": 2 * (5 + 21),  # of 24 code prompts three are held out for calibration
        "sentences": 3,
        "branches": 8,
    }
    for name in names:
        for part in ((0, 2), (1, 2)) if name in ("train", "sentences", "branches") else ((0, 1),):
            make_rollouts(recipe, data=tiny_data, work=shared, device="cpu", only=[name], part=part)
    for name in ("train", "sentences"):
        parts = stored(shared, name)
        assert len(part_folders(shared / f"rollouts-{name}")) == 2
        together = {r.key: r for found in parts for r in found}
        assert together == {r.key: r for found in stored(whole, name) for r in found}
    assert {r.key for found in stored(shared, "branches") for r in found} == {
        r.key for found in stored(whole, "branches") for r in found
    }
    # Every stage is there: the last command only trains.
    stages.clear()
    run_recipe(recipe, data=tiny_data, work=shared, output=tmp_path / "out2", progress=progress)
    assert stages in (["train"], ["rollouts-valid", "train"])
    model = LengthValueModel.from_pretrained(tmp_path / "out2")
    assert model.config.name == "tiny"


def test_a_second_round_is_guided_by_a_model_that_has_seen_the_first(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, single_thread: None
) -> None:
    assert recipe.branches is not None
    recipe = replace(recipe, branches=replace(recipe.branches, rounds=2))
    seen: list[str] = []
    work = tmp_path / "work"
    make_rollouts(recipe, data=tiny_data, work=work, device="cpu", only=["valid", "train", "sentences"])
    for name in ("guide", "branches", "guide-2", "branches-2"):
        if name.startswith("branches"):
            with pytest.raises(DataError, match=name.replace("branches", "only guide")):
                make_rollouts(recipe, data=tiny_data, work=tmp_path / "none", device="cpu", only=[name], part=(0, 2))
        make_rollouts(
            recipe, data=tiny_data, work=work, device="cpu", only=[name],
            progress=lambda stage, *_: None if stage in seen else seen.append(stage),
        )  # fmt: skip
    assert seen == ["train-guide", "rollouts-branches", "train-guide-2", "rollouts-branches-2"]
    rounds = [stored(work, name)[0] for name in ("branches", "branches-2")]
    assert [found.generator["seed"] for found in rounds] == [1, 2]
    first, second = (
        json.loads((work / f"{name}-run" / "train.jsonl").read_text().splitlines()[-1]) for name in ("guide", "guide-2")
    )
    assert second["steps"] > first["steps"]  # sentences and the first round's branches came on top
    result = run_recipe(recipe, data=tiny_data, work=work, output=tmp_path / "out")
    assert result["rollouts"]["branches-2"]["answers"] == result["rollouts"]["branches"]["answers"] == 8
    with pytest.raises(DataError, match="rounds"):
        BranchPlan.from_dict({"prompts": 1, "rounds": 0})


def test_what_an_earlier_larger_request_left_is_not_trained_on(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, single_thread: None
) -> None:
    work = tmp_path / "work"
    run_recipe(recipe, data=tiny_data, work=work, output=tmp_path / "out")
    assert recipe.branches is not None
    less = replace(
        recipe,
        rollouts=replace(recipe.rollouts, prompts={"math": 3}, samples=1),
        branches=replace(recipe.branches, prompts=2, sentences=0),
    )
    result = run_recipe(less, data=tiny_data, work=work, output=tmp_path / "less")
    fresh = run_recipe(less, data=tiny_data, work=tmp_path / "fresh", output=tmp_path / "fresh-out")
    assert {name: row["answers"] for name, row in result["rollouts"].items()} == {
        "valid": 1,
        "train": 3,
        "branches": 4,
    }
    assert {name: row["answers"] for name, row in fresh["rollouts"].items()} == {
        name: row["answers"] for name, row in result["rollouts"].items()
    }
    # The same answers; branches hang on the guide, which the larger request trained.
    for name in ("valid", "train"):
        assert result["rollouts"][name] == fresh["rollouts"][name]


def test_parts_that_were_made_for_fewer_samples_are_told(recipe: Recipe, tiny_data: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, branches=None)
    fewer = replace(recipe, rollouts=replace(recipe.rollouts, samples=1))
    for part in (0, 1):
        make_rollouts(fewer, data=tiny_data, work=tmp_path, device="cpu", only=["train"], part=(part, 2))
    with pytest.raises(DataError, match="holds 26 of 52 answers"):
        run_recipe(recipe, data=tiny_data, work=tmp_path, output=tmp_path / "out")


def test_missing_parts_and_wrong_stages_are_told(recipe: Recipe, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "rollouts-train" / "part-0-of-2").mkdir(parents=True)
    with pytest.raises(DataError, match="other parts"):
        stored(tmp_path, "train")
    (tmp_path / "rollouts-train" / "part-1-of-2").mkdir()
    (tmp_path / "rollouts-train" / "part-0-of-2" / "complete").touch()
    with pytest.raises(DataError, match="to their end"):
        stored(tmp_path, "train")
    (tmp_path / "rollouts-train" / "part-1-of-2" / "complete").touch()
    assert len(part_folders(tmp_path / "rollouts-train")) == 2
    with pytest.raises(DataError, match="no stage 'tests'"):
        make_rollouts(recipe, data=tiny_data, work=tmp_path, device="cpu", only=["tests"])


def test_a_recipe_without_sentences_and_its_rollouts_given_again(
    recipe: Recipe, tiny_data: Path, tmp_path: Path, single_thread: None
) -> None:
    assert recipe.branches is not None
    recipe = replace(recipe, branches=replace(recipe.branches, sentences=0))
    work = tmp_path / "work"
    with pytest.raises(DataError, match="only guide"):
        make_rollouts(recipe, data=tiny_data, work=work, device="cpu", only=["branches"], part=(0, 2))
    result = run_recipe(recipe, data=tiny_data, work=work, output=tmp_path / "out")
    assert set(result["rollouts"]) == {"valid", "train", "branches"}
    # Branches are cut sooner than answers; that makes them no other generator's.
    folders = [work / "rollouts-train", work / "rollouts-branches"]
    again = run_recipe(recipe, data=None, work=tmp_path / "again", output=tmp_path / "out2", rollouts=folders)
    assert again["rollouts"]["train"]["answers"] == sum(len(s) for n in ("train", "branches") for s in stored(work, n))
    assert LengthValueModel.from_pretrained(tmp_path / "out2").config.generator.max_new_tokens == 24


def test_branches_are_held_out_with_their_prompt() -> None:
    def rollouts(suffix: str) -> RolloutSet:
        return RolloutSet([Rollout(f"p{i}{suffix}", "math", [3], [4, 5], True, i) for i in range(300)])

    sources, valid = _split([rollouts(""), rollouts("#length#branch1"), rollouts("#branch0")])
    names = [
        {source.samples.prompt_keys[row].partition("#")[0] for row in source.rows.tolist()}  # type: ignore[union-attr]
        for source in sources
    ]
    assert names[0] == names[1] == names[2]
    assert valid.rows is not None
    assert not names[0] & {valid.samples.prompt_keys[row] for row in valid.rows.tolist()}  # type: ignore[union-attr]
    assert len(valid.rows)


def test_branch_fields_are_checked() -> None:
    plan = BranchPlan.from_dict({"prompts": 3, "targets": [5, 9], "points": 1})
    assert (plan.prompts, plan.settings.targets, plan.settings.points) == (3, (5, 9), 1)
    with pytest.raises(DataError, match="unknown field point"):
        BranchPlan.from_dict({"prompts": 3, "point": 1})
    with pytest.raises(DataError, match="no field prompts"):
        BranchPlan.from_dict({"points": 1})
