"""Answers of a LIFEBench run as they end, kept in a file so that an interrupted or divided run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeAlias

from lenvm.decoding import Generation
from lenvm.errors import DataError
from lenvm.evaluation.lifebench import Kind, Task
from lenvm.evaluation.lifebench_gates import GateRule

__all__ = ["Answer", "Job", "Key", "Policy", "WorkFile"]

Policy: TypeAlias = str | GateRule
"""What decides about the length: "unguided", a mode of the value model, or a gate."""
Key: TypeAlias = tuple[str, str, str, int, int]
_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One answer to make. Of ``tuning`` answers only the figures are kept, not the tokens."""

    policy: Policy
    task: Task
    kind: Kind
    target: int
    sample: int = 0
    tuning: bool = field(default=False, compare=False)

    @property
    def key(self) -> Key:
        """What names the answer in a work file."""
        return str(self.policy), self.kind, self.task.id, self.target, self.sample


@dataclass(frozen=True)
class Answer:
    """What came out, ``length`` content tokens; ``token_ids`` None where they were not kept."""

    length: int
    token_ids: list[int] | None
    finished: bool
    forced_stop: bool
    text_cost: float
    logprob: float


class WorkFile:
    """JSON lines: the settings that all answers share, then one answer a line, appended as it ends.

    Args:
        path: None keeps answers in memory alone. A folder that is not there is made; a last line that was cut in the
            middle is dropped.
        settings: everything that an answer depends on but its job (JSON values).

    Raises DataError for a file of other settings and for one that cannot be read or written.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._answers: dict[Key, Answer] = {}
        self._stream: TextIO | None = None
        self.path = path
        if path is None:
            return
        # Through JSON and back, so that what is compared is what the file can hold (tuples are lists there).
        header: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, "settings": dict(settings)}))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            end = self._read(path, header) if path.exists() else 0
            self._stream = path.open("a", encoding="utf-8")
            self._stream.truncate(end)
        except OSError as error:
            raise DataError(f"{path} cannot be used ({error.strerror}): choose another --work") from error
        if end == 0:
            self._write(header)

    def _read(self, path: Path, header: Mapping[str, Any]) -> int:
        """Load what is there; returns the bytes that are whole lines."""
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                found = json.loads(line)
                if number == 1:
                    self._compare(found, header)
                else:
                    key, *fields = (found[name] for name in ("key", *Answer.__annotations__))
                    policy, kind, task, target, sample = key
                    self._answers[policy, kind, task, target, sample] = Answer(*fields)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number} is not a line of answers: choose another --work") from error
        return end

    def _compare(self, found: Any, header: Mapping[str, Any]) -> None:
        if found == header:
            return
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise DataError(f"{self.path} is no file of LIFEBench answers: choose another --work")
        ours, theirs = header["settings"], found["settings"]
        names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        changed = ", ".join(names) or "format"
        raise DataError(f"{self.path} holds answers of other settings ({changed} differ): choose another --work")

    def __enter__(self) -> WorkFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def __contains__(self, job: Job) -> bool:
        answer = self._answers.get(job.key)
        return answer is not None and (job.tuning or answer.token_ids is not None)

    def __getitem__(self, job: Job) -> Answer:
        return self._answers[job.key]

    def add(self, job: Job, generation: Generation) -> None:
        """Keep an answer; it is in the file when this returns."""
        answer = Answer(
            len(generation.token_ids),
            None if job.tuning else list(generation.token_ids),
            generation.finished,
            generation.forced_stop,
            generation.text_cost,
            generation.logprob,
        )
        self._answers[job.key] = answer
        self._write({"key": job.key, **vars(answer)})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._stream.flush()
