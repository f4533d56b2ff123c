"""A LIFEBench run on tiny parts: gates are tuned honestly, answers are made once, and reports have their keys."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from lenvm.backbones import encode_chat
from lenvm.decoding import Generation, Request, SamplingParams
from lenvm.errors import DataError, InvalidRequestError
from lenvm.evaluation import run_lifebench as module
from lenvm.evaluation.answers import Answer, AnswerFile, recorded_settings
from lenvm.evaluation.lifebench import KINDS, Kind, Row, Task, build_prompt
from lenvm.evaluation.lifebench_compare import front_metrics
from lenvm.evaluation.lifebench_draw import drawn
from lenvm.evaluation.lifebench_gates import (
    FORCED,
    FREE,
    GRIDS,
    RESAMPLE_TOLERANCES,
    GateRule,
    Mix,
    RuleScore,
    best_rule,
    front,
    gate_guide,
    mix_at_cost,
)
from lenvm.evaluation.lifebench_posterior import PosteriorRule, PosteriorScore, choose_posterior
from lenvm.evaluation.lifebench_work import Job
from lenvm.evaluation.run_lifebench import MODES, RESAMPLED, LifebenchSettings, pool_tokens, run_lifebench
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
    # Truncation at the target itself is among them: it is the trick to be told apart.
    assert grid.count(FORCED[kind]) == 1
    others = [rule for rule in grid if rule != FORCED[kind]]
    assert all(rule.stop is None or rule.stop >= (1.0 if kind == "at_most" else 1.05) for rule in others)


def scored(slack: float, ls: float, cost: float) -> RuleScore:
    return RuleScore(GateRule(slack, 0.1, None), ls, cost)


def test_the_best_rule_and_the_front() -> None:
    table = [scored(0.1, 90, 20), scored(0.2, 90, 15), scored(0.3, 70, 5), scored(0.4, 60, 7), RuleScore(FREE, 30, 0)]
    assert best_rule(table, "equal_to") is table[1]
    forced = RuleScore(FORCED["equal_to"], 100, 21)
    assert best_rule([*table, forced], "equal_to") is table[1]
    assert best_rule([*table, forced], "at_most") is forced  # there it is a rule like any other
    assert front(table) == [table[4].rule, table[2].rule, table[1].rule]  # what another beats in both is left out
    many = [scored(at / 100, at, at) for at in range(50)]
    thinned = front(many, 6)
    assert len(thinned) == 6
    assert (thinned[0], thinned[-1]) == (many[0].rule, many[-1].rule)
    # A corner of the hull stays, however few may stay.
    many[20] = replace(many[20], ls=21.9)
    assert many[20].rule in front(many, 3)
    with pytest.raises(InvalidRequestError, match="empty"):
        best_rule([forced], "equal_to")


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
    assert metrics["limits"] == {"cut": 4, "context": 512, "limited_by_context": 0}
    for mode in MODES:
        for kind in KINDS:
            assert set(metrics[mode][kind]) >= KEYS
            assert set(metrics[mode][kind]["by_target"]) == {"8", "16"}
            assert metrics[mode][kind]["n"] == 6
    assert all(abs(metrics["unguided"][kind]["kl_per_sequence"]) < 1e-9 for kind in KINDS)
    assert metrics["eos_gate"]["at_least"]["rule"] == {"slack": 0.0, "threshold": None, "stop": None}
    assert metrics["eos_gate"]["at_least"]["ls"] == metrics["eos_gate"]["at_most"]["ls"] == 100.0
    assert metrics["posterior"]["at_most"]["rule"] == PosteriorRule().to_dict()
    forced = metrics["force_eos"]
    assert {forced[kind]["ls"] for kind in KINDS} == {100.0}
    assert forced["equal_to"]["within_5pct"] == forced["at_most"]["finished_rate"] == 1.0
    assert forced["equal_to"]["kl_per_sequence"] > 1.0
    for kind in KINDS:
        others = {f"posterior_minus_{mode}" for mode in MODES if mode != "posterior"}
        assert set(metrics["comparisons"][kind]) == others
        assert set(metrics["comparisons"][kind]["posterior_minus_eos_gate"]) == {"ls", "kl_per_sequence"}
    tuning = metrics["tuning"]
    assert tuning["tasks"] == 2
    assert tuning["posterior"] == {}  # one rule: there is nothing to choose
    assert {kind: len(table) for kind, table in tuning["gates"].items()} == {k: len(v) for k, v in SMALL.items()}
    for kind in KINDS:
        (best,) = (
            row
            for row in tuning["gates"][kind]
            if all(row[name] == value for name, value in metrics["eos_gate"][kind]["rule"].items())
        )
        assert best["ls"] == max(row["ls"] for row in tuning["gates"][kind])
        on_test = metrics["gate_front"][kind]
        rules = [{name: row[name] for name in ("slack", "threshold", "stop")} for row in on_test["rules"]]
        assert rules[0] == FREE.to_dict()
        # The gate that is in the table is on the front, on the same answers.
        at = rules.index(metrics["eos_gate"][kind]["rule"])
        assert on_test["rules"][at]["ls"] == pytest.approx(metrics["eos_gate"][kind]["ls"])
        equal, single = on_test["equal_cost"], on_test["no_more_cost"]
        cost = metrics["posterior"][kind]["kl_per_sequence"]
        assert equal["posterior_kl_per_sequence"] == pytest.approx(cost)
        assert max(equal["kl_per_sequence"], single["kl_per_sequence"]) <= max(0.0, cost) + 1e-6
        for gate in (equal, single):
            difference, low, high = gate["posterior_minus_gate"]
            assert low <= difference <= high
            assert difference == pytest.approx(metrics["posterior"][kind]["ls"] - gate["ls"])
        assert single["ls"] <= equal["ls"] + 1e-9
        assert set(on_test["by_target"]) == {"8", "16"}
    tests = {row.task_id for row in rows}
    tuned = {job.task.id for job in sampled} - tests
    assert (len(tests), len(tuned)) == (3, 2)
    assert not any(job.keeps_tokens for job in sampled if job.task.id in tuned)
    assert {job.policy for job in sampled if job.task.id in tuned} == {
        rule for rules in SMALL.values() for rule in rules
    }


def test_one_of_several_answers_is_drawn(run: Any, tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"
    rules = (PosteriorRule(0.05), PosteriorRule(0.2))
    settings = replace(SETTINGS, kinds=("equal_to",), posterior_grid=rules, cost_cap=1e6, forced_cap=1.0)
    single, _, _ = run(settings, work=work)
    several = replace(settings, resample=3, modes=(*MODES, *RESAMPLED))
    metrics, rows, sampled = run(several, work=work)
    assert {job.sample for job in sampled} >= {1, 2}
    assert not any(job.policy in ("paper_value", "paper_length") for job in sampled)
    for mode in MODES:
        assert metrics[mode] == single[mode]
    assert metrics["gate_front"] == single["gate_front"]
    for mode, plain in RESAMPLED.items():
        found = metrics[mode]["equal_to"]
        assert found["resampling"]["answers"] == 3
        assert found["resampling"]["tolerance"] == metrics["posterior_resampled"]["equal_to"]["rule"]["tolerance"]
        assert found["n"] == metrics[plain]["equal_to"]["n"] == 6
        assert found["ls"] > metrics[plain]["equal_to"]["ls"] - 5.0
    assert metrics["unguided_resampled"]["equal_to"]["ls"] > metrics["unguided"]["equal_to"]["ls"]
    # What the choice adds is in the text cost: unguided answers themselves cost nothing.
    assert 0.0 < metrics["unguided_resampled"]["equal_to"]["kl_per_sequence"] <= math.log(3)
    tuned = metrics["tuning"]["posterior_resampled"]["equal_to"]
    assert [row["tolerance"] for row in tuned] == [0.05, 0.2]
    best = max(tuned, key=lambda row: (round(row["ls"], 9), -row["kl_per_sequence"]))
    assert metrics["posterior_resampled"]["equal_to"]["rule"]["tolerance"] == best["tolerance"]
    assert metrics["tuning"]["within_caps_resampled"] == {"equal_to": True}
    front = metrics["gate_front_resampled"]["equal_to"]
    assert front["equal_cost"]["posterior_kl_per_sequence"] == pytest.approx(
        np.mean([row.text_cost for row in rows if row.mode == "posterior_resampled"])
    )
    assert "posterior_resampled_minus_posterior" in metrics["comparisons"]["equal_to"]
    assert "posterior_minus_unguided_resampled" not in metrics["comparisons"]["equal_to"]
    again, _, sampled = run(several, work=work)
    assert not sampled
    assert again == metrics


def test_gates_are_drawn_as_softly_as_suits_them_or_not_at_all(run: Any) -> None:
    settings = replace(SETTINGS, targets=(8, 64), kinds=("at_most",), resample=3, modes=tuple(RESAMPLED))
    metrics, _, _ = run(settings)
    front = metrics["gate_front_resampled"]["at_most"]
    several = [rule for rule in front["rules"] if "resample" in rule]
    assert {rule["tolerance"] for rule in several} == set(RESAMPLE_TOLERANCES)
    assert {rule["resample"] for rule in several} == {3}
    single = [rule for rule in front["rules"] if "resample" not in rule]
    assert len(several) == len(single) * len(RESAMPLE_TOLERANCES)
    # Where posterior costs next to nothing no draw is cheap enough, and the gate that does nothing is there still.
    assert any(rule["kl_per_sequence"] == pytest.approx(0.0, abs=1e-9) for rule in single)
    assert front["by_target"]["64"]["posterior_kl_per_sequence"] < math.log(3)
    assert set(metrics["comparisons"]["at_most"]) == {
        "posterior_resampled_minus_unguided_resampled", "posterior_resampled_minus_eos_gate_resampled",
    }  # fmt: skip
    assert metrics["unguided_resampled"]["at_most"]["resampling"] == {"answers": 3, "tolerance": 0.05}


def test_a_draw_by_hand() -> None:
    task, kind = Task("a", "en", "b", "c", "d"), "equal_to"
    jobs = [Job(PosteriorRule(0.1), task, kind, 100, sample) for sample in range(4)]
    # Of the first two the second weighs e^20 times as much, of the others the first.
    figures = [(90, 22.0), (100, 1.0), (100, 2.0), (500, 2.0)]
    store = {
        job.key: Answer(length, None, True, False, cost, -9.0)
        for job, (length, cost) in zip(jobs, figures, strict=True)
    }

    class Store:
        def __getitem__(self, job: Job) -> Answer:
            return store[job.key]

    found = drawn(jobs, 2, cast("Any", Store()), tolerance=9.0, seed=0)
    assert [job.sample for job, _ in found] == [1, 2]
    assert [answer.text_cost for _, answer in found] == pytest.approx([1.0 + math.log(2), 2.0 + math.log(2)])
    assert drawn(jobs, 1, cast("Any", Store()), tolerance=9.0, seed=0) == [(job, store[job.key]) for job in jobs]


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
    # Left for the last run: the paper's length space, and tokens of the forced answers that the front had none of.
    assert {job.policy for job in sampled} <= {
        "paper_length",
        *FORCED.values(),
        *(r for g in SMALL.values() for r in g),
    }
    assert {job.kind for job in sampled if job.policy == "paper_length"} == {"equal_to"}
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
    with pytest.raises(DataError, match="no file of answers"):
        run(few, work=work)
    with pytest.raises(DataError, match="cannot be used"):
        run(few, work=tmp_path)


def test_tuning_answers_are_kept_without_their_tokens(tmp_path: Path) -> None:
    task = Task("t", "en", "", "", "")
    tuning, test = (Job(FREE, task, "at_most", 8, keeps_tokens=flag) for flag in (False, True))
    generation = Generation(token_ids=[4, 5, 6], finished=True, text_cost=1.5, logprob=-2.0)
    with AnswerFile(tmp_path / "w", {}) as store:
        store.add(tuning, generation)
    with AnswerFile(tmp_path / "w", {}) as store:
        assert tuning in store
        assert test not in store  # its tokens are wanted
        assert (store[tuning].length, store[tuning].token_ids, store[tuning].text_cost) == (3, None, 1.5)
        store.add(test, generation)
    with AnswerFile(tmp_path / "w", {}) as store:
        assert test in store
        assert tuning in store
        assert store[test].token_ids == [4, 5, 6]
        store.add(tuning, generation)
    # Whichever file holds the tokens, and in whatever order.
    with AnswerFile(tmp_path / "new", {}, [tmp_path / "w"]) as store:
        assert store[test].token_ids == [4, 5, 6]


def test_answers_name_the_devices_that_made_them(tmp_path: Path) -> None:
    task = Task("t", "en", "", "", "")
    jobs = [Job(FREE, task, "at_most", target) for target in (8, 16, 32)]
    generation = Generation(token_ids=[4], finished=True, text_cost=1.5, logprob=-2.0)
    for device, job in zip(("A", "B", "B"), jobs, strict=True):
        with AnswerFile(tmp_path / "w", {"seed": 1}, maker={"device": device}) as store:
            store.add(job, generation)
    with AnswerFile(tmp_path / "w", {"seed": 1}, maker={"device": "C"}) as store:  # which adds none
        assert store.makers == [{"device": "A"}, {"device": "B"}]
        assert all(job in store for job in jobs)
    assert recorded_settings(tmp_path / "w") == {"seed": 1}
    for content in ("", "{}", "[]\n", '{"settings": 1}\n'):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(DataError, match="no file of answers"):
            recorded_settings(tmp_path / "bad")
    with pytest.raises(DataError, match="cannot be read"):
        recorded_settings(tmp_path / "missing")


def test_files_of_two_processes_are_one_run(run: Any, tmp_path: Path) -> None:
    whole, _, _ = run()
    first, second, third = (tmp_path / f"{name}.jsonl" for name in "abc")
    run(replace(SETTINGS, modes=("posterior", "paper_value", "paper_length")), work=first)
    run(replace(SETTINGS, modes=("unguided", "eos_gate", "force_eos")), work=second)
    before = second.read_text()
    second.write_text(before + '{"key":["unguided"')  # still being written
    merged, _, sampled = run(work=third, others=[first, second])
    assert not sampled
    assert second.read_text() == before + '{"key":["unguided"'
    for kind in KINDS:
        assert merged["gate_front"][kind]["rules"] == whole["gate_front"][kind]["rules"]
        assert merged["posterior"][kind]["ls"] == whole["posterior"][kind]["ls"]
    assert len(third.read_text().splitlines()) == 1  # its own header
    with pytest.raises(DataError, match=r"none\.jsonl cannot be used"):
        run(work=third, others=[tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match=r"a\.jsonl holds answers of other settings \(cut differ\)"):
        run(replace(SETTINGS, cut=3), others=[first])


def scored_posterior(tolerance: float, ls: float, cost: float, forced: float = 0.0) -> PosteriorScore:
    return PosteriorScore(PosteriorRule(tolerance), ls, cost - 1, cost, forced)


def test_the_posterior_rule_is_the_best_within_its_caps() -> None:
    table = [scored_posterior(0.1, 70, 4), scored_posterior(0.05, 80, 7), scored_posterior(0.02, 90, 9)]
    assert choose_posterior(table, cost_cap=8, forced_cap=0.05) is table[1]
    assert choose_posterior(table, cost_cap=9, forced_cap=0.05) is table[2]
    assert choose_posterior(table, cost_cap=2, forced_cap=0.05) is table[0]  # none fits: the one that costs least
    forced = [*table[:1], scored_posterior(0.04, 85, 7, forced=0.06)]
    assert choose_posterior(forced, cost_cap=8, forced_cap=0.05) is table[0]
    assert choose_posterior(forced, cost_cap=8, forced_cap=0.0) is table[0]
    # Both caps hold at once, each bound itself is still within, and of equals the cheaper one is taken.
    edge = [scored_posterior(0.05, 80, 8, 0.05), scored_posterior(0.04, 99, 7.9, 0.051), scored_posterior(0.03, 80, 6)]
    assert choose_posterior(edge, cost_cap=8, forced_cap=0.05) is edge[2]
    assert choose_posterior(edge[:2], cost_cap=8, forced_cap=0.05) is edge[0]
    with pytest.raises(InvalidRequestError, match="no posterior rule"):
        choose_posterior([], cost_cap=8, forced_cap=0.05)


def test_posterior_is_tuned_on_tasks_that_are_not_in_the_test(run: Any) -> None:
    rules = [PosteriorRule(tolerance, strength) for tolerance in (0.02, 0.3) for strength in (1.0, 0.0)]
    settings = replace(SETTINGS, modes=("posterior",), kinds=("equal_to",), posterior_grid=rules, cost_cap=1e6)
    metrics, rows, sampled = run(replace(settings, forced_cap=1.0))
    table = metrics["tuning"]["posterior"]["equal_to"]
    assert [(row["tolerance"], row["strength"]) for row in table] == [(rule.tolerance, rule.strength) for rule in rules]
    # A strength of 0 is no guidance, whatever the tolerance.
    assert table[1]["ls"] == table[3]["ls"] < table[0]["ls"]
    assert abs(table[1]["kl_per_sequence"]) < 1e-9
    chosen = metrics["posterior"]["equal_to"]["rule"]
    best = max(table, key=lambda row: row["ls"])
    assert chosen == {name: best[name] for name in PosteriorRule().to_dict()}
    in_test = {row.task_id for row in rows}
    assert {job.policy for job in sampled if job.task.id in in_test} == {PosteriorRule(**chosen)}
    assert {job.policy for job in sampled if job.task.id not in in_test} == set(rules)
    tuning = metrics["tuning"]
    assert (tuning["cost_cap"], tuning["forced_cap"], tuning["within_caps"]) == (1e6, 1.0, {"equal_to": True})
    tight, _, _ = run(replace(settings, cost_cap=-1.0, forced_cap=0.0))  # not even no guidance is within
    assert tight["tuning"]["within_caps"] == {"equal_to": False}


def test_gates_at_no_more_cost_by_hand() -> None:
    def row(task: str, target: int, length: int, cost: float) -> Row:
        return Row(task, "equal_to", target, "posterior", [3] * length, True, False, cost, 0.0)

    posterior = [row("a", 10, 10, 4.0), row("a", 20, 20, 2.0), row("b", 10, 10, 4.0), row("b", 20, 20, 2.0)]
    gates = {
        FREE: [(10.0, 0.0), (30.0, 0.0), (10.0, 0.0), (30.0, 0.0)],
        GateRule(0.1, 0.1, None): [(40.0, 2.0), (60.0, 2.0), (40.0, 2.0), (60.0, 2.0)],
        FORCED["equal_to"]: [(100.0, 8.0), (100.0, 8.0), (100.0, 8.0), (100.0, 8.0)],
    }
    found = front_metrics(gates, posterior)
    assert [score["ls"] for score in found["rules"]] == [20.0, 50.0, 100.0]
    # Posterior costs 3: a sixth of the answers by the dear rule.
    assert found["equal_cost"]["share"] == pytest.approx(1 / 6)
    assert found["equal_cost"]["ls"] == pytest.approx(50 + 50 / 6)
    assert found["equal_cost"]["posterior_minus_gate"][0] == pytest.approx(50 - 50 / 6)
    assert found["no_more_cost"]["ls"] == 50.0
    assert found["no_more_cost"]["posterior_minus_gate"] == [50.0, 50.0, 50.0]
    assert found["by_target"]["10"]["ls"] == pytest.approx(40 + 60 / 3)
    assert found["by_target"]["20"]["ls"] == 60.0
    assert set(front_metrics(gates, [])) == {"rules"}
    # No gate within an estimate of about zero: there is none to name.
    cheap = [
        row(*at, 0.0 if at[0] == "b" else -0.4) for at in (("a", 10, 10), ("a", 20, 20), ("b", 10, 10), ("b", 20, 20))
    ]
    assert "no_more_cost" not in front_metrics(gates, cheap)


def test_answers_that_meet_the_end_of_the_context(run: Any, tiny_generator: Any) -> None:
    context = tiny_generator.sampler.context
    settings = replace(SETTINGS, targets=(8, 500), tasks=2, modes=("force_eos",), kinds=("at_least",))
    metrics, rows, _ = run(settings)  # EOS is held back until 500, for which there is no room
    cut = [row for row in rows if not row.finished]
    assert [row.target for row in cut] == [500, 500]
    assert all(len(row.token_ids) < context - 12 for row in cut)
    assert metrics["limits"] == {"cut": 4, "context": context, "limited_by_context": 2}


def test_settings_and_tasks_that_do_not_fit(run: Any, tiny_generator: Any, tiny_data: Path) -> None:
    for changes in ({"modes": ("magic",)}, {"kinds": ("exactly",)}, {"modes": ()}):
        with pytest.raises(InvalidRequestError, match="unknown"):
            replace(SETTINGS, **changes)
    with pytest.raises(InvalidRequestError, match="no posterior rule"):
        replace(SETTINGS, posterior_grid=())
    with pytest.raises(InvalidRequestError, match="tolerance"):
        replace(SETTINGS, posterior_grid=[PosteriorRule(-1.0)])
    with pytest.raises(InvalidRequestError, match="all 6 tasks are in the test"):
        run(replace(SETTINGS, tasks=6))
    with pytest.raises(InvalidRequestError, match="all 6 tasks are in the test"):
        run(replace(SETTINGS, tasks=6, modes=("posterior",), posterior_grid=(PosteriorRule(0.1), PosteriorRule(0.2))))
    run(replace(SETTINGS, tasks=6, modes=("unguided",), kinds=("at_most",)))
    assert pool_tokens(tiny_generator, tiny_data, SETTINGS) >= 5 * 4 * 16
