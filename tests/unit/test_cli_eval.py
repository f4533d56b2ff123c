"""``lenvm eval`` on tiny random parts: tables, JSON, and reports with everything that a published figure needs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lenvm_service.cli import main


def test_prediction(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "prediction.json"
    command = [
        "eval", "prediction", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--samples", "2",
        "--train-prompts", "4", "--work", str(tmp_path / "work"),
    ]  # fmt: skip
    assert main([*command, "--report", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "min(L, 64)" in shown
    assert "constant" in shown
    written = json.loads(report.read_text())
    assert set(written) == {"command", "commit", "device", "date", "versions", "metrics"}
    assert set(written["metrics"]) == {"math", "code", "if"}
    assert main([*command, "--json"]) == 0  # the answers are there already
    again = json.loads(capsys.readouterr().out)
    assert again["code"]["mre"] == pytest.approx(written["metrics"]["code"]["mre"], rel=1e-5)


def test_lifebench(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, texts, work = tmp_path / "lifebench.json", tmp_path / "texts.jsonl", tmp_path / "runs" / "work.jsonl"
    command = [
        "eval", "lifebench", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--tasks", "3",
        "--targets", "8,16", "--work", str(work),
    ]  # fmt: skip
    some = [*command, "--modes", "unguided,posterior,paper_value"]
    assert main([*some, "--report", str(report), "--texts", str(texts)]) == 0
    shown = capsys.readouterr().out
    assert "posterior minus unguided" in shown
    assert all(f"LIFEBench, {kind}" in shown for kind in ("Equal To", "At Most", "At Least"))
    metrics = json.loads(report.read_text())["metrics"]
    assert set(metrics["comparisons"]["at_most"]) == {"posterior_minus_unguided", "posterior_minus_paper_value"}
    answers = [json.loads(line) for line in texts.read_text().splitlines()]
    assert len(answers) == 3 * 3 * 2 * 3
    assert {answer["kind"] for answer in answers} == {"equal_to", "at_most", "at_least"}
    before = work.read_text()
    assert main([*some, "--kinds", "at_most", "--json"]) == 0  # the answers are there already
    again = json.loads(capsys.readouterr().out)
    assert set(again["posterior"]) == {"at_most"}
    assert again["posterior"]["at_most"]["ls"] == pytest.approx(metrics["posterior"]["at_most"]["ls"], rel=1e-5)
    assert work.read_text() == before
    assert main([*command, "--modes", "unguided,magic"]) == 1
    assert "unknown mode magic" in capsys.readouterr().err
    assert main([*command, "--kinds", "exactly"]) == 1
    assert "unknown kind exactly" in capsys.readouterr().err


def test_lifebench_says_which_gate_and_whether_it_is_beaten(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval", "lifebench", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--tasks", "2",
        "--tuning-tasks", "1", "--targets", "8", "--kinds", "at_least,at_most",
    ]  # fmt: skip
    report = tmp_path / "lifebench.json"
    assert main([*command, "--report", str(report)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("(tuned on other tasks)") == 2
    assert len(re.findall(r"At its text cost \(\S+ nats\) posterior .*? the gate on EOS", shown)) == 2
    assert shown.count("paper length: the same rule as paper value") == 2
    written = json.loads(report.read_text())["metrics"]
    assert set(written["tuning"]["gates"]) == {"at_least", "at_most"}
    assert written["eos_gate"]["at_most"]["rule"].keys() == {"slack", "threshold", "stop"}


@pytest.mark.parametrize("name", ["prediction", "lifebench"])
def test_data_that_is_not_there(
    name: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", name, "--data", str(tmp_path / "none"), "--model", str(tiny_checkpoint)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
