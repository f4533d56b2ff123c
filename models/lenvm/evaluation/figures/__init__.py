"""Figures drawn from reports: one module an experiment, so that a figure can never differ from its report.

A module ``lenvm.evaluation.figures.NAME`` has ``draw(metrics, folder) -> paths``: it gets the ``metrics`` of
``reports/NAME.json`` and writes SVG files into ``folder``. Modules and matplotlib are imported when they are used.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lenvm._extras import require
from lenvm.errors import DataError

__all__ = ["FIGURES", "draw_all", "draw_report", "read_metrics"]

# Name of the report -> the module that draws it.
FIGURES: Mapping[str, str] = {
    name: f"lenvm.evaluation.figures.{name}"
    for name in ("prediction", "lifebench", "conditional", "tradeoff", "tokens", "ablation", "scaling", "engine")
}


def read_metrics(path: Path) -> dict[str, Any]:
    """The ``metrics`` of a report. Raises DataError where the file is missing or is not a report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        metrics = report["metrics"]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): run the command that writes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a report: write it again with lenvm eval") from error
    if not isinstance(metrics, dict):
        raise DataError(f"{path} is not a report: write it again with lenvm eval")
    return metrics


def draw_report(name: str, metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the figures of one report into ``folder``; the files written. An eval command's ``--figures`` calls this.

    Raises DataError for an unknown name or a folder that cannot be written, and the error of a missing extra.
    """
    if name not in FIGURES:
        raise DataError(f"there is no figure {name!r}: choose from {', '.join(FIGURES)}")
    require("train", "matplotlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made: list[Path] = importlib.import_module(FIGURES[name]).draw(metrics, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    return made


def draw_all(reports: Path, folder: Path, names: Iterable[str] | None = None) -> dict[str, list[Path]]:
    """Draw every report that ``reports`` holds: name -> files written. With ``names`` a missing report is an error.

    Raises DataError where there is no report to draw, or one of them is damaged.
    """
    chosen = list(FIGURES) if names is None else list(names)
    unknown = [name for name in chosen if name not in FIGURES]
    if unknown:
        raise DataError(f"there is no figure {unknown[0]!r}: choose from {', '.join(FIGURES)}")
    found = [name for name in chosen if names is not None or (reports / f"{name}.json").is_file()]
    if not found:
        raise DataError(f"{reports} holds none of the reports that have figures: run lenvm eval first")
    return {name: draw_report(name, read_metrics(reports / f"{name}.json"), folder) for name in found}
