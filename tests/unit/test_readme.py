"""The README's figures are those of the committed reports (its commands: test_docs_blocks.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODES = {
    "unguided": "unguided",
    "eos_gate": "gate on EOS (no value model), best score",
    "paper_value": "paper's hard rule",
    "paper_length": "paper's hard rule, in lengths",
    "posterior": "posterior (ours)",
    "posterior_resampled": "posterior, one of 4 answers (ours)",
}
KINDS = ("equal_to", "at_most", "at_least")


BASELINES = ("constant", "prompt_length", "linear_probe", "prompt_encoder")


def report(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "reports" / f"{name}.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "device", "date", "versions", "metrics"} <= set(content)
    metrics: dict[str, Any] = content["metrics"]
    return metrics


def test_prediction_table() -> None:
    for domain, row in report("prediction").items():
        if domain == "pooled":
            continue  # of all domains at once
        low, high = row["mre_ci"]
        cells = [
            domain,
            f"{100 * row['mre']:.1f} % ({100 * low:.1f}-{100 * high:.1f})",
            f"{100 * row['oracle_horizon_same']:.1f} %",
            f"{100 * row['mre_mean']:.1f} %",
            *(f"{100 * row['baselines'][name]:.1f} %" for name in BASELINES),
            f"{100 * row['noise_floor']:.1f} %",
            f"{100 * row['coverage_p90']:.1f} %",
            f"{100 * row['cut_share']:.1f} %",
        ]
        assert "| " + " | ".join(cells) + " |" in README


def test_lifebench_table() -> None:
    metrics = report("lifebench")
    for mode, name in MODES.items():
        row = metrics[mode]["equal_to"]
        assert all(figures["n"] >= 100 for figures in row["by_target"].values())
        cells = [
            name,
            f"{row['ls']:.1f}",
            f"{abs(row['kl_per_sequence']):.1f}",
            f"{row['logprob_per_token']:.2f}",
            f"{100 * row['rep4']:.0f} %",
            f"{100 * row['forced_stop_rate']:.1f} %",
            f"{100 * row['finished_rate']:.0f} %",
        ]
        assert "| " + " | ".join(cells) + " |" in README


def test_what_the_readme_says_of_the_comparisons() -> None:
    metrics = report("lifebench")

    def said(difference: list[float]) -> str:
        mean, low, high = difference
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"

    comparisons = metrics["comparisons"]["equal_to"]
    assert said(comparisons["posterior_minus_paper_value"]["ls"]) in README
    assert comparisons["posterior_minus_eos_gate"]["ls"][2] < 0  # "does not beat the best gate"
    gate, ours, paper = (metrics[mode]["equal_to"] for mode in ("eos_gate", "posterior", "paper_value"))
    assert f"scores {gate['ls']:.0f} against {ours['ls']:.0f}" in README
    assert round(gate["kl_per_sequence"] / ours["kl_per_sequence"]) == 3  # "at three times the text cost"
    assert gate["forced_stop_rate"] == pytest.approx(2 / 3, abs=0.04)  # "with two thirds of its stops forced"
    assert paper["kl_per_sequence"] / ours["kl_per_sequence"] > 100  # "at less than a hundredth of its text cost"
    # What falls short, as the page says.
    assert ours["by_target"]["1024"]["kl_per_sequence"] > 8
    drawn = metrics["posterior_resampled"]["equal_to"]
    assert drawn["resampling"]["answers"] == 4
    assert drawn["kl_per_sequence"] < ours["kl_per_sequence"]  # "nearer to the target and cheaper"
    assert said(comparisons["posterior_resampled_minus_posterior"]["ls"]) in README
    front = metrics["gate_front_resampled"]["equal_to"]["equal_cost"]
    assert front["kl_per_sequence"] == pytest.approx(drawn["kl_per_sequence"], rel=1e-4)
    assert f"at that cost | {front['ls']:.1f} | {front['kl_per_sequence']:.1f} |" in README
    assert said(front["posterior_minus_gate"]) in README
    rival = metrics["eos_gate_resampled"]["equal_to"]
    assert f"scores {rival['ls']:.0f} against {drawn['ls']:.0f}, at twice the text cost" in README
    assert rival["kl_per_sequence"] / drawn["kl_per_sequence"] == pytest.approx(2, abs=0.1)
    assert rival["forced_stop_rate"] == pytest.approx(1 / 3, abs=0.03)  # "with a third of its stops forced"
    law = report("conditional")
    within = {kind: law[kind]["resampled"]["ks"] < law[kind]["resampled"]["ks_null_95"] for kind in KINDS}
    assert within == {"at_most": True, "at_least": True, "equal_to": False}
    for kind, words in (("at_most", "At Most"), ("at_least", "At Least"), ("equal_to", "Equal To")):
        assert f"{report('conditional')[kind]['resampled']['ks']:.2f} ({words})" in README
    for kind in KINDS:
        equal = metrics["gate_front"][kind]["equal_cost"]
        assert equal["kl_per_sequence"] == pytest.approx(metrics["posterior"][kind]["kl_per_sequence"], rel=1e-4)
        row = f"| gate on EOS, at posterior's text cost | {equal['ls']:.1f} | {equal['kl_per_sequence']:.1f} |"
        assert kind != "equal_to" or row in README
        assert said(equal["posterior_minus_gate"]) in README
        assert equal["posterior_minus_gate"][1] > 0  # "beats the gate on all three"


def test_figures_of_the_http_path() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    http = report("engine")["http"]
    served = {run["api_workers"]: run for run in http["served"]}
    (many,), (one,) = served[8]["rates"], served[1]["rates"]
    for row, run in ((many, served[8]), (served[8]["texts"], None), (one, served[1])):
        cells = [f"{row['answered_per_s']:,.0f}/s", f"{row['p50_ms']:,.1f} ms", f"{row['p99_ms']:,.1f} ms"]
        cells.append("" if run is None else f"{run['step']['added_ms']:.1f} ms")
        assert "| ".join(f"{cell} " if cell else cell for cell in cells) + "|" in text, cells
    engine = http["engine_only"]
    assert f"answers {engine['engine_requests_per_s']:,.0f} a second;" in text
    assert f"the model alone {engine['scorer_requests_per_s']:,.0f}." in text


def test_figures_of_a_step() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").replace("\n", " ")
    step = report("engine")["step"]
    small, large = step["135m"], step["1.5b"]
    assert f"**{small['ms']:.2f} ms** for the shipped 135M model, {small['floor_ratio']:.1f} times the floor" in text
    assert f"**{large['ms']:.2f} ms** for a model of Qwen2.5-1.5B's shape, {large['floor_ratio']:.1f} times its" in text
    shortest, longest = (small["by_prefix"][prefix]["ms"] for prefix in ("128", "7936"))
    assert f"takes {longest / shortest:.1f} times as long" in text


def test_figures_of_guidance_and_layers() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    metrics = report("engine")
    guided = metrics["guided"]
    assert f"{guided['added_ms_in_process']:.1f} ms, {guided['added_in_process_over_step']:.2f} times" in text
    assert f"{guided['added_ms_loopback']:.1f} over loopback" in text
    eager, compiled = (guided["generate"][way]["ms"] for way in ("eager", "compiled"))
    assert f"takes {eager:.1f} ms eager and {compiled:.1f} with a compiled static cache" in text
    prefill = metrics["prefill"]
    assert f"**{prefill['tokens_per_s']:,.0f} tokens a second**, {prefill['ratio']:.1f} times" in text
    profile = metrics["http_profile"]
    for row in profile["layers"].values():
        workers = f"{row['workers_us']:,.0f} us" if row["workers_us"] else ""
        assert f"| {row['host_us']:,.0f} us | {workers}".rstrip() in text
    step = profile["step"]
    for figure in (step["added_ms_in_process"], step["meanwhile_ms"], step["added_ms_loopback"]):
        assert f" {figure:.1f} " in text


def test_figures_of_ten_minutes() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").replace("\n", " ")
    memory = report("engine")["memory"]
    early, late = memory["rss_mib"]
    assert f"is {early:,.0f} MiB after a third of the time and {late:,.0f} at the end" in text
    answers = memory["answers"]
    assert f"of {answers['answers']:,} answers {answers['checked']} were checked" in text
    assert (answers["wrong"], memory["pool"]["exact"], memory["engine_failures"]) == (0, True, 0)


def test_figures_of_pauses() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").replace("\n", " ")
    for way in ("python's count", "rows"):
        row = report("engine")["pauses"][way]
        assert f"p99 is {row['p99_ms']:.0f} ms and the longest pause {row['longest_pause_ms']:.0f}" in text
