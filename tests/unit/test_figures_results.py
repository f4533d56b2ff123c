"""Figures and the tables of docs/results.md: made from reports, the same each time, and committed up to date."""

from __future__ import annotations

import importlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from lenvm.errors import DataError
from lenvm.evaluation.figures import FIGURES, draw_all, draw_report, read_metrics
from lenvm.evaluation.figures.style import new_figure, save, styled
from lenvm.evaluation.results import FRAGMENTS, fill, fill_file
from lenvm_service.cli import main

ROOT = Path(__file__).parents[2]
POSITIONS = ("0", "0.25", "0.5", "0.75", "0.9")


def token(text: str, mean: float) -> dict[str, Any]:
    return {
        "id": 3, "text": text, "count": 60, "prompts": 20, "mean": mean, "se": 0.002, "z": mean / 0.002,
        "shrunk": 0.9 * mean, "tokens": 100 * mean,
    }  # fmt: skip


def check(mean: float) -> dict[str, Any]:
    return {
        "tokens": 900, "mean_shift": mean, "mean_shift_se": 1e-4, "mean_shift_z": 1e4 * mean, "rms_shift": 0.02,
        "mean_over_rms": mean / 0.02,
    }  # fmt: skip


def model(mre: float, gamma: float = 0.997) -> dict[str, Any]:
    return {
        "mre": mre, "mre_by_seed": [mre - 0.01, mre + 0.01], "median_error": mre,
        "domains": {name: {"mre": mre} for name in ("math", "code", "if")},
        "all_states": {"value_rmse": mre / 3, "mae": 100 * mre}, "value_rmse_by_seed": [mre / 3, mre / 3],
        "by_position": {at: {"error": mre, "median_remaining": mre} for at in POSITIONS},
        "spec": {"gamma": gamma}, "losses": {"value": mre / 10, "bins": None},
        "against": {"return": {"mre_difference": [0.05, 0.01, 0.09], "other_seeds": False}} if mre > 0.3 else {},
    }  # fmt: skip


SHARED = {
    "budget": {"steps": 150, "batch_tokens": 65536},
    "data": {"train_prompts": 10, "train_answers": 40, "test_prompts": 7, "test_answers": 14},
    "failed": [],
}
METRICS: dict[str, dict[str, Any]] = {
    "tokens": {
        "gamma": 0.99,
        "lengthening": [token(" Wait", 0.03), token("\n", 0.02), token("`|", 0.01), token("$x$", 0.01)],
        "shortening": [token(" answer", -0.05), token("漢", -0.02)],
        "overall": check(1e-4),
        "by_domain": {"math": check(2e-4)},
        "examples": [
            {"domain": "math", "prompt": "?", "tokens": ["a", "b"], "values": [-0.2, -0.1, -0.05], "finished": True}
        ],
    },
    "ablation": {
        "groups": {"target": ["return", "log_length"], "gamma": ["return", "gamma 0.99"]},
        "variants": {"return": model(0.3), "log_length": model(0.35), "gamma 0.99": model(0.4, 0.99)},
        **SHARED,
    },
    "scaling": {
        "axes": {
            "depth": [{"at": at, **model(0.6 - 0.01 * at)} for at in (5, 10, 20, 30)],
            "prompts": [{"at": at, **model(0.5 - at / 1e5)} for at in (2000, 15000)],
        },
        **SHARED,
    },
    "engine": {
        "step": {
            "135m": {
                "ms": 2.0,
                "floor_ms": 0.2,
                "prefix": 512,
                "rows": 32,
                "candidates": 16,
                "by_prefix": {"128": {"ms": 1.4, "floor_ms": 0.15}, "4096": {"ms": 2.6, "floor_ms": 1.1}},
            },
            "product_flops": 7.5e14,
        }
    },
}


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    folder = tmp_path / "reports"
    folder.mkdir()
    for name, metrics in METRICS.items():
        (folder / f"{name}.json").write_text(json.dumps({"metrics": metrics}))
    return folder


def test_every_registered_module_draws() -> None:
    for name, module in FIGURES.items():
        assert callable(importlib.import_module(module).draw), name


