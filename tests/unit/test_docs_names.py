"""Tables and prose of the pages, beside the code that they are about: metrics, sizes, fields, commands, options."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from prometheus_client import CollectorRegistry
from typer.main import get_command

from lenvm.config import FORMAT_VERSION, LenVMConfig
from lenvm.scoring import BlockLayout
from lenvm_service.cli import app
from lenvm_service.metrics import Metrics
from lenvm_service.prefix_cache import Codec, SessionRecord
from lenvm_service.settings import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [path for path in DOCS.rglob("*.md") if path.name != "results.md"]
PROSE = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_every_metric_that_a_page_names_exists() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    exposed = {family.name for family in registry.collect()}
    counters = {family.name for family in registry.collect() if family.type == "counter"}
    packages = {"lenvm_client", "lenvm_service"}
    words = {word for page in PAGES for word in re.findall(r"\blenvm_[a-z_0-9]+", page.read_text(encoding="utf-8"))}
    for word in words - packages:
        if word.endswith("_total"):
            assert word.removesuffix("_total") in counters, word
        elif word not in ("lenvm_top_k",):  # a field of vLLM requests
            assert word in exposed - counters, word
    assert metrics.registry is registry
    assert len(words) > 20


@pytest.mark.parametrize(
    ("line", "dtype", "payload"),
    [
        ("float32, exact", "float32", "exact"),
        ("bfloat16 or float16, exact", "bfloat16", "exact"),
        ("int8", "float32", "int8"),
    ],
)
def test_sizes_of_blocks_in_redis(line: str, dtype: str, payload: str) -> None:
    layout = BlockLayout(shape=(2, 30, 3, 32, 64), dtype=dtype, engine="torch")
    size = Codec(layout, num_bins=60, payload=payload).block_bytes
    cells = [f"{size:,}", f"{-(-size // 32):,}", f"{32 * (2 * 2**30 // size):,} tokens"]
    assert f"| {line} | {' | '.join(cells)} |" in read("how-to/redis.md")


def test_size_of_a_session_in_redis() -> None:
    import numpy as np

    codec = Codec(BlockLayout(shape=(2, 30, 3, 32, 64), dtype="float32", engine="torch"), num_bins=60)
    record = SessionRecord(np.arange(10, dtype="<u4").tobytes(), 0.0, np.zeros(60))
    assert len(codec.pack_session(b"r" * 32, b"k" * 32, record)) == 4 * 10 + 8 + 8 * 60 + 110
    assert "4 a token, 8 for the value and 8 a length bin, and 110" in read("how-to/redis.md")


def test_defaults_that_pages_name() -> None:
    page = read("how-to/redis.md")
    assert f"`--redis-ttl-s` ({Settings.model_fields['redis_ttl_s'].default:.0f})" in page
    assert f"`--redis-lookup-ms` ({Settings.model_fields['redis_lookup_ms'].default:.0f})" in page


def test_fields_of_an_artifact() -> None:
    page = read("reference/artifact.md")
    fields = re.findall(r"^\| `(\w+)` \| ", page.partition("## lenvm.json")[2].partition("```")[0], re.MULTILINE)
    assert sorted(fields) == sorted(field.name for field in dataclasses.fields(LenVMConfig))
    assert f"| `format_version` | integer | {FORMAT_VERSION};" in page


# -- commands and options in the prose ---------------------------------------------------------------------------------

FOREIGN = {  # options of other programs
    "--disable-overlap-schedule",
    "--enable-custom-logit-processor",
    "--enable-priority-scheduling",
    "--logits-processors",
    "--schedule-low-priority-values-first",
    "--scheduling-policy",
    "--strict",
}


def spans(page: Path) -> list[str]:
    """Code in the running text and in tables."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]


def commands_and_options() -> tuple[set[str], set[str]]:
    commands, options = set(), {"--help", "--version"}

    def walk(command: Any, path: str) -> None:
        commands.add(path)
        for parameter in command.params:
            options.update(parameter.opts)
        for name, below in getattr(command, "commands", {}).items():
            walk(below, f"{path} {name}")

    walk(get_command(app), "lenvm")
    return commands, options


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(DOCS.parent))) for page in PROSE])
def test_commands_and_options_in_the_prose_exist(page: Path) -> None:
    commands, options = commands_and_options()
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    for code in spans(page):
        words = code.split()
        if words[:1] == ["make"]:
            assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), code
        elif words[:1] == ["lenvm"] and words[1:] and re.fullmatch("[a-z]+", words[1]):
            group = words[1] in ("eval", "rollout") and words[2:] and re.fullmatch("[a-z]+", words[2])
            assert " ".join(words[: 3 if group else 2]) in commands, code
        if words[:1] == ["lenvm"] or code.startswith("--"):
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= options | FOREIGN, code
