"""mkdocs hooks: fill the reference pages, and take in what lies outside of docs/ but belongs to the site.

The pages are written to be read in the repository too. There, a page of generated tables says where they come from; in
the site they follow its ``<!-- generated: NAME -->``.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reference  # beside this file: mkdocs puts its folder on the path while it loads it
from mkdocs.structure.files import File, Files
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
_MARK = re.compile(r"<!-- generated: (\w+) -->")
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _http() -> str:
    return reference.http(json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")))


def _cli() -> str:
    from lenvm_service.cli import app

    return reference.cli(get_command(app))


def _settings() -> str:
    from lenvm_service.cli import app
    from lenvm_service.settings import Settings

    return reference.settings(Settings, get_command(app).commands["serve"])  # type: ignore[attr-defined]


def _reports() -> str:
    return reference.reports(ROOT / "reports")


GENERATED: dict[str, Callable[[], str]] = {"cli": _cli, "http": _http, "reports": _reports, "settings": _settings}


def on_files(files: Files, config: Any) -> Files:
    """Adds the changelog, the guide for contributors, and the reports as they are."""
    for source, page in OUTSIDE.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "reports").glob("*.json")):
        files.append(File.generated(config, f"reports/{path.name}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in tables, and points links that leave docs/ at what the site has of it."""
    del config, files
    uri: str = page.file.src_uri
    text = _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)
    # A page that lies in the root of the repository, but not of the site, links from there.
    folder = "" if uri in OUTSIDE.values() and uri != "index.md" else posixpath.join("docs", posixpath.dirname(uri))
    return _LINK.sub(lambda link: _rewritten(link, folder, uri), text)


def _rewritten(link: re.Match[str], folder: str, uri: str) -> str:
    target = posixpath.normpath(posixpath.join(folder, link[2]))
    if target.startswith("docs/") and folder.startswith("docs"):
        return link[0]
    if target.startswith("docs/"):
        there = target.removeprefix("docs/")
    elif target in OUTSIDE:
        there = OUTSIDE[target]
    elif target == "reports":
        there = "reference/reports.md"
    elif target.startswith("reports/") and target.endswith(".json"):
        there = target
    elif (ROOT / target).exists():
        return link[1]  # a source file: the site does not have it
    else:
        return link[0]  # dead: --strict says so
    return f"[{link[1]}]({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{link[3] or ''})"
