"""Backbone folders on disk: cache root, manifest, cheap and full checks, digests, the lock between processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lenvm.errors import BackboneError, CacheFolderError

__all__ = [
    "MANIFEST",
    "backbone_sha256",
    "cache_root",
    "check_backbone",
    "file_sha256",
    "locked",
    "read_manifest",
    "tokenizer_sha256",
    "verify_backbone",
    "write_manifest",
    "writing_to",
]

MANIFEST = "lenvm-backbone.json"
_SMALL = 16 << 20  # files up to this size are hashed at every check: a few milliseconds
_CHUNK = 1 << 20
# Keys of config.json that change with whoever saved the file, not with the model.
_VOLATILE_CONFIG = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"})


def cache_root(cache_dir: Path | None = None) -> Path:
    """``cache_dir``, else ``$LENVM_CACHE``, else ``~/.cache/lenvm``. The folder need not exist."""
    return Path(cache_dir or os.environ.get("LENVM_CACHE") or "~/.cache/lenvm").expanduser()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError of writing below ``folder`` into a CacheFolderError."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise CacheFolderError(f"cannot write to {folder} ({reason}): set LENVM_CACHE to a writable folder") from exc


@contextmanager
def locked(path: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, between processes; the system frees it when a holder dies."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def file_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; ``on_bytes`` hears of each chunk. Raises BackboneError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
    except OSError as exc:
        raise BackboneError(f"cannot read {path} ({exc.strerror}): check the path") from exc
    return digest.hexdigest()


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Record size and SHA-256 of every file of ``folder``, plus ``about`` (name, source, converter)."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"format_version": 1, **about, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that this library wrote; None for any other folder. BackboneError when it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = _read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(f, dict) and {"size", "sha256"} <= set(f) for f in files.values()
    ):
        raise BackboneError(f"{path} is damaged: delete the folder and pull the backbone again")
    return manifest


def check_backbone(folder: Path, *, weights: bool = True) -> None:
    """Cheap check, for every load: files exist, weights are whole, small files match the manifest if there is one.

    Without ``weights``, as in an ONNX export, a folder may have none.

    Raises BackboneError with what to do. A change inside a weight file that keeps its size needs ``verify_backbone``.
    """
    if not folder.is_dir():
        raise BackboneError(
            f"backbone folder {folder} does not exist: pass a Hugging Face folder, a .gguf file or a hub id"
        )
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise BackboneError(f"{folder} has no {name}: save model and fast tokenizer there with save_pretrained")
    if not isinstance(_read_json(folder / "config.json").get("model_type"), str):
        raise BackboneError(f"{folder}/config.json names no model_type: save the model again with save_pretrained")
    for path in _weight_files(folder) if weights else ():
        _check_safetensors(path)
    _check_manifest(folder, full=False)


def verify_backbone(folder: Path, on_bytes: Callable[[int], None] | None = None) -> None:
    """``check_backbone`` and the SHA-256 of every file of the manifest (``lenvm pull --verify``): BackboneError."""
    check_backbone(folder)
    _check_manifest(folder, full=True, on_bytes=on_bytes)


def backbone_sha256(folder: Path) -> str:
    """Hex digest that identifies a backbone: its weight files and its config, without the keys that savers vary.

    Weight digests come from the manifest where there is one, else from a store keyed by path, size and time of change.
    """
    config = {key: value for key, value in _read_json(folder / "config.json").items() if key not in _VOLATILE_CONFIG}
    known = (read_manifest(folder) or {"files": {}})["files"]
    lines = [json.dumps(config, sort_keys=True)]
    for path in _weight_files(folder):
        digest = known[path.name]["sha256"] if path.name in known else _stored_sha256(path)
        lines.append(f"{path.name} {digest}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """Hex digest of what turns text and messages into ids: tokenizer.json and the chat template."""
    digest = hashlib.sha256(bytes.fromhex(file_sha256(folder / "tokenizer.json")))
    template_file, config_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template_file.is_file():
        template: Any = template_file.read_text(encoding="utf-8")
    else:
        template = _read_json(config_file).get("chat_template") if config_file.is_file() else None
    digest.update(json.dumps(template).encode())
    return digest.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise BackboneError(f"cannot read {path} ({exc.strerror}): check the folder") from exc
    except ValueError as exc:
        raise BackboneError(f"{path} is truncated or not JSON: delete the folder and fetch the backbone again") from exc
    if not isinstance(content, dict):
        raise BackboneError(f"{path} is not a JSON object: delete the folder and fetch the backbone again")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from ``folder``, sorted. Pickled weights are refused."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise BackboneError(
            f"{folder} has no model.safetensors (pickled .bin weights are refused): save the model as safetensors"
        )
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise BackboneError(f"{index} is damaged: fetch the backbone again")
    return [folder / name for name in sorted(set(shards.values()))]


def _check_safetensors(path: Path) -> None:
    """The header must parse and the file must end where its last tensor ends: a cut download fails here."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if 8 + length <= size else {}
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        size, length, end = -1, 0, 0
    if size != 8 + length + end:
        raise BackboneError(f"{path} is missing, truncated or not safetensors: delete it and fetch the backbone again")


def _check_manifest(folder: Path, *, full: bool, on_bytes: Callable[[int], None] | None = None) -> None:
    manifest = read_manifest(folder)
    for name, entry in (manifest or {"files": {}})["files"].items():
        path = folder / name
        whole = path.is_file() and path.stat().st_size == entry["size"]
        if whole and (full or entry["size"] <= _SMALL):
            whole = file_sha256(path, on_bytes) == entry["sha256"]
        if not whole:
            raise BackboneError(f"{path} is missing or was changed: delete {folder} and pull the backbone again")


def _stored_sha256(path: Path) -> str:
    """``file_sha256``, remembered below the cache root: hashing gigabytes at every load would be slow."""
    stat = path.stat()
    key = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    note = cache_root() / "digests" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError):
        digest = note.read_text(encoding="ascii")
        if len(digest) == 64:
            return digest
    digest = file_sha256(path)
    with suppress(OSError):  # a cache that cannot be written only costs time here
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(digest, encoding="ascii")
    return digest
