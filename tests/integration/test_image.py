"""The CPU image, its build steps run in folders of their own: there is no container runtime where the tests run.

RUN, COPY, ENV, CMD, HEALTHCHECK and STOPSIGNAL are taken from the Dockerfile; /opt/lenvm, /src, /wheels, /cache and
/models become folders. Needs a package index, or pip's own cache of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from lenvm import __version__
from lenvm_client import Client
from tests.integration.conftest import free_port
from tests.support.dockerfile import ROOT, copy_context, environment, stage

EXTRA = "onnx"


@dataclass
class Image:
    """Where the folders of the image lie here."""

    root: Path

    def text(self, line: str) -> str:
        """A line of the Dockerfile with its folders replaced."""
        return re.sub(r"(?<![\w/.])/(?=(opt|src|wheels|cache|models)\b)", f"{self.root}/", line)

    def folder(self, name: str) -> Path:
        return Path(self.text(name))

    def variables(self, *stages: str) -> dict[str, str]:
        """What a container has: ENV, and of the machine only what leads pip to its index."""
        found = {name: self.text(value) for name, value in environment(*stages).items()}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        found["PATH"] = found.get("PATH", "$PATH").replace("$PATH", path)
        kept = ("PIP_", "HTTP", "http", "SSL_", "REQUESTS_", "LANG", "HOME")
        return {name: value for name, value in os.environ.items() if name.startswith(kept)} | found

    def run(self, name: str, cwd: Path) -> None:
        """Each RUN of a stage that is about Python."""
        for instruction, rest in stage(name):
            if instruction == "RUN" and "useradd" not in rest:
                script = self.text(re.sub(r"--mount=\S+ ", "", rest))
                done = subprocess.run(
                    ["bash", "-euc", script], cwd=cwd, env={**self.variables(name), "EXTRA": EXTRA},
                    capture_output=True, text=True, timeout=600,
                )  # fmt: skip
                assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    built = Image(tmp_path_factory.mktemp("image"))
    for name in ("/opt", "/src", "/wheels", "/cache"):
        built.folder(name).mkdir()
    (copied,) = [rest.split() for name, rest in stage("dependencies") if name == "COPY"]
    for source in copied[:-1]:
        shutil.copy(ROOT / source, built.folder("/src"))
    built.run("dependencies", built.folder("/src"))
    assert ("COPY", ". .") in stage("wheel")
    copy_context(built.root / "context")
    assert {path.name for path in (built.root / "context" / "deploy").iterdir()} == {"probe.py", "requirements.py"}
    built.run("wheel", built.root / "context")
    shutil.rmtree(built.root / "context")
    built.run("", built.root)
    probe = built.folder("/opt") / "lenvm" / "bin" / "lenvm-probe"  # /usr/local/bin there
    probe.write_bytes((ROOT / "deploy" / "probe.py").read_bytes())
    probe.chmod(0o755)
    return built


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def container(
    image: Image, tiny_export: Path, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """``docker run``, with an export mounted where LENVM_MODEL says."""
    variables = image.variables(f"runtime-{EXTRA}", "")
    mount = Path(variables["LENVM_MODEL"])
    mount.parent.mkdir(exist_ok=True)
    if not mount.is_symlink():
        mount.symlink_to(tiny_export)
    variables["LENVM_PORT"] = str(free_port())
    words = dict(stage(""))
    command = json.loads(words["ENTRYPOINT"]) + json.loads(words["CMD"])
    command[0] = shutil.which(command[0], path=variables["PATH"])
    assert command[0].startswith(str(image.root))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=log)
    yield process, variables
    process.kill()
    process.wait()


def healthy(variables: dict[str, str], *arguments: str) -> bool:
    probe = shutil.which("lenvm-probe", path=variables["PATH"])
    return subprocess.run([str(probe), *arguments], env=variables, capture_output=True, timeout=60).returncode == 0


def test_the_image_serves_is_healthy_writes_nothing_and_stops(
    image: Image, container: tuple[subprocess.Popen[bytes], dict[str, str]], tmp_path: Path
) -> None:
    process, variables = container
    installed = files(image.folder("/opt"))
    assert not [path for path in installed if path.endswith("site-packages/torch/__init__.py")]
    words = dict(stage(""))
    name, *arguments = json.loads(words["HEALTHCHECK"].partition("CMD ")[2])
    assert name == "lenvm-probe"
    end = time.monotonic() + 120
    while not (healthy(variables, *arguments) and healthy(variables)):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.2)
    with Client(f"http://127.0.0.1:{variables['LENVM_PORT']}", max_retries=0) as client:
        assert client.predict_length("Why is the sky blue?").prediction.value < 0
    process.send_signal(signal.Signals[words["STOPSIGNAL"]])
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    # There it runs as somebody who may write to /cache and /tmp alone.
    assert files(image.folder("/opt")) == installed
    assert files(tmp_path) == {"log"}


def lenvm(image: Image, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``docker run lenvm ARGUMENTS``."""
    variables = image.variables(f"runtime-{EXTRA}", "")
    command = [str(shutil.which("lenvm", path=variables["PATH"])), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)


def test_commands_without_torch(image: Image, tiny_export: Path, tmp_path: Path) -> None:
    done = lenvm(image, tmp_path, "predict", "Hello", "--model", str(tiny_export), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predictions"][0]["value"] < 0
    done = lenvm(image, tmp_path, "serve", "--model", "smollm2-135m-instruct", "--port", "0")  # shipped, for torch
    assert done.returncode == 1
    assert "pip install 'lenvm[serve]'" in done.stderr


def test_what_is_installed_is_what_is_pinned(image: Image) -> None:
    (packages,) = image.folder("/opt").glob("lenvm/lib/python3.*/site-packages")
    found = {canonicalize_name(one.name): one.version for one in metadata.distributions(path=[str(packages)])}
    assert "torch" not in found
    assert {"lenvm", "onnxruntime-gpu", "opentelemetry-sdk"} <= set(found)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert found.pop("lenvm") == __version__
    for of_the_environment in ("pip", "setuptools"):
        found.pop(of_the_environment, None)
    assert found.items() <= pins.items()
    python = image.folder("/opt") / "lenvm" / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
