"""Dockerfile and Compose: no engine here, linters read them, and their parts (probe, requirements, flags) are run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from lenvm_service.cli import app
from lenvm_service.settings import Settings, load_settings
from tests.support.deploy_tools import find_tool, tool_folder
from tests.support.dockerfile import DOCKERFILE, ROOT, environment, ignored, instructions


def compose(name: str) -> dict[str, Any]:
    """With defaults for variables, and a secret for the one that must be set."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "deploy" / name).read_text(encoding="utf-8"))
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:\?[^}]*\}", "0123456789abcdef", text))
    return found


COMPOSE = {name: compose(name) for name in ("compose.yaml", "compose.gpu.yaml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# -- the image ---------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say(real_parts_required: bool) -> None:
    hadolint = find_tool("hadolint", required=real_parts_required)
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_the_image_sets_is_a_setting() -> None:
    set_here = {name.removeprefix("LENVM_").lower() for name in environment() if name.startswith("LENVM_")}
    assert set_here - {"cache"} <= set(Settings.model_fields)
    assert environment()["LENVM_HOST"] == "0.0.0.0"


def test_the_image_runs_a_command_that_exists_as_nobody_special() -> None:
    by_name = dict(instructions())
    assert json.loads(by_name["ENTRYPOINT"]) == ["lenvm"]
    assert PROJECT["scripts"]["lenvm"]
    (command,) = json.loads(by_name["CMD"])
    assert command in get_command(app).commands  # type: ignore[attr-defined]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", by_name["USER"])


def test_everything_that_is_copied_is_in_the_context() -> None:
    copied = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    sources = {word for words in copied for word in words[:-1] if not word.startswith("--")} - {"."}
    assert sources
    needed = [line.removesuffix("/") for line in build_inputs()]
    for path in [*sources, *needed]:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path
    assert ignored("tests/unit")
    assert ignored(".git")
    assert ignored("models/lenvm/__pycache__")
    assert ignored("deploy/compose.yaml")


def build_inputs() -> list[str]:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    wheel = build["build"]["targets"]["wheel"]["only-include"]
    return [*wheel, PROJECT["readme"], *PROJECT["license-files"], build["version"]["path"]]


@pytest.mark.parametrize("extra", ["serve", "onnx"])
def test_requirements_of_an_image(extra: str) -> None:
    (others,) = re.findall(r'requirements\.py "\$EXTRA" (.+) >', DOCKERFILE)
    command = [sys.executable, "deploy/requirements.py", extra, *others.split()]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    names = {canonicalize_name(Requirement(line).name) for line in lines if line}
    assert "lenvm" not in names
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]} < names
    assert {"fastapi", "opentelemetry-sdk"} < names  # by way of another extra, and for the chart's otel_endpoint
    assert ("torch" in names, "onnxruntime-gpu" in names) == ((extra == "serve"), (extra == "onnx"))
    wrong = subprocess.run([*command[:2], "none"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "error: name an extra" in wrong.stderr


def test_each_kind_of_image_has_its_stage() -> None:
    stages = set(re.findall(r"^FROM \S+ AS runtime-(\w+)$", DOCKERFILE, re.MULTILINE))
    assert stages == {"serve", "onnx"}
    assert stages <= set(PROJECT["optional-dependencies"])


# -- the probe ---------------------------------------------------------------------------------------------------------


class Health(BaseHTTPRequestHandler):
    key: str | None = None
    ready = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        known = self.key is None or self.headers.get("Authorization") == f"Bearer {self.key}"
        open_to_all = self.path == "/health/live"
        self.send_response(401 if not (known or open_to_all) else 200 if open_to_all or self.ready else 503)
        self.end_headers()


@pytest.fixture
def health() -> Iterator[tuple[type[Health], dict[str, str]]]:
    handler = type("Own", (Health,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # A proxy in the environment must not be asked.
        yield handler, {"LENVM_PORT": str(server.server_address[1]), "http_proxy": "http://127.0.0.1:9"}
        server.shutdown()


def probe(arguments: list[str], variables: dict[str, str]) -> int:
    command = [sys.executable, str(ROOT / "deploy/probe.py"), *arguments]
    return subprocess.run(command, env={"PATH": os.environ["PATH"], **variables}, timeout=60).returncode


def test_the_probe(health: tuple[type[Health], dict[str, str]]) -> None:
    handler, variables = health
    (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
    name, *arguments = json.loads(check[check.index("CMD ") + 4 :])
    assert f"deploy/probe.py /usr/local/bin/{name}" in DOCKERFILE
    handler.ready = False
    assert probe(arguments, variables) == 0  # a model that loads is no reason to restart
    assert probe([], variables) == 1
    handler.ready, handler.key = True, "lenvm-secret"
    assert probe([], variables) == 1
    assert probe(arguments, variables) == 0
    assert probe([], {**variables, "LENVM_PROBE_KEY": "lenvm-secret\n"}) == 0


def test_the_probe_of_a_process_that_is_gone() -> None:
    assert probe([], {"LENVM_PORT": "9"}) == 1


# -- compose -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_are_valid(name: str, real_parts_required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tool_folder("python", required=real_parts_required))
    from compose_spec import PyCompose

    PyCompose.from_json(json.dumps(COMPOSE[name]))
    wrong = {"services": {"lenvm": {"image": "x", "no_such_key": 1}}}
    with pytest.raises(ValueError, match="no_such_key"):
        PyCompose.from_json(json.dumps(wrong))


def test_compose_sets_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {**COMPOSE["compose.yaml"]["services"]["lenvm"]["environment"]}
    variables |= COMPOSE["compose.gpu.yaml"]["services"]["lenvm"]["environment"]
    for name, value in variables.items():
        assert name.removeprefix("LENVM_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.device, settings.dtype, settings.log_format) == ("cuda", "bfloat16", "json")
    grace = int(COMPOSE["compose.yaml"]["services"]["lenvm"]["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_timeout_s + 5


def test_compose_names_what_is_there() -> None:
    content = COMPOSE["compose.yaml"]
    services = content["services"]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, service in services.items():
        assert set(service.get("networks", [])) <= set(content["networks"])
        assert set(service.get("depends_on", [])) <= set(services)
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (ROOT / "deploy" / source).exists() if source.startswith(".") else source in content["volumes"]
        if service["image"] == "lenvm:local":
            assert service["command"][0] in commands
            assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
    assert services["redis"]["networks"] == ["back"]
    assert content["networks"]["back"] == {"internal": True}
    url = re.fullmatch(r"redis://(\w+):6379/0", services["lenvm"]["environment"]["LENVM_REDIS_URL"])
    assert url is not None
    assert url[1] in services
