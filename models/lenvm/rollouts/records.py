"""Rollouts in memory (flat arrays) and as Parquet bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import DataError

__all__ = ["Key", "Rollout", "RolloutSet", "decode", "decode_keys", "encode"]

Key: TypeAlias = tuple[str, int]
IntArray: TypeAlias = NDArray[np.int64]
TokenArray: TypeAlias = NDArray[Any]  # uint16 or int32


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. ``token_ids`` are content tokens, EOS excluded; ``finished`` is False where it was cut."""

    prompt_id: str
    domain: str
    prompt_ids: list[int]
    token_ids: list[int]
    finished: bool
    seed: int

    @property
    def key(self) -> Key:
        """What makes a rollout unique in a folder."""
        return self.prompt_id, self.seed


class RolloutSet:
    """The rollouts of a folder, sorted by prompt id and seed, whatever the order in which they were sampled.

    Columns [n]: ``prompt_keys`` (prompt ids), ``domains``, ``seeds``, ``finished``, ``lengths`` (content tokens).
    Token ids stay in flat arrays (about two bytes a token); ``tokens(i)`` and ``prompt_tokens(i)`` are views of them.
    """

    def __init__(self, rollouts: Iterable[Rollout], generator: Mapping[str, Any] | None = None) -> None:
        self._take([_columns(list(rollouts))], dict(generator or {}), "the given rollouts")

    @classmethod
    def from_columns(cls, parts: list[dict[str, Any]], generator: dict[str, Any], where: str) -> RolloutSet:
        """From decoded shards; ``where`` names their folder in errors."""
        made = cls.__new__(cls)
        made._take(parts, generator, where)
        return made

    def _take(self, parts: list[dict[str, Any]], generator: dict[str, Any], where: str) -> None:
        column = {name: np.concatenate([part[name] for part in parts]) for name in _columns([])}
        order = np.lexsort((column["seed"], column["prompt_id"]))
        self.generator = generator
        self.prompt_keys: list[str] = column["prompt_id"][order].tolist()
        self.domains: list[str] = column["domain"][order].tolist()
        self.seeds: IntArray = column["seed"][order]
        self.finished: NDArray[np.bool_] = column["finished"][order]
        self.lengths: IntArray = column["token_count"][order]
        self._token_starts: IntArray = (np.cumsum(column["token_count"]) - column["token_count"])[order]
        self._prompt_lengths: IntArray = column["prompt_count"][order]
        self._prompt_starts: IntArray = (np.cumsum(column["prompt_count"]) - column["prompt_count"])[order]
        self._flat_tokens: TokenArray = column["token_ids"]
        self._flat_prompts: TokenArray = column["prompt_ids"]
        keys = list(zip(self.prompt_keys, self.seeds.tolist(), strict=True))
        doubled = next((key for key, later in pairwise(keys) if key == later), None)
        if doubled is not None:
            raise DataError(
                f"{where}: prompt {doubled[0]!r}, seed {doubled[1]} is there twice: roll out again elsewhere"
            )

    def __len__(self) -> int:
        return len(self.prompt_keys)

    def __getitem__(self, index: int) -> Rollout:
        return Rollout(
            self.prompt_keys[index],
            self.domains[index],
            self.prompt_tokens(index).tolist(),
            self.tokens(index).tolist(),
            bool(self.finished[index]),
            int(self.seeds[index]),
        )

    def __iter__(self) -> Iterator[Rollout]:
        return (self[index] for index in range(len(self)))

    def tokens(self, index: int) -> TokenArray:
        """Content token ids of one rollout, a view [length]."""
        start = self._token_starts[index]
        return self._flat_tokens[start : start + self.lengths[index]]

    def prompt_tokens(self, index: int) -> TokenArray:
        """Prompt token ids of one rollout, a view [prompt length]."""
        start = self._prompt_starts[index]
        return self._flat_prompts[start : start + self._prompt_lengths[index]]

    def take(self, indices: Sequence[int] | IntArray) -> RolloutSet:
        """The rollouts at ``indices``, in that order; token ids are shared, not copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        made = RolloutSet.__new__(RolloutSet)
        made.generator = self.generator
        made.prompt_keys = [self.prompt_keys[index] for index in chosen.tolist()]
        made.domains = [self.domains[index] for index in chosen.tolist()]
        for name in ("seeds", "finished", "lengths", "_token_starts", "_prompt_lengths", "_prompt_starts"):
            setattr(made, name, getattr(self, name)[chosen])
        made._flat_tokens, made._flat_prompts = self._flat_tokens, self._flat_prompts
        return made

    def with_keys(self, keys: Collection[Key]) -> RolloutSet:
        """Those of ``keys`` (prompt id, seed) alone; the same set where that is all of them."""
        own = zip(self.prompt_keys, self.seeds.tolist(), strict=True)
        kept = [index for index, key in enumerate(own) if key in keys]
        return self if len(kept) == len(self) else self.take(kept)

    def by_prompt(self) -> dict[str, list[int]]:
        """Prompt id -> indices of its rollouts, by seed."""
        groups: dict[str, list[int]] = {}
        for index, key in enumerate(self.prompt_keys):
            groups.setdefault(key, []).append(index)
        return groups


def _columns(rows: list[Rollout]) -> dict[str, NDArray[Any]]:
    """Rows as arrays: five columns of length n, and token ids flat with their counts."""
    return {
        "prompt_id": np.asarray([row.prompt_id for row in rows], dtype=str),
        "domain": np.asarray([row.domain for row in rows], dtype=str),
        "seed": np.asarray([row.seed for row in rows], dtype=np.int64),
        "finished": np.asarray([row.finished for row in rows], dtype=bool),
        "prompt_count": np.asarray([len(row.prompt_ids) for row in rows], dtype=np.int64),
        "prompt_ids": _flat([row.prompt_ids for row in rows]),
        "token_count": np.asarray([len(row.token_ids) for row in rows], dtype=np.int64),
        "token_ids": _flat([row.token_ids for row in rows]),
    }


def _flat(lists: list[list[int]]) -> TokenArray:
    flat = np.asarray([token for ids in lists for token in ids], dtype=np.int32)
    return flat.astype(np.uint16) if not flat.size or flat.max() < 2**16 else flat


def encode(rows: list[Rollout]) -> bytes:
    """One Parquet file (zstd); token ids are list<uint16>, or list<int32> where one of them needs it."""
    import pyarrow
    import pyarrow.parquet

    columns = _columns(rows)

    def lists(name: str) -> Any:
        offsets = np.concatenate([[0], np.cumsum(columns[f"{name}_count"])]).astype(np.int32)
        return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(columns[f"{name}_ids"]))

    table = pyarrow.table(
        {
            "prompt_id": pyarrow.array([row.prompt_id for row in rows], pyarrow.string()),
            "domain": pyarrow.array([row.domain for row in rows], pyarrow.string()),
            "prompt_ids": lists("prompt"),
            "token_ids": lists("token"),
            "finished": pyarrow.array(columns["finished"]),
            "seed": pyarrow.array(columns["seed"]),
        }
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _read_table(payload: bytes, path: Path, columns: list[str] | None) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(pyarrow.BufferReader(payload), columns=columns).combine_chunks()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable Parquet file: roll out again into an empty folder") from error


def decode_keys(payload: bytes, path: Path) -> list[Key]:
    """The (prompt id, seed) pairs of a shard, without reading its token ids. Raises DataError like ``decode``."""
    table = _read_table(payload, path, ["prompt_id", "seed"])
    if table.num_columns != 2:
        raise DataError(f"{path} lacks the columns of a rollout shard: roll out again into an empty folder")
    return list(zip(table["prompt_id"].to_pylist(), table["seed"].to_pylist(), strict=True))


def decode(payload: bytes, path: Path) -> dict[str, NDArray[Any]]:
    """The columns of a shard, as ``_columns`` makes them; ``path`` only names it in a DataError."""
    table = _read_table(payload, path, None)
    try:
        columns = {
            "prompt_id": np.asarray(table["prompt_id"].to_pylist(), dtype=str),
            "domain": np.asarray(table["domain"].to_pylist(), dtype=str),
            "seed": table["seed"].to_numpy(),
            "finished": table["finished"].to_numpy().astype(bool),
        }
        for name in ("prompt", "token"):
            chunked = table[f"{name}_ids"]
            lists = chunked.chunk(0) if chunked.num_chunks else chunked.combine_chunks()
            columns[f"{name}_count"] = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
            columns[f"{name}_ids"] = lists.flatten().to_numpy(zero_copy_only=False)
    except (KeyError, AttributeError, ValueError) as error:
        raise DataError(f"{path} lacks the columns of a rollout shard: roll out again into an empty folder") from error
    return columns
