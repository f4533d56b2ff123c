"""CHANGELOG.md keeps its format, and the version stands in one place."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

from lenvm import __version__

ROOT = Path(__file__).resolve().parents[2]
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
TEXT = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_sections_are_versions_from_new_to_old() -> None:
    sections = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    assert sections[0] == "Unreleased"
    released = [re.fullmatch(r"(\d+\.\d+\.\d+\S*) - \d{4}-\d\d-\d\d", section) for section in sections[1:]]
    assert all(released), sections
    versions = [Version(match[1]) for match in released if match]
    assert versions == sorted(versions, reverse=True)
    # A version that was released is not worked on any more.
    assert all(version <= Version(__version__) for version in versions)


def test_entries_stand_under_a_kind() -> None:
    for section in re.split(r"^## .+$", TEXT, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert kinds, section
        assert [kind for kind in KINDS if kind in kinds] == kinds
        before = section.partition("### ")[0]
        assert not re.search(r"^- ", before, re.MULTILINE)
        for entry in re.findall(r"^- (.+)$", section, re.MULTILINE):
            assert len(entry) > 15, entry


def test_the_version_is_written_once() -> None:
    pattern = re.compile(rf"^\s*(?:__version__|version)\s*[:=]\s*['\"]?{re.escape(__version__)}\b", re.MULTILINE)
    files = [ROOT / "pyproject.toml", ROOT / "Dockerfile", ROOT / "Makefile"]
    for folder in ("models/lenvm", "service", "clients"):
        files += (ROOT / folder).rglob("*.py")
    holders = [str(file.relative_to(ROOT)) for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    assert holders == ["models/lenvm/_version.py"]
