"""The gates on EOS that LIFEBench tunes: rules without a value model, the best, and their front of score and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.lifebench import Kind
from lenvm.guides import EosGateGuide

__all__ = [
    "FORCED",
    "FREE",
    "GRIDS",
    "RESAMPLE_TOLERANCES",
    "GateRule",
    "Mix",
    "RuleScore",
    "best_rule",
    "front",
    "gate_guide",
    "mix_at_cost",
]


@dataclass(frozen=True)
class GateRule:
    """A rule of :class:`lenvm.guides.EosGateGuide`. ``threshold`` None: no EOS is sought. ``stop`` None: no end.

    ``resample`` above 1: of so many answers one is drawn by importance weight, for a target as soft as ``tolerance``.
    That changes nothing of how answers are sampled, and so nothing of the name (``str``) that they have in work files.
    """

    slack: float
    threshold: float | None
    stop: float | None
    resample: int = 1
    tolerance: float | None = None

    def __str__(self) -> str:
        return f"gate slack={self.slack:g} threshold={self.threshold} stop={self.stop}"

    def to_dict(self) -> dict[str, float | None]:
        """Plain fields, as a report holds them."""
        plain = asdict(self)
        if self.resample == 1:
            del plain["resample"], plain["tolerance"]
        return plain


FREE = GateRule(1.0, None, None)
"""Leaves every answer as it is, and costs nothing: the cheap end of every front."""


FORCED: Mapping[Kind, GateRule] = {
    "equal_to": GateRule(0.0, None, 1.0),
    "at_most": GateRule(1.0, None, 1.0),
    "at_least": GateRule(0.0, None, None),
}
"""Hold EOS back until the target and take it there, as far as the kind asks for it: a length score of 100 by
construction. For equal_to that is truncation, which costs ``-ln P(EOS)`` wherever the target happens to fall."""


def _grid(kind: Kind) -> list[GateRule]:
    """From the strictest rules to none at all, ``FORCED`` among them."""
    thresholds = (0.0001, 0.0003, 0.001, 0.003, 0.02, 0.1)
    rules: list[GateRule] = []
    if kind == "equal_to":
        stops: tuple[float | None, ...] = (1.05, 1.25, None)
        rules += [GateRule(d, p, s) for d in (0.0, 0.02, 0.05, 0.1, 0.3) for p in (*thresholds, None) for s in stops]
        rules += [GateRule(1.0, None, s) for s in stops[:-1]]
    elif kind == "at_most":
        stops = (1.0, 1.1, None)
        rules += [GateRule(d, p, s) for d in (0.1, 0.2, 0.5, 0.8) for p in thresholds for s in stops]
        rules += [GateRule(1.0, None, s) for s in stops[1:-1]]
    else:
        rules += [GateRule(d, None, None) for d in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)]
    return [FORCED[kind], *rules, FREE]


RESAMPLE_TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""How softly a gate's answers are weighed where one of several is drawn: it may take what suits it best."""


GRIDS: Mapping[Kind, Sequence[GateRule]] = {
    "equal_to": _grid("equal_to"),
    "at_most": _grid("at_most"),
    "at_least": _grid("at_least"),
}
"""The rules to choose from, by kind."""


@dataclass(frozen=True)
class RuleScore:
    """What a rule reached: mean length score (0 to 100) and mean text cost (nats a sequence)."""

    rule: GateRule
    ls: float
    kl_per_sequence: float

    def to_dict(self) -> dict[str, Any]:
        """One flat row of a table."""
        return {**self.rule.to_dict(), "ls": self.ls, "kl_per_sequence": self.kl_per_sequence}


def best_rule(table: Sequence[RuleScore], kind: Kind) -> RuleScore:
    """The best length score, whatever it costs; of equals the cheapest. Raises InvalidRequestError for no rules.

    Truncation at an equal_to target is left out: it would always win, and is a mode of its own.
    """
    usable = [score for score in table if kind != "equal_to" or score.rule != FORCED[kind]]
    if not usable:
        raise InvalidRequestError("the grid of gates is empty: give at least one rule", param="grids")
    return max(usable, key=lambda score: (round(score.ls, 9), -score.kl_per_sequence))


def front(table: Sequence[RuleScore], size: int = 12) -> list[GateRule]:
    """Rules that no cheaper one beats in length score, the cheapest first; at most ``size``.

    Where there are more, those stay that a mix of two others does not beat either, and of the rest an even choice.
    """
    found: list[RuleScore] = []
    for score in sorted(table, key=lambda score: (score.kl_per_sequence, -score.ls)):
        if not found or score.ls > found[-1].ls:
            found.append(score)
    corners = _thinned(_hull(found), max(2, size))
    rest = _thinned([at for at in range(len(found)) if at not in corners], size - len(corners))
    return [found[at].rule for at in sorted({*corners, *rest})]


def _hull(found: Sequence[RuleScore]) -> list[int]:
    """The corners of the upper hull of score over cost, where both rise along ``found``."""
    corners: list[int] = []
    for at, score in enumerate(found):
        while len(corners) > 1:
            first, last = found[corners[-2]], found[corners[-1]]
            width, height = score.kl_per_sequence - first.kl_per_sequence, score.ls - first.ls
            if (last.ls - first.ls) * width > height * (last.kl_per_sequence - first.kl_per_sequence):
                break
            corners.pop()
        corners.append(at)
    return corners


def _thinned(items: Sequence[int], size: int) -> list[int]:
    """At most ``size`` of ``items``, evenly, both ends among them."""
    if len(items) <= size:
        return list(items)
    return [items[round(at * (len(items) - 1) / (size - 1))] for at in range(size)] if size > 1 else []


@dataclass(frozen=True)
class Mix:
    """A gate that follows rule ``dear`` for a share of the answers and rule ``cheap`` for the others (indices)."""

    cheap: int
    dear: int
    share: float


def mix_at_cost(scores: Sequence[RuleScore], cost: float) -> Mix:
    """The mix of at most two rules with the best mean length score whose mean text cost is ``cost``, or less where one
    rule alone is better.

    Chosen by these very scores, so their luck is counted for the gate. Raises InvalidRequestError where every rule
    costs more: a front begins with ``FREE``.
    """
    limit = max(0.0, cost) + 1e-9  # rounding in sums of zeros
    cheap = [at for at, score in enumerate(scores) if score.kl_per_sequence <= limit]
    if not cheap:
        raise InvalidRequestError(f"no gate costs at most {cost:.3g} nats: add a softer rule", param="grids")
    found = [(scores[at].ls, Mix(at, at, 0.0)) for at in cheap]
    for at in cheap:
        for other, score in enumerate(scores):
            if other not in cheap:
                low, high = scores[at].kl_per_sequence, score.kl_per_sequence
                share = max(0.0, (cost - low) / (high - low))
                found.append(((1 - share) * scores[at].ls + share * score.ls, Mix(at, other, share)))
    return max(found, key=lambda pair: pair[0])[1]


def gate_guide(targets: Sequence[int], kinds: Sequence[Kind], rules: Sequence[GateRule]) -> EosGateGuide:
    """One guide for requests that each have a rule of their own."""
    return EosGateGuide(
        targets,
        kinds=list(kinds),
        slack=[rule.slack for rule in rules],
        threshold=[math.inf if rule.threshold is None else rule.threshold for rule in rules],
        stop=[math.inf if rule.stop is None else rule.stop for rule in rules],
    )
