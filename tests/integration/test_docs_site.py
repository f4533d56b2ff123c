"""The site: built without a warning, complete, without a dead link, and without anything from another server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.main import get_command

from lenvm_service.cli import app
from lenvm_service.settings import Settings
from tests.support.links import HtmlPage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, HtmlPage]:
    return {path: HtmlPage.read(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_built(site: Path) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        name = source.relative_to(ROOT / "docs").with_suffix("")
        page = site / "index.html" if str(name) == "index" else site / name / "index.html"
        assert page.is_file(), name
    for name in ("changelog", "contributing"):
        assert (site / name / "index.html").is_file()
    assert not list(site.rglob("_site"))


def test_links_lead_somewhere(site: Path, pages: dict[Path, HtmlPage]) -> None:
    dead, seen = set(), 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue  # 404.html is served in the place of any page, with links from the root
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            seen += 1
            found = target.is_file() and target.is_relative_to(site.resolve())
            if found and parts.fragment and target in pages:
                found = unquote(parts.fragment) in pages[target].anchors
            if not found:
                dead.add(f"{path.relative_to(site)}: {link}")
    assert not dead
    assert seen > 1000


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, HtmlPage], site: Path) -> None:
    loaded = {link for page in pages.values() for link in page.loaded}
    assert loaded
    assert not [link for link in loaded if urlsplit(link).netloc]
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def text_of(site: Path, page: str) -> str:
    return (site / "reference" / page / "index.html").read_text(encoding="utf-8")


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    page, commands = text_of(site, "cli"), 0

    def walk(command: object, name: str) -> None:
        nonlocal commands
        commands += 1
        assert f'id="{name.replace(" ", "-")}"' in page, name
        for parameter in command.params:  # type: ignore[attr-defined]
            for flag in (*parameter.opts, *parameter.secondary_opts):
                assert parameter.param_type_name == "argument" or f"<code>{flag}</code>" in page, (name, flag)
        for sub, below in getattr(command, "commands", {}).items():
            walk(below, f"{name} {sub}")

    walk(get_command(app), "lenvm")
    assert commands > 20


def test_the_reference_has_every_route_schema_and_field(site: Path) -> None:
    page, document = text_of(site, "http"), json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f'id="{operation["operationId"]}"' in page
            assert f"{method.upper()} {path}" in page
    for name, schema in document["components"]["schemas"].items():
        assert f'id="schema-{name.lower()}"' in page
        for field in schema.get("properties", ()):
            assert f"<code>{field}</code>" in page, (name, field)


def test_the_reference_has_every_setting_and_report(site: Path) -> None:
    page = text_of(site, "settings")
    for name in Settings.model_fields:
        assert f"<code>LENVM_{name.upper()}</code>" in page
    for report in (ROOT / "reports").glob("*.json"):
        assert report.name in text_of(site, "reports")
        assert (site / "reports" / report.name).read_bytes() == report.read_bytes()


def test_the_python_reference_has_the_public_names(site: Path) -> None:
    import lenvm_client

    page = text_of(site, "python")
    for name in ("Client", "GuidedDecoder", "BudgetPlanner", "predict_rows"):
        assert name in lenvm_client.__all__
        assert re.search(rf'id="lenvm_client[\w.]*\.{name}"', page), name
    for name in ("lenvm.returns.horizon", "lenvm.distribution.LengthBins", "lenvm_service.local.LocalScorer"):
        assert f'id="{name}"' in page, name
