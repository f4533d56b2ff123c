"""The code of the documentation: every fenced block of README.md and docs/**/*.md, and what is to be done with it.

bash, console and python blocks are run for real (tests/integration/test_docs_run.py), those of a page in one folder and
in order, unless a comment in front of the block says otherwise:

    <!-- test: check: REASON -->  the block cannot run here; each of its commands is checked as far as that goes
    <!-- test: serve -->          one ``lenvm serve``: it is started, must become ready, and is ended
    <!-- file: NAME -->           the block is the content of a file that later commands of the page use

A console block has ``$ command`` lines, each with the answer that it must give. json, toml and yaml must be readable;
text is anything else.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.main import get_command

__all__ = ["PAGES", "ROOT", "Block", "blocks", "check_python", "console_steps", "read_data", "same", "shell_commands"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("bash", "console", "python")
DATA = ("json", "toml", "yaml", "text")
_MARK = re.compile(r"<!-- (test|file): ([^:>]+?)(?:: (.+?))? -->\s*", re.DOTALL)
# What differs from call to call: times, keyed handles, ids of requests, and what an earlier call left in the cache.
_VARIES = {"timings_ms", "request_id", "session", "prediction_id", "model_sha", "cached_tokens", "created"}


@dataclass(frozen=True)
class Block:
    """A block and its ``treatment``: run, check, serve, file or read. ``argument``: of the comment in front of it."""

    page: str
    line: int
    language: str
    text: str
    treatment: str
    argument: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All code of a page. A block that the rules above do not cover fails the test."""
    name, mark, found = str(page.relative_to(ROOT)), "", []
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.map is None or token.type not in ("html_block", "fence", "code_block"):
            mark = "" if token.type.endswith("_open") and token.level == 0 else mark
            continue
        line = token.map[0] + 1
        if token.type == "html_block":
            mark = token.content
            continue
        assert token.type == "fence", f"{name}:{line}: fence the block and name its language"
        found.append(_block(name, line, token.info.strip(), token.content, mark))
        mark = ""
    return found


def _block(page: str, line: int, language: str, text: str, mark: str) -> Block:
    where = f"{page}:{line}"
    assert language in RUN + DATA, f"{where}: {language!r} is none of {', '.join(RUN + DATA)}"
    said = _MARK.fullmatch(mark)
    if said is None:
        return Block(page, line, language, text, "run" if language in RUN else "read")
    if said[1] == "file":
        return Block(page, line, language, text, "file", said[2])
    assert said[2] in ("check", "serve"), f"{where}: {said[2]} is no treatment"
    assert said[2] == "serve" or (said[3] and len(said[3]) > 8), f"{where}: say why it cannot be run"
    return Block(page, line, language, text, said[2], said[3] or "")


def read_data(block: Block) -> None:
    """A block of data, as whoever pastes it would have it read."""
    if block.language == "json":
        json.loads(block.text)
    elif block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text) is not None


def console_steps(block: Block) -> list[tuple[str, str]]:
    """Pairs of a command (which may go on over lines that are indented) and its answer."""
    steps = re.findall(r"^\$ (.*(?:\n {2,}.*)*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE)
    assert "".join(f"$ {command}\n{answer}" for command, answer in steps) == block.text, f"{block.where}: no console"
    return steps


def same(found: Any, printed: Any) -> bool:
    """Equal to the digits that the page shows, but for what differs from call to call."""
    if isinstance(printed, dict):
        names = set(printed) - _VARIES
        return names == set(found) - _VARIES and all(same(found[name], printed[name]) for name in names)
    if isinstance(printed, list):
        return len(found) == len(printed) and all(map(same, found, printed))
    if isinstance(printed, float):
        return bool(found == pytest.approx(printed, rel=2e-3, abs=2e-3))
    return bool(found == printed)


# -- what cannot be run ------------------------------------------------------------------------------------------------


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a script: lines joined, comments and redirections left out, pipes taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;<>&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|;&") and word:
                yield from [words] if words else []
                words = []
            else:
                words.append(word)
        if words:
            redirected = next((at for at, word in enumerate(words) if set(word) <= set("<>")), len(words))
            yield words[:redirected]


def check_lenvm(words: list[str]) -> None:
    """Parsed by the command line itself, values included: ``lenvm`` would get as far as running."""
    from lenvm_service.cli import app

    command: Any = get_command(app)
    path = "lenvm"
    while getattr(command, "commands", None):
        if not words or words[0].startswith("-"):  # `lenvm rollout` has options of its own, and runs without a command
            break
        assert words[0] in command.commands, f"{path} has no command {words[0]}"
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    command.make_context(path, list(words), resilient_parsing="--help" in words)


def check_python(text: str, where: str) -> None:
    """It compiles, and what it imports from this project is there (an engine's own modules are not)."""
    tree = ast.parse(text, where)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0].startswith("lenvm"):
            _check_names(str(node.module), [alias.name for alias in node.names])


def _check_names(module: str, names: list[str]) -> None:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lenvm"):
            raise
        source = ROOT / "clients" / Path(*module.split(".")).with_suffix(".py")
        public = re.search(r"__all__ = \[(.*?)\]", source.read_text(encoding="utf-8"), re.DOTALL)
        assert public is not None
        assert set(names) <= set(re.findall(r'"(\w+)"', public[1])), (module, names)
    else:
        assert not [name for name in names if not hasattr(found, name)], (module, names)
