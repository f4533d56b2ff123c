"""Ablation and scaling: targets, the measurement of small models, and both commands on tiny random parts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenvm.errors import DataError, InvalidRequestError
from lenvm.evaluation.ablation import (
    GROUPS,
    _difference,
    ablation_specs,
    average,
    summarise,
)
from lenvm.evaluation.experiments import Bench, Budget, Spec, choose_prompts, logit_of, open_bench, run_specs
from lenvm.evaluation.results import difference_in_words
from lenvm.evaluation.scaling import scaling_specs, summarise_scaling
from lenvm.evaluation.states_table import Readings, StateTable, score_readings
from lenvm.evaluation.targets import TARGETS
from lenvm.rollouts import Rollout, RolloutSet, RolloutWriter
from lenvm.training.targets import Targets, make_target
from lenvm_service.cli import main


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower when threads share them, much slower beside other processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


GENERATOR = {"backbone": "tiny", "temperature": 0.7, "top_p": 1.0, "max_new_tokens": 40}


def answers(prompts: int, samples: int, seed: int) -> list[Rollout]:
    """The first prompt token says how long the answers are: something that a tiny model can learn."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(prompts):
        for domain in ("math", "code"):
            kind = int(rng.integers(3))
            for sample in range(samples):
                length = int(rng.integers(1, 5)) + (2, 12, 40)[kind]
                finished = length <= 40
                made.append(
                    Rollout(
                        f"{domain}-{seed}-{number}", domain, [10 + kind, *rng.integers(40, 120, 3).tolist()],
                        rng.integers(40, 120, min(length, 40)).tolist(), finished, sample,
                    )
                )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def sets() -> tuple[RolloutSet, RolloutSet]:
    return RolloutSet(answers(24, 3, 1), GENERATOR), RolloutSet(answers(8, 3, 2), GENERATOR)