def test_figures_are_small_labelled_and_the_same_each_time(reports: Path, tmp_path: Path) -> None:
    first, second = (draw_all(reports, tmp_path / name) for name in ("one", "two"))
    assert set(first) == set(METRICS)
    for name in first:
        for a, b in zip(first[name], second[name], strict=True):
            assert a.read_bytes() == b.read_bytes(), a.name
            assert a.stat().st_size < 150_000
            text = a.read_text(encoding="utf-8")
            assert not any(line != line.rstrip() for line in text.splitlines()) or a.suffix == ".html"
            if a.suffix == ".svg":
                root = ET.fromstring(text)
                assert root.tag.endswith("svg")
                assert "<dc:date>" not in text
    ablation = (tmp_path / "one" / "ablation.svg").read_text()
    for wanted in ("mean relative error", "log(1 + length)", "RMSE of the return"):
        assert wanted in ablation
    assert "135m: 32 rows x 16 candidates" in (tmp_path / "one" / "step.svg").read_text()
    assert "layers of the backbone" in (tmp_path / "one" / "scaling.svg").read_text()


def test_a_report_without_tokens_still_draws(tmp_path: Path) -> None:
    empty = {**METRICS["tokens"], "lengthening": [], "shortening": [], "examples": []}
    assert len(draw_report("tokens", empty, tmp_path)) == 2


def test_text_of_a_figure_stays_text(tmp_path: Path) -> None:
    with styled():
        figure, (axes,) = new_figure()
        axes.set_xlabel("tokens still to come")
        text = save(figure, tmp_path / "x.svg").read_text()
    assert "tokens still to come" in text
    assert "Verdana" in text


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not a report"), ('{"metrics": 3}', "is not a report"), ("{}", "is not a report")]
)
def test_a_damaged_report_is_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(DataError, match=message):
        draw_all(tmp_path, tmp_path / "figures")


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the reports"):
        draw_all(tmp_path, tmp_path / "figures")
    with pytest.raises(DataError, match="no figure 'magic'"):
        draw_all(tmp_path, tmp_path / "figures", ["magic"])
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "none.json")


