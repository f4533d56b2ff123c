"""A LIFEBench run on tiny parts: gates are tuned honestly, answers are made once, and reports have their keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lenvm.backbones import encode_chat
from lenvm.decoding import Generation, Request, SamplingParams
from lenvm.errors import DataError, InvalidRequestError
from lenvm.evaluation import run_lifebench as module
from lenvm.evaluation.lifebench import KINDS, Kind, Task, build_prompt
from lenvm.evaluation.lifebench_gates import (
    FREE,
    GRIDS,
    GateRule,
    Mix,
    RuleScore,
    best_rule,
    front,
    gate_guide,
    mix_at_cost,
)
from lenvm.evaluation.lifebench_work import Job, WorkFile
from lenvm.evaluation.run_lifebench import MODES, LifebenchSettings, pool_tokens, run_lifebench
from lenvm.rollouts.sampling import stream_seed
from lenvm.scoring import TorchScorer

KEYS = {"ls", "ld", "kl_per_sequence", "logprob_per_token", "rep4", "forced_stop_rate", "within_5pct", "by_target"}
SMALL: dict[Kind, list[GateRule]] = {
    "equal_to": [GateRule(0.05, 0.003, 1.05), GateRule(0.3, 0.3, 2.0), FREE],
    "at_most": [GateRule(0.2, 0.1, 1.0), FREE],
    "at_least": [GateRule(0.0, None, None), FREE],
}
SETTINGS = LifebenchSettings(targets=(8, 16), tasks=3, tuning_tasks=2, params=SamplingParams(0.7, top_k=8), grids=SMALL)


@pytest.fixture
def run(tiny_generator: Any, tiny_model: Any, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(settings, ...) -> (metrics, rows, jobs that were sampled)``."""
    sampled: list[Job] = []
    plain = module._Runner._sample

    def counting(self: Any, stage: str, jobs: Any, done: int) -> None:
        sampled.extend(jobs)
        plain(self, stage, jobs, done)

    monkeypatch.setattr(module._Runner, "_sample", counting)

    def go(settings: LifebenchSettings = SETTINGS, **options: Any) -> Any:
        sampled.clear()
        metrics, rows = run_lifebench(tiny_generator, TorchScorer(tiny_model), tiny_data, settings, **options)
        return metrics, rows, list(sampled)

    return go


@pytest.mark.parametrize("kind", KINDS)
def test_grids_are_rules_that_a_gate_takes(kind: Kind) -> None:
    grid = GRIDS[kind]
    assert len(set(map(str, grid))) == len(set(grid)) == len(grid)
    assert grid[-1] == FREE
    gate_guide([100] * len(grid), [kind] * len(grid), grid)
    # Truncation at the target is no length control; for at_most it is what the gate is.
    assert all(rule.stop is None or rule.stop >= (1.0 if kind == "at_most" else 1.05) for rule in grid)


def scored(slack: float, ls: float, cost: float) -> RuleScore:
    return RuleScore(GateRule(slack, 0.1, None), ls, cost)


def test_the_best_rule_and_the_front() -> None:
    table = [scored(0.1, 90, 20), scored(0.2, 90, 15), scored(0.3, 70, 5), scored(0.4, 60, 7), RuleScore(FREE, 30, 0)]
    assert best_rule(table) is table[1]
    assert front(table) == [table[4].rule, table[2].rule, table[1].rule]  # what another beats in both is left out
    many = [scored(at / 100, at, at) for at in range(50)]
    thinned = front(many, 6)
    assert len(thinned) == 6
    assert (thinned[0], thinned[-1]) == (many[0].rule, many[-1].rule)
    with pytest.raises(InvalidRequestError, match="empty"):
        best_rule([])


def test_a_gate_at_exactly_a_text_cost() -> None:
    scores = [RuleScore(FREE, 30, 0), scored(0.3, 70, 5), scored(0.2, 90, 15)]
    assert mix_at_cost(scores, 10) == Mix(1, 2, 0.5)
    assert mix_at_cost(scores, 5) == Mix(1, 1, 0.0)
    assert mix_at_cost(scores, 2) == Mix(0, 1, 0.4)
    assert mix_at_cost(scores, 100) == Mix(2, 2, 0.0)
    assert mix_at_cost(scores, -0.3) == Mix(0, 0, 0.0)
    # A rule under the line between its neighbours is passed over.
    assert mix_at_cost([*scores, scored(0.4, 71, 9)], 9) == Mix(1, 2, 0.4)
    with pytest.raises(InvalidRequestError, match="add a softer rule"):
        mix_at_cost(scores[1:], 1.0)


