"""CUDA graphs: a step recorded once and launched as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["GraphError", "captured"]


class GraphError(RuntimeError):
    """This GPU or driver would not record the step. What goes wrong in a replay is raised as it is."""


def captured(step: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """Record ``step`` in a CUDA graph, after warm-up on a side stream, and return its replay. What other threads do on
    the GPU meanwhile does not disturb it. ``pool``: memory that it shares with graphs that never run at its time.

    Raises GraphError."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
        finally:  # also of a step that fails: its buffers go, and what was launched before may still write them
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise GraphError(str(error)) from error
    replay: Callable[[], None] = graph.replay
    return replay
