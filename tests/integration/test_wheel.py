"""The wheel, built from the source distribution and installed into an empty environment: the base install. Serving
without torch is in test_image.py.

Needs a package index, or pip's own cache of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from lenvm import __version__

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Without PYTHONPATH, and away from the source tree: only what is installed counts.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, cwd=cwd, env=environment
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in folder.glob("*.tar.gz")] == [f"lenvm-{__version__}.tar.gz"]
    (built,) = folder.glob(f"lenvm-{__version__}-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of an environment with the base install only."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    bin_dir = folder / "bin"
    pip = (sys.executable, "-m", "pip", "--python", bin_dir / "python", "install", "-q")
    done = run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return bin_dir


def test_the_wheel_carries_packages_checkpoints_and_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    homes = {
        "models/lenvm": "lenvm",
        "models/zoo": "lenvm/_zoo",
        "models/recipes": "lenvm/_recipes",
        "service/lenvm_service": "lenvm_service",
        "clients/lenvm_client": "lenvm_client",
    }
    for source, home in homes.items():
        files = [path.relative_to(ROOT / source) for path in (ROOT / source).rglob("*") if path.is_file()]
        wanted = {f"{home}/{path.as_posix()}" for path in files if "__pycache__" not in path.parts}
        assert wanted <= names, f"{source}: {sorted(wanted - names)}"
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "zoo/", "recipes/"))]


def test_shipped_checkpoints_are_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        artifacts = [name for name in archive.namelist() if re.fullmatch(r"lenvm/_zoo/[^/]+/lenvm\.json", name)]
        assert "lenvm/_zoo/smollm2-135m-instruct/lenvm.json" in artifacts
        for artifact in artifacts:
            for file, digest in json.loads(archive.read(artifact))["files"].items():
                content = archive.read(artifact.replace("lenvm.json", file))
                assert hashlib.sha256(content).hexdigest() == digest, (artifact, file)


def test_its_metadata_are_those_of_the_project(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (distribution,) = metadata.distributions(path=[str(wheel)])
    about = distribution.metadata
    assert (about["Name"], about["Version"]) == ("lenvm", __version__)
    assert about["License-Expression"] == project["license"]
    extras = {canonicalize_name(extra) for extra in project["optional-dependencies"]}
    assert {canonicalize_name(extra) for extra in about.get_all("Provides-Extra") or ()} == extras
    assert str(about.get_payload()).startswith("# LenVM")  # the README, as the index shows it
    assert [(point.name, point.value) for point in distribution.entry_points] == [("lenvm", "lenvm_service.cli:main")]
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_base_install_has_neither_torch_nor_numpy(bin_dir: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, lenvm, lenvm_client, lenvm_service;"
        "print([m for m in ('torch', 'numpy', 'transformers') if u.find_spec(m)], lenvm.__version__)"
    )
    done = run(bin_dir / "python", "-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] ")


def test_resources_are_found_in_an_installed_wheel(bin_dir: Path, tmp_path: Path) -> None:
    for name in ("zoo", "recipes"):
        shipped = sorted(path.name for path in (ROOT / "models" / name).iterdir())
        code = f"from lenvm._resources import {name}_dir as d; print(sorted(p.name for p in d().iterdir()))"
        done = run(bin_dir / "python", "-c", code, cwd=tmp_path)
        assert done.stdout.strip() == str(shipped), done.stderr


def test_the_command_line_answers_without_any_extra(bin_dir: Path, tmp_path: Path) -> None:
    assert run(bin_dir / "lenvm", "--version", cwd=tmp_path).stdout == f"lenvm {__version__}\n"
    done = run(bin_dir / "lenvm", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("pull", "predict", "score", "generate", "rollout", "train", "export", "eval", "demo"):
        assert command in done.stdout


def test_a_command_that_needs_an_extra_names_it_in_one_line(bin_dir: Path, tmp_path: Path) -> None:
    done = run(bin_dir / "lenvm", "predict", "hi", cwd=tmp_path)
    assert done.returncode != 0
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "pip install 'lenvm[serve]'" in line
