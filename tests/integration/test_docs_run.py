"""The documentation, run: each page's blocks in order, in one folder, against a real ``lenvm serve``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ServiceProcess
from tests.support.documented import PAGES, ROOT, Block, blocks, console_steps, same

RUNNABLE = {
    str(page.relative_to(ROOT)): found
    for page in PAGES
    if (found := [block for block in blocks(page) if block.treatment in ("run", "serve", "file")])
    and any(block.treatment != "file" for block in found)
}


def environment() -> dict[str, str]:
    """The shell of a reader who has activated the virtual environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "COLUMNS": "120", "NO_COLOR": "1"}


def bash(script: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def serve(script: str, folder: Path) -> None:
    """A server in the foreground: ready, then Ctrl-C, and status 0."""
    command = ["bash", "-c", f"exec {script.strip()} --port 0"]
    log = folder / "serve.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()
    assert first.startswith("lenvm is ready"), log.read_text()


def python(block: Block, text: str, names: dict[str, Any], folder: Path) -> None:
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        exec(compile(text, block.where, "exec"), names)
    assert said.getvalue().strip() or "print(" not in text


def console(block: Block, text: str, folder: Path) -> None:
    for command, printed in console_steps(Block(block.page, block.line, block.language, text, "run")):
        found = bash(command, folder)
        if printed.lstrip().startswith("{"):
            assert same(json.loads(found), json.loads(printed)), f"{block.where}: {command}\n{found}"
        else:
            assert found == printed, f"{block.where}: {command}"


@pytest.mark.parametrize("page", RUNNABLE)
def test_a_page(page: str, service: ServiceProcess, tmp_path: Path) -> None:
    address = service.url.removeprefix("http://")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in RUNNABLE[page]:
        text = block.text.replace("localhost:8000", address).replace("127.0.0.1:8000", address)
        if block.treatment == "file":
            path = tmp_path / block.argument
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif block.treatment == "serve":
            serve(text, tmp_path)
        elif block.language == "python":
            python(block, text, names, tmp_path)
        elif block.language == "console":
            console(block, text, tmp_path)
        else:
            bash(text, tmp_path)