@pytest.fixture
def bench(tiny_backbone: Path, sets: tuple[RolloutSet, RolloutSet]) -> Bench:
    budget = Budget(steps=3, batch_tokens=256, micro_tokens=256, learning_rate=3e-3, head_width=16)
    return open_bench(str(tiny_backbone), *sets, budget)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_is_read_back_as_the_length_that_it_aimed_at(name: str) -> None:
    target = make_target(name, 0.99, 1.0)
    lengths = torch.tensor([1.0, 7.0, 64.0, 700.0, 2049.0])
    z = torch.zeros(5, requires_grad=True)
    targets = Targets(lengths.int(), torch.ones(5, dtype=torch.bool), torch.ones(5))
    optimizer = torch.optim.LBFGS([z], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = target.loss(z, targets).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    read = target.read(z.detach())
    # The bounded one reaches its bound only in the limit.
    torch.testing.assert_close(read, lengths, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_cut_answer_costs_only_below_its_bound(name: str) -> None:
    target = make_target(name, 0.99, 1.0)
    z = torch.tensor([-3.0, 30.0])
    cut = Targets(torch.tensor([500, 500]), torch.zeros(2, dtype=torch.bool), torch.ones(2))
    below, above = target.loss(z, cut).tolist()
    assert below > 0
    assert above == 0
    known = Targets(cut.remaining, torch.ones(2, dtype=torch.bool), cut.weight)
    assert (target.loss(z, known) > 0).all()
    assert float(target.loss(z, known)[0]) == pytest.approx(below)


@pytest.mark.parametrize("name", ["return", *sorted(TARGETS)])
def test_every_model_starts_at_the_same_guess(name: str) -> None:
    target = make_target(name, 0.997, 1.0)
    assert float(target.read(torch.tensor([logit_of(target, 180.0)]))[0]) == pytest.approx(180.0, rel=1e-3)


def test_figures_of_a_perfect_reader_are_zero_and_of_a_wrong_one_known(sets: tuple[RolloutSet, RolloutSet]) -> None:
    states = StateTable.of(sets[1], 2, 40)
    content, finished = states.table.content, states.table.finished
    exact = np.concatenate([np.arange(n, -1, -1) + bool(f) for n, f in zip(content, finished, strict=True)]).astype(
        float
    )
    found = score_readings(states, Readings(exact, None, None, {}), 40)["figures"]["value"]
    assert found["all_states"]["value_rmse"] == pytest.approx(0, abs=1e-9)
    assert found["all_states"]["mae"] == 0
    assert all(row["error"] == 0 for row in found["by_position"].values())
    assert found["by_position"].keys() == {"0", "0.25", "0.5", "0.75", "0.9"}
    # Saying 11 remaining tokens everywhere means 10 content tokens at the prompt.
    said = score_readings(states, Readings(np.full_like(exact, 11.0), None, None, {}), 40)["figures"]["value"]
    by_hand = [abs(10 - truth) / truth for truth in states.truth]
    assert np.mean(said["prompt_errors"]) == pytest.approx(np.mean(by_hand), abs=1e-4)
    math_mre = np.mean([error for error, d in zip(by_hand, states.domains, strict=True) if d == "math"])
    assert said["domains"]["math"]["mre"] == pytest.approx(math_mre, abs=1e-6)
    ended = [n for n, f in zip(content, finished, strict=True) if f]
    half = np.mean([abs(10 - (n - n // 2)) / n for n in ended])
    assert said["by_position"]["0.5"]["error"] == pytest.approx(half)


def test_truth_takes_all_answers_and_a_cut_one_counts_as_the_cap() -> None:
    rows = [
        Rollout("p", "math", [5], [7] * 10, True, 0),
        Rollout("p", "math", [5], [7] * 30, False, 1),
        Rollout("p", "math", [5], [7] * 20, True, 2),
    ]
    states = StateTable.of(RolloutSet(rows, GENERATOR), 1, 40)
    assert states.truth.tolist() == [pytest.approx((10 + 40 + 20) / 3)]
    assert len(states.rollouts) == 1


def test_nested_shares_of_the_prompts(sets: tuple[RolloutSet, RolloutSet]) -> None:
    half, quarter = (set(choose_prompts(sets[0], None, share).prompt_keys) for share in (0.5, 0.25))
    assert quarter < half
    assert len(half) == 24
    assert len(quarter) == 12
    assert len(set(choose_prompts(sets[0], 5).prompt_keys)) == 10


def test_a_model_learns_and_a_second_call_trains_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.budget = replace(bench.budget, steps=16, batch_tokens=512, micro_tokens=512, learning_rate=1e-2)
    work = tmp_path / "runs" / "work.jsonl"
    specs = [Spec("return"), Spec("both", head="both")]
    before = run_specs(bench, [Spec("untrained", settings={"learning_rate": 1e-9, "head_learning_rate": 1e-9})])[0]
    first = run_specs(bench, specs, work=work)
    for run in first:
        assert run["steps"] == 16
        assert run["losses"]["value"] < 0.8 * before["losses"]["value"]
    assert first[0]["figures"].keys() == {"value"}
    assert first[1]["figures"].keys() == {"value", "bins", "mean"}
    assert math.isnan(first[0]["losses"]["bins"])
    assert first[1]["losses"]["bins"] < math.log(20)

    work.write_text(work.read_text() + '{"digest": "cut sho')
    bench.run = None  # type: ignore[assignment,method-assign]  # any training would fail
    again = run_specs(bench, specs, work=work)
    assert [run["figures"]["value"]["mre"] for run in again] == [run["figures"]["value"]["mre"] for run in first]
    with pytest.raises(TypeError):
        run_specs(bench, [Spec("new", gamma=0.9)], work=work)


def test_a_line_cut_short_does_not_swallow_the_next(bench: Bench, tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    work.write_text('{"digest": "cut sho')
    run_specs(bench, [Spec("return")], work=work)
    assert json.loads(work.read_text().splitlines()[-1])["run"]["name"] == "return"


def test_a_model_that_cannot_be_trained_is_told_and_does_not_stop_the_others(bench: Bench) -> None:
    class Failing(Bench):
        def run(self, spec: Spec, on_step: Any = None) -> dict[str, Any]:
            if spec.name == "bad":
                raise RuntimeError("no such kernel\nand more")
            return super().run(spec, on_step)

    bench.__class__ = Failing
    bad, good = run_specs(bench, [Spec("bad"), Spec("good")])
    assert bad["error"] == "no such kernel"
    assert "figures" in good


def test_seeds_differ_and_one_seed_repeats(bench: Bench) -> None:
    one, same, other = (bench.run(Spec("return", seed=seed))["figures"]["value"]["mre"] for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_depth_keeps_the_first_layers(bench: Bench) -> None:
    model = bench._model(Spec("shallow", depth=1))
    assert len(model.decoder.layers) == 1
    assert len(bench.decoder.layers) == 2
    with pytest.raises(InvalidRequestError, match="depth"):
        bench._model(Spec("deep", depth=3))


def test_other_generators_do_not_mix(tiny_backbone: Path, sets: tuple[RolloutSet, RolloutSet]) -> None:
    other = RolloutSet(list(sets[1]), {**GENERATOR, "temperature": 1.0})
    with pytest.raises(DataError, match="sampled differently"):
        open_bench(str(tiny_backbone), sets[0], other, Budget())


def test_specs_repeat_the_main_comparison_alone() -> None:
    specs = ablation_specs(seeds=2)
    assert len({(spec.name, spec.seed) for spec in specs}) == len(specs)
    assert {spec.name for spec in specs if spec.seed == 0} == {name for names in GROUPS.values() for name in names}
    assert {spec.name for spec in specs if spec.seed == 1} == {
        name for group in ("target", "order", "head") for name in GROUPS[group]
    }
    assert [spec.name for spec in ablation_specs(["gamma 0.99"], seeds=2)] == ["gamma 0.99"] * 2
    with pytest.raises(InvalidRequestError, match="magic"):
        ablation_specs(["magic"])


def test_the_full_model_stands_on_every_axis_once_trained() -> None:
    points = scaling_specs(30, 4)
    assert [at for axis, at, _ in points if axis == "depth"] == [5, 10, 20, 30]
    assert [at for axis, at, _ in points if axis == "samples"] == [1, 2, 4]
    assert sum(spec.name == "full" for _, _, spec in points) == 3
    assert len({spec.name for _, _, spec in points}) == 9
    with pytest.raises(InvalidRequestError, match="width"):
        scaling_specs(30, 4, ["width"])


def test_ablation_summary(bench: Bench) -> None:
    metrics = summarise(bench, ["order", "head"], seeds=2)
    assert metrics["groups"] == {"order": ["return", "grouped"], "head": ["return", "bins alone", "value and bins"]}
    row = metrics["variants"]["grouped"]
    assert row["mre"] == pytest.approx(np.mean(row["mre_by_seed"]))
    difference, low, high = row["against"]["return"]["mre_difference"]
    assert low <= difference <= high
    base = metrics["variants"]["return"]
    pooled = np.mean([row["domains"][d]["mre"] - base["domains"][d]["mre"] for d in ("math", "code")])
    assert difference == pytest.approx(pooled, abs=1e-4)  # as many prompts in each domain
    assert metrics["variants"]["bins alone"]["readings"].keys() == {"value", "bins", "mean"}
    assert metrics["data"]["train_prompts"] == 48


def test_a_difference_is_that_of_the_two_errors_shown(bench: Bench) -> None:
    # Domains of other sizes: the mean over prompts would be another one.
    kept = [r for r in bench.test.rollouts if r.domain == "math" or r.prompt_id.endswith(("-0", "-1"))]
    bench.test = StateTable.of(RolloutSet(kept, GENERATOR), 2, 40)
    metrics = summarise(bench, ["order", "gamma 0.99"], seeds=2)
    both, base = metrics["variants"]["grouped"], metrics["variants"]["return"]
    found = both["against"]["return"]
    assert not found["other_seeds"]
    assert (found["mre"], found["base_mre"]) == pytest.approx((both["mre"], base["mre"]), abs=1e-5)
    assert found["mre_difference"][0] == pytest.approx(both["mre"] - base["mre"], abs=2e-5)
    assert ":" not in str(difference_in_words(both))


def test_a_difference_over_fewer_seeds_than_the_table_says_so(bench: Bench) -> None:
    def run(name: str, seed: int, errors: list[float]) -> dict[str, Any]:
        figure = {"prompt_errors": errors}
        return {"name": name, "seed": seed, "spec": {"head": "value"}, "figures": {"value": figure}}

    runs = [run("return", 0, [0.2, 0.4]), run("return", 1, [0.6, 0.8]), run("gamma", 0, [0.3, 0.6])]
    found = _difference(runs, "gamma", "return", ["math", "code"])
    assert found["seeds"] == [0]
    assert found["mre_difference"][0] == pytest.approx(found["mre"] - found["base_mre"]) == pytest.approx(0.15)
    words = difference_in_words({"against": {"return": found}})
    assert words is not None
    assert words.startswith("+15.0 [")
    assert words.endswith(": 45.0 - 30.0, seed 0")
    assert difference_in_words({}) is None


def test_average_of_nested_figures() -> None:
    assert average([{"a": 1, "b": [1.0, 2.0], "c": None}, {"a": 1, "b": [3.0, 4.0], "c": 2.0}])["b"] == [2.0, 3.0]
    assert average([{"n": 3}, {"n": 3}]) == {"n": 3}
    assert average([{"n": 3}, {"n": 4}]) == {"n": 3.5}


def test_scaling_summary(bench: Bench) -> None:
    metrics = summarise_scaling(bench, ["depth", "samples"])
    assert [row["at"] for row in metrics["axes"]["depth"]] == [1, 2]
    assert [row["at"] for row in metrics["axes"]["samples"]] == [1, 2, 3]
    shallow, deep = metrics["axes"]["depth"]
    assert shallow["parameters"] * 2 == deep["parameters"]
    assert deep["mre"] == metrics["axes"]["samples"][-1]["mre"]


def test_a_budget_of_one_epoch_and_how_often_smaller_data_is_seen(bench: Bench) -> None:
    bench.budget = replace(bench.budget, steps=0, batch_tokens=512)
    metrics = summarise_scaling(bench, ["depth", "prompts", "samples"])
    tokens = sum(len(rollout.prompt_ids) + len(rollout.token_ids) for rollout in bench.train)
    assert bench.steps == metrics["budget"]["steps"] >= tokens / 512
    assert [row["epochs"] for row in metrics["axes"]["depth"]] == [1.0, 1.0]
    assert metrics["axes"]["prompts"][-1]["epochs"] == metrics["axes"]["samples"][-1]["epochs"] == 1.0
    # Data this small leaves a large gap in the last batch of every epoch, and shares differ in their lengths.
    seen = [row["epochs"] for row in metrics["axes"]["prompts"]]
    assert seen == pytest.approx([8, 4, 2, 1], rel=0.45)
    assert seen == sorted(seen, reverse=True)
    assert metrics["axes"]["samples"][0]["epochs"] == pytest.approx(3, rel=0.45)
    assert {row["steps"] for rows in metrics["axes"].values() for row in rows} == {bench.steps}


def test_a_budget_below_one_epoch_is_told(bench: Bench) -> None:
    run = bench.run(Spec("return"))
    tokens = sum(len(rollout.prompt_ids) + len(rollout.token_ids) for rollout in bench.train)
    assert 0.6 * 3 * 256 / tokens < run["epochs"] <= 3 * 256 / tokens < 1


@pytest.fixture(scope="module")
def folders(sets: tuple[RolloutSet, RolloutSet], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = []
    for name, rollouts in zip(("train", "test"), sets, strict=True):
        folder = tmp_path_factory.mktemp("answers") / name
        with RolloutWriter(folder, GENERATOR) as writer:
            for rollout in rollouts:
                writer.add(rollout)
        made.append(str(folder))
    return made


def test_both_commands(
    tiny_backbone: Path, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--rollouts", folders[0], "--test", folders[1], "--backbone", str(tiny_backbone), "--steps", "2",
        "--batch-tokens", "256", "--micro-tokens", "256", "--work", str(tmp_path / "work.jsonl"), "--seeds", "1",
    ]  # fmt: skip
    report, figures = tmp_path / "ablation.json", tmp_path / "figures"
    out = ["--report", str(report), "--figures", str(figures)]
    assert main(["eval", "ablation", *command, *out]) == 0
    shown = capsys.readouterr().out
    assert "Ablation: precision" in shown
    assert "log_length" in shown
    metrics = json.loads(report.read_text())["metrics"]
    assert set(metrics["groups"]) == set(GROUPS)
    assert not metrics["failed"]
    assert (figures / "ablation-targets.svg").is_file()
    assert main(["eval", "ablation", *command, "--only", "magic"]) == 1
    assert "magic" in capsys.readouterr().err

    report = tmp_path / "scaling.json"
    assert main(["eval", "scaling", *command, "--report", str(report), "--figures", str(figures)]) == 0
    assert "Scaling: layers" in capsys.readouterr().out
    assert set(json.loads(report.read_text())["metrics"]["axes"]) == {"depth", "prompts", "samples"}
    assert (figures / "scaling.svg").is_file()
    assert main(["eval", "scaling", *command, "--axes", "width"]) == 1
