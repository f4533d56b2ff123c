"""Memory that the system hands out page by page, as it is first written."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

__all__ = ["reserved"]


def reserved(nbytes: int) -> NDArray[np.uint8]:
    """``nbytes`` zeros that take address space at once, and memory where they are written.

    Raises OSError where the system grants no address space that it has no memory for.
    """
    # Not np.zeros, which asks for huge pages: a pool writes to many tensors in step, each would take two megabytes of
    # zeros at the same moment, and a request would wait for all of them.
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)
