"""How far one scorer's answers are from another's: values and horizons along texts, and a decoding step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import ParityError
from lenvm.export.artifact import Variant
from lenvm.returns import horizon_from_logit, value_from_logit
from lenvm.scoring import Scorer, ScoreRow

__all__ = ["LIMITS", "TORCH_LIMITS", "Parity", "check_parity", "compare", "errors", "state_logits"]


@dataclass(frozen=True)
class Parity:
    """Errors over ``states``: of the value, and of the horizon relative to the reference's."""

    states: int
    value_mean: float
    value_max: float
    horizon_mean: float
    horizon_max: float

    def to_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


_ROWS = 16  # of a call
# What a variant may lose against torch in float32, from the prompt on: (mean, largest) error of the value.
LIMITS: dict[Variant, tuple[float, float]] = {"fp32": (1e-4, 1e-3), "fp16": (0.005, 0.05), "int8": (0.02, 0.25)}
# And torch itself, by the precision of the backbone, on any device.
TORCH_LIMITS: dict[str, tuple[float, float]] = {"float32": (1e-4, 1e-3), "bfloat16": (0.005, 0.05)}


def compare(reference: Scorer, other: Scorer, texts: Sequence[tuple[Sequence[int], int]]) -> Parity:
    """Over texts, ``(ids, prompt length)`` each: all states from the end of the prompt on, and decoding steps."""
    return errors(state_logits(reference, texts), state_logits(other, texts), reference.gamma)


def errors(reference: NDArray[np.float64], other: NDArray[np.float64], gamma: float) -> Parity:
    """Errors of value logits ``[S]`` against those of a reference."""
    value_errors = np.abs(value_from_logit(other) - value_from_logit(reference))
    horizon_errors = np.abs(horizon_from_logit(other, gamma) / horizon_from_logit(reference, gamma) - 1)
    return Parity(
        states=len(value_errors),
        value_mean=float(value_errors.mean()),
        value_max=float(value_errors.max()),
        horizon_mean=float(horizon_errors.mean()),
        horizon_max=float(horizon_errors.max()),
    )


def state_logits(scorer: Scorer, texts: Sequence[tuple[Sequence[int], int]]) -> NDArray[np.float64]:
    """Value logits of all states that :func:`compare` looks at."""
    groups = (texts[first : first + _ROWS] for first in range(0, len(texts), _ROWS))
    return np.concatenate([logits for group in groups for logits in _logits(scorer, group)])


def _logits(scorer: Scorer, texts: Sequence[tuple[Sequence[int], int]]) -> list[NDArray[np.float64]]:
    """Value logits of each text, all of them in one call: at the end of the prompt, after each token of the answer,
    which goes on from the stored prompt, and of two decoding steps with two candidates each, the second of which goes
    on with a promoted one."""
    opened = scorer.score([ScoreRow(append=ids[:start]) for ids, start in texts])
    found, states = [[answer.logits] for answer in opened], [answer.state for answer in opened]
    longer = [at for at, (ids, start) in enumerate(texts) if start < len(ids)]
    rows = [ScoreRow(states[at], texts[at][0][texts[at][1] :], values_from=0) for at in longer]
    for at, answer in zip(longer, scorer.score(rows) if rows else [], strict=True):
        found[at].append(answer.logits)
    for step in range(2):
        there, rows = [], []
        for at, (ids, start) in enumerate(texts):
            if (place := start + step) < len(ids):
                there.append(at)
                rows.append(ScoreRow(states[at], [ids[place - 1]] if step else [], [ids[place], ids[place - 1]]))
        for at, answer in zip(there, scorer.score(rows) if rows else [], strict=True):
            found[at].append(answer.candidate_logits.astype(np.float64))
            states[at] = answer.state
    return [np.concatenate(parts) for parts in found]


def check_parity(variant: Variant, found: Parity) -> None:
    """Raise ParityError where a variant lost more than it may."""
    mean, largest = LIMITS[variant]
    if not (found.value_mean <= mean and found.value_max <= largest):  # not written as > : NaN must fail
        raise ParityError(
            f"values of the {variant} graph differ from torch's by {found.value_mean:.2g}, up to {found.value_max:.2g} "
            f"({mean:g} and {largest:g} are allowed): nothing was written, take another --variant"
        )
