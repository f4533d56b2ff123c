"""No dead link inside the repository, and every page has its place in the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.links import dead_links, markdown_anchors, markdown_links

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "models/zoo").rglob("*.md")],
    key=lambda path: str(path),
)


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page, ROOT) == []


def test_every_page_is_in_the_navigation() -> None:
    def pages(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = pages(config["nav"])
    written = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(set(named)) == sorted(named)
    assert set(named) - {"changelog.md", "contributing.md"} == written  # these two lie outside of docs/


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `code` & more\n\n## Twice\n\n## Twice\n", encoding="utf-8")
    text = """# Here
[ok](there.md) [ok](there.md#a-code-more) [ok](#here) [ok](https://example.com/none) `[code](none.md)`
[ok](there.md#twice_1)
[dead](none.md) [dead](there.md#none) ![dead](none.png) [dead](#none) [outside](../)

| [dead](table.md) |
| --- |
"""
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert dead_links(page, tmp_path) == ["none.md", "there.md#none", "none.png", "#none", "../", "table.md"]
    assert "https://example.com/none" in markdown_links(text)
    assert markdown_anchors((tmp_path / "there.md").read_text()) == {"a-code-more", "twice", "twice_1"}
