"""Bootstrap intervals and rank correlation, in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.errors import InvalidRequestError

__all__ = ["bootstrap_ci", "kendall_tau", "paired_bootstrap"]

FloatArray: TypeAlias = NDArray[np.float64]

_CHUNK = 2**22  # resampled indices held at a time


def bootstrap_ci(
    values: ArrayLike,
    n: int = 2000,
    seed: int = 0,
    statistic: Callable[[FloatArray], float] | None = None,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic`` (None: the mean) over independent ``values`` [m].

    Raises InvalidRequestError for no values, NaN, ``n`` below 1 or a level outside (0, 1).
    """
    sample = _finite(values, "values")
    _check(n, level)
    rng = np.random.default_rng(seed)
    found: list[float] = []
    rows = max(1, _CHUNK // len(sample))
    for start in range(0, n, rows):
        drawn = sample[rng.integers(len(sample), size=(min(rows, n - start), len(sample)))]
        found.extend(drawn.mean(axis=1) if statistic is None else [statistic(row) for row in drawn])
    return _interval(np.asarray(found, dtype=np.float64), level)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    strata: Sequence[Hashable] | None = None,
) -> tuple[float, float, float]:
    """``mean(a - b)`` with its interval, as ``(difference, low, high)``; a[i] and b[i] [m] belong together.

    ``clusters`` [m] names what is resampled, such as the prompt: several targets of one prompt are not independent.
    None resamples the pairs. ``strata`` [m], such as the domain, weigh the same whatever their sizes (the mean is that
    of their means), and each is resampled alone. Raises InvalidRequestError as ``bootstrap_ci`` does, and for unequal
    lengths.
    """
    first, second = _finite(a, "a"), _finite(b, "b")
    if first.shape != second.shape or any(
        len(given) != len(first) for given in (clusters, strata) if given is not None
    ):
        raise InvalidRequestError("a, b, clusters and strata must have one length: they are paired", param="a")
    _check(n, level)
    difference = first - second
    names = range(len(first)) if clusters is None else clusters
    stratum = np.zeros(len(first), dtype=np.int64) if strata is None else _numbered(strata)
    rng = np.random.default_rng(seed)
    means, found = [], []
    for number in range(int(stratum.max()) + 1):
        members = np.flatnonzero(stratum == number)
        index = _numbered([names[at] for at in members.tolist()])
        sums, sizes = np.bincount(index, weights=difference[members]), np.bincount(index).astype(np.float64)
        count = len(sums)
        # How often each cluster is drawn; the mean of a resample is then a ratio of two dot products.
        times = rng.multinomial(count, np.full(count, 1.0 / count), size=n)
        means.append(difference[members].mean())
        found.append((times @ sums) / (times @ sizes))
    low, high = _interval(np.mean(found, axis=0), level)
    return float(np.mean(means)), low, high


def kendall_tau(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b of ``x`` and ``y`` [m]: -1 to 1, corrected for ties; NaN where either is constant or m < 2."""
    first, second = _finite(x, "x"), _finite(y, "y")
    if first.shape != second.shape:
        raise InvalidRequestError("x and y must have one length: they are paired", param="x")
    concordance, pairs_x, pairs_y = 0.0, 0.0, 0.0
    for index in range(len(first) - 1):  # O(m^2) in time but O(m) in memory; m is a few hundred prompts
        sign_x = np.sign(first[index + 1 :] - first[index])
        sign_y = np.sign(second[index + 1 :] - second[index])
        concordance += float(sign_x @ sign_y)
        pairs_x += float(np.count_nonzero(sign_x))
        pairs_y += float(np.count_nonzero(sign_y))
    if pairs_x == 0.0 or pairs_y == 0.0:
        return float("nan")
    return concordance / float(np.sqrt(pairs_x * pairs_y))


def _numbered(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.int64)


def _interval(found: FloatArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(found, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _finite(values: ArrayLike, name: str) -> FloatArray:
    array: NDArray[Any] = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InvalidRequestError(f"{name} must be a non-empty list of finite numbers", param=name)
    return array


def _check(n: int, level: float) -> None:
    if n < 1:
        raise InvalidRequestError(f"the number of resamples must be at least 1, not {n}", param="n")
    if not 0.0 < level < 1.0:
        raise InvalidRequestError(f"the level must lie in (0, 1), not {level}", param="level")
