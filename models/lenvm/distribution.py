"""The length distribution: log-probabilities over bins of the remaining length, and what can be read off them.

``l`` counts the tokens still to come, EOS included (so ``l >= 1`` before a terminal state). A bin spreads its mass
uniformly over its lengths; the last bin holds every ``l > cap`` and stands at the point ``cap + 1``.
Functions take log-probs [..., n] that are normalised over the last axis; ``-inf`` marks an impossible bin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.errors import InvalidRequestError
from lenvm.returns import check_gamma

__all__ = [
    "LengthBins",
    "log_geometric_sum",
    "log_pmf",
    "log_softmax",
    "log_survival",
    "quantile",
    "restricted_mean",
    "survival",
    "value_at",
]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

_MAX_CAP = 1_000_000


@dataclass(frozen=True)
class LengthBins:
    """Bins of the remaining length: width 1 up to ``unit``, then growing by ``ratio`` up to ``cap``, then overflow.

    Raises InvalidRequestError unless ``1 <= unit <= cap <= 1e6`` and ``ratio > 1``. The default has 60 bins.
    """

    cap: int = 2048
    unit: int = 16
    ratio: float = 1.12

    def __post_init__(self) -> None:
        for name in ("cap", "unit"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise InvalidRequestError(f"bins.{name} must be an integer", param=name)
        if not 1 <= self.unit <= self.cap <= _MAX_CAP:
            raise InvalidRequestError(f"bins need 1 <= unit <= cap <= {_MAX_CAP}", param="cap")
        ratio: Any = self.ratio  # from a file: the annotation promises nothing
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1.0 < ratio < math.inf:
            raise InvalidRequestError(f"bins.ratio must be a number above 1, not {ratio!r}", param="ratio")

    @cached_property
    def hi(self) -> IntArray:
        """Last length of each bin, int [n]; ``cap + 1`` for the overflow bin. Read-only."""
        edges = list(range(1, self.unit + 1))
        exact = float(self.unit)
        while edges[-1] < self.cap:
            exact *= self.ratio
            edges.append(min(self.cap, max(edges[-1] + 1, round(min(exact, self.cap)))))
        return _frozen(np.array([*edges, self.cap + 1], dtype=np.int64))

    @cached_property
    def lo(self) -> IntArray:
        """First length of each bin, int [n]; ``cap + 1`` for the overflow bin. Read-only."""
        return _frozen(np.concatenate([np.ones(1, dtype=np.int64), self.hi[:-1] + 1]))

    @cached_property
    def widths(self) -> IntArray:
        """Number of lengths in each bin, int [n]; 1 for the overflow bin. Read-only."""
        return _frozen(self.hi - self.lo + 1)

    @property
    def size(self) -> int:
        """Number of bins n, the overflow bin included."""
        return len(self.hi)

    def index(self, length: ArrayLike) -> IntArray:
        """Bin of each remaining length, any shape (l > cap is the overflow bin). InvalidRequestError for l < 1."""
        lengths = np.asarray(length)
        if not bool(np.all(lengths >= 1)):
            raise InvalidRequestError("a remaining length must be at least 1 (EOS included)", param="length")
        return np.asarray(np.searchsorted(self.hi[:-1], lengths, side="left"), dtype=np.int64)

    def survival_weights(self, c: ArrayLike) -> FloatArray:
        """``P(l > c | bin)``: c [...] -> [..., n], uniform inside a bin; what ``-log P(l > c)`` of a cut answer needs.

        Past the cap the bins cannot tell lengths apart: ``c > cap`` is read as ``c = cap``, an upper bound, so that an
        answer cut beyond the cap counts as overflow and never as impossible.
        """
        cut = np.minimum(np.floor(np.asarray(c, dtype=np.float64)), self.cap)[..., None]
        if bool(np.isnan(cut).any()):
            raise InvalidRequestError("the number of tokens to exceed must not be NaN", param="c")
        return np.clip((self.hi - cut) / self.widths, 0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, as stored in ``lenvm.json``."""
        return {"cap": self.cap, "unit": self.unit, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LengthBins:
        """The inverse of ``to_dict``. Raises InvalidRequestError for missing, unknown or invalid fields."""
        if set(data) != {"cap", "unit", "ratio"}:
            raise InvalidRequestError(f"bins need exactly cap, unit and ratio, not {sorted(data)}", param="bins")
        return cls(cap=data["cap"], unit=data["unit"], ratio=data["ratio"])


def log_softmax(logits: ArrayLike) -> FloatArray:
    """Bin logits [..., n] -> log-probs [..., n] in float64; ``-inf`` logits stay ``-inf``."""
    array = np.asarray(logits, dtype=np.float64)
    shifted = array - array.max(axis=-1, keepdims=True)
    normalised: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def restricted_mean(logp: ArrayLike, bins: LengthBins) -> FloatArray:
    """``E[min(l, cap)]`` in tokens, EOS included: [..., n] -> [...]."""
    middles = np.minimum((bins.lo + bins.hi) / 2.0, bins.cap)
    return np.asarray(np.exp(_checked(logp, bins)) @ middles, dtype=np.float64)


def survival(logp: ArrayLike, bins: LengthBins, n: ArrayLike) -> FloatArray:
    """``P(l > n)``: [..., n_bins], with ``n`` broadcast over the leading shape; ``n > cap`` is read as the cap."""
    return np.asarray((np.exp(_checked(logp, bins)) * bins.survival_weights(n)).sum(axis=-1), dtype=np.float64)


def log_survival(logp: ArrayLike, bins: LengthBins, n: ArrayLike) -> FloatArray:
    """``log P(l > n)``, as ``survival`` but without underflow; ``-inf`` where it is impossible."""
    with np.errstate(divide="ignore"):
        terms = _checked(logp, bins) + np.log(bins.survival_weights(n))
    return np.asarray(np.logaddexp.reduce(terms, axis=-1), dtype=np.float64)


def quantile(logp: ArrayLike, bins: LengthBins, q: ArrayLike) -> tuple[IntArray, NDArray[np.bool_]]:
    """Smallest ``l`` with ``P(l' <= l) >= q``: [..., n] with scalar q -> [...], with q [Q] -> [..., Q].

    Returns lengths (EOS included) and ``saturated``: True where the quantile lies beyond the cap and the cap stands in.
    Raises InvalidRequestError unless every q lies in (0, 1).
    """
    levels = np.asarray(q, dtype=np.float64)
    if levels.ndim > 1 or not bool(np.all((levels > 0.0) & (levels < 1.0))):
        raise InvalidRequestError("quantiles must lie between 0 and 1 (exclusive)", param="quantiles")
    cumulative = np.cumsum(np.exp(_checked(logp, bins)), axis=-1)
    cumulative = cumulative / cumulative[..., -1:]  # float32 log-probs sum to 1 only within 1e-6
    wanted = np.atleast_1d(levels) - 1e-12  # a level reached up to rounding is reached
    reached = np.minimum((cumulative[..., None, :] < wanted[:, None]).sum(axis=-1), bins.size - 1)
    padded = np.concatenate([np.zeros_like(cumulative[..., :1]), cumulative], axis=-1)
    below = np.take_along_axis(padded, reached, axis=-1)
    mass = np.take_along_axis(padded, reached + 1, axis=-1) - below
    widths = bins.widths[reached]
    steps = np.ceil((wanted - below) / np.maximum(mass, np.finfo(np.float64).tiny) * widths - 1e-9)
    lengths = bins.lo[reached] - 1 + np.clip(steps, 1, widths).astype(np.int64)
    saturated = reached == bins.size - 1
    lengths = np.where(saturated, bins.cap, lengths)
    return (lengths[..., 0], saturated[..., 0]) if levels.ndim == 0 else (lengths, saturated)


def value_at(logp: ArrayLike, bins: LengthBins, gamma: float) -> FloatArray:
    """``E[-(1 - gamma^l)]`` at any gamma: [..., n] -> [...] (the overflow bin counts as ``cap + 1`` tokens)."""
    rate = -math.log(check_gamma(gamma))
    log_means = -rate * bins.lo + log_geometric_sum(rate, bins.widths) - np.log(bins.widths)
    return np.asarray(np.exp(_checked(logp, bins)) @ np.expm1(log_means), dtype=np.float64)


def log_pmf(logp: ArrayLike, bins: LengthBins) -> FloatArray:
    """``log P(l)`` for l = 1..cap + 1: [..., n] -> [..., cap + 1] (the last entry is all of ``l > cap``)."""
    per_length = _checked(logp, bins) - np.log(bins.widths)
    return np.repeat(per_length, bins.widths, axis=-1)


def log_geometric_sum(rate: ArrayLike, count: ArrayLike) -> FloatArray:
    """``log sum_{i < count} exp(-rate i)``, broadcast, for a rate of either sign; ``-inf`` for an empty sum."""
    rates = np.asarray(rate, dtype=np.float64)
    counts = np.asarray(count, dtype=np.float64)
    size = np.abs(rates)
    with np.errstate(divide="ignore", invalid="ignore"):
        decaying = np.log(-np.expm1(-size * counts)) - np.log(-np.expm1(-size))
        total = np.where(size > 0.0, decaying, np.log(counts))
    # A growing series is a decaying one read from its last, largest term.
    return np.asarray(total + np.where(rates < 0.0, size * (counts - 1.0), 0.0), dtype=np.float64)


def _checked(logp: ArrayLike, bins: LengthBins) -> FloatArray:
    array = np.asarray(logp, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != bins.size:
        raise InvalidRequestError(f"bin log-probs must end in {bins.size} bins, not {array.shape}", param="logp")
    return array


def _frozen(array: IntArray) -> IntArray:
    array.setflags(write=False)  # cached and shared: a caller must not be able to change them
    return array
