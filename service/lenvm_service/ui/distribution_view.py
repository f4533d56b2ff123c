"""The length distribution of one prompt as figures and a histogram (inline SVG). Lengths are remaining tokens, the
end-of-sequence token included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_service.ui.html import escape, fact_list, note, number

__all__ = ["Bar", "bars", "distribution_html", "quantile_facts"]

_WIDTH, _HEIGHT = 720, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 12, 12, 62, 34
_GAP, _BEYOND = 10, 34  # before the bar of everything beyond the cap, and its width
_LABEL = 100  # about the width of the longest label
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_MARKS = (("0.5", "p50"), ("0.9", "p90"), ("0.95", "p95"))


@dataclass(frozen=True)
class Bar:
    """Lengths ``lo`` to ``hi`` and their probability; ``beyond``: all lengths over the cap."""

    lo: int
    hi: int
    probability: float
    beyond: bool = False


def bars(distribution: Mapping[str, Sequence[float]]) -> list[Bar]:
    """The bins of a prediction's ``distribution``, the last of which is the overflow."""
    triples = list(zip(distribution["lo"], distribution["hi"], distribution["probability"], strict=True))
    return [Bar(int(lo), int(hi), float(p), beyond=at == len(triples) - 1) for at, (lo, hi, p) in enumerate(triples)]


def quantile_facts(row: Mapping[str, Any], cap: int) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each quantile. One that lies beyond the cap is no number: the model abstains."""
    facts = []
    for level, name in _MARKS:
        value = row["quantiles"][level]
        share = f"{100 * float(level):g} of 100 answers end by then"
        if _abstains(row, value, cap):
            facts.append((name, f"over {cap:,}", "the model abstains: it lies beyond its cap"))
        else:
            facts.append((name, f"{value:,}", share))
    return facts


def _abstains(row: Mapping[str, Any], value: int, cap: int) -> bool:
    return bool(row["saturated"]) and value >= cap


def distribution_html(row: Mapping[str, Any], *, cap: int | None, generator: str) -> str:
    """A prediction (``PredictJob`` with its distribution) for people. ``generator``: whose lengths are predicted."""
    facts = [("horizon", number(row["horizon"]), "the value read back as a length")]
    about = f"Tokens still to come after the prompt's {row['prompt_tokens']:,}, end-of-sequence included. {generator}"
    if cap is None or row["distribution"] is None:
        missing = "This model has no length distribution (num_bins = 0): value and horizon are all that it can tell."
        return fact_list(facts) + note(missing) + note(about)
    found = bars(row["distribution"])
    mean = ("mean", number(row["mean"]), f"of lengths up to {cap:,}" if found[-1].probability > 0.001 else "expected")
    parts = [fact_list([mean, *quantile_facts(row, cap), *facts]), _histogram(row, found, cap)]
    if row["saturated"]:
        share = 100 * found[-1].probability
        parts.append(
            note(
                f"Saturated: {number(share)} % of the answers are predicted to be longer than {cap:,} tokens, which is "
                "as far as this model can tell. Quantiles up there are not guessed, and the mean counts those answers "
                f"as {cap:,}: it is a lower bound."
            )
        )
    return "".join([*parts, note(about)])


def _histogram(row: Mapping[str, Any], found: Sequence[Bar], cap: int) -> str:
    """Bars over a logarithmic axis: the area of each is its probability."""
    inside = _WIDTH - _LEFT - _RIGHT - _GAP - _BEYOND
    unit = inside / math.log((cap + 0.5) / 0.5)

    def place(length: float) -> float:
        return _LEFT + unit * math.log(max(0.5, min(length, cap + 0.5)) / 0.5)

    boxes = []
    for bar in found:
        left, right = place(bar.lo - 0.5), place(bar.hi + 0.5)
        if bar.beyond:
            left, right = _WIDTH - _RIGHT - _BEYOND, _WIDTH - _RIGHT
        boxes.append((bar, left, right, bar.probability / (right - left)))
    scale = (_HEIGHT - _TOP - _BOTTOM) / max(density for *_, density in boxes)
    base = _HEIGHT - _BOTTOM
    end = place(cap) - _BEYOND  # a tick further right would run into the last one
    parts = [_tick(place(tick), base, f"{tick:,}") for tick in _TICKS if place(tick) < end]
    parts.append(_tick(_WIDTH - _RIGHT - _BEYOND / 2, base, f"> {cap:,}"))
    for bar, left, right, density in boxes:
        height = scale * density
        lengths = f"over {cap:,}" if bar.beyond else f"{bar.lo:,}" if bar.lo == bar.hi else f"{bar.lo:,} to {bar.hi:,}"
        kind = "lv-beyond" if bar.beyond else "lv-bar"
        parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{base - height:.1f}" width="{max(0.5, right - left - 0.6):.1f}" '
            f'height="{height:.1f}"><title>{lengths} tokens: {100 * bar.probability:.2f} %</title></rect>'
        )
    marks = [(name, float(row["quantiles"][level])) for level, name in _MARKS]
    marks = [mark for mark in marks if not _abstains(row, int(mark[1]), cap)] + [("mean", float(row["mean"]))]
    for at, (name, length) in enumerate(sorted(marks, key=lambda mark: mark[1])):
        parts.append(_mark(place(length), 13 + 13 * at, base, f"{name} {length:,.0f}", dashed=name == "mean"))
    said = "; ".join(f"{name} {value}" for name, value, _ in quantile_facts(row, cap))
    label = escape(f"Histogram of the remaining length on a logarithmic axis: {said}.")
    return (
        f'<svg class="lv-plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _tick(x: float, base: float, text: str) -> str:
    return (
        f'<line class="lv-tick" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 5}"/>'
        f'<text class="lv-text" x="{x:.1f}" y="{base + 18}" text-anchor="middle">{text}</text>'
    )


def _mark(x: float, y: float, base: float, text: str, *, dashed: bool) -> str:
    anchor = "end" if x > _WIDTH - _LABEL else "start"
    shifted = x - 4 if anchor == "end" else x + 4
    kind = "lv-mark lv-dashed" if dashed else "lv-mark"
    return (
        f'<line class="{kind}" x1="{x:.1f}" y1="{y - 9}" x2="{x:.1f}" y2="{base}"/>'
        f'<text class="lv-text" x="{shifted:.1f}" y="{y}" text-anchor="{anchor}">{text}</text>'
    )
