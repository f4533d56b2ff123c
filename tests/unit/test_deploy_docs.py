"""docs/deploy.md beside the files that it is about; its commands are checked with those of the other pages."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
CHART = ROOT / "deploy" / "helm" / "lenvm"


def test_values_and_files_that_the_page_names_exist() -> None:
    for path in re.findall(r"`(deploy/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    named = re.findall(r"`((?:cache|checkpoints|networkPolicy|secrets|apiKeys)\.\w+)", TEXT)
    assert named
    for name in named:
        first, second = name.split(".")
        assert second in values[first], name


def test_every_alert_has_its_line() -> None:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text(encoding="utf-8"))["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    lines = re.findall(r"^\| (LenVM[\w, ]+) \|", TEXT, re.MULTILINE)
    assert {name for line in lines for name in line.split(", ")} == alerts
