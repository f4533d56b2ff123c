"""``lifebench*.svg``: length scores beside what they cost the text, by target, and the lengths behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.evaluation.figures.style import GREY, INK, colour, marker, new_figure, plain_ticks, save, styled

__all__ = ["draw"]

_KINDS = ("equal_to", "at_most", "at_least")
_LABELS = {
    "posterior": "posterior (value model)",
    "eos_gate": "gate on EOS, best score",
    "force_eos": "EOS forced at the target",
    "unguided": "prompt alone",
    "paper_value": "paper's rule, values",
    "paper_length": "paper's rule, lengths",
    "posterior_resampled": "posterior, one of several",
    "eos_gate_resampled": "gate on EOS, one of several",
    "unguided_resampled": "prompt alone, one of several",
}


def draw(metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """Score against text cost with the front of all tuned gates; score by target; achieved length against target."""
    modes = [mode for mode in _LABELS if mode in metrics]
    kinds = [kind for kind in _KINDS if kind in metrics[modes[0]]]
    with styled():
        return [
            _scores_and_costs(metrics, modes, kinds, folder / "lifebench.svg"),
            _by_target(metrics, modes, kinds, folder / "lifebench_targets.svg"),
            _lengths(metrics, modes, kinds, folder / "lifebench_lengths.svg"),
        ]


def _look(mode: str) -> dict[str, Any]:
    plain = mode.removesuffix("_resampled")
    at = list(_LABELS).index(plain)
    look = {"color": GREY if plain == "unguided" else colour(at), "marker": marker(at), "label": _LABELS[mode]}
    return look if mode == plain else {**look, "markerfacecolor": "none"}


def _title(kind: str) -> str:
    return kind.replace("_", " ").capitalize()


def _scores_and_costs(metrics: Mapping[str, Any], modes: Sequence[str], kinds: Sequence[str], path: Path) -> Path:
    figure, axes = new_figure(1, len(kinds), width=3.4 * len(kinds), height=3.9, sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for fronts, line, label in (("gate_front", "-", ""), ("gate_front_resampled", "--", ", one of several")):
            front = metrics.get(fronts, {}).get(kind)
            if not front:
                continue
            points = sorted((row["kl_per_sequence"], row["ls"]) for row in front["rules"])
            costs, scores = zip(*_hull(points), strict=True)
            between = np.linspace(costs[0], costs[-1], 400)  # a mix's line is not straight on this axis
            mix, plain = np.interp(between, costs, scores), dict[str, Any](color=INK, zorder=1)
            axis.plot(between, mix, line, linewidth=1, label=f"best mix of gates{label}", **plain)
            if not label:
                axis.plot(*zip(*points, strict=True), ".", markersize=4, label="gates that were tuned", **plain)
        made = [mode for mode in modes if kind in metrics[mode]]
        for mode in made:
            row = metrics[mode][kind]
            if "same_as" not in row:
                axis.plot([row["kl_per_sequence"]], [row["ls"]], linestyle="none", zorder=3, **_look(mode))
        # The paper's rules cost hundreds of nats, gates some, and the prompt alone nothing.
        axis.set_xscale("symlog", linthresh=10, linscale=1.5)
        axis.set_xlim(-0.5, 1.3 * max(30.0, *(metrics[mode][kind]["kl_per_sequence"] for mode in made)))
        plain_ticks(axis.xaxis, [0, 2, 4, 6, 8, 10, 30, 100, 300, 1000])
        axis.set_ylim(0, 104)
        axis.set_title(_title(kind))
        axis.set_xlabel("text cost (nats a sequence)")
    axes[0].set_ylabel("length score")
    return _finish(figure, axes, path)


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper hull of (cost, score), cheapest first, as far as the score rises: what a mix of two gates reaches."""
    corners: list[tuple[float, float]] = []
    for x, y in points:
        if corners and y <= corners[-1][1]:
            continue
        while corners and (
            corners[-1][0] == x
            or (
                len(corners) > 1
                and (corners[-1][1] - corners[-2][1]) * (x - corners[-2][0])
                <= (y - corners[-2][1]) * (corners[-1][0] - corners[-2][0])
            )
        ):
            corners.pop()
        corners.append((x, y))
    return corners


def _by_target(metrics: Mapping[str, Any], modes: Sequence[str], kinds: Sequence[str], path: Path) -> Path:
    figure, axes = new_figure(1, len(kinds), width=3.4 * len(kinds), height=3.7, sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for mode in modes:
            if kind in metrics[mode] and "same_as" not in metrics[mode][kind]:
                rows = _targets(metrics[mode][kind])
                line = "--" if mode.endswith("_resampled") else "-"
                axis.plot(list(rows), [row["ls"] for row in rows.values()], line, **_look(mode))
        _target_axis(axis, list(_targets(metrics[modes[0]][kind])))
        axis.set_ylim(0, 104)
        axis.set_title(_title(kind))
    axes[0].set_ylabel("length score")
    return _finish(figure, axes, path)


def _lengths(metrics: Mapping[str, Any], modes: Sequence[str], kinds: Sequence[str], path: Path) -> Path:
    """Bands of 5-95 % and 25-75 % of the answers around their median, the best two modes beside the prompt alone."""
    shown = [mode for mode in ("posterior", "eos_gate", "unguided") if mode in modes] or list(modes[:1])
    kinds = [kind for kind in kinds if all(kind in metrics[mode] for mode in shown)]
    figure, axes = new_figure(
        len(kinds), len(shown), width=3.2 * len(shown), height=2.7 * len(kinds) + 0.4, sharex=True, sharey="row"
    )
    for at, axis in enumerate(axes):
        kind, mode = kinds[at // len(shown)], shown[at % len(shown)]
        rows = _targets(metrics[mode][kind])
        targets, look = list(rows), _look(mode)
        low, lower, median, upper, high = np.maximum([row["length_quantiles"] for row in rows.values()], 1).T
        axis.fill_between(targets, low, high, color=look["color"], alpha=0.15, linewidth=0, label="5 to 95 %")
        axis.fill_between(targets, lower, upper, color=look["color"], alpha=0.3, linewidth=0, label="25 to 75 %")
        axis.plot(targets, median, color=look["color"], marker=look["marker"], label="median")
        axis.plot(targets, targets, "--", color=INK, linewidth=1, label="target")
        _target_axis(axis, targets, named=at >= len(axes) - len(shown))
        axis.set_yscale("log")
        plain_ticks(axis.yaxis, [4.0**power for power in range(1, 7)])
        axis.set_title(f"{_title(kind)}: {look['label']}")
        if at % len(shown) == 0:
            axis.set_ylabel("answer's length (tokens)")
    return _finish(figure, axes, path)


def _targets(row: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """By target, ascending (a report's keys are sorted as text)."""
    return {target: row["by_target"][str(target)] for target in sorted(map(int, row["by_target"]))}


def _target_axis(axis: Any, targets: list[int], *, named: bool = True) -> None:
    axis.set_xscale("log")
    plain_ticks(axis.xaxis, [float(target) for target in targets])
    if named:
        axis.set_xlabel("target (tokens)")


def _finish(figure: Any, axes: Sequence[Any], path: Path) -> Path:
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=min(4, len(named)))
    return save(figure, path)
