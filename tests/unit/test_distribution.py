"""The length distribution against brute force over single lengths."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lenvm.distribution import (
    LengthBins,
    log_geometric_sum,
    log_pmf,
    log_softmax,
    log_survival,
    quantile,
    restricted_mean,
    survival,
    value_at,
)
from lenvm.errors import InvalidRequestError
from lenvm.returns import horizon

FloatArray = NDArray[np.float64]


@st.composite
def distributions(draw: st.DrawFn) -> tuple[LengthBins, FloatArray]:
    cap = draw(st.integers(1, 400))
    bins = LengthBins(cap=cap, unit=draw(st.integers(1, min(cap, 20))), ratio=draw(st.floats(1.01, 3.0)))
    logits = np.random.default_rng(draw(st.integers(0, 2**32))).normal(scale=draw(st.floats(0.0, 8.0)), size=bins.size)
    if bins.size > 2 and draw(st.booleans()):
        logits[draw(st.integers(0, bins.size - 1))] = -np.inf  # an impossible bin
    return bins, log_softmax(logits)


def brute_pmf(logp: FloatArray, bins: LengthBins) -> dict[int, float]:
    """P(l) by looking every length up in its bin."""
    return {
        length: float(np.exp(logp[bin_])) / int(bins.widths[bin_])
        for length in range(1, bins.cap + 2)
        for bin_ in [int(bins.index(length))]
    }


@given(distributions())
def test_bins_tile_every_length_once(case: tuple[LengthBins, FloatArray]) -> None:
    bins, logp = case
    np.testing.assert_array_equal(bins.lo[1:], bins.hi[:-1] + 1)
    assert bins.lo[0] == 1
    assert bins.hi[-2] == bins.cap
    assert bins.lo[-1] == bins.hi[-1] == bins.cap + 1
    assert (bins.widths[: bins.unit] == 1).all()
    assert bins.widths.min() >= 1
    lengths = np.arange(1, bins.cap + 1)
    found = bins.index(lengths)
    assert ((bins.lo[found] <= lengths) & (lengths <= bins.hi[found])).all()
    np.testing.assert_array_equal(bins.index([bins.cap + 1, 10 * bins.cap + 7]), bins.size - 1)
    assert sum(brute_pmf(logp, bins).values()) == pytest.approx(1.0)
    np.testing.assert_allclose(np.exp(log_pmf(logp, bins)), list(brute_pmf(logp, bins).values()))


def test_default_bins() -> None:
    bins = LengthBins()
    assert bins.size == 60
    assert bins.hi[:16].tolist() == list(range(1, 17))
    assert LengthBins.from_dict(json.loads(json.dumps(bins.to_dict()))) == bins
    assert bins.hi is bins.hi  # computed once
    with pytest.raises(ValueError, match="read-only"):
        bins.hi[0] = 5


@given(distributions())
def test_restricted_mean(case: tuple[LengthBins, FloatArray]) -> None:
    bins, logp = case
    brute = sum(p * min(length, bins.cap) for length, p in brute_pmf(logp, bins).items())
    assert float(restricted_mean(logp, bins)) == pytest.approx(brute, rel=1e-9)


@given(distributions(), st.integers(-3, 450))
def test_survival(case: tuple[LengthBins, FloatArray], n: int) -> None:
    bins, logp = case
    brute = sum(p for length, p in brute_pmf(logp, bins).items() if length > min(n, bins.cap))
    assert float(survival(logp, bins, n)) == pytest.approx(brute, abs=1e-12)
    assert math.exp(float(log_survival(logp, bins, n))) == pytest.approx(brute, abs=1e-12)


def test_survival_does_not_underflow_and_broadcasts() -> None:
    bins = LengthBins(cap=4, unit=4)
    logp = np.array([0.0, -800.0, -900.0, -1000.0, -np.inf])
    assert float(log_survival(logp, bins, 1)) == pytest.approx(-800.0)
    assert float(log_survival(logp, bins, 4)) == -np.inf
    assert float(log_survival(logp, bins, 0)) == pytest.approx(0.0)
    assert survival(np.stack([logp, logp]), bins, [0, 3]).shape == (2,)
    weights = bins.survival_weights([[0, 2], [4, 99]])
    assert weights.shape == (2, 2, 5)
    assert weights[0, 1].tolist() == [0, 0, 1, 1, 1]
    assert (
        weights[1, 0].tolist() == weights[1, 1].tolist() == [0, 0, 0, 0, 1]
    )  # cut past the cap: overflow, not impossible
    assert LengthBins(cap=20, unit=16, ratio=4.0).survival_weights(18).tolist() == [*[0.0] * 16, 0.5, 1.0]


@given(distributions(), st.floats(0.001, 0.999))
def test_quantile_is_the_smallest_length_that_reaches_its_level(case: tuple[LengthBins, FloatArray], q: float) -> None:
    bins, logp = case
    length, saturated = (part.item() for part in quantile(logp, bins, q))
    below = 1.0 - float(survival(logp, bins, length - 1))
    if saturated:
        assert length == bins.cap
        assert 1.0 - float(survival(logp, bins, bins.cap)) < q + 1e-9
    else:
        assert 1 <= length <= bins.cap
        assert 1.0 - float(survival(logp, bins, length)) >= q - 1e-9
        assert below <= q + 1e-9


@given(distributions())
def test_quantiles_are_monotone(case: tuple[LengthBins, FloatArray]) -> None:
    bins, logp = case
    levels = np.linspace(0.01, 0.99, 33)
    lengths, saturated = quantile(np.stack([logp, logp]), bins, levels)
    assert lengths.shape == saturated.shape == (2, 33)
    assert (np.diff(lengths, axis=-1) >= 0).all()
    assert (np.diff(saturated.astype(int), axis=-1) >= 0).all()


def test_quantiles_by_hand() -> None:
    bins = LengthBins(cap=8, unit=4, ratio=2.0)  # 1, 2, 3, 4, 5-8, overflow
    with np.errstate(divide="ignore"):
        logp = np.log(np.array([0.0, 0.5, 0.0, 0.0, 0.4, 0.1]))
    lengths, saturated = quantile(logp, bins, [0.1, 0.5, 0.51, 0.7, 0.71, 0.9, 0.95])
    assert lengths.tolist() == [2, 2, 5, 6, 7, 8, 8]
    assert saturated.tolist() == [False] * 6 + [True]


@given(distributions(), st.floats(0.3, 0.99999))
def test_value_at_any_gamma(case: tuple[LengthBins, FloatArray], gamma: float) -> None:
    bins, logp = case
    pmf = brute_pmf(logp, bins)
    brute = sum(-p * (1.0 - gamma**length) for length, p in pmf.items())
    value = float(value_at(logp, bins, gamma))
    assert value == pytest.approx(brute, abs=1e-9)
    assume(value > -1.0 + 1e-9)
    mean = sum(p * length for length, p in pmf.items())
    assert horizon(min(value, 0.0), gamma) <= mean * (1.0 + 1e-6)  # Jensen


@given(distributions())
def test_value_near_gamma_one_reads_back_as_the_mean(case: tuple[LengthBins, FloatArray]) -> None:
    bins, logp = case
    gamma = 1.0 - 1e-9
    mean = float(restricted_mean(logp, bins)) + float(survival(logp, bins, bins.cap))  # overflow counts as cap + 1 here
    assert horizon(float(value_at(logp, bins, gamma)), gamma) == pytest.approx(mean, rel=1e-5)


@given(st.floats(-3.0, 3.0), st.integers(0, 200))
def test_log_geometric_sum(rate: float, count: int) -> None:
    found = float(log_geometric_sum(rate, count))
    if count == 0:
        assert found == -np.inf
    else:
        assert found == pytest.approx(float(np.logaddexp.reduce(-rate * np.arange(count))), abs=1e-9)


def test_log_softmax_normalises_and_keeps_impossible_bins() -> None:
    logp = log_softmax(np.array([[1000.0, 999.0, -np.inf], [0.0, 0.0, 0.0]], dtype=np.float32))
    assert logp.dtype == np.float64
    np.testing.assert_allclose(np.exp(logp).sum(axis=-1), 1.0)
    assert logp[0, 2] == -np.inf


def test_leading_shapes_are_kept() -> None:
    bins = LengthBins(cap=64)
    logp = log_softmax(np.zeros((2, 3, bins.size)))
    assert restricted_mean(logp, bins).shape == (2, 3)
    assert value_at(logp, bins, 0.9).shape == (2, 3)
    assert quantile(logp, bins, 0.5)[0].shape == (2, 3)
    assert quantile(logp, bins, [0.5, 0.9])[0].shape == (2, 3, 2)
    assert survival(logp, bins, 7).shape == (2, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"cap": 0},
        {"cap": 8},  # below unit
        {"unit": 0},
        {"cap": 2.5},
        {"cap": True},
        {"cap": 10**7},
        {"ratio": 1.0},
        {"ratio": math.nan},
        {"ratio": math.inf},
        {"ratio": "1.1"},
    ],
)
def test_bad_bins_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        LengthBins.from_dict({**LengthBins().to_dict(), **fields})


def test_other_bad_input_is_refused() -> None:
    bins = LengthBins()
    logp = log_softmax(np.zeros(bins.size))
    for q in (0.0, 1.0, -0.5, math.nan, [0.5, 2.0]):
        with pytest.raises(InvalidRequestError):
            quantile(logp, bins, q)
    for length in (0, -1, [3, 0]):
        with pytest.raises(InvalidRequestError):
            bins.index(length)
    with pytest.raises(InvalidRequestError):
        restricted_mean(logp[:-1], bins)
    with pytest.raises(InvalidRequestError):
        survival(logp, bins, math.nan)
    with pytest.raises(InvalidRequestError):
        value_at(logp, bins, 1.0)
    for data in ({"cap": 2048}, {**bins.to_dict(), "extra": 1}):
        with pytest.raises(InvalidRequestError):
            LengthBins.from_dict(data)
