"""Where the shipped checkpoints and recipes are: beside the package in a source tree, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

from lenvm.errors import ArtifactError

__all__ = ["recipes_dir", "zoo_dir"]

_PACKAGE = Path(__file__).resolve().parent


def zoo_dir() -> Path:
    """The folder with one sub-folder per shipped checkpoint. Raises :class:`ArtifactError` where none is shipped."""
    return _find("zoo")


def recipes_dir() -> Path:
    """The folder with the shipped ``*.toml`` recipes. Raises :class:`ArtifactError` where none is shipped."""
    return _find("recipes")


def _find(name: str) -> Path:
    # The wheel's folder comes first: next to an installed package, ``../zoo`` would be somebody else's.
    for folder in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise ArtifactError(
        f"this installation carries no {name} folder: reinstall it from a complete wheel or source tree"
    )
