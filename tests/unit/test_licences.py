"""Licences of what users get with lenvm: all known, all allowed; and what the document of components is made of."""

from __future__ import annotations

import tomllib
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from deploy.sbom import Closure, LicenceError, allowed, closure, licence_of, policy, sbom, table

ROOT = Path(__file__).resolve().parents[2]
RULES = policy()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def found() -> Closure:
    return closure(PROJECT)


def test_every_dependency_of_users_is_under_an_allowed_licence(found: Closure) -> None:
    rows = table(found, RULES).splitlines()[2:]
    assert len(rows) == len(found) > 50
    for name in ("torch", "onnxruntime-gpu", "transformers", "redis", "httpx2"):
        assert name in found
    for name in ("pytest", "mypy", "mkdocs", "cyclonedx-bom"):
        assert name not in found


def test_only_extras_that_nobody_installs_here_are_missing(found: Closure) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = makefile.partition("-e '.[")[2].partition("]'")[0].split(",")
    assert "export" in installed
    assert not {extra for extra in found.missing.values() if extra in (*installed, "", "api", "serve", "onnx")}


def licence_texts(distribution: metadata.Distribution) -> str:
    files = [
        file for file in distribution.files or () if "licen" in file.name.lower() or "copying" in file.name.lower()
    ]
    return " ".join(" ".join(Path(str(file.locate())).read_text(errors="replace").split()) for file in files)


@pytest.mark.parametrize("name", RULES["read"])
def test_a_licence_that_was_read_by_hand_stands_in_the_package(name: str) -> None:
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        assert name not in closure(PROJECT)  # of an extra that is not installed: nothing rests on the line
        return
    assert RULES["read"][name]["text"] in licence_texts(distribution)


def test_ours_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]


# -- the rules ---------------------------------------------------------------------------------------------------------


class Package(metadata.Distribution):
    """A distribution with this metadata."""

    def __init__(self, name: str, *, requires: tuple[str, ...] = (), **fields: str) -> None:
        self.message = Message()
        self.message["Name"], self.message["Version"] = name, "1.0"
        for field, value in fields.items():
            self.message[field.replace("_", "-")] = value
        for line in requires:
            self.message["Requires-Dist"] = line

    @property
    def metadata(self) -> Any:
        return self.message

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError

    @property
    def requires(self) -> list[str] | None:
        return self.message.get_all("Requires-Dist")


APACHE, BSD = "License :: OSI Approved :: Apache Software License", "License :: OSI Approved :: BSD License"


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License_Expression": "MIT OR Apache-2.0"}, "MIT OR Apache-2.0"),
        ({"License": "MIT"}, "MIT"),
        ({"License": "Apache", "Classifier": APACHE}, "Apache-2.0"),
        ({"License": "BSD-3-Clause", "Classifier": BSD}, "BSD-3-Clause"),
    ],
)
def test_what_metadata_says(fields: dict[str, str], licence: str) -> None:
    assert licence_of(Package("some-package", **fields), RULES) == licence


@pytest.mark.parametrize("fields", [{}, {"License": "BSD"}, {"Classifier": BSD}, {"License": "see LICENSE"}])
def test_what_is_not_known_is_an_error(fields: dict[str, str]) -> None:
    with pytest.raises(LicenceError, match=r"some-package: the licence is not known .* deploy/licences\.toml"):
        licence_of(Package("some-package", **fields), RULES)


@pytest.mark.parametrize(
    ("licence", "is_allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND LGPL-2.1-or-later", False),
        ("MIT AND (MPL-2.0 OR ISC)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
    ],
)
def test_what_is_allowed(licence: str, is_allowed: bool) -> None:
    assert allowed("some-package", licence, RULES) == is_allowed


def test_copyleft_is_refused_and_an_exception_holds_for_its_licence_alone() -> None:
    found = Closure()
    found["some-package"] = Package("some-package", License_Expression="AGPL-3.0-only")
    with pytest.raises(LicenceError, match=r"some-package is under AGPL-3\.0-only"):
        table(found, RULES)
    assert allowed("tqdm", "MPL-2.0 AND MIT", RULES)
    assert not allowed("tqdm", "GPL-3.0-only", RULES)
    nvidia = Package("nvidia-cublas-cu12", License="NVIDIA Proprietary Software")
    assert allowed("nvidia-cublas-cu12", licence_of(nvidia, RULES), RULES)
    assert licence_of(Package("cuda-pathfinder", License="Apache-2.0"), RULES) == "Apache-2.0"


def test_the_closure_follows_markers_and_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {
        "a": Package("a", requires=("b; extra == 'fast'", "c; sys_platform == 'nowhere'", "d")),
        "b": Package("b"),
        "d": Package("d", requires=("a", "gone")),
        "tool": Package("tool"),
    }

    def distribution(name: str) -> metadata.Distribution:
        if name not in packages:
            raise metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(metadata, "distribution", distribution)
    project = {"name": "lenvm", "dependencies": ["d"], "optional-dependencies": {"dev": ["tool"], "x": ["lenvm[y]"]}}
    found = closure(project)
    assert (sorted(found), found.missing) == (["a", "d"], {"gone": ""})
    project["optional-dependencies"] = {"x": ["a[fast]"]}
    assert sorted(closure(project)) == ["a", "b", "d"]


def test_the_document_keeps_what_users_get() -> None:
    found = Closure()
    found["a-b"] = Package("A_b", License="MIT")
    document = {
        "metadata": {"component": {"bom-ref": "root", "name": "lenvm"}},
        "components": [{"name": "A_b", "bom-ref": "A_b==1"}, {"name": "pytest", "bom-ref": "pytest==9"}],
        "dependencies": [
            {"ref": "root", "dependsOn": ["A_b==1", "pytest==9"]},
            {"ref": "pytest==9"},
            {"ref": "A_b==1"},
        ],
    }
    made = sbom(document, found, "1.2.3", RULES)
    assert [canonicalize_name(part["name"]) for part in made["components"]] == ["a-b"]
    assert made["components"][0]["licenses"] == [{"expression": "MIT", "acknowledgement": "concluded"}]
    assert made["dependencies"] == [{"ref": "root", "dependsOn": ["A_b==1"]}, {"ref": "A_b==1", "dependsOn": []}]
    assert made["metadata"]["component"]["version"] == "1.2.3"
