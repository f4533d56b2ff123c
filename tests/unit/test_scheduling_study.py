"""The simulator of ``benchmarks/scheduling.py`` against hand-made cases, queueing theory and brute force."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sim() -> Iterator[ModuleType]:
    yield _load("_scheduling")
    del sys.modules["_scheduling"]


@pytest.fixture
def study(sim: ModuleType) -> Iterator[ModuleType]:
    _load("_scheduling_data")
    yield _load("scheduling")
    del sys.modules["_scheduling_data"], sys.modules["scheduling"]


def _load_of(sim: ModuleType, arrival: Any, work: Any, prompt_tokens: int = 1) -> Any:
    count = len(work)
    return sim.Workload(
        np.asarray(arrival, dtype=float), np.zeros(count, int), np.full(count, prompt_tokens), np.asarray(work)
    )


def _random(sim: ModuleType, count: int, seed: int, prompt_tokens: int = 1, rate: float = 0.3) -> Any:
    rng = np.random.default_rng(seed)
    return _load_of(sim, np.cumsum(rng.exponential(1 / rate, count)), rng.integers(1, 20, count), prompt_tokens)


def test_a_case_by_hand(sim: ModuleType) -> None:
    load = _load_of(sim, [0, 1, 2, 3], [10, 8, 2, 5])
    start, end = sim.run_to_completion(load, np.zeros(4), 1)
    assert (start.tolist(), end.tolist()) == ([0, 10, 18, 20], [10, 18, 20, 25])
    start, end = sim.run_to_completion(load, load.work.astype(float), 1)
    assert end.tolist() == [10, 25, 12, 17]
    start, end = sim.run_to_completion(load, np.zeros(4), 2)
    assert (start.tolist(), end.tolist()) == ([0, 1, 9, 10], [10, 9, 11, 15])


def test_an_urgent_request_goes_first(sim: ModuleType) -> None:
    load = _load_of(sim, [0, 1, 2, 3], [10, 8, 2, 5])
    key, never = load.work.astype(float), np.full(4, np.inf)
    assert sim.run_to_completion(load, key, 1, never)[1].tolist() == [10, 25, 12, 17]
    # The second is urgent when the first ends; at 18 the third is the shortest, and nobody else is urgent by then.
    assert sim.run_to_completion(load, key, 1, np.array([np.inf, 10, 19, 20]))[1].tolist() == [10, 18, 20, 25]
    assert sim.run_to_completion(load, key, 1, np.array([np.inf, 11, 19, 12]))[1].tolist() == [10, 20, 12, 25]


def test_a_preempted_request_prefills_again(sim: ModuleType) -> None:
    load = _load_of(sim, [0, 3], [10, 2], prompt_tokens=sim.CHUNK)
    work = load.work.tolist()
    start, end, preemptions = sim.run_preemptive(load, lambda i, g: work[i] - g, 1, 100)
    # Three tokens are there at 3; the other runs until 5; then prompt and tokens are two chunks: one step more.
    assert (start.tolist(), end.tolist(), preemptions) == ([0, 3], [5 + 1 + 7, 5], 1)


@pytest.mark.parametrize("slots", [1, 3])
def test_preemptive_first_come_first_served_is_the_same(sim: ModuleType, slots: int) -> None:
    load = _random(sim, 500, slots, prompt_tokens=1000)
    plain = sim.run_to_completion(load, np.zeros(500), slots)
    start, end, preemptions = sim.run_preemptive(load, lambda i, g: float(i), slots, 4)
    assert preemptions == 0
    np.testing.assert_allclose((start, end), plain)


def test_srpt_is_that_of_a_clock(sim: ModuleType) -> None:
    """Whole steps, one slot, no cost of prefill: a loop over the clock that always runs the shortest remainder."""
    rng = np.random.default_rng(3)
    arrival, work = np.sort(rng.integers(0, 300, 60)), rng.integers(1, 12, 60)
    load = _load_of(sim, arrival, work)
    left, ended, now = work.tolist(), [0] * 60, 0
    while any(left):
        ready = [i for i in range(60) if arrival[i] <= now and left[i]]
        now += 1
        if ready:
            best = min(ready, key=lambda i: (left[i], i))
            left[best] -= 1
            if not left[best]:
                ended[best] = now
    tokens = work.tolist()
    _, end, _ = sim.run_preemptive(load, lambda i, g: tokens[i] - g, 1, 1)
    assert sorted(end.tolist()) == sorted(ended)
    assert (end - arrival).mean() == (np.asarray(ended) - arrival).mean()


def test_one_slot_is_an_m_d_1_queue(sim: ModuleType) -> None:
    rng = np.random.default_rng(0)
    load = _load_of(sim, np.cumsum(rng.exponential(20.0, 100_000)), np.full(100_000, 12))
    start, _ = sim.run_to_completion(load, np.zeros(100_000), 1)
    assert (start - load.arrival).mean() == pytest.approx(0.6 * 12 / (2 * (1 - 0.6)), rel=0.03)  # Pollaczek-Khinchine


def test_tables_are_those_of_brute_force(sim: ModuleType) -> None:
    rng = np.random.default_rng(1)
    pmf = rng.dirichlet(np.full(24, 0.3), size=5)
    pmf[0] = np.eye(24)[-1]  # always 24 tokens
    survival = sim.survival_table(pmf)
    means, gittins = sim.mean_table(survival, 4), sim.gittins_table(survival, 4)
    lengths = np.arange(1, 25)
    assert means.shape == gittins.shape == (5, 6)
    for row in range(5):
        for column, age in enumerate(range(0, 24, 4)):
            beyond = pmf[row] * (lengths > age)
            if beyond.sum() < 1e-6:
                continue
            assert means[row, column] == pytest.approx((beyond @ (lengths - age)) / beyond.sum())
            ratios = []
            for stop in range(age + 4, 25, 4):
                done = beyond[lengths <= stop].sum()
                if done > 1e-9:
                    ratios.append(beyond @ (np.minimum(lengths, stop) - age) / done)
            assert gittins[row, column] == pytest.approx(min(ratios), rel=1e-6)
    np.testing.assert_allclose(gittins[0], 24 - np.arange(0, 24, 4))


def test_the_study_runs_on_lengths_of_its_own(study: ModuleType) -> None:
    rng = np.random.default_rng(2)
    means = rng.integers(5, 50, 20)
    work = np.clip(rng.poisson(means[:, None], (20, 16)), 1, 64)
    pmf = np.full((20, 64), 1e-6)
    np.add.at(pmf, (np.arange(20)[:, None], work - 1), 1.0)
    people = study.Population(np.full(20, 7), work, means * 1.0, means * 1.5, means * 1.0, pmf / 16)
    options = study.argparse.Namespace(requests=2000, slots=4, quantum=8, tuning_seeds=1, seeds=2)
    ageing = study.Ageing(0.2, 0.0, 1e6, 0.0, 1e6)
    ranked = study.tables(people, 8)
    for kind in ("0.9", "bursty"):
        runs = [
            study.one_run(people, study.workload(people, kind, 2000, 4, s), ageing, ranked, options) for s in (0, 1)
        ]
        found = study.summary(runs, 0.02)
        assert found["fcfs"]["gain_share"] == found["fcfs"]["starved"] == 0.0
        assert found["oracle"]["gain_share"] == 1.0
        for name in ("sjf_p50_aged_one", "sjf_p50_deadline", "oracle_aged", "oracle_deadline"):  # enough ageing is FCFS
            assert found[name]["mean_s"] == pytest.approx(found["fcfs"]["mean_s"])
            assert found[name]["starved"] == 0.0
        # One prompt is like another to the guess; what is predicted well wins most of what there is.
        assert found["guess"]["mean_s"] == pytest.approx(found["fcfs"]["mean_s"])
        assert 0.5 < found["sjf_p50"]["gain_share"] <= 1.1
    settings = study.tuned(people, "0.9", options)
    assert {settings.p50_rate, settings.oracle_rate} <= set(study.RATES)
    assert min(settings.p50_wait, settings.oracle_wait) >= 0.0


def test_the_whole_study_with_a_model(
    study: ModuleType, tiny_checkpoint: Path, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, their lengths, boundary and progressive predictions, and the report, on the tiny model."""
    from lenvm.decoding import SamplingParams
    from lenvm.evaluation.lengths import write_lengths
    from lenvm.evaluation.states import group_prompts
    from lenvm.prompts import Prompt
    from lenvm.rollouts import read_rollouts
    from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts

    prompts = [Prompt(f"p{i}", "if", "own", f"{i} {i * i}?") for i in range(6)]
    params = SamplingParams(0.7, max_new_tokens=64)
    sample_rollouts(
        LocalGenerator(str(tiny_backbone)),
        prompts,
        tmp_path / "r",
        samples=3,
        params=params,
        seed=1,
        max_prompt_tokens=64,
    )
    write_lengths(group_prompts(read_rollouts(tmp_path / "r")), tmp_path / "lengths.jsonl.gz")
    arguments = [
        *("--lengths", tmp_path / "lengths.jsonl.gz", "--rollouts", tmp_path / "r", "--model", tiny_checkpoint),
        *("--cache", tmp_path, "--requests", 300, "--seeds", 2, "--tuning-seeds", 1, "--quantum", 8),
        *("--report", tmp_path / "report.json", "--loads", "0.9"),
    ]
    for _ in range(2):  # the second time from the cache
        monkeypatch.setattr(sys, "argv", ["scheduling.py", *map(str, arguments)])
        study.main()
        metrics = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["metrics"]
        assert metrics["about"]["samples"] == 3
        assert metrics["progressive"]["about"]["samples"] == 1
        assert metrics["0.9"].keys() - metrics["progressive"]["0.9"].keys() == {
            "prompt_oracle",
            "prompt_oracle_mean",
            "prompt_oracle_srpt",
        }
        assert metrics["progressive"]["0.9"]["srpt_progressive"]["mean_s"] > 0.0
        monkeypatch.setattr(sys.modules["_scheduling_data"], "score_states", None)


