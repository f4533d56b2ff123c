"""Cells and tables of Markdown, as ``docs/results.md`` has them; what is not there is a dash."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lenvm.evaluation.figures.tokens import shown

__all__ = ["change", "code", "dig", "interval", "number", "percent", "picture", "table"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if not at else "---:" for at in range(len(head))) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def dig(metrics: Any, *path: str) -> Any:
    """What lies at ``path`` of nested figures, or None."""
    for name in path:
        metrics = metrics.get(name) if isinstance(metrics, Mapping) else None
    return metrics


def percent(value: Any, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def number(value: Any, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def interval(bounds: Any, scale: float = 100.0, form: str = ".1f") -> str:
    return "–" if not bounds else f"{scale * bounds[0]:{form}} to {scale * bounds[1]:{form}}"


def change(difference: Any, scale: float = 1.0) -> str:
    """A difference with its interval, in points: ``scale`` 100 for fractions."""
    return "–" if not difference else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(scale * x for x in difference))


def code(text: str) -> str:
    """A token in a table cell: backticks around it, more of them where it holds some; bars escaped."""
    text = shown(text).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def picture(name: str, text: str) -> str:
    return f"![{text}](figures/{name}.svg)"
