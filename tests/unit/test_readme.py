"""The README's figures are those of the committed reports, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from lenvm_service.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODES = {
    "unguided": "unguided",
    "eos_gate": "gate on EOS (no value model)",
    "paper_value": "paper's hard rule",
    "posterior": "posterior (ours)",
}


def report(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "reports" / f"{name}.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "device", "date", "versions", "metrics"} <= set(content)
    metrics: dict[str, Any] = content["metrics"]
    return metrics


def test_prediction_table() -> None:
    for domain, row in report("prediction").items():
        low, high = row["mre_ci"]
        cells = [
            domain,
            f"{100 * row['mre']:.1f} % ({100 * low:.1f}-{100 * high:.1f})",
            f"{100 * row['baselines']['constant']:.1f} %",
            f"{100 * row['baselines']['prompt_length']:.1f} %",
            f"{100 * row['noise_floor']:.1f} %",
            f"{100 * row['cut_share']:.1f} %",
        ]
        assert "| " + " | ".join(cells) + " |" in README


def test_first_light_table() -> None:
    metrics = report("first_light")
    for mode, name in MODES.items():
        row = metrics[mode]["equal_to"]
        cells = [
            name,
            f"{row['ls']:.1f}",
            f"{row['kl_per_sequence']:.1f}",
            f"{row['logprob_per_token']:.2f}",
            f"{100 * row['rep4']:.0f} %",
            f"{100 * row['forced_stop_rate']:.1f} %",
        ]
        assert "| " + " | ".join(cells) + " |" in README


def test_every_command_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"^    (?:\.venv/bin/)?lenvm ([a-z]+)", README, re.MULTILINE))
    assert named
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert named <= set(commands)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^    make ([a-z]+)", README, re.MULTILINE))
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
