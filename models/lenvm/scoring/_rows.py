"""What every scorer makes and checks of rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import ContextTooLongError, InvalidRequestError
from lenvm.scoring.protocol import ScoreRow

__all__ = ["check_row", "packed_ids"]


def check_row(row: ScoreRow, *, context: int, vocab_size: int) -> None:
    """Raise for a row that no scorer with such a context and vocabulary can answer.

    Raises:
        InvalidRequestError: an id out of range, or a row with neither a state nor tokens.
        ContextTooLongError: prefix, tokens and candidate do not fit in the context.
    """
    if row.state is None and not len(row.append):
        raise InvalidRequestError("the prompt is empty: give at least one token", param="token_ids")
    for name, ids in (("token_ids", row.append), ("candidates", row.candidates)):
        if len(ids) and (min(ids) < 0 or max(ids) >= vocab_size):
            raise InvalidRequestError(f"{name} must be in [0, {vocab_size})", param=name)
    if row.values_from is not None and not 0 <= row.values_from < len(row.append):
        raise InvalidRequestError("values_from must index the appended tokens", param="values_from")
    total = (row.state.length if row.state else 0) + len(row.append) + (1 if len(row.candidates) else 0)
    if total > context:
        raise ContextTooLongError(
            f"the prefix has {total} tokens; the model's context is {context}: shorten it", param="token_ids"
        )


def packed_ids(rows: Sequence[Sequence[int]], total: int) -> NDArray[np.int32] | None:
    """All ids of all rows, ``total`` of them, one after another; None where one is no 32-bit integer. In half of
    NumPy's time."""
    try:
        return np.frombuffer(struct.pack(f"{total}i", *chain.from_iterable(rows)), np.int32)
    except struct.error:
        return None
