"""``python tests/support/engine_sources.py``: the engines' own files that our drivers implement interfaces of, into
``build/engines``.

Out of the published packages, at the versions of the record (``engine_interfaces.json``). The packages themselves, half
a gigabyte with GPU libraries, are not kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FOLDER", "install"]

FOLDER = Path(__file__).resolve().parents[2] / "build" / "engines"
_RECORD = Path(__file__).with_name("engine_interfaces.json")


def install(folder: Path) -> None:
    """Fetch what is not there, or is of another version."""
    for record in json.loads(_RECORD.read_text(encoding="utf-8")).values():
        pinned = f"{record['package']}=={record['version']}"
        stamp = folder / f".{record['package']}"
        paths = {item["path"] for item in record["files"]}
        if stamp.is_file() and stamp.read_text() == pinned and all((folder / path).is_file() for path in paths):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            # llama-cpp-python's project publishes source alone; the others wheels of which the sources are a part.
            pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--no-cache-dir", "-d", temporary, pinned], check=True)
            (archive,) = Path(temporary).iterdir()
            for path, content in _files(archive, paths):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
                paths.discard(path)
        if paths:
            raise SystemExit(f"{pinned} has no {', '.join(sorted(paths))}")
        stamp.write_text(pinned)


def _files(archive: Path, paths: set[str]) -> Iterator[tuple[str, bytes]]:
    """Those of a wheel, or of a source distribution, whose paths have its name before them."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from [(path, wheel.read(path)) for path in paths if path in wheel.namelist()]
        return
    with tarfile.open(archive) as source:
        for member in source:
            path = member.name.partition("/")[2]
            if path in paths and (file := source.extractfile(member)) is not None:
                yield path, file.read()


if __name__ == "__main__":
    install(FOLDER)
