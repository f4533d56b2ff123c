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
    assert set(written["metrics"]) == {"math", "code", "if", "pooled"}
    together = written["metrics"].pop("pooled")
    assert together["mre"] == pytest.approx(sum(row["mre"] for row in written["metrics"].values()) / 3)
    gain = 1 - together["mre"] / together["baselines"]["constant"]
    assert together["gain_over"]["constant"] == pytest.approx(gain, abs=1e-4)
    assert together["gain_over"]["prompt_encoder"] is None
    assert "error that is gone" in shown
    for row in written["metrics"].values():
        gain = 1 - row["mre"] / row["baselines"]["linear_probe"]
        assert row["gain_over"]["linear_probe"] == pytest.approx(gain, abs=1e-4)
        assert {"mre", "mre_ci", "median_error", "noise_floor", "oracle_horizon", "kendall_tau", "pinball"} <= set(row)
        assert set(row["along"]) == {"0", "0.25", "0.5", "0.75", "0.9"}
        assert row["baselines"]["linear_probe"] > 0.0
        assert row["baselines"]["prompt_encoder"] is None
        assert row["baseline_fit"]["linear_probe_prompts"] == 12
    sampled = tmp_path / "work" / "rollouts-eval-"
    given = ["--test-rollouts", f"{sampled}test", "--train-rollouts", f"{sampled}train", "--along", "0"]
    rival = ["--prompt-encoder", str(tiny_checkpoint), "--figures", str(tmp_path / "figures")]
    assert main([*command[:4], *command[4:6], *given, *rival, "--json"]) == 0  # the answers are there already
    again = json.loads(capsys.readouterr().out)
    assert again["code"]["mre"] == pytest.approx(written["metrics"]["code"]["mre"], rel=1e-5)
    assert again["code"]["baselines"]["prompt_encoder"] == again["code"]["mre"]  # the same model
    assert again["code"]["gain_over"]["prompt_encoder"] == 0.0
    assert "along" not in again["code"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"prediction.svg", "prediction_reliability.svg"}


