"""Links of Markdown pages and of built HTML: which there are, and what each page can be linked to."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown.extensions.toc import slugify, unique
from markdown_it import MarkdownIt

__all__ = ["HtmlPage", "dead_links", "markdown_anchors", "markdown_links"]


def markdown_links(text: str) -> list[str]:
    """Targets of the links and pictures of a page; what stands in code is none."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        for child in token.children or ():
            target = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if target is not None:
                found.append(str(target))
    return found


def markdown_anchors(text: str) -> set[str]:
    """Ids of a page's headings, as the site makes them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found: set[str] = set()
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            words = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            unique(slugify(words, "-"), found)
    return found


def dead_links(page: Path, root: Path) -> list[str]:
    """Links of a Markdown page that lead to no file inside ``root``, or to no heading of one."""
    dead = []
    for link in markdown_links(page.read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue  # somebody else's: not asked from here
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        there = target.exists() and target.is_relative_to(root)
        if there and parts.fragment:
            there = parts.fragment in markdown_anchors(target.read_text(encoding="utf-8"))
        if not there:
            dead.append(link)
    return dead


@dataclass
class HtmlPage(HTMLParser):
    """``links``: every href and src; ``loaded``: those that a browser fetches by itself; ``anchors``: every id."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def read(cls, path: Path) -> HtmlPage:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := given.get(name)))
        for name in ("href", "src"):
            value = given.get(name)
            if value is not None:
                self.links.append(value)
                if tag in ("script", "img", "iframe", "source") or (tag == "link" and given.get("rel") == "stylesheet"):
                    self.loaded.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
