"""What the Dockerfile and .dockerignore say, read without an engine."""

from __future__ import annotations

import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

__all__ = ["DOCKERFILE", "ROOT", "copy_context", "environment", "ignored", "instructions", "stage"]

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each, comments left out and lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def stage(name: str) -> list[tuple[str, str]]:
    """Those of ``FROM ... AS name``; of the last stage, the image, where ``name`` is empty."""
    stages: dict[str, list[tuple[str, str]]] = {}
    current = None
    for instruction, rest in instructions():
        if instruction == "FROM":
            current = stages.setdefault(rest.partition(" AS ")[2], [])
        elif current is not None:
            current.append((instruction, rest))
    return stages[name]


def environment(*stages: str) -> dict[str, str]:
    """ENV of these stages, later ones over earlier ones; of all if none is named."""
    found = [one for name in stages for one in stage(name)] if stages else instructions()
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(rest for name, rest in found if name == "ENV")))


def ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that matches the path or a folder above it wins."""
    parts, verdict = path.split("/"), False
    for line in (ROOT / ".dockerignore").read_text().split():
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        tails = [parts[end - 1 : end] if anywhere else parts[:end] for end in range(1, len(parts) + 1)]
        if any(fnmatch("/".join(tail), pattern.removeprefix("**/")) for tail in tails):
            verdict = not line.startswith("!")
    return verdict


def copy_context(target: Path) -> None:
    """``COPY . .``: what is not ignored."""
    kept_below = {line[1:].partition("/")[0] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if name in kept_below or not ignored((here / name).as_posix())]
        for name in files:
            if not ignored((here / name).as_posix()):
                (target / here).mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / here / name, target / here / name)