def test_prediction_refuses_baselines_fitted_on_test_prompts(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    command = ["eval", "prediction", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--samples", "2"]
    assert main([*command, "--train-prompts", "1", "--work", str(work), "--along", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["math"]["baselines"]["linear_probe"] is None  # three train prompts are too few
    assert "linear_probe_prompts" not in found["math"]["baseline_fit"]
    rollouts = str(work / "rollouts-eval-test")
    assert main([*command, "--test-rollouts", rollouts, "--train-rollouts", rollouts]) == 1
    assert "in both rollouts" in capsys.readouterr().err


def test_prediction_figures_are_the_same_when_drawn_again(tmp_path: Path) -> None:
    from lenvm.evaluation.figures.prediction import draw

    along = {at: {"error": 0.3, "error_remaining": 0.4, "error_static": 0.5} for at in ("0", "0.5")}
    row = {"mre": 0.3, "mre_ci": [0.28, 0.33], "noise_floor": 0.2, "oracle_horizon": None}
    row |= {"baselines": {"constant": 0.5, "linear_probe": None}, "calibrated": True, "along": along}
    row |= {"reliability": {"0.5": 0.5, "0.9": 0.91}, "uncalibrated": {"reliability": {"0.5": 0.4, "0.9": 0.8}}}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (draw({"math": row, "code": row}, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["prediction.svg", "prediction_along.svg", "prediction_reliability.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    # A report of an earlier release holds the errors alone.
    old = {"math": {"mre": 0.3, "mre_ci": [0.28, 0.33], "noise_floor": 0.2, "baselines": {"constant": 0.5}}}
    assert len(draw(old, tmp_path / "a")) == 1


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


def test_a_report_from_answers_that_were_made_elsewhere(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And kind by kind: a report keeps those that a run did not make, with what made them."""
    report, work, drawn = tmp_path / "lifebench.json", tmp_path / "work.jsonl", tmp_path / "figures"
    command = [
        "eval", "lifebench", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--tasks", "2",
        "--targets", "8", "--modes", "unguided,posterior", "--report", str(report), "--figures", str(drawn),
    ]  # fmt: skip
    assert main([*command, "--report-only"]) == 2
    assert "give them" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--work", str(work), "--report-only"]) == 2  # it is not there yet
    assert main([*command, "--work", str(work), "--kinds", "equal_to"]) == 0
    first = json.loads(report.read_text())
    # As if a GPU had made them.
    lines = work.read_text().splitlines()
    header = json.loads(lines[0])
    header["settings"]["device"] = "cuda"
    lines[0], lines[1] = (
        json.dumps(header),
        json.dumps({"made": {"device": "Some GPU", "commit": "abc", "versions": {}}}),
    )
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main([*command, "--work", str(elsewhere), "--kinds", "equal_to"]) == 1
    assert "device differ" in " ".join(capsys.readouterr().err.split())
    before = elsewhere.read_bytes()
    assert main([*command, "--work", str(elsewhere), "--kinds", "equal_to", "--report-only"]) == 0
    assert elsewhere.read_bytes() == before
    again = json.loads(report.read_text())
    assert (again["device"], again["metrics"]["posterior"]) == ("Some GPU", first["metrics"]["posterior"])
    assert "made" not in again["metrics"]
    capsys.readouterr()
    assert main([*command, "--work", str(elsewhere), "--kinds", "at_most", "--report-only"]) == 1
    assert "2 answers are in none of the --work files" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--work", str(work), "--kinds", "at_most"]) == 0
    both = json.loads(report.read_text())
    assert both["metrics"]["posterior"]["equal_to"] == again["metrics"]["posterior"]["equal_to"]
    assert set(both["metrics"]["posterior"]) == set(both["metrics"]["comparisons"]) == {"equal_to", "at_most"}
    made = both["metrics"]["made"]
    assert set(made) == {"equal_to"}
    assert (made["equal_to"]["device"], made["equal_to"]["command"]) == ("Some GPU", again["command"])
    assert both["device"] == first["device"] != "Some GPU"
    # A third run keeps both, each with its own origin.
    assert main([*command, "--work", str(work), "--kinds", "at_least"]) == 0
    made = json.loads(report.read_text())["metrics"]["made"]
    assert made["equal_to"]["device"] == "Some GPU"
    assert made["at_most"]["command"] == both["command"]
    report.write_text("[]")
    capsys.readouterr()
    assert main([*command, "--work", str(work), "--kinds", "at_most"]) == 1
    assert "no report that kinds could be kept of" in " ".join(capsys.readouterr().err.split())


def test_lifebench_says_which_gate_and_whether_it_is_beaten(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval", "lifebench", "--data", str(tiny_data), "--model", str(tiny_checkpoint), "--tasks", "2",
        "--tuning-tasks", "1", "--targets", "8", "--kinds", "at_least,at_most",
    ]  # fmt: skip
    report, drawn = tmp_path / "lifebench.json", tmp_path / "figures"
    tuned = ["--tolerance", "0.05,0.2", "--cost-cap", "9", "--forced-cap", "0.5"]
    assert main([*command, *tuned, "--report", str(report), "--figures", str(drawn)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("(tuned on other tasks") == 4  # the gate and posterior, of two kinds
    assert len(re.findall(r"within 9 nats and 50.0 % forced stops", shown)) == 2
    assert len(re.findall(r"At its text cost \(\S+ nats\) posterior .*? the best mix of gates on EOS", shown)) == 2
    assert sorted(path.name for path in drawn.iterdir()) == [
        "lifebench.svg", "lifebench_lengths.svg", "lifebench_targets.svg",
    ]  # fmt: skip
    assert "gates that were tuned" in (drawn / "lifebench.svg").read_text()
    assert shown.count("paper length: the same rule as paper value") == 2
    written = json.loads(report.read_text())["metrics"]
    assert set(written["tuning"]["gates"]) == {"at_least", "at_most"}
    assert (written["tuning"]["cost_cap"], written["tuning"]["forced_cap"]) == (9.0, 0.5)
    assert [row["tolerance"] for row in written["tuning"]["posterior"]["at_most"]] == [0.05, 0.2]
    assert main([*command, *tuned, "--resample", "2", "--report", str(report), "--figures", str(drawn)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("(tuned on other tasks") == 8
    assert shown.count("posterior, 1 of 2: tolerance") == 2
    assert len(re.findall(r"At its text cost \(\S+ nats\) posterior, 1 of 2 .*? gates on EOS that draw", shown)) == 2
    assert "posterior, 1 of 2 minus posterior:" in shown
    assert "posterior, one of several" in (drawn / "lifebench.svg").read_text()
    few = ["--modes", "unguided_resampled,eos_gate_resampled", "--resample", "2", "--figures", str(drawn)]
    assert main([*command, *few]) == 0
    assert "prompt alone, one of several" in (drawn / "lifebench.svg").read_text()
    capsys.readouterr()
    assert main([*command, "--modes", "posterior_resampled"]) == 1  # of one answer there is no choice
    assert "unknown mode posterior_resampled" in capsys.readouterr().err
    assert main([*command, "--tolerance", "soft"]) == 2
    assert "numbers with commas" in " ".join(capsys.readouterr().err.split())
    assert written["eos_gate"]["at_most"]["rule"].keys() == {"slack", "threshold", "stop"}


@pytest.mark.parametrize("name", ["prediction", "lifebench"])
def test_data_that_is_not_there(
    name: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", name, "--data", str(tmp_path / "none"), "--model", str(tiny_checkpoint)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
