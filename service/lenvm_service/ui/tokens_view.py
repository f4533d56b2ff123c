"""An answer token by token: coloured by its length shift, the remaining horizon above it, all numbers on hovering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lenvm.evaluation.figures.token_view import shift_look
from lenvm_service.ui.html import escape, note, number, table

__all__ = ["answer_html", "legend_html", "tokens_html"]

_END = "■"


def legend_html() -> str:
    """What the colours mean."""
    return (
        '<p class="lv-note"><span class="lv-l" style="--a:.5">Orange</span>: the token made the rest longer. '
        '<span class="lv-s" style="--a:.5">Blue, dotted</span>: shorter. The stronger, the more; without colour: '
        "hardly. A length shift is what the value changed in excess of the one token that was used up. Above each "
        "token stands the remaining horizon after it, in tokens; point at a token for all its numbers.</p>"
    )


def tokens_html(row: Mapping[str, Any], *, finished: bool) -> str:
    """A completion's scores (``TokenScoreJob``). ``finished``: its last token is the end-of-sequence token."""
    horizons = row["horizons"]
    count = len(row["tokens"]) - finished
    start = (
        f"Before the first token: value {number(row['values'][0], '.3f')}, horizon {number(horizons[0])} tokens. "
        f"{count:,} content token{'' if count == 1 else 's'}, {'ended by itself' if finished else 'not ended'}."
    )
    return note(start) + answer_html(row, finished=finished) + _numbers(row, finished)


def answer_html(row: Mapping[str, Any], *, finished: bool) -> str:
    """The coloured tokens alone."""
    boxes = []
    for at in range(len(row["tokens"])):
        text, shown, said = _token(row, at, finished)
        found = shift_look(row["length_shifts"][at])
        look = f' lv-{found[0]}" style="--a:{found[1]:.2f}' if found else ""
        above = f"{row['horizons'][at + 1]:.0f}"
        boxes.append(
            f'<span class="lv-t{look}" title="{escape(said)}"><small>{above}</small><b>{escape(shown)}</b></span>'
            + "<br>" * (text.endswith("\n") and at + 1 < len(row["tokens"]))
        )
    return f'<div class="lv-tokens" translate="no">{"".join(boxes)}</div>'


def _token(row: Mapping[str, Any], at: int, finished: bool) -> tuple[str, str, str]:
    """Its text, what is shown for it, and what is said of it."""
    text = row["tokens"][at]
    last = finished and at == len(row["tokens"]) - 1
    shown = _END if last else text.replace("\n", "⏎").replace("\t", "⇥")
    name = "end of the answer" if last else repr(text)
    said = (
        f"{name}: length shift {number(row['length_shifts'][at], '+.4f')} ({_change(row, at)} tokens); "
        f"after it value {number(row['values'][at + 1], '.3f')}, horizon {number(row['horizons'][at + 1])} tokens"
    )
    return text, shown, said


def _change(row: Mapping[str, Any], at: int) -> str:
    """The shift as a change of the horizon, the token that was used up not counted."""
    return number(row["horizons"][at + 1] + 1.0 - row["horizons"][at], "+.1f")


def _numbers(row: Mapping[str, Any], finished: bool) -> str:
    """The same without a mouse."""
    rows = [
        (
            str(at + 1),
            _token(row, at, finished)[1],
            str(row["token_ids"][at]),
            number(row["length_shifts"][at], "+.4f"),
            _change(row, at),
            number(row["values"][at + 1], ".3f"),
            number(row["horizons"][at + 1]),
        )
        for at in range(len(row["tokens"]))
    ]
    columns = ["", "token", "id", "length shift", "in tokens", "value after", "horizon after"]
    return f"<details><summary>All numbers</summary>{table(columns, rows)}</details>"
