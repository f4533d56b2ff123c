"""What the ``lenvm eval`` commands share: options, reports, checks before hours of work, and cells of tables."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.errors import DataError
from lenvm_service.cli._output import number

__all__ = [
    "Dtype",
    "FiguresOption",
    "ReportOnlyOption",
    "ReportOption",
    "WorkOption",
    "check_writable",
    "draw",
    "identity_of",
    "in_words",
    "maker_of",
    "names",
    "numbers",
    "percent",
    "publish",
    "whole_numbers",
]


class Dtype(StrEnum):
    """Precision of both models."""

    float32 = "float32"
    bfloat16 = "bfloat16"


ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write the metrics with command, commit and device."),
]
FiguresOption = Annotated[
    Path | None, typer.Option("--figures", metavar="DIR", help="Also draw the figures of this report into this folder.")
]
ReportOnlyOption = Annotated[
    bool, typer.Option("--report-only", help="Sample nothing: report what the --work files hold, on any machine.")
]
WorkOption = Annotated[
    Path | None, typer.Option("--work", metavar="DIR", help="Where sampled answers are kept. Default: runs/NAME.")
]


def in_words(name: str) -> str:
    return name.replace("_", " ")


def whole_numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r}: give whole numbers with commas between them, like 64,128")
    return tuple(dict.fromkeys(found))


def numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(value) for value in found):
        raise typer.BadParameter(f"{text!r}: give numbers with commas between them, like 0.03,0.05")
    return tuple(dict.fromkeys(found))


def names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def check_writable(*paths: Path | None) -> None:
    """Before hours of work, not after them. Raises DataError where a file could not be written."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise DataError(f"{path} cannot be written: make the folder {path.parent} first")


def identity_of(
    model: Any, dtype: str, device: str, work: Sequence[Path], *, report_only: bool = False
) -> dict[str, Any]:
    """What an answer depends on beside the settings of its evaluation. Of the device its kind counts: one run may be
    divided over several GPUs. With ``report_only`` it is the one that the answers in ``work`` were made on."""
    kind = device.partition(":")[0]
    if report_only:
        from lenvm.evaluation.answers import recorded_settings

        there = [path for path in work if path.exists()]
        if not there:
            raise typer.BadParameter("--report-only reports what --work files hold: give them")
        kind = recorded_settings(there[0]).get("device", kind)
    return {"model": model.config.name, "files": model.config.files, "dtype": dtype, "device": kind}


def maker_of(device: str) -> dict[str, Any]:
    """What makes answers here, as a work file names it."""
    from lenvm.reports import commit, device_name, versions

    return {"device": device_name(device), "commit": commit(), "versions": versions()}


def publish(report: Path | None, metrics: Mapping[str, Any], device: str | None) -> None:
    """Write the report. Its device is what made the answers, where ``metrics`` name that (``sampled_by``, beside which
    the report's commit and versions are those of what computed it), else this ``device``, None for one that is not
    known."""
    if report is None:
        return
    from lenvm.reports import device_name, write_report

    command = shlex.join(["lenvm", *sys.argv[1:]])
    devices = dict.fromkeys(maker["device"] for maker in metrics.get("sampled_by", ()))
    here = "unknown" if device is None else device_name(device)
    write_report(report, command=command, metrics=metrics, device=" and ".join(devices) or here)


def draw(name: str, metrics: Mapping[str, Any], figures: Path | None) -> None:
    """The figures of report ``name``, drawn from what the report would hold; None draws nothing."""
    if figures is None:
        return
    from lenvm.evaluation.figures import draw_report

    draw_report(name, metrics, figures)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else number(100 * fraction, ".1f") + " %"
