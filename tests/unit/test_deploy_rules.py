"""Prometheus' rules and Grafana's dashboard: checked by promtool, and about metrics and labels that the service has."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lenvm_service.metrics import Metrics
from tests.support.deploy_tools import find_tool

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "lenvm.json").read_text(encoding="utf-8"))


def promtool(*arguments: str | Path, required: bool) -> subprocess.CompletedProcess[str]:
    command = [find_tool("promtool", required=required), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def panel_queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def test_the_configuration_is_valid(real_parts_required: bool) -> None:
    done = promtool("check", "config", PROMETHEUS / "prometheus.yaml", required=real_parts_required)
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout  # the file that rule_files names


def test_every_alert_is_caused_and_a_healthy_service_has_none(real_parts_required: bool) -> None:
    done = promtool("test", "rules", PROMETHEUS / "rules_test.yaml", required=real_parts_required)
    assert done.returncode == 0, done.stdout + done.stderr
    caused = set()
    for test in yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text(encoding="utf-8"))["tests"]:
        for check in test["promql_expr_test"]:
            if "ALERTS" in check["expr"]:
                caused |= {name for sample in check["exp_samples"] for name in re.findall(r'"(\w+)"', sample["labels"])}
    assert caused == set(ALERTS)


def test_the_tests_of_the_rules_can_fail(real_parts_required: bool, tmp_path: Path) -> None:
    rules = (PROMETHEUS / "rules.yaml").read_text(encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(rules.replace("lenvm_engine_ready == 0", "lenvm_engine_ready == 2"))
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text(encoding="utf-8"))
    tests["tests"] = [test for test in tests["tests"] if test["name"] == "a model does not load"]
    (tmp_path / "rules_test.yaml").write_text(yaml.safe_dump(tests))
    done = promtool("test", "rules", tmp_path / "rules_test.yaml", required=real_parts_required)
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr


def known_metrics() -> dict[str, set[str]]:
    """Name of each series -> its labels."""
    metrics, found = Metrics(), {}
    for collector in vars(metrics).values():
        if not hasattr(collector, "_labelnames"):
            continue
        (family,) = collector.describe() or collector.collect()
        labels = set(collector._labelnames)
        if family.type == "counter":
            found[f"{family.name}_total"] = labels
        elif family.type == "histogram":
            found |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
            found[f"{family.name}_bucket"] = labels | {"le"}
        else:
            found[family.name] = labels
    return found


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Metric names with the labels in their braces."""
    for name, inside in re.findall(r"\b(lenvm[_:][a-z0-9_:]+)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))


EXPRESSIONS = [
    *(rule["expr"] for rule in RULES),
    *panel_queries(),
    *(note["expr"] for note in DASHBOARD["annotations"]["list"]),
    DASHBOARD["templating"]["list"][1]["query"]["query"],
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=range(len(EXPRESSIONS)))
def test_metrics_and_labels_exist(expression: str) -> None:
    known = known_metrics()
    assert "lenvm_requests_total" in known
    assert known["lenvm_queue_wait_seconds_bucket"] == {"model", "le"}
    for name, labels in selectors(expression):
        if ":" in name:
            assert name in RECORDS, name
        else:
            assert name in known, name
            assert labels <= known[name] | {"instance", "job"}, name
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        labels = {label.strip() for label in grouped.split(",")}
        assert labels <= set().union(*(known.get(name, {"model", "quantile"}) for name, _ in selectors(expression)))


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for query in panel_queries() for name, _ in selectors(query)}
    bases = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in shown}
    elsewhere = {"lenvm_feedback_quantile"}  # by way of the recorded coverage
    missing = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in known_metrics()} - bases - elsewhere
    assert missing == set()


@pytest.mark.parametrize("name", ALERTS)
def test_alerts_say_what_is_wrong(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "description"}
    for flag in re.findall(r"--([a-z-]+)", alert["annotations"]["description"]):
        from lenvm_service.settings import Settings

        assert flag.replace("-", "_") in Settings.model_fields


def test_the_dashboard_is_sound() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert all(panel["description"] and panel["title"] for panel in panels if panel["type"] != "row")
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert provisioned["datasources"][0]["type"] == DASHBOARD["templating"]["list"][0]["query"]
