"""Answers of a long evaluation as they end, kept in a file so that an interrupted or divided run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, TypeAlias

from lenvm.decoding import Generation
from lenvm.errors import DataError

__all__ = ["Answer", "AnswerFile", "Key", "Keyed", "check_complete", "recorded_settings"]

Key: TypeAlias = tuple[str | int, ...]
_FORMAT = 2


class Keyed(Protocol):
    """One answer to make."""

    @property
    def key(self) -> Key:
        """What names the answer in a file."""

    @property
    def keeps_tokens(self) -> bool:
        """False where its figures are enough."""


@dataclass(frozen=True)
class Answer:
    """What came out, ``length`` content tokens; ``token_ids`` None where they were not kept."""

    length: int
    token_ids: list[int] | None
    finished: bool
    forced_stop: bool
    text_cost: float
    logprob: float


class AnswerFile:
    """JSON lines: the settings that all answers share, then one answer a line, appended as it ends.

    Args:
        path: new answers go here; None keeps them in memory alone. A folder that is not there is made; a last line
            that was cut in the middle is dropped.
        settings: everything that an answer depends on but its key (JSON values).
        others: files of other processes of the same run, read and left as they are.
        maker: what makes new answers (device, commit, versions); it is noted before those that it makes.

    Attributes:
        makers: everything that made the answers, as the files name it.

    Raises DataError for a file of other settings and for one that cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        others: Sequence[Path] = (),
        *,
        maker: Mapping[str, Any] | None = None,
    ) -> None:
        self._answers: dict[Key, Answer] = {}
        self.makers: list[dict[str, Any]] = []
        self._here = None if maker is None else dict(maker)
        self._stream: TextIO | None = None
        # Through JSON and back, so that what is compared is what the file can hold (tuples are lists there).
        header: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, "settings": dict(settings)}))
        end = 0
        for file in (*others, *([] if path is None else [path])):
            try:
                if file == path:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    end = self._read(file, header) if file.exists() else 0
                    self._stream = file.open("a", encoding="utf-8")
                    self._stream.truncate(end)
                else:
                    self._read(file, header)
            except OSError as error:
                raise DataError(f"{file} cannot be used ({error.strerror}): choose another --work") from error
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
                    _compare(path, found, header)
                elif list(found) == ["made"]:
                    self._note(dict(found["made"]))
                else:
                    key, *fields = (found[name] for name in ("key", *Answer.__annotations__))
                    if not isinstance(key, list):
                        raise TypeError("a key is a list")
                    self._keep(tuple(key), Answer(*fields))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number} is not a line of answers: choose another --work") from error
        return end

    def _note(self, maker: dict[str, Any]) -> None:
        if maker not in self.makers:
            self.makers.append(maker)

    def _keep(self, key: Key, answer: Answer) -> None:
        held = self._answers.get(key)
        # Two processes may have made the same answer, one of them without its tokens.
        if held is None or held.token_ids is None or answer.token_ids is not None:
            self._answers[key] = answer

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def __contains__(self, job: Keyed) -> bool:
        answer = self._answers.get(job.key)
        return answer is not None and (answer.token_ids is not None or not job.keeps_tokens)

    def __getitem__(self, job: Keyed) -> Answer:
        return self._answers[job.key]

    def add(self, job: Keyed, generation: Generation) -> None:
        """Keep an answer; it is in the file when this returns."""
        if self._here is not None:
            self._note(self._here)
            self._write({"made": self._here})
            self._here = None
        answer = Answer(
            len(generation.token_ids),
            list(generation.token_ids) if job.keeps_tokens else None,
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


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings that the answers of a file share. Raises DataError for a file that holds none."""
    try:
        with path.open(encoding="utf-8") as stream:
            settings = json.loads(stream.readline())["settings"]
        if not isinstance(settings, dict):
            raise TypeError("settings are an object")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file that --work wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of answers: give one that --work wrote") from error
    return settings


def check_complete(missing: Sequence[Any], *, report_only: bool) -> None:
    """Raise DataError where answers would have to be sampled although the files were to hold all of them."""
    if missing and report_only:
        raise DataError(f"{len(missing)} answers are in none of the --work files: run it without --report-only")


def _compare(path: Path, found: Any, header: Mapping[str, Any]) -> None:
    if found == header:
        return
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise DataError(f"{path} is no file of answers: choose another --work")
    ours, theirs = header["settings"], found["settings"]
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    changed = ", ".join(names) or "format"
    raise DataError(f"{path} holds answers of other settings ({changed} differ): choose another --work")
