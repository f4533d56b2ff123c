"""How softly posterior guidance holds a target, chosen on the tuning tasks as the gates are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lenvm.errors import InvalidRequestError

__all__ = ["PosteriorRule", "PosteriorScore", "choose_posterior", "excess"]


@dataclass(frozen=True)
class PosteriorRule:
    """``tolerance``, ``strength`` and ``min_eos_prob`` of :class:`lenvm.guidance.Objective`."""

    tolerance: float = 0.05
    strength: float = 1.0
    min_eos_prob: float = 0.0

    def __str__(self) -> str:
        return f"posterior tolerance={self.tolerance:g} strength={self.strength:g} min_eos_prob={self.min_eos_prob:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, as a report holds them."""
        return asdict(self)


@dataclass(frozen=True)
class PosteriorScore:
    """What a rule reached on the tuning tasks: mean length score, text cost in nats (all targets, and those of 64 and
    more where there are any), and the share of forced stops."""

    rule: PosteriorRule
    ls: float
    kl_per_sequence: float
    kl_per_sequence_64plus: float
    forced_stop_rate: float

    def to_dict(self) -> dict[str, Any]:
        """One flat row of a table."""
        plain = asdict(self)
        return {**plain.pop("rule"), **plain}


def choose_posterior(table: Sequence[PosteriorScore], *, cost_cap: float, forced_cap: float) -> PosteriorScore:
    """The best length score among the rules whose text cost (nats, targets of 64 and more) and share of forced stops
    both stay within the caps; where none does, the one that goes least beyond them.

    Raises InvalidRequestError for no rules.
    """
    if not table:
        raise InvalidRequestError("there is no posterior rule: give at least one", param="posterior_grid")

    beyond = [excess(score, cost_cap=cost_cap, forced_cap=forced_cap) for score in table]
    kept = [score for score, by in zip(table, beyond, strict=True) if by <= min(beyond)]
    return max(kept, key=lambda score: (round(score.ls, 9), -score.kl_per_sequence))


def excess(score: PosteriorScore, *, cost_cap: float, forced_cap: float) -> float:
    """How far a rule goes beyond the caps, as a share of the one it exceeds most; 0 within both."""
    # A cap of 0 allows nothing: whatever is there is beyond it without measure.
    pairs = ((score.kl_per_sequence_64plus, cost_cap), (score.forced_stop_rate, forced_cap))
    return max(max(0.0, value - cap) / max(cap, 1e-9) for value, cap in pairs)
