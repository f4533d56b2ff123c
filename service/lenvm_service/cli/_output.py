"""What commands print: JSON or tables on stdout; progress, warnings and errors on stderr. Base install only."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = [
    "ProgressReporter",
    "elide",
    "number",
    "one_line",
    "print_error",
    "print_json",
    "print_warnings",
    "printable",
    "shift_style",
    "stdout_console",
    "table",
    "title",
]

_PLAIN_WIDTH = 120  # of tables in files and pipes, where rich would assume 80


def stdout_console() -> Console:
    """The console for results. Texts are shown as they are: no markup, no emoji codes."""
    as_is = Console(highlight=False, markup=False, emoji=False)
    if not as_is.is_terminal and "COLUMNS" not in os.environ:
        as_is.width = _PLAIN_WIDTH
    return as_is


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command with ``--json``; numbers that JSON cannot hold become null."""
    print(json.dumps(_plain(document), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def one_line(text: object) -> str:
    """Text on one line, control characters made visible."""
    return printable(" ".join(str(text).split()))


def print_error(message: str) -> None:
    """``error: ...`` on stderr."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def print_warnings(messages: Sequence[str]) -> None:
    """``warning: ...`` on stderr, a line each."""
    for message in messages:
        print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Generated text for a terminal: control characters but newline and tab (escape sequences!) made visible."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or (c.isspace() and ord(c) > 0xA0) else repr(c)[1:-1] for c in text
    )


def elide(text: str, head: int, tail: int = 0) -> str:
    """``text`` on one line: about its first ``head`` and last ``tail`` characters, in whole words where it has any."""
    line = one_line(text)
    if len(line) <= head + tail + 5:
        return line
    first = line[: head + 1].rpartition(" ")[0] or line[:head]
    last = (line[-tail - 1 :].partition(" ")[2] or line[-tail:]) if tail else ""
    return f"{first} […] {last}".rstrip()


def number(value: float | None, pattern: str = ".1f") -> str:
    """A number for a table; a dash where there is none."""
    if value is None or math.isnan(value):
        return "-"
    text = format(value, pattern)
    return text.lstrip("-") if float(text) == 0.0 else text  # no "-0.0"


def shift_style(shift: float, largest: float) -> str:
    """Colour of a length shift: red longer, blue shorter, dim where it is small beside the largest one."""
    if abs(shift) < 0.05 * largest:
        return "dim"
    strong = "bold " if abs(shift) > 0.5 * largest else ""
    return strong + ("red" if shift > 0 else "bright_blue")


def title(console: Console, text: str) -> None:
    """A heading as wide as the console (a table's own title is folded to the table's width)."""
    console.print(Text(text, style="bold"))


def table(columns: Sequence[str], *, text: Sequence[str] = (), show_lines: bool = False) -> Table:
    """An empty table: columns are numbers (right-aligned) except for those in ``text``."""
    made = Table(show_lines=show_lines)
    for name in columns:
        made.add_column(name, justify="left" if name in text else "right", overflow="fold")
    return made


class ProgressReporter:
    """A bar a stage on a terminal; elsewhere a line every ``every_s`` seconds, so that a log shows life and short work
    prints nothing. The first ``update`` opens it: bars of other makers may come before."""

    def __init__(self, *, every_s: float = 30.0) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._every_s = every_s
        self._spoke = time.monotonic()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, stage: str, done: int, total: int | None, metrics: Mapping[str, float] | None = None) -> None:
        """``done`` of ``total`` (None: unknown); the signature of ``run_recipe``'s progress."""
        note = "  ".join(f"{name} {value:,.4g}" for name, value in (metrics or {}).items())
        if not self._console.is_terminal:
            if time.monotonic() - self._spoke >= self._every_s:
                self._spoke = time.monotonic()
                print(f"{stage}: {done}/{total or '?'}  {note}".rstrip(), file=sys.stderr, flush=True)
            return
        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, note=note)
        self._bars.update(self._tasks[stage], completed=done, total=total, note=note)
