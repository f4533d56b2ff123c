"""Lengths of answers without the answers: a file small enough to carry, from rollouts or from a server's log.

JSON lines (gzip'd unless the name ends in .jsonl), one a prompt: ``id``, ``domain``, ``prompt_ids`` (token ids, chat
template applied), ``lengths`` (content tokens of each answer) and ``finished`` (whether each ended by itself).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lenvm.errors import DataError
from lenvm.evaluation.states import PromptAnswers, group_prompts
from lenvm.prompts import read_jsonl
from lenvm.rollouts import RolloutSet, read_rollouts

__all__ = ["read_answers", "read_lengths", "write_lengths"]


def write_lengths(prompts: Sequence[PromptAnswers], path: Path) -> None:
    """Write the file, whole or not at all. Raises DataError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    opened = open if path.suffix == ".jsonl" else gzip.open
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened(temporary, "wt", encoding="utf-8") as lines:
            for prompt in prompts:
                row = {
                    "id": prompt.prompt_id,
                    "domain": prompt.domain,
                    "prompt_ids": list(prompt.prompt_ids),
                    "lengths": prompt.lengths.tolist(),
                    "finished": prompt.finished.tolist(),
                }
                lines.write(json.dumps(row) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose another place") from error


def read_lengths(path: Path) -> list[PromptAnswers]:
    """The prompts of a file, whose answers have no tokens. Raises DataError, naming the line, for a malformed one."""
    found: list[PromptAnswers] = []
    for number, row in read_jsonl(path):
        try:
            lengths = np.asarray(row["lengths"], dtype=np.int64)
            finished = np.asarray(row["finished"], dtype=np.bool_)
            ids = [int(token) for token in row["prompt_ids"]]
            if lengths.ndim != 1 or lengths.shape != finished.shape or not len(lengths) or not ids or min(lengths) < 0:
                raise ValueError("lengths and finished must have one entry for each answer, and prompt_ids some")
            found.append(PromptAnswers(str(row["id"]), str(row["domain"]), ids, lengths, finished))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: not the lengths of a prompt's answers ({error})") from None
    return found


def read_answers(path: Path) -> tuple[list[PromptAnswers], RolloutSet | None]:
    """Prompts with their answers from a folder of rollouts, or with lengths alone from a file (None then)."""
    if path.is_file():
        return read_lengths(path), None
    rollouts = read_rollouts(path)
    return group_prompts(rollouts), rollouts
