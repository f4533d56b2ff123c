"""What is promised about the distribution: light imports, named extras, pins that fit, resources that are found."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lenvm import _extras, _resources
from lenvm.errors import ArtifactError, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "fastapi", "redis", "onnxruntime")

# Stands in for an environment without the extras: those modules cannot be found.
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_without_extras(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def test_the_hook_really_blocks() -> None:
    out = run_without_extras("try:\n    import numpy\nexcept ModuleNotFoundError as error:\n    print(error.name)")
    assert out == "numpy"


@pytest.mark.parametrize("module", ["lenvm_client", "lenvm", "lenvm_service"])
def test_imports_need_no_extra(module: str) -> None:
    code = f"import {module}; print(sorted(set(sys.modules) & set({HEAVY!r})), {module}.__version__)"
    assert re.fullmatch(r"\[\] \d\S*", run_without_extras(code))


def test_the_client_is_imported_quickly() -> None:
    code = "import time; t = time.perf_counter(); import lenvm_client; print(time.perf_counter() - t)"
    assert min(float(run_without_extras(code)) for _ in range(3)) < 0.25


def test_a_lazy_name_names_the_extra() -> None:
    code = "import lenvm\ntry:\n    lenvm.log_weights\nexcept lenvm.MissingExtraError as error:\n    print(error)"
    assert run_without_extras(code) == "numpy not installed: run pip install 'lenvm[serve]'"


def test_require() -> None:
    _extras.require("serve", "json", "os.path")
    with pytest.raises(MissingExtraError, match=re.escape("no_such_a, no_such_b.c not installed: run pip install")):
        _extras.require("train", "no_such_a", "json", "no_such_b.c")
    assert "lenvm[serve]" in run_without_extras(
        "from lenvm._extras import require\ntry:\n    require('serve', 'torch')\nexcept ImportError as e:\n    print(e)"
    )


def brought_by(extra: str, project: dict[str, Any]) -> set[str]:
    """Distributions of an extra, those of the extras that it names included."""
    found = set()
    for wanted in (Requirement(line) for line in project["optional-dependencies"][extra]):
        found.add(canonicalize_name(wanted.name))
        if wanted.name == project["name"]:
            found.update(*(brought_by(other, project) for other in wanted.extras))
    return found


def test_serving_an_export_takes_no_torch(project: dict[str, Any]) -> None:
    assert "onnxruntime-gpu" in brought_by("onnx", project)
    assert not {"torch", "onnx"} & brought_by("onnx", project)
    assert not {"onnxruntime-gpu", "onnx"} & brought_by("serve", project)


def test_every_optional_module_is_brought_by_its_extra(project: dict[str, Any]) -> None:
    extras = {extra: brought_by(extra, project) for extra in project["optional-dependencies"]}
    other_names = {"onnxruntime": "onnxruntime-gpu", "opentelemetry": "opentelemetry-api"}
    for module, extra in _extras._EXTRA_OF.items():
        assert canonicalize_name(other_names.get(module, module)) in extras[extra], module


def test_every_dependency_is_pinned_inside_its_range(project: dict[str, Any]) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    lines = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(line.name): re.fullmatch(r"==([^*+]+)", str(line.specifier)) for line in lines}
    assert all(pins.values()), "exact versions only"
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for wanted in (Requirement(line) for group in groups for line in group):
        if wanted.name != project["name"]:
            pin = pins[canonicalize_name(wanted.name)]
            assert pin is not None
            assert wanted.specifier.contains(pin[1]), wanted


def test_packages_are_typed() -> None:
    for package in ("models/lenvm", "service/lenvm_service", "clients/lenvm_client"):
        assert (ROOT / package / "py.typed").is_file()


def test_resources_of_a_wheel_come_before_those_of_a_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_resources, "_PACKAGE", tmp_path / "lenvm")
    with pytest.raises(ArtifactError, match="carries no zoo folder"):
        _resources.zoo_dir()
    for folder in ("zoo", "recipes", "lenvm/_zoo"):
        (tmp_path / folder).mkdir(parents=True)
    assert _resources.recipes_dir() == tmp_path / "recipes"
    assert _resources.zoo_dir() == tmp_path / "lenvm" / "_zoo"
