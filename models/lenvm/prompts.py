"""Prompt files: gzip'd JSON lines in ``<data>/prompts/<domain>_<split>.jsonl.gz``, read, carved and subsampled by id.

Every choice here hangs on the SHA-256 of an id, never on the order of a file or on a random generator's version, so
that the same prompts are held out on every machine and for good.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lenvm.errors import DataError, InvalidRequestError

__all__ = ["CALIBRATION_SIZE", "DOMAINS", "SPLITS", "Prompt", "load_prompts", "read_jsonl", "select"]

DOMAINS = ("math", "code", "if")
SPLITS = ("train", "valid", "test", "calibration")
CALIBRATION_SIZE = 500


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


@dataclass(frozen=True)
class Prompt:
    """One prompt. ``answer`` is the reference answer where the source has one; ``extra`` holds every other field."""

    id: str
    domain: str
    source: str
    text: str
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a gzip'd JSON-lines file with their line numbers (from 1); blank lines are skipped.

    Raises DataError, naming the file and the line, for a missing or truncated file or a line that is not an object.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: each line must be one JSON object, not {type(row).__name__}")
                yield number, row
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give the folder that holds prompts/ and bench/ with --data") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON ({error.msg}): fix or remove the line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1}: not valid UTF-8: write the file again as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read after line {number} ({reason}): fetch the file again") from error


def load_prompts(data_dir: str | Path, domain: str, split: str) -> list[Prompt]:
    """The prompts of one domain ("math", "code", "if") and split ("train", "valid", "test", "calibration").

    ``calibration`` is carved from the train file by the hash of the id (500 prompts, at most an eighth of the file) and
    ``train`` is what remains, less any prompt whose text is also in calibration. File order is kept.
    Raises InvalidRequestError for an unknown name and DataError for a missing or malformed folder, file or line.
    """
    if domain not in DOMAINS:
        raise InvalidRequestError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}", param="domain")
    if split not in SPLITS:
        raise InvalidRequestError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}", param="split")
    folder = Path(data_dir) / "prompts"
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the folder that holds prompts/ and bench/ with --data")
    if split in ("valid", "test"):
        return _read_prompts(folder / f"{domain}_{split}.jsonl.gz")
    prompts = _read_prompts(folder / f"{domain}_train.jsonl.gz")
    size = min(CALIBRATION_SIZE, len(prompts) // 8)
    held_out = {prompt.id for prompt in _by_hash(prompts, "calibration")[:size]}
    if split == "calibration":
        return [prompt for prompt in prompts if prompt.id in held_out]
    # A few sources repeat a prompt under two ids: training on the twin would be training on the calibration set.
    texts = {_normalised(prompt.text) for prompt in prompts if prompt.id in held_out}
    return [prompt for prompt in prompts if prompt.id not in held_out and _normalised(prompt.text) not in texts]


def select(items: Sequence[T], n: int | None, seed: int = 0) -> list[T]:
    """At most ``n`` of ``items`` (None: all), chosen and ordered by the hash of seed and id.

    Independent of the order of ``items``, and nested: ``select(items, 10, s)`` starts ``select(items, 20, s)``.
    Raises InvalidRequestError for ``n`` below 1.
    """
    if n is not None and n < 1:
        raise InvalidRequestError(f"the number of prompts must be at least 1, not {n}", param="n")
    return _by_hash(items, f"select-{seed}")[:n]


def _by_hash(items: Sequence[T], salt: str) -> list[T]:
    return sorted(items, key=lambda item: (hashlib.sha256(f"{salt}:{item.id}".encode()).digest(), item.id))


def _normalised(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def _read_prompts(path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    line_of: dict[str, int] = {}
    for number, row in read_jsonl(path):
        prompt = _parse(row, f"{path}:{number}")
        if prompt.id in line_of:
            raise DataError(
                f"{path}:{number}: id {prompt.id!r} is already on line {line_of[prompt.id]}: ids are unique"
            )
        line_of[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path} holds no prompts: fetch the file again")
    return prompts


def _parse(row: dict[str, Any], where: str) -> Prompt:
    for name in ("id", "domain", "source", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"{where}: field {name!r} must be a non-empty string")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{where}: field 'answer' must be a string or null")
    known = ("id", "domain", "source", "prompt", "answer")
    extra = {name: value for name, value in row.items() if name not in known}
    return Prompt(row["id"], row["domain"], row["source"], row["prompt"], answer, extra)
