"""``make serve``: the service is left running, and the request that it prints works."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Not what `make test ARGS=...` was given: make hands its variables on, and ARGS are those of `lenvm serve` too.
    own = ("ARGS", "MODEL", "PORT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in own}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.usefixtures("real_backbone_dir")
def test_make_serve_leaves_a_service_that_answers_and_make_stop_ends_it() -> None:
    left = ROOT / "runs" / "serve.pid"
    if left.exists() and Path("/proc", left.read_text().strip()).exists():
        pytest.skip("a service of make serve is in use here: make stop first")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = make("serve", f"PORT={port}")
    try:
        assert started.returncode == 0, started.stderr
        (line,) = re.findall(r"^Try: +(curl .*)$", started.stdout, re.MULTILINE)
        asked = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True)
        (prediction,) = json.loads(asked.stdout)["predictions"]
        assert prediction["quantiles"]["0.5"] > 0
        again = make("serve", f"PORT={port}")
        assert again.returncode != 0
        assert "runs already" in again.stderr
    finally:
        stopped = make("stop")
    assert stopped.returncode == 0, stopped.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert make("stop").returncode != 0