def test_a_whole_run(run: Any) -> None:
    metrics, rows, sampled = run()
    assert len(rows) == len(MODES) * 3 * 3 * 2
    for mode in MODES:
        for kind in KINDS:
            assert set(metrics[mode][kind]) >= KEYS
            assert set(metrics[mode][kind]["by_target"]) == {"8", "16"}
            assert metrics[mode][kind]["n"] == 6
    assert all(abs(metrics["unguided"][kind]["kl_per_sequence"]) < 1e-9 for kind in KINDS)
    assert metrics["eos_gate"]["at_least"]["rule"] == {"slack": 0.0, "threshold": None, "stop": None}
    assert metrics["eos_gate"]["at_least"]["ls"] == metrics["eos_gate"]["at_most"]["ls"] == 100.0
    for kind in KINDS:
        others = {f"posterior_minus_{mode}" for mode in MODES if mode != "posterior"}
        assert set(metrics["comparisons"][kind]) == others
        assert set(metrics["comparisons"][kind]["posterior_minus_eos_gate"]) == {"ls", "kl_per_sequence"}
    tuning = metrics["tuning"]
    assert tuning["tasks"] == 2
    assert {kind: len(table) for kind, table in tuning["gates"].items()} == {k: len(v) for k, v in SMALL.items()}
    for kind in KINDS:
        (best,) = (
            row
            for row in tuning["gates"][kind]
            if all(row[name] == value for name, value in metrics["eos_gate"][kind]["rule"].items())
        )
        assert best["ls"] == max(row["ls"] for row in tuning["gates"][kind])
        on_test = metrics["gate_front"][kind]
        # The front ends with the gate that is in the table, on the same answers.
        assert on_test["rules"][-1]["ls"] == pytest.approx(metrics["eos_gate"][kind]["ls"])
        equal = on_test["equal_cost"]
        cost = metrics["posterior"][kind]["kl_per_sequence"]
        assert equal["posterior_kl_per_sequence"] == pytest.approx(cost)
        assert equal["kl_per_sequence"] <= max(0.0, cost) + 1e-6
        difference, low, high = equal["posterior_minus_gate"]
        assert low <= difference <= high
        assert difference == pytest.approx(metrics["posterior"][kind]["ls"] - equal["ls"])
    tests, tuned = ({job.task.id for job in sampled if job.tuning is flag} for flag in (False, True))
    assert not tests & tuned
    assert (len(tests), len(tuned)) == (3, 2)


def test_unguided_answers_are_the_samplers_own(run: Any, tiny_generator: Any, tiny_data: Path) -> None:
    """They share a batch with gates, under the rule that does nothing."""
    _, rows, sampled = run(replace(SETTINGS, modes=("unguided", "eos_gate"), kinds=("at_most",)))
    tasks = {job.task.id: job.task for job in sampled}
    unguided = [row for row in rows if row.mode == "unguided"]
    requests = [
        Request(
            encode_chat(tiny_generator.tokenizer, build_prompt(tasks[row.task_id], "at_most", row.target)),
            stream_seed(f"{row.task_id}/{row.target}", 0, 0),
            4 * row.target,
        )
        for row in unguided
    ]
    plain = tiny_generator.sampler.generate(requests, SETTINGS.params)
    assert [answer.token_ids for answer in plain] == [row.token_ids for row in unguided]


def test_nothing_is_sampled_twice(run: Any) -> None:
    metrics, rows, sampled = run()
    assert len({job.key for job in sampled}) == len(sampled)
    assert {job.kind for job in sampled if job.policy == "paper_length"} == {"equal_to"}
    for kind in ("at_most", "at_least"):
        assert metrics["paper_length"][kind]["same_as"] == "paper_value"
        ours, theirs = (
            [replace(row, mode="") for row in rows if (row.mode, row.kind) == (mode, kind)]
            for mode in ("paper_length", "paper_value")
        )
        assert ours == theirs
    assert "same_as" not in metrics["paper_length"]["equal_to"]
    alone, _, sampled = run(replace(SETTINGS, modes=("paper_length",), kinds=("at_most",)))
    assert {job.policy for job in sampled} == {"paper_value"}
    assert alone["paper_length"]["at_most"]["ls"] == metrics["paper_length"]["at_most"]["ls"]


