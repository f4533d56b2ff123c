"""``lenvm eval`` on tiny random parts: tables, JSON, and reports with everything that a published figure needs."""

from __future__ import annotations

import json
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
    report, texts = tmp_path / "lifebench.json", tmp_path / "texts.jsonl"
    command = [
        "eval", "lifebench", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--tasks", "3",
        "--targets", "8,16", "--modes", "unguided,posterior,paper_value",
    ]  # fmt: skip
    assert main([*command, "--report", str(report), "--texts", str(texts)]) == 0
    assert "posterior minus unguided" in capsys.readouterr().out
    metrics = json.loads(report.read_text())["metrics"]
    assert set(metrics["comparisons"]) == {"posterior_minus_unguided", "posterior_minus_paper_value"}
    assert len(texts.read_text().splitlines()) == 3 * 2 * 3
    assert main([*command, "--modes", "unguided,magic"]) == 1
    assert "unknown mode magic" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["prediction", "lifebench"])
def test_data_that_is_not_there(
    name: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", name, "--data", str(tmp_path / "none"), "--model", str(tiny_checkpoint)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