def test_the_command_draws_some(reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "figures", "--reports", str(reports), "--out", str(tmp_path / "out")]
    assert main([*command, "--only", "scaling"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scaling.svg"]
    assert "scaling.svg" in capsys.readouterr().out
    assert main([*command, "--only", "magic"]) == 1


DOCUMENT = "# Title\nprose\n<!-- begin:ablation-target -->\nold\n<!-- end:ablation-target -->\nmore prose\n"


def test_tables_are_filled_and_prose_stays(reports: Path) -> None:
    filled = fill(DOCUMENT, reports)
    assert filled.startswith("# Title\nprose\n<!-- begin:ablation-target -->\n| variant")
    assert filled.endswith("<!-- end:ablation-target -->\nmore prose\n")
    assert "old" not in filled
    assert "| log length | 35.0 % | 34.0, 36.0 | 35.0 % | 35.0 % | 35.0 % | +5.0 [+1.0, +9.0] |" in filled
    assert fill(filled, reports) == filled


def test_points_that_did_not_see_all_of_their_data_are_told(reports: Path) -> None:
    document = "<!-- begin:scaling -->\n<!-- end:scaling -->"
    assert "less than one epoch" not in fill(document, reports)
    metrics = json.loads((reports / "scaling.json").read_text())
    for points in metrics["metrics"]["axes"].values():
        points[-1]["epochs"] = 0.43
    (reports / "scaling.json").write_text(json.dumps(metrics))
    filled = fill(document, reports)
    assert "less than one epoch" in filled
    assert "| 15,000 | 0.43 |" in filled


def test_prediction_tables_have_the_gain_over_each_baseline(tmp_path: Path) -> None:
    row = {
        "mre": 0.3, "mre_ci": [0.28, 0.32], "median_error": 0.25, "noise_floor": 0.1,
        "baselines": {"constant": 0.5, "linear_probe": 0.4}, "gain_over": {"constant": 0.4, "linear_probe": 0.25},
        "baseline_fit": {"linear_probe_prompts": 45000},
    }  # fmt: skip
    together = {name: row[name] for name in ("mre", "baselines", "gain_over")}
    (tmp_path / "prediction.json").write_text(json.dumps({"metrics": {"if": row, "pooled": together}}))
    filled = fill("<!-- begin:prediction -->\n<!-- end:prediction -->", tmp_path)
    assert "| instruction | 40.0 % | – | 25.0 % | – | 45,000 |" in filled
    assert "| pooled | 40.0 % | – | 25.0 % | – | – |" in filled
    assert filled.count("| pooled") == 1
    del row["gain_over"]  # a report of an earlier release
    (tmp_path / "prediction.json").write_text(json.dumps({"metrics": {"if": row}}))
    assert "error less" not in fill("<!-- begin:prediction -->\n<!-- end:prediction -->", tmp_path)


def lifebench_row(ls: float, cost: float, **more: Any) -> dict[str, Any]:
    rates = dict.fromkeys(("within_5pct", "forced_stop_rate", "natural_end_rate", "empty_rate", "rep4"), 0.25)
    return {"ls": ls, "kl_per_sequence": cost, **rates, **more}


def lifebench_report(**posterior: Any) -> dict[str, Any]:
    by_target = {at: lifebench_row(60.0, 3.0, mean_length=float(at)) for at in ("1024", "64")}
    gate = {"kl_per_sequence": 4.9, "ls": 51.4, "posterior_minus_gate": [16.3, 12.6, 20.3]}
    return {
        "force_eos": {"equal_to": lifebench_row(100.0, 21.0, kl_per_sequence_64plus=20.0)},
        "posterior": {
            "equal_to": lifebench_row(67.7, 5.0, kl_per_sequence_64plus=4.5, by_target=by_target, **posterior)
        },
        "gate_front": {
            "equal_to": {
                "equal_cost": gate, "no_more_cost": {**gate, "ls": 40.0}, "by_target": {"64": gate}, "rules": [],
            }
        },
        "tuning": {"tasks": 16, "gates": {}, "posterior": {}},
    }  # fmt: skip


def filled_with(metrics: dict[str, Any], fragment: str, folder: Path) -> str:
    (folder / "lifebench.json").write_text(json.dumps({"metrics": metrics}))
    return fill(f"<!-- begin:{fragment} -->\n<!-- end:{fragment} -->", folder)


def test_lifebench_tables_name_truncation_and_the_cost_at_long_targets(tmp_path: Path) -> None:
    filled = filled_with(lifebench_report(), "lifebench", tmp_path)
    assert "| force eos | 100.0 | 25.0 % | 21.0 | 20.0 | 25.0 % |" in filled
    assert "| posterior | 67.7 | 25.0 % | 5.0 | 4.5 |" in filled
    old = lifebench_report()
    del old["force_eos"], old["posterior"]["equal_to"]["kl_per_sequence_64plus"]
    assert "| posterior | 67.7 | 25.0 % | 5.0 | – |" in filled_with(old, "lifebench", tmp_path)


def test_posterior_beside_gates_at_no_more_cost(tmp_path: Path) -> None:
    filled = filled_with(lifebench_report(), "lifebench-gates", tmp_path)
    assert "| equal to | mix of two | 67.7 | 5.0 | 51.4 | 4.9 | +16.3 [+12.6, +20.3] |" in filled
    assert "| equal to | single gate | 67.7 | 5.0 | 40.0 | 4.9 |" in filled
    alone = lifebench_report()
    del alone["gate_front"]
    assert "Not measured yet: `lenvm eval lifebench" in filled_with(alone, "lifebench-gates", tmp_path)


def test_one_of_several_answers_stands_beside_single_ones(tmp_path: Path) -> None:
    metrics = lifebench_report()
    drawn = lifebench_row(
        80.0, 4.0, resampling={"answers": 4, "tolerance": 0.05}, by_target=metrics["posterior"]["equal_to"]["by_target"]
    )
    metrics["posterior_resampled"] = {"equal_to": drawn}
    metrics["gate_front_resampled"] = metrics["gate_front"]
    assert "| posterior, 1 of 4 | 80.0 |" in filled_with(metrics, "lifebench", tmp_path)
    gates = filled_with(metrics, "lifebench-gates", tmp_path)
    assert "| equal to | mix of two | 67.7 |" in gates
    assert "| equal to, 1 of 4 | mix of two | 80.0 | 4.0 |" in gates
    targets = filled_with(metrics, "lifebench-targets", tmp_path)
    assert targets.count("\n| 1024 |") == 2
    assert "One of 4 answers, drawn by importance weight;" in targets
    row = {"pairs": 20, "ks": 0.2, "ks_null_95": 0.1, "satisfied_rate": 0.5, "ks_satisfied": 0.1, "logprob_gap": 0.0,
           "natural_end_rate": 1.0, "forced_stop_rate": 0.0}  # fmt: skip
    conditional = {"at_most": {**row, "resampled": {**row, "ks": 0.05}}, "sampling": {"resample": 4}}
    (tmp_path / "conditional.json").write_text(json.dumps({"metrics": conditional}))
    filled = fill("<!-- begin:conditional -->\n<!-- end:conditional -->\n", tmp_path)
    assert "| at most | 1 | 20 | 0.200 |" in filled
    assert "| at most | 4 | 20 | 0.050 |" in filled


def test_posterior_by_target_and_the_caps_it_was_chosen_within(tmp_path: Path) -> None:
    metrics = lifebench_report()
    filled = filled_with(metrics, "lifebench-targets", tmp_path)
    assert "chosen" not in filled  # one rule alone was given
    rows = [line for line in filled.splitlines() if line.startswith(("| 64", "| 1024"))]
    assert rows[0] == "| 64 | 60.0 | 25.0 % | 64 | 3.0 | 25.0 % | 25.0 % | +16.3 [+12.6, +20.3] |"
    assert rows[1].endswith("| – |")  # the front has no such target
    metrics["tuning"] |= {
        "posterior": {"equal_to": [{}]}, "cost_cap": 8.0, "forced_cap": 0.05, "within_caps": {"equal_to": True},
    }  # fmt: skip
    filled = filled_with(metrics, "lifebench-targets", tmp_path)
    assert "on 16 other tasks" in filled
    assert "within 8 nats at targets of 64 and more and 5.0 % forced stops." in filled
    metrics["tuning"]["within_caps"] = {"equal_to": False}
    assert "(none of the rules stayed within them)." in filled_with(metrics, "lifebench-targets", tmp_path)
    del metrics["posterior"]
    assert "Not measured yet" in filled_with(metrics, "lifebench-targets", tmp_path)


def test_every_fragment_renders_and_says_what_is_missing(reports: Path, tmp_path: Path) -> None:
    (reports / "precision.json").write_text(json.dumps({"metrics": METRICS["ablation"]}))
    for name, (report, _) in FRAGMENTS.items():
        document = f"<!-- begin:{name} -->\n<!-- end:{name} -->"
        command = "lenvm eval ablation --only precision" if report == "precision" else f"lenvm eval {report}"
        assert command in fill(document, tmp_path)
        if report in {*METRICS, "precision"}:
            body = fill(document, reports).split("\n", 1)[1].rsplit("\n", 1)[0]
            assert body
            widths = {line.replace("\\|", "").count("|") for line in body.split("\n\n")[-1].splitlines()}
            assert len(widths) == 1, name


def test_tokens_in_cells_are_fenced_and_escaped(reports: Path) -> None:
    filled = fill("<!-- begin:tokens -->\n<!-- end:tokens -->", reports)
    assert "| `␣Wait` | 60 |" in filled
    assert "| `` `\\| `` | 60 |" in filled


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("<!-- begin:magic -->\n<!-- end:magic -->", "no fragment 'magic'"),
        ("<!-- begin:tokens -->\n", "not closed"),
        ("<!-- begin:tokens -->\n<!-- end:scaling -->", "not closed"),
    ],
)
def test_broken_documents_are_refused(reports: Path, document: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fill(document, reports)


def test_the_results_command(reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "results.md"
    document.write_text(DOCUMENT)
    assert main(["eval", "results", "--reports", str(reports), "--out", str(document)]) == 0
    assert "1 table" in capsys.readouterr().out
    assert "log length" in document.read_text()
    assert fill_file(document, reports) == ["ablation-target"]
    assert main(["eval", "results", "--out", str(tmp_path / "none.md")]) == 1


def test_the_committed_document_agrees_with_the_reports() -> None:
    document = ROOT / "docs" / "results.md"
    text = document.read_text(encoding="utf-8")
    assert fill(text, ROOT / "reports") == text, "run lenvm eval results"
    # Every fragment has its place, and every picture in it exists.
    assert {line[11:-4] for line in text.splitlines() if line.startswith("<!-- begin:")} == set(FRAGMENTS)
    for part in text.split("](figures/")[1:]:
        name = part.split(")")[0]
        assert (ROOT / "docs" / "figures" / name).is_file(), f"run lenvm eval figures ({name})"
