"""Checks of documented commands that cannot be run where the tests run: by the tool's dry run, or by the files that the
command is about."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

from lenvm_service.settings import Settings
from tests.support.deploy_tools import find_tool
from tests.support.documented import ROOT, check_lenvm, check_python, shell_commands
from tests.support.redis_server import RedisServer

__all__ = ["check_command", "check_script"]

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CHART = ROOT / "deploy" / "helm" / "lenvm"


def check_script(text: str, folder: Path, *, required: bool) -> None:
    """Every command of a bash block. ``required``: a tool that is missing is a failure, not a skip."""
    commands = list(shell_commands(text))
    assert commands
    for words in commands:
        check_command(words, folder, required=required)


def check_command(words: list[str], folder: Path, *, required: bool) -> None:
    """One command. A program that nobody here knows how to check fails: add a check for it."""
    while words and re.fullmatch(r"[A-Z][A-Z_]*=.*", words[0], re.DOTALL):  # variables of the command's environment
        words = words[1:]
    if not words:
        return
    name, rest = words[0].rsplit("/", 1)[-1], words[1:]
    if name == "helm":
        _helm(rest, required=required)
    elif name == "promtool":
        _promtool(rest, required=required)
    elif name == "redis-server":
        server = RedisServer(folder / "redis", *rest)
        server.start().kill()
    else:
        assert name in CHECKS, f"no check is known for {name}: see tests/support/documented_commands.py"
        CHECKS[name](rest)


def _docker(words: list[str]) -> None:
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


def _kubectl(words: list[str]) -> None:
    assert words[:3] == ["create", "secret", "generic"]
    keys = {word.split("=")[1] for word in words if word.startswith("--from-")}
    deployment = (CHART / "templates" / "deployment.yaml").read_text(encoding="utf-8")
    assert keys == set(re.findall(r"\bkey: ([a-z][a-z.-]+)", deployment))
    assert f"secrets.existing={words[3]}" in (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def _helm(words: list[str], *, required: bool) -> None:
    words = ["template", *(word for word in words[1:] if word != "--reuse-values")]
    helm = find_tool("helm", required=required)
    done = subprocess.run([helm, *words], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def _promtool(words: list[str], *, required: bool) -> None:
    # `test rules` takes seconds, and is run beside the rules: here it is enough that the file is there.
    assert (ROOT / words[-1]).is_file()
    if words[0] == "check":
        subprocess.run([find_tool("promtool", required=required), *words], cwd=ROOT, check=True, timeout=60)


def _curl(words: list[str]) -> None:
    (path,) = [found[1] for word in words if (found := re.fullmatch(r"(?:http://)?[\w.-]+:\d+(/[^?]*)", word))]
    assert path in json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))["paths"], path
    if "-d" in words:
        json.loads(words[words.index("-d") + 1])


def _export(words: list[str]) -> None:
    for word in (word for word in words if "=" in word):
        name, _, value = word.partition("=")
        if name.startswith("LENVM_") and name.removeprefix("LENVM_").lower() in Settings.model_fields:
            continue
        if name.endswith("_IMPORT_PATH"):
            module, _, function = value.partition(":")
            assert hasattr(importlib.import_module(module), function), value
        elif name != "PATH":
            assert f"${{{name}:?" in (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"), name


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in (word.split("=")[0] for word in words if "=" in word):
        assert f"$({name})" in makefile, name


def _pip(words: list[str]) -> None:
    """What it installs is ours, and its extras exist."""
    assert words[0] == "install"
    found = [re.fullmatch(r"lenvm(?:\[([\w,-]+)\])?", word) for word in words[1:] if not word.startswith("-")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert found
    for name in found:
        assert name is not None, words
        assert set((name[1] or "").split(",")) - {""} <= set(extras)


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        module = words[1].split(".")
        if module[0] in ("lenvm_service", "lenvm", "lenvm_client"):
            assert list(ROOT.glob(f"*/{'/'.join(module)}*")), words[1]
        if module[:2] == ["lenvm_service", "cli"]:
            check_lenvm(words[2:])
    else:
        assert (ROOT / words[0]).is_file(), words[0]
        check_python((ROOT / words[0]).read_text(encoding="utf-8"), words[0])


def _torchrun(words: list[str]) -> None:
    _python(words[words.index("-m") :])


def _vllm(words: list[str]) -> None:
    module, name = words[words.index("--logits-processors") + 1].split(":")
    check_python(f"from {module} import {name}", "the option --logits-processors")


def _ray(words: list[str]) -> None:
    assert words[0] in ("start", "status", "stop"), words


def _ray_serve(words: list[str]) -> None:
    """Ray's command ``serve``: the files that it is given exist."""
    assert words[0] in ("deploy", "run", "status", "shutdown"), words
    assert all((ROOT / word).is_file() for word in words if word.endswith((".yaml", ".yml"))), words


def _git(words: list[str]) -> None:
    assert words[0] in ("clone", "tag", "push", "status", "log"), words


def _pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if not word.startswith("-")), words


def _cd(words: list[str]) -> None:
    assert len(words) == 1


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "cd": _cd,
    "curl": _curl,
    "docker": _docker,
    "export": _export,
    "git": _git,
    "kubectl": _kubectl,
    "lenvm": check_lenvm,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "python": _python,
    "ray": _ray,
    "serve": _ray_serve,
    "torchrun": _torchrun,
    "vllm": _vllm,
}
