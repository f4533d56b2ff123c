"""Realised lengths against predicted ones over a sliding window: coverage of quantiles, and drift.

Answers that were cut are censored: their length is above a bound. Dropping them, or counting them as long as they got,
makes answers look shorter than they are. Counting a cut answer only where the cut left its side of the quantile decided
loses answers that would mostly have been beyond: quantiles look better than they are. Bounds that count what is
undecided as within, then as beyond, are always right and soon too wide to see drift by. So each number here is a
product-limit (Kaplan-Meier) estimate: the share of a cut answer goes to those that were seen to get further. That is
right where an answer's cut says nothing about where, in its own predicted distribution, it would have ended. Hence the
scale of coverage: not tokens, on which one limit for all is a late cut for one prompt and an early one for another, but
the predicted probability of a length, which is uniform for a calibrated model whatever the prompt and its limit.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LEVELS", "FeedbackWindow", "WindowSummary", "predicted_probability", "product_limit"]

LEVELS = (0.5, 0.9, 0.95)
"""Of the quantiles whose coverage is told."""


@dataclass(frozen=True)
class WindowSummary:
    """``items`` in the window. ``coverage``: of each level, the part of answers that are at most as long as the
    predicted quantile, nominally the level; NaN where no answer tells. ``log_ratio``: mean of ln(realised / predicted
    median); the horizon stands in where a model has no distribution. Above 0: longer than predicted. What a calibrated
    model has here depends on the shape of its distributions: watch it move."""

    items: int
    coverage: Mapping[float, float]
    log_ratio: float


@dataclass(frozen=True, slots=True)
class _Item:
    """One answer on two scales, each with whether it is only a lower bound there."""

    levels: frozenset[float]
    probability: float
    beyond_probability: bool
    log_ratio: float | None
    beyond_ratio: bool


class FeedbackWindow:
    """The last ``size`` answers of one model; thread-safe, about 400 bytes an answer."""

    def __init__(self, size: int = 2000) -> None:
        self._items: deque[_Item] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._summary: WindowSummary | None = None  # until the next answer

    def add(
        self,
        length: int,
        *,
        cut: bool,
        horizon: float,
        levels: Sequence[float],
        quantiles: Sequence[int],
        cap: int | None,
    ) -> None:
        """A remaining length l >= 1, EOS included; ``cut``: l is above ``length``. ``quantiles`` are those predicted at
        ``levels`` (none without a distribution); those at ``cap`` or above are known to be no lower than it."""
        probability, beyond = predicted_probability(length, levels, quantiles, cut=cut, cap=cap)
        predicted: float | None = max(1.0, horizon)
        if levels:
            median = dict(zip(levels, quantiles, strict=True)).get(0.5)
            predicted = None if median is None or (cap is not None and median >= cap) else max(1, median)
        ratio = None if predicted is None else math.log(length / predicted)
        item = _Item(frozenset(levels) & frozenset(LEVELS), probability, beyond, ratio, cut)
        with self._lock:
            self._items.append(item)
            self._summary = None

    def summary(self) -> WindowSummary:
        """The window in numbers; computed once for each new state."""
        with self._lock:
            if self._summary is None:
                self._summary = _summarize(list(self._items))
            return self._summary

    def coverage(self, level: float) -> float:
        """Of ``summary``, at one of ``LEVELS``."""
        return self.summary().coverage[level]


def _summarize(items: list[_Item]) -> WindowSummary:
    items.sort(key=lambda one: (one.probability, one.beyond_probability))  # once, instead of for each level
    coverage = {
        level: _coverage([(one.probability, one.beyond_probability) for one in items if level in one.levels], level)
        for level in LEVELS
    }
    ratios = sorted((one.log_ratio, one.beyond_ratio) for one in items if one.log_ratio is not None)
    return WindowSummary(len(items), coverage, _mean(ratios))


def _coverage(observed: Sequence[tuple[float, bool]], level: float) -> float:
    if not observed or (observed[-1][1] and observed[-1][0] < level):  # all that were left were cut below the quantile
        return math.nan
    return math.fsum(mass for _, mass in itertools.takewhile(lambda step: step[0] <= level, product_limit(observed)))


def _mean(observed: Sequence[tuple[float, bool]]) -> float:
    if not observed:
        return math.nan
    steps = list(product_limit(observed))
    # What was cut beyond all that ended counts as if it had ended there: the mean is a lower bound then.
    rest = 1.0 - math.fsum(mass for _, mass in steps)
    return math.fsum(value * mass for value, mass in steps) + rest * observed[-1][0]


def product_limit(observed: Sequence[tuple[float, bool]]) -> Iterator[tuple[float, float]]:
    """Steps (value, mass) of the distribution behind ``observed``, sorted pairs (value, whether it was cut there).

    What was cut gives its mass to what lies above; at equal values what ended goes first, a cut being strictly above.
    Where the last was cut, the masses do not add up to 1: the rest lies above it, nobody knows where.
    """
    rest = 1.0
    for left, (value, cut) in zip(range(len(observed), 0, -1), observed, strict=True):
        if not cut:
            mass = rest / left
            rest -= mass
            yield value, mass


def predicted_probability(
    length: int, levels: Sequence[float], quantiles: Sequence[int], *, cut: bool, cap: int | None
) -> tuple[float, bool]:
    """The probability that the prediction gave to lengths up to ``length``, and whether that is only a lower bound.

    Linear between predicted quantiles, so that ``length <= quantile`` is ``probability <= level``, exactly; 1 beyond
    the last of them. A quantile at the cap lies there or anywhere above: an answer longer than the cap is censored,
    halfway between the level below and that one.
    """
    below, start = 0.0, 0
    for level, quantile in sorted(zip(levels, quantiles, strict=True)):
        if cap is not None and quantile >= cap:
            halfway = (below + level) / 2
            if length > cap or (cut and length >= cap):
                return halfway, True
            return below + (halfway - below) * (length - start) / (cap - start), cut
        if length <= quantile:
            return below + (level - below) * (length - start) / (quantile - start), cut
        below, start = level, quantile
    return 1.0, cut
