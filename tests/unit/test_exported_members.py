"""The public surface: what a package exports is what its ``__all__`` says, and every public module has one."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import lenvm
import lenvm_client
import lenvm_service

PACKAGES = [lenvm, lenvm_client, lenvm_service]
SOURCES = sorted(
    path
    for package in PACKAGES
    for path in Path(str(package.__file__)).parent.rglob("*.py")
    if not any(part.startswith("_") and part != "__init__.py" for part in path.parts[-2:])
)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_exported_name_resolves(package: ModuleType) -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_nothing_public_is_left_out(package: ModuleType) -> None:
    ours = {
        name
        for name, member in vars(package).items()
        if not name.startswith("_")
        and not isinstance(member, ModuleType)
        and str(getattr(member, "__module__", "")).startswith(package.__name__)
    }
    assert ours <= set(package.__all__)


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(str(lenvm.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == lenvm._LAZY
    assert set(lenvm._LAZY) <= set(lenvm.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    for package in PACKAGES:
        with pytest.raises(AttributeError, match="no_such_name"):
            package.no_such_name  # noqa: B018 - the access is the test


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_every_public_module_says_what_it_exports(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    definitions = [
        node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    targets = [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)]
    if any(not name.startswith("_") for name in definitions):
        assert "__all__" in targets


def test_versions_agree() -> None:
    assert lenvm.__version__ == lenvm_service.__version__ == lenvm_client.__version__
    assert importlib.import_module("lenvm._version").__version__ == lenvm.__version__
