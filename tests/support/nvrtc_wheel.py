"""``python tests/support/nvrtc_wheel.py``: the compiler of CUDA C++ that torch's builds for CUDA bring, for a test that
compiles our kernel without a GPU, into ``build/nvrtc``. The oldest version that a torch we allow asks for.

It stays out of .venv and out of constraints.txt: which one users get follows from their torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["FOLDER", "environment", "install"]

FOLDER = Path(__file__).resolve().parents[2] / "build" / "nvrtc"
_WHEELS = ("cuda-bindings==13.0.3", "cuda-pathfinder==1.3.3", "nvidia-cuda-nvrtc==13.0.88")


def environment(*, required: bool) -> dict[str, str]:
    """For a process that imports its bindings. Where it is missing the test is skipped, or fails if real parts are
    required."""
    found = next(FOLDER.glob("nvidia/*/lib/libnvrtc.so.*"), None)
    if found is None:
        missing = "NVRTC is not in build/nvrtc: run make nvrtc"
        pytest.fail(missing) if required else pytest.skip(missing)
    made = dict(os.environ)
    for name, path in (("PYTHONPATH", FOLDER), ("LD_LIBRARY_PATH", found.parent)):
        made[name] = os.pathsep.join(filter(None, (str(path), made.get(name))))
    return made


def install(folder: Path) -> None:
    """Fetch what is not there, or is of another version."""
    stamp, wanted = folder / ".version", "\n".join(_WHEELS)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", folder]
    subprocess.run([*pip, "--only-binary=:all:", *_WHEELS], check=True)
    stamp.write_text(wanted)


if __name__ == "__main__":
    install(FOLDER)
