"""Rollout folders: Parquet shards and one ``manifest.json`` that lists them with their SHA-256.

A rollout is durable once the manifest lists its shard. Shards and manifest are written to a temporary name, synced and
renamed, the shard first: after a kill at any moment the folder holds every listed shard whole, and at most one finished
shard that is not listed yet, which the next run writes again. So a repeated command neither loses nor doubles a sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lenvm._extras import require
from lenvm.errors import DataError, InvalidRequestError
from lenvm.rollouts.records import Key, Rollout, RolloutSet, decode, decode_keys, encode
from lenvm.rollouts.summary import RolloutSummary, histogram, summary

__all__ = [
    "Rollout",
    "RolloutSet",
    "RolloutSummary",
    "RolloutWriter",
    "completed",
    "histogram",
    "part_folders",
    "read_rollouts",
    "stored_generator",
    "summary",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMPLETE = "complete"  # a file in the folder of a part that was made to its end

_SHARD_NAME = re.compile(r"rollouts-\d{5,}\.parquet")


class RolloutWriter:
    """Context manager that appends rollouts to a folder, ``shard_rows`` to a shard; a rerun goes on where one ended.

    A shard is closed early once its first rollout has waited for ``flush_s`` seconds, so that a kill costs little.
    Leaving the block, by an exception too, writes the last, shorter shard. ``done`` holds the (prompt id, seed) pairs
    that need not be sampled again. Raises DataError where the folder belongs to another generator, is damaged, or is
    being written by another process, and where a pair is added twice.
    """

    def __init__(
        self, folder: str | Path, generator: Mapping[str, Any], *, shard_rows: int = 1024, flush_s: float = 60.0
    ) -> None:
        if shard_rows < 1:
            raise InvalidRequestError(f"shard_rows must be at least 1, not {shard_rows}", param="shard_rows")
        require("train", "pyarrow")
        self.folder = Path(folder)
        self.done: set[Key] = set()
        self._generator: dict[str, Any] = json.loads(json.dumps(dict(generator)))  # tuples become lists, as when read
        self._shard_rows = shard_rows
        self._flush_s = flush_s
        self._waiting_since = 0.0
        self._rows: list[Rollout] = []
        self._manifest: dict[str, Any] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> RolloutWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise DataError(f"{self.folder} cannot be written ({error.strerror}): choose another folder") from error
        try:
            _acquire(self._lock, self.folder)
            self._open()
        except BaseException:
            self._close_lock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._close_lock()

    def add(self, rollout: Rollout) -> None:
        """Take one rollout; it is durable once its shard is closed, or after ``flush``."""
        if self._lock is None:
            raise InvalidRequestError("open the rollout writer first: with RolloutWriter(...) as writer")
        if rollout.key in self.done:
            raise DataError(f"{self.folder} already holds prompt {rollout.prompt_id!r}, seed {rollout.seed}: skip it")
        for name, ids in (("prompt_ids", rollout.prompt_ids), ("token_ids", rollout.token_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < 2**31:
                raise InvalidRequestError(f"{name} of prompt {rollout.prompt_id!r} must lie in [0, 2^31)", param=name)
        if not -(2**63) <= rollout.seed < 2**63:
            raise InvalidRequestError(f"seed {rollout.seed} does not fit in 64 bits", param="seed")
        now = time.monotonic()
        if not self._rows:
            self._waiting_since = now
        self._rows.append(rollout)
        self.done.add(rollout.key)
        if len(self._rows) >= self._shard_rows or now - self._waiting_since >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Make every rollout added so far durable."""
        if not self._rows:
            return
        name = _shard_name(len(self._manifest["shards"]))
        payload = encode(self._rows)
        _write_atomically(self.folder / name, payload)
        entry = {"file": name, "rows": len(self._rows), "sha256": hashlib.sha256(payload).hexdigest()}
        counts = Counter(self._manifest["counts"])
        counts.update(
            rollouts=len(self._rows),
            cut=sum(not row.finished for row in self._rows),
            content_tokens=sum(len(row.token_ids) for row in self._rows),
        )
        # Ours only once it is written: a failed write must be tried again with the same rows in the same shard.
        listed = {**self._manifest, "shards": [*self._manifest["shards"], entry], "counts": dict(counts)}
        self._write_manifest(listed)
        self._manifest = listed
        self._rows = []

    def _open(self) -> None:
        for left_over in self.folder.glob(".*.tmp"):
            left_over.unlink()
        if _has_manifest(self.folder):
            self._manifest = _read_manifest(self.folder, self._generator)
            self.done = _read_keys(self.folder, self._manifest)
            # Finished, but the run was killed before it was listed: its pairs are sampled again, so it must go.
            (self.folder / _shard_name(len(self._manifest["shards"]))).unlink(missing_ok=True)
            return
        counts = {"rollouts": 0, "cut": 0, "content_tokens": 0}
        self._manifest = {
            "format_version": FORMAT_VERSION,
            "generator": self._generator,
            "counts": counts,
            "shards": [],
        }
        self._write_manifest(self._manifest)

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        _write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")

    def _close_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def completed(folder: str | Path, generator: Mapping[str, Any] | None = None) -> set[Key]:
    """The (prompt id, seed) pairs that are durable in ``folder``; none where it does not exist or was never begun.

    Raises DataError for a damaged folder, and for another generator where ``generator`` is given.
    """
    path = Path(folder)
    if not path.is_dir() or not _has_manifest(path):
        return set()
    require("train", "pyarrow")
    expected = None if generator is None else json.loads(json.dumps(dict(generator)))
    return _read_keys(path, _read_manifest(path, expected))


