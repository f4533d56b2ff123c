"""What waits for each engine, in memory that its process and all API workers see: a worker refuses without asking."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

from lenvm_service.engine.queueing import Backlog

__all__ = ["Board"]

_NUMBERS = len(Backlog._fields)


class Board:
    """One :class:`Backlog` an engine. A reader may see numbers of two moments beside each other: good enough for a
    refusal, and whatever is let in is judged once more by the engine.

    Args:
        descriptor: of the memory, as :meth:`create` made it. It lasts as long as the process: engines tell to the end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self._numbers: Any = memoryview(self._memory).cast("d")

    @classmethod
    def create(cls, engines: int) -> Board:
        """A board for so many engines: nothing waits."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("lenvm-board")
        else:
            descriptor, path = tempfile.mkstemp()
            os.unlink(path)
        os.ftruncate(descriptor, 8 * _NUMBERS * engines)
        return cls(descriptor)

    def fileno(self) -> int:
        """The memory's descriptor, for a worker to inherit."""
        return self._descriptor

    def write(self, engine: int, backlog: Backlog) -> None:
        """Tell; each number is stored whole."""
        at = _NUMBERS * engine
        for offset, number in enumerate(backlog):
            self._numbers[at + offset] = number

    def read(self, engine: int) -> Backlog:
        """What was told last."""
        return Backlog(*self._numbers[_NUMBERS * engine : _NUMBERS * (engine + 1)])
