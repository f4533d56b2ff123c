"""The scoring engine: a guided decoding step against the length of the prefix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lenvm.evaluation.figures.style import COLOURS, GREY, new_figure, plain_ticks, save, styled

__all__ = ["draw"]


def draw(metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """``step.svg``, a panel for each model, where a step was measured over several prefixes."""
    step = metrics.get("step", {})
    models = {name: row for name, row in step.items() if isinstance(row, dict) and row.get("by_prefix")}
    if not models:
        return []
    with styled():
        figure, axes_of = new_figure(1, len(models), width=3.8 * len(models), height=3.4)
        for axes, (name, row) in zip(axes_of, models.items(), strict=True):
            own = {str(row["prefix"]): {"ms": row["ms"], "floor_ms": row["floor_ms"]}}
            rows = sorted((int(prefix), times) for prefix, times in (row["by_prefix"] | own).items())
            prefixes = [prefix for prefix, _ in rows]
            axes.plot(prefixes, [times["ms"] for _, times in rows], marker="o", ms=3, color=COLOURS[0], label="step")
            axes.plot(prefixes, [times["floor_ms"] for _, times in rows], ":", color=GREY, label="the device's floor")
            title = f"{name}: {row['rows']} rows x {row['candidates']} candidates"
            axes.set(xscale="log", yscale="log", xlabel="tokens of the prefix", ylabel="milliseconds", title=title)
            plain_ticks(axes.xaxis, prefixes)
            axes.legend()
        return [save(figure, folder / "step.svg")]
