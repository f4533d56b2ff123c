"""``conditional.svg``: ranks of guided lengths among accepted unguided ones, which an exact sampler makes uniform."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.evaluation.figures.style import GREY, INK, colour, new_figure, save, styled

__all__ = ["draw"]

_KINDS = ("at_most", "at_least", "equal_to")


def draw(metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """A histogram of the ranks for each objective, with the band in which an exact sampler's bars would lie; a second
    row of them where one of several answers was drawn."""
    kinds = [kind for kind in _KINDS if metrics.get(kind, {}).get("pairs")]
    several = metrics.get("sampling", {}).get("resample", 1)
    tables = [metrics] if several == 1 else [metrics, {kind: metrics[kind]["resampled"] for kind in kinds}]
    width = max(1, len(kinds))
    with styled():
        figure, axes = new_figure(len(tables), width, width=3.2 * width, height=3.2 * len(tables), sharey=True)
        for number, found in enumerate(tables):
            own = axes[number * width : (number + 1) * width]
            for at, (axis, kind) in enumerate(zip(own, kinds, strict=False)):
                _histogram(axis, kind, found[kind], colour(at))
            own[0].set_ylabel("density of guided answers" if number == 0 else f"drawn from {several}")
        return [save(figure, folder / "conditional.svg")]


def _histogram(axis: Any, kind: str, row: Mapping[str, Any], shade: str) -> None:
    counts = np.asarray(row["rank_histogram"], dtype=np.float64)
    bins, pairs = len(counts), counts.sum()
    edges = np.arange(bins + 1) / bins
    axis.bar(edges[:-1], counts * bins / pairs, width=1 / bins, align="edge", color=shade, alpha=0.75)
    # 95 % of the bars of uniform ranks, by the normal approximation to the binomial.
    spread = 1.96 * np.sqrt((bins - 1) / pairs)
    axis.axhspan(max(0.0, 1 - spread), 1 + spread, color=GREY, alpha=0.2, linewidth=0)
    axis.axhline(1.0, color=INK, linewidth=1, linestyle="--")
    axis.set_title(f"{kind.replace('_', ' ').capitalize()}: KS {row['ks']:.3f} (exact: {row['ks_null']:.3f})")
    axis.set_xlabel(f"rank among accepted unguided answers\n({row['pairs']} pairs)")
    axis.set_xlim(0, 1)