def test_modes_in_separate_runs_merge_into_one_report(run: Any, tmp_path: Path) -> None:
    whole, rows, _ = run()
    work = tmp_path / "runs" / "lifebench.jsonl"
    for modes in (("posterior",), ("unguided", "paper_value"), ("eos_gate",)):
        _, _, sampled = run(replace(SETTINGS, modes=modes), work=work)
        assert sampled
    text = work.read_text()
    work.write_text(text + text.splitlines()[-1][:40])  # interrupted in the middle of a line
    calls = []
    merged, again, sampled = run(work=work, progress=lambda *call: calls.append(call))
    # Left for the last run: the paper's length space.
    assert {job.policy for job in sampled} <= {"paper_length"} | {rule for rules in SMALL.values() for rule in rules}
    assert calls[-1][1] == calls[-1][2]
    # The same answers; their costs agree as far as batches of another shape let them.
    assert [replace(row, text_cost=0.0, logprob=0.0) for row in again] == [
        replace(row, text_cost=0.0, logprob=0.0) for row in rows
    ]
    for mode in MODES:
        for kind in KINDS:
            assert merged[mode][kind]["kl_per_sequence"] == pytest.approx(
                whole[mode][kind]["kl_per_sequence"], abs=1e-3
            )
    assert merged["eos_gate"]["equal_to"]["rule"] == whole["eos_gate"]["equal_to"]["rule"]
    _, _, sampled = run(work=work)
    assert not sampled
    # More tasks and other targets go on in the same file: they are no settings of an answer.
    _, _, sampled = run(replace(SETTINGS, targets=(8, 12), modes=("unguided",)), work=work)
    assert {job.target for job in sampled} == {12}


def test_a_work_file_of_other_settings(run: Any, tmp_path: Path) -> None:
    work = tmp_path / "w.jsonl"
    few = replace(SETTINGS, modes=("unguided",), kinds=("at_most",))
    run(few, work=work, identity={"dtype": "float32"})
    with pytest.raises(DataError, match=r"other settings \(dtype differ\)"):
        run(few, work=work, identity={"dtype": "bfloat16"})
    with pytest.raises(DataError, match=r"\(cut differ\)"):
        run(replace(few, cut=3), work=work, identity={"dtype": "float32"})
    lines = work.read_text().splitlines()
    work.write_text("\n".join([lines[0], '{"key": 3}', *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"w.jsonl:2 is not a line of answers"):
        run(few, work=work, identity={"dtype": "float32"})
    work.write_text("[]\n")
    with pytest.raises(DataError, match="no file of LIFEBench answers"):
        run(few, work=work)
    with pytest.raises(DataError, match="cannot be used"):
        run(few, work=tmp_path)


def test_tuning_answers_are_kept_without_their_tokens(tmp_path: Path) -> None:
    task = Task("t", "en", "", "", "")
    tuning, test = (Job(FREE, task, "at_most", 8, tuning=flag) for flag in (True, False))
    generation = Generation(token_ids=[4, 5, 6], finished=True, text_cost=1.5, logprob=-2.0)
    with WorkFile(tmp_path / "w", {}) as store:
        store.add(tuning, generation)
    with WorkFile(tmp_path / "w", {}) as store:
        assert tuning in store
        assert test not in store  # its tokens are wanted
        assert (store[tuning].length, store[tuning].token_ids, store[tuning].text_cost) == (3, None, 1.5)
        store.add(test, generation)
    with WorkFile(tmp_path / "w", {}) as store:
        assert test in store
        assert tuning in store
        assert store[test].token_ids == [4, 5, 6]


def test_settings_and_tasks_that_do_not_fit(run: Any, tiny_generator: Any, tiny_data: Path) -> None:
    for changes in ({"modes": ("magic",)}, {"kinds": ("exactly",)}, {"modes": ()}):
        with pytest.raises(InvalidRequestError, match="unknown"):
            replace(SETTINGS, **changes)
    with pytest.raises(InvalidRequestError, match="all 6 tasks are in the test"):
        run(replace(SETTINGS, tasks=6))
    run(replace(SETTINGS, tasks=6, modes=("unguided",), kinds=("at_most",)))
    assert pool_tokens(tiny_generator, tiny_data, SETTINGS) >= 5 * 4 * 16
