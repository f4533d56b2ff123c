"""``generate(..., resample=K)``: K answers to each prompt, and one of them drawn by importance weight."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lenvm_client._steps import GuidanceReport
from lenvm_client.errors import InvalidRequestError
from lenvm_client.resampling import resample

__all__ = ["drawn", "repeated"]


def repeated(inputs: Any, of: int) -> Any:
    """Inputs of which each prompt stands ``of`` times, side by side."""
    if isinstance(inputs, torch.Tensor):
        return inputs.repeat_interleave(of, 0)
    if not isinstance(inputs, Mapping):
        return inputs  # refused where inputs are checked
    return {
        name: value.repeat_interleave(of, 0) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def drawn(
    output: Any,
    report: GuidanceReport,
    *,
    width: int,
    ends: Collection[int],
    objectives: Sequence[Mapping[str, Any] | None],
    of: int,
    seeds: Sequence[int] | None,
) -> tuple[torch.Tensor, GuidanceReport]:
    """Of each ``of`` sequences in a row one, and its report, whose text cost counts the draw.

    Raises InvalidRequestError for answers that no importance weight can be told of.
    """
    if not isinstance(output, torch.Tensor):
        message = "resample gives token ids alone: leave return_dict_in_generate out"
        raise InvalidRequestError(message, param="resample")
    kept, rows = [], []
    for at, objective in enumerate(objectives):
        first = at * of
        own = report.rows[first : first + of]
        if objective is None:
            chosen, cost = 0, own[0].text_cost  # unguided answers are all alike
        else:
            lengths = []
            for number, row in enumerate(own, first):
                last = int(output[number, width + row.steps - 1]) if row.steps else -1
                lengths.append(row.steps - (last in ends))
            seed = int(torch.randint(1 << 31, ()).item()) if seeds is None else seeds[first]
            found = resample(objective, lengths, [row.text_cost for row in own], rng=random.Random(seed))
            chosen, cost = found.index, found.text_cost
        kept.append(first + chosen)
        rows.append(replace(own[chosen], text_cost=cost))
    return output[kept], replace(report, rows=tuple(rows))
