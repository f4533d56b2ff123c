"""Each command of docs/deploy.md: run where its tool is here, else compared with the files that it is about."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lenvm_service.cli import app
from tests.support.deploy_tools import find_tool

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (\S.*)$", TEXT, re.MULTILINE)
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CHART = ROOT / "deploy" / "helm" / "lenvm"


def check_lenvm(words: list[str]) -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    name, *rest = words
    options = {option for parameter in commands[name].params for option in parameter.opts}
    flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert flags <= options | {"--help"}, flags - options


def check_docker(words: list[str]) -> None:
    command, rest = words[0], words[1:]
    if command == "compose":
        files = [rest[at + 1] for at, word in enumerate(rest) if word == "-f"]
        assert files
        assert all((ROOT / file).is_file() for file in files)
    elif command == "build":
        for at, word in enumerate(rest):
            if word == "--build-arg":
                name, value = rest[at + 1].split("=")
                assert re.search(rf"^ARG {name}=", DOCKERFILE, re.MULTILINE)
                assert f"AS runtime-{value}" in DOCKERFILE
    else:
        assert command == "run"
        image = next(at for at, word in enumerate(rest) if word in ("lenvm", "lenvm:onnx"))
        if rest[image] == "lenvm:onnx":
            model = re.search(r"LENVM_MODEL=(\S+)", DOCKERFILE)
            assert model is not None
            assert f":{model[1]}:ro" in " ".join(rest)
        check_lenvm(rest[image + 1 :] or ["serve"])


def check_kubectl(words: list[str]) -> None:
    assert words[:3] == ["create", "secret", "generic"]
    keys = {word.split("=")[1] for word in words if word.startswith("--from-")}
    deployment = (CHART / "templates" / "deployment.yaml").read_text(encoding="utf-8")
    assert keys == set(re.findall(r"\bkey: ([a-z][a-z.-]+)", deployment))
    assert f"secrets.existing={words[3]}" in TEXT


def check_curl(words: list[str]) -> None:
    path = words[words.index("-s") + 1].removeprefix("localhost:8000")
    assert path in json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))["paths"]
    json.loads(words[words.index("-d") + 1])


def check_export(words: list[str]) -> None:
    assert f"${{{words[0].split('=')[0]}:?" in (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")


CHECKS = {
    "curl": check_curl,
    "docker": check_docker,
    "export": check_export,
    "kubectl": check_kubectl,
    "lenvm": check_lenvm,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command(command: str, real_parts_required: bool) -> None:
    name, *words = shlex.split(command.partition(" > ")[0])
    if name == "helm":
        words = ["template", *(word for word in words[1:] if word != "--reuse-values")]
        done = subprocess.run(
            [find_tool("helm", required=real_parts_required), *words], cwd=ROOT, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    elif name == "promtool":
        # `test rules` takes seconds, and is run beside the rules: here it is enough that the file is there.
        assert (ROOT / words[-1]).is_file()
        if words[0] == "check":
            subprocess.run([find_tool(name, required=real_parts_required), *words], cwd=ROOT, check=True, timeout=60)
    else:
        CHECKS[name](words)


def test_values_and_files_that_the_page_names_exist() -> None:
    for path in re.findall(r"`(deploy/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\(([\w.-]+)\)", TEXT):
        assert (ROOT / "docs" / target).is_file(), target
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