def test_bursts_have_the_load_that_they_claim(study: ModuleType) -> None:
    people = study.Population(
        np.array([1]), np.full((1, 1), 10), np.ones(1), np.ones(1), np.ones(1), np.full((1, 10), 0.1)
    )
    load = study.workload(people, "bursty", 2_000_000, 16, 1)
    share = sum(share * length for share, length in study.BURSTY) / sum(length for _, length in study.BURSTY)
    assert 10 * len(load.work) / 16 / load.arrival[-1] == pytest.approx(share, rel=0.08)
    gaps = np.diff(load.arrival)
    assert gaps.std() / gaps.mean() > 1.15  # Poisson: 1


REPORT = FOLDER.parent / "reports" / "scheduling.json"


@pytest.mark.parametrize("load", ["0.9", "0.98", "bursty"])
def test_the_report_bears_out_what_is_claimed(load: str) -> None:
    row = json.loads(REPORT.read_text(encoding="utf-8"))["metrics"][load]
    assert row["sjf_p50"]["gain_share_ci"][0] >= 0.7
    assert row["sjf_p50_aged"]["p99_ratio"] <= 1.1
    assert row["sjf_p50_deadline"]["p99_ratio"] <= 1.1
    assert row["sjf_p50"]["gain_share"] <= row["prompt_oracle_mean"]["gain_share"]


def test_the_document_has_the_report_s_figures() -> None:
    metrics = json.loads(REPORT.read_text(encoding="utf-8"))["metrics"]
    text = (FOLDER.parent / "docs" / "scheduling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\(`(\w+)`\) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 14
    for policy, cells in rows:
        shown = [cell.strip() for cell in cells.split("|")]
        found = [metrics[load][policy] for load in ("0.9", "0.98", "bursty")]
        assert shown == [f"{x['mean_s']:.1f} s, {x['gain_share']:.2f}, {x['p99_ratio']:.2f} x" for x in found]