def stored_generator(folder: str | Path) -> dict[str, Any] | None:
    """The description of the generator that ``folder`` belongs to; None where it was never begun."""
    path = Path(folder)
    if not path.is_dir() or not _has_manifest(path):
        return None
    generator: dict[str, Any] = _read_manifest(path, None)["generator"]
    return generator


def read_rollouts(folder: str | Path) -> RolloutSet:
    """Every durable rollout of ``folder`` or of its parts, checked against the manifest's hashes.

    Raises DataError, in one line, for a folder that is missing, empty, truncated, tampered with or doubled.
    """
    path = Path(folder)
    parts, generators = [], []
    for each in part_folders(path) or [path]:
        if not each.is_dir() or not _has_manifest(each):
            raise DataError(f"{each} holds no rollouts ({MANIFEST} is missing): make them with lenvm rollout")
        require("train", "pyarrow")
        manifest = _read_manifest(each, None)
        parts += [decode(_read_shard(each, entry), each / entry["file"]) for entry in manifest["shards"]]
        generators.append(manifest["generator"])
    if not parts:
        raise DataError(f"{path} holds no finished shard yet: run lenvm rollout to its end")
    if any(other != generators[0] for other in generators):
        raise DataError(f"the parts of {path} come from different generators: roll out again")
    return RolloutSet.from_columns(parts, generators[0], str(path))


def part_folder(folder: Path, part: tuple[int, int]) -> Path:
    """Where the i-th of n parts (from 0) of a folder is made; the folder itself where there is one part."""
    index, parts = part
    return folder / f"part-{index}-of-{parts}" if parts > 1 else folder


def part_folders(folder: str | Path) -> list[Path]:
    """The parts (``part-0-of-2`` ...) that several processes made of one folder, in order; none where it is one.

    Raises DataError where one of them is missing or was not made to its end (it has no file ``complete`` then).
    """
    found = sorted(Path(folder).glob("part-*-of-*"))
    counts = {int(part.name.rpartition("-")[2]) for part in found}
    whole = [part.name for part in found if (part / COMPLETE).exists()]
    if found and (len(counts) > 1 or len(whole) != max(counts)):
        made = ", ".join(whole) or "no finished part"
        raise DataError(f"{folder} holds {made}: make the other parts too, to their end, with --only and --part")
    return found


# --- folder and manifest ----------------------------------------------------------------------------------------------


def _shard_name(index: int) -> str:
    return f"rollouts-{index:05d}.parquet"


def _has_manifest(folder: Path) -> bool:
    """Whether the folder has been begun. A run writes its manifest before any shard, so shards alone mean damage."""
    if (folder / MANIFEST).is_file():
        return True
    if any(_SHARD_NAME.fullmatch(path.name) for path in folder.iterdir()):
        raise DataError(f"{folder} holds shards but no {MANIFEST}: restore it, or roll out again into an empty folder")
    return False


def _read_manifest(folder: Path, generator: dict[str, Any] | None) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        listed = {(str(entry["file"]), int(entry["rows"]), str(entry["sha256"])) for entry in manifest["shards"]}
        made_by, _ = dict(manifest["generator"]), dict(manifest["counts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: restore it, or roll out again into an empty folder") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format version {version!r}, not {FORMAT_VERSION}: use the lenvm that wrote it")
    if generator is not None and made_by != generator:
        differing = sorted(
            name for name in {*made_by, *generator} if made_by.get(name, ...) != generator.get(name, ...)
        )
        raise DataError(f"{folder} was made by another generator ({', '.join(differing)}): choose another folder")
    names = {name for name, _, _ in listed}
    if names != {_shard_name(index) for index in range(len(manifest["shards"]))}:
        raise DataError(f"{path} does not list shards 0 to n - 1 once each: restore it")
    next_shard = _shard_name(len(names))
    stray = sorted(p.name for p in folder.glob("rollouts-*.parquet") if p.name not in names and p.name != next_shard)
    if stray:
        raise DataError(f"{folder} holds {stray[0]}, which {MANIFEST} does not list: restore the one or move the other")
    return manifest


def _read_shard(folder: Path, entry: dict[str, Any]) -> bytes:
    path = folder / str(entry["file"])
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is listed in {MANIFEST} but cannot be read: restore it, or roll out again") from error
    if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
        raise DataError(
            f"{path} is truncated or changed (its SHA-256 is not the manifest's): restore it or roll out again"
        )
    return payload


def _read_keys(folder: Path, manifest: dict[str, Any]) -> set[Key]:
    keys: set[Key] = set()
    for entry in manifest["shards"]:
        keys.update(decode_keys(_read_shard(folder, entry), folder / str(entry["file"])))
    if len(keys) != sum(int(entry["rows"]) for entry in manifest["shards"]):
        raise DataError(f"{folder} holds a (prompt, seed) pair twice: roll out again into an empty folder")
    return keys


def _write_atomically(path: Path, payload: bytes) -> None:
    """Write, sync and rename: a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # a full disk gets the space back
        raise DataError(
            f"{path} cannot be written ({error.strerror}): free some space or choose another folder"
        ) from error


def _acquire(lock: IO[str], folder: Path) -> None:
    """One writer a folder; the lock dies with its process, so a killed run leaves nothing to clean up."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(
            f"{folder} is being written by another process: wait for it, or choose another folder"
        ) from error
