"""``lenvm demo``, cut down, on the real model: every part runs, and its tables hold what a newcomer is to see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OBJECTIVES = ("unguided", "equal_to 24", "at_most 24", "at_least 24", "tilt lambda", "tilt beta", "scale factor 0.5")


@pytest.mark.usefixtures("real_backbone_dir")
def test_the_demo_shows_every_part_and_stops() -> None:
    command = [sys.executable, "-m", "lenvm_service.cli", "demo", "--samples", "2", "--max-new-tokens", "48"]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "error" not in done.stderr
    for heading in ("1. How long will the answer be?", "2. What did each token do", "3. Steering the length."):
        assert heading in out
    for kind in ("math", "code", "instruction"):
        assert f"│ {kind} " in out
    for objective in OBJECTIVES:
        assert f"│ {objective}" in out
    steering = out[out.index("3. Steering") :]
    assert steering.count("│ paper ") == 4
    assert steering.count("│ posterior ") == 5
    assert "to go" in out
    assert "Everything worked" in out


def test_a_demo_without_its_checkpoint_is_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lenvm_service.cli", "demo", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: demo, part setup: no checkpoint")
