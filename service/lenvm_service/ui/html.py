"""Text and numbers in HTML: nothing that a visitor types or a model writes is ever read as markup or as a template."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

__all__ = ["escape", "fact_list", "note", "number", "problem", "table"]

# The page's component reads its value as a template: these three would begin an expression.
_TEMPLATE = str.maketrans({"$": "&#36;", "{": "&#123;", "`": "&#96;"})


def escape(text: object) -> str:
    """As HTML text or as the value of an attribute in double quotes."""
    return html.escape(str(text)).translate(_TEMPLATE)


def number(value: float | None, spec: str = ",.1f") -> str:
    """A number with a real minus sign; a dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = format(value, spec)
    if text.startswith("-") and not text.strip("-0.,"):
        text = format(0.0, spec)  # rounding gave a negative zero
    return text.replace("-", "−")


def problem(message: str) -> str:
    """Why there is no answer."""
    return f'<p class="lv-problem" role="alert">{escape(message)}</p>'


def note(message: str) -> str:
    """What a reader must know besides."""
    return f'<p class="lv-note">{escape(message)}</p>'


def fact_list(facts: Iterable[tuple[str, str, str]]) -> str:
    """Figures side by side: (name, value, what it is)."""
    parts = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class='lv-about'>{escape(about)}</dd></div>"
        for name, value, about in facts
    )
    return f'<dl class="lv-facts">{"".join(parts)}</dl>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="lv-scroll"><table class="lv-table"><tr>{head}</tr>{body}</table></div>'
