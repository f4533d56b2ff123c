"""Reports: the JSON files in which published figures live, each with the command, commit and device that made it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lenvm._version import __version__
from lenvm.errors import DataError, InvalidRequestError

__all__ = ["commit", "device_name", "versions", "write_report"]

SIGNIFICANT_DIGITS = 6
# What commands write: a report or figure that has just been made again does not make the code that made it dirty.
_OUTPUTS = ("reports", "docs/figures")


def write_report(
    path: str | Path,
    *,
    command: str | Sequence[str],
    metrics: Mapping[str, Any],
    device: str,
    versions: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``{command, commit, device, date, versions, metrics}`` plus ``extra`` to ``path``, whole or not at all.

    Keys are sorted and floats have six significant digits; NaN and infinities become null, NumPy values plain ones.
    Returns what was written. Raises DataError where the file cannot be written, InvalidRequestError for a value that
    JSON cannot hold or an ``extra`` key that is taken.
    """
    report: dict[str, Any] = {
        "command": command if isinstance(command, str) else shlex.join(command),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "metrics": metrics,
        "versions": dict(_default_versions() if versions is None else versions),
    }
    taken = sorted(report.keys() & (extra or {}).keys())
    if taken:
        raise InvalidRequestError(f"report key {taken[0]!r} is taken: rename the extra key", param="extra")
    plain: dict[str, Any] = _plain({**report, **(extra or {})}, "report")
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(f"{target} cannot be written ({error.strerror}): choose another place") from error
    return plain


def commit() -> str:
    """The short commit of the checkout that this code runs from, with ``-dirty`` where a tracked file was changed.

    ``$LENVM_COMMIT`` stands in where there is no checkout (a wheel, a copy on another machine), else "unknown".
    """
    here = Path(__file__).resolve()
    # A wheel inside the virtual environment of some other repository must not name that repository's commit.
    top = _git(here.parent, "rev-parse", "--show-toplevel")
    if top and _git(here.parent, "ls-files", "--error-unmatch", here.name):
        head = _git(Path(top), "rev-parse", "--short", "HEAD")
        if head:
            excluded = [f":(exclude){output}" for output in _OUTPUTS]
            changed = _git(Path(top), "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
            return f"{head}-dirty" if changed else head
    return os.environ.get("LENVM_COMMIT", "").strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions of what shapes a figure: lenvm, python, numpy, torch, transformers ("none" where not installed)."""
    found = {"lenvm": __version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


_default_versions = versions  # ``write_report`` has a parameter of the same name


def device_name(device: str | None = None) -> str:
    """A device in words, such as "NVIDIA H100 80GB HBM3" or "CPU: <model>, 2 cores".

    ``device`` is a torch device string; None takes the GPU where this process already uses one. Never imports torch:
    a command that computed on a GPU has imported it.
    """
    torch: Any = sys.modules.get("torch")
    on_gpu = torch is not None and (torch.cuda.is_initialized() if device is None else device.startswith("cuda"))
    if on_gpu and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"CPU: {_cpu_model()}, {cores} core{'s' if cores != 1 else ''}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    """Standard output of a git command, stripped; empty where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _plain(value: Any, where: str) -> Any:
    """``value`` in JSON's own types, floats rounded."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise InvalidRequestError(f"{where} is a {type(value).__name__}, which a report cannot hold", param=where)
