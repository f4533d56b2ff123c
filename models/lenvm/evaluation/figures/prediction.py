"""``prediction.svg``: error by domain beside baselines and floors, error along the answer, reliability of quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.evaluation.figures.style import (
    COLOURS,
    DOMAIN_COLOURS,
    GREY,
    INK,
    colour,
    label_bars,
    marker,
    new_figure,
    save,
    styled,
)

__all__ = ["draw"]

_BARS = (
    ("mre", "LenVM (horizon)"),
    ("baselines.prompt_encoder", "prompt only"),
    ("baselines.linear_probe", "linear probe"),
    ("baselines.prompt_length", "prompt length"),
    ("baselines.constant", "constant"),
)
_FLOORS = (("noise_floor", "noise floor", "-"), ("oracle_horizon", "horizon of an exact value", ":"))


def draw(metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """One file for each of the three; those whose figures the report lacks (older, or run without) are left out."""
    metrics = {name: row for name, row in metrics.items() if name != "pooled"}
    with styled():
        made = [_errors(metrics, folder)]
        if all(row.get("along") for row in metrics.values()):
            made.append(_along(metrics, folder))
        if all(row.get("reliability") for row in metrics.values()):
            made.append(_reliability(metrics, folder))
        return made


def _errors(metrics: Mapping[str, Any], folder: Path) -> Path:
    bars = [(key, label) for key, label in _BARS if any(_figure(row, key) is not None for row in metrics.values())]
    figure, (axis,) = new_figure(width=7.6, height=3.8)
    width = 0.84 / len(bars)
    places = np.arange(len(metrics))
    for at, (key, label) in enumerate(bars):
        heights = [100 * (_figure(row, key) or 0.0) for row in metrics.values()]
        x = places + (at - (len(bars) - 1) / 2) * width
        drawn = axis.bar(x, heights, 0.92 * width, color=COLOURS[0] if at == 0 else colour(at), label=label)
        texts = [f"{height:.0f}" if height else "" for height in heights]
        if key != "mre":
            label_bars(axis, drawn, texts)
        else:
            bounds = np.array([row["mre_ci"] for row in metrics.values()]) * 100
            errors = np.maximum([heights - bounds[:, 0], bounds[:, 1] - heights], 0.0)
            axis.errorbar(x, heights, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
            for place, bound, text in zip(x, bounds[:, 1], texts, strict=True):
                axis.text(place, bound + 0.8, text, ha="center", va="bottom", fontsize=8, color=INK)
    for key, label, style in _FLOORS:
        axis.plot([], [], style, color=INK, linewidth=1.2, label=label)
        for place, row in zip(places, metrics.values(), strict=True):
            if (height := _figure(row, key)) is not None:
                axis.plot([place - 0.46, place + 0.46], [100 * height] * 2, style, color=INK, linewidth=1.2)
    axis.set_xticks(places, list(metrics))
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("mean relative error (%)")
    axis.set_title("Length prediction at the prompt boundary")
    figure.legend(loc="outside lower center", ncols=4)
    return save(figure, folder / "prediction.svg")


def _along(metrics: Mapping[str, Any], folder: Path) -> Path:
    figure, axes = new_figure(1, 2, width=7.6, height=3.3)
    for at, (domain, row) in enumerate(metrics.items()):
        fractions = [float(name) for name in row["along"]]
        shown = DOMAIN_COLOURS.get(domain, colour(at))
        for axis, name in zip(axes, ("error", "error_remaining"), strict=True):
            values = [100 * one[name] for one in row["along"].values()]
            axis.plot(np.multiply(100, fractions), values, marker=marker(at), color=shown, label=domain)
        static = [100 * one["error_static"] for one in row["along"].values()]
        axes[0].plot(np.multiply(100, fractions), static, "--", color=shown, linewidth=1, alpha=0.7)
    axes[0].plot([], [], "--", color=GREY, linewidth=1, label="counting down from the prompt's prediction")
    axes[0].set_title("Relative to the whole answer")
    axes[1].set_title("Relative to what is left")
    for axis in axes:
        axis.set_xlabel("share of the answer generated (%)")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("mean error of the predicted rest (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return save(figure, folder / "prediction_along.svg")


def _reliability(metrics: Mapping[str, Any], folder: Path) -> Path:
    figure, (axis,) = new_figure(width=4.6, height=4.4)
    axis.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    for at, (domain, row) in enumerate(metrics.items()):
        shown = DOMAIN_COLOURS.get(domain, colour(at))
        own = row["reliability"]
        levels = [100 * float(level) for level in own]
        label = f"{domain}, calibrated" if row.get("calibrated") else domain
        axis.plot(levels, [100 * share for share in own.values()], marker=marker(at), markersize=3.5, color=shown,
                  label=label)  # fmt: skip
        before = row.get("uncalibrated", {}).get("reliability")
        if before:
            axis.plot([100 * float(level) for level in before], [100 * share for share in before.values()], ":",
                      color=shown, linewidth=1.2, label=f"{domain}, as the network gives it")  # fmt: skip
    axis.set_xlabel("level of the quantile (%)")
    axis.set_ylabel("answers covered (%)")
    axis.set_title("Reliability of the quantiles")
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100)
    axis.legend(loc="upper left")
    return save(figure, folder / "prediction_reliability.svg")


def _figure(row: Mapping[str, Any], key: str) -> float | None:
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if value is None or np.isfinite(value) else None
