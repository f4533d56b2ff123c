"""When Python looks for cycles among its objects: seldom and in small parts, where a service is under load."""

from __future__ import annotations

import gc

__all__ = ["collect_young", "let_garbage_be", "settle_garbage"]

_THRESHOLDS = 5_000, 1, 1_000_000  # the last: full collections, which take a second, are all but switched off
_ROWS = 128  # some thousand objects, a millisecond or two


class _Young:
    """Rows since young objects were last looked through, and whether that is ours to do."""

    ours = False
    rows = 0
    generation = 0


def settle_garbage() -> None:
    """Once everything is loaded: what is there stays, and the garbage collector no longer looks through it.

    By default it looks through the whole heap, libraries and every held session, each time that has grown by a quarter:
    a third of the time of a busy process, in pauses of a tenth of a second and more. Cycles die young here; what grows
    old is sessions, which go by reference count.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    _Young.ours = True


def collect_young(rows: int) -> None:
    """So many rows more have left objects behind; look through the young ones where it is time. To be called where
    somebody else is at work for us.

    Python's own count is of objects made less objects gone. Once the cache is full, each new session pushes out an old
    one, and the count stands still while young objects pile up: then it looks through all of them at once, for 40 ms.
    """
    _Young.rows += rows
    if not _Young.ours or _Young.rows < _ROWS:
        return
    _Young.rows = 0
    # What lives through two of these is old: a request that is under way at the first is gone at the second.
    _Young.generation = 1 - _Young.generation
    gc.collect(_Young.generation)


def let_garbage_be() -> None:
    """Back to Python's own ways, but for its thresholds: the service has ended, and the process goes on."""
    _Young.ours = False
    gc.unfreeze()
