"""One look for every figure: a light card that reads on light and dark pages, colours that colour-blind readers tell
apart (Okabe and Ito, 2008), and SVG files that are the same byte for byte when drawn again.

matplotlib is imported inside the functions: this module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DOMAIN_COLOURS",
    "GREY",
    "INK",
    "colour",
    "label_bars",
    "marker",
    "new_figure",
    "plain_ticks",
    "save",
    "styled",
]

INK = "#1f2933"
GREY = "#7b8794"
_CARD = "#ffffff"
_RULE = "#d9e0e6"
# Okabe-Ito without black and yellow (too faint on white); blue and vermilion first, the pair that differs most.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b4c9a")
DOMAIN_COLOURS: Mapping[str, str] = {"math": COLOURS[0], "code": COLOURS[1], "if": COLOURS[2]}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_RC: Mapping[str, Any] = {
    "svg.hashsalt": "lenvm",  # ids of clip paths would be random otherwise
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.facecolor": _CARD,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "figure.facecolor": _CARD,
    "savefig.facecolor": _CARD,
    "figure.constrained_layout.use": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


@contextmanager
def styled(**changes: Any) -> Iterator[None]:
    """Draw inside this block. ``changes`` are further matplotlib settings, underscores for dots (``svg_fonttype``)."""
    import matplotlib as mpl

    settings: Any = dict(_RC) | {name.replace("_", ".", 1): value for name, value in changes.items()}
    with mpl.rc_context(settings):
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 7.2, height: float = 4.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows`` x ``columns`` panels, ``width`` x ``height`` inches, and its axes row by row.

    ``options`` go to ``Figure.subplots`` (``sharey``, ``width_ratios``). No pyplot: nothing global is left behind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False, **options)))


def save(figure: Figure, path: Path) -> Path:
    """Write an SVG without date or version, so that the same figures give the same file; returns ``path``."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "lenvm"})
    # Readers without matplotlib's own font get a wide one, and no line ends with a space.
    text = path.read_text(encoding="utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
    return path


def colour(index: int) -> str:
    """The ``index``-th colour of a series; past the seventh they repeat, so vary the marker too."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The ``index``-th marker: shape tells series apart where colour cannot."""
    return _MARKERS[index % len(_MARKERS)]


def plain_ticks(axis: Any, at: Sequence[float], labels: list[str] | None = None) -> None:
    """Ticks of ``axis`` (``axes.xaxis``) at these places only, labelled in plain numbers: what a log axis needs."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator(at))
    axis.set_major_formatter(FixedFormatter(labels or [f"{value:g}" for value in at]))
    axis.set_minor_locator(NullLocator())


def label_bars(axes: Axes, bars: Any, texts: list[str]) -> None:
    """Write ``texts`` at the ends of ``bars``."""
    axes.bar_label(bars, labels=texts, padding=3, fontsize=8, color=INK)
