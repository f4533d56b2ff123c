"""Prediction metrics and the statistics below them, against brute force and cases worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.along import FRACTIONS, along_metrics, places
from lenvm.evaluation.coverage import GRID, LEVELS, Prediction, pinball_loss, quantile_metrics
from lenvm.evaluation.prediction import (
    DomainData,
    PromptSamples,
    evaluate,
    evaluate_domain,
    fit_constant,
    fit_prompt_length,
    noise_floor,
    oracle_horizon_errors,
    relative_errors,
)
from lenvm.evaluation.probe import fit_probe
from lenvm.evaluation.stats import bootstrap_ci, kendall_tau, paired_bootstrap

lengths = st.floats(1.0, 2048.0)


# --- statistics -------------------------------------------------------------------------------------------------------


def tau_by_pairs(x: Sequence[float], y: Sequence[float]) -> float:
    score, ties_x, ties_y, pairs = 0, 0, 0, 0
    for i, j in combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        score, ties_x, ties_y, pairs = score + int(a * b), ties_x + (a == 0), ties_y + (b == 0), pairs + 1
    untied = (pairs - ties_x) * (pairs - ties_y)
    return score / math.sqrt(untied) if untied else math.nan


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_kendall_tau_b_is_the_pair_count(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    assert kendall_tau(x, y) == pytest.approx(tau_by_pairs(x, y), nan_ok=True)
    assert kendall_tau(y, x) == pytest.approx(kendall_tau(x, y), nan_ok=True)


def test_kendall_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1.0
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1.0
    assert kendall_tau([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    assert math.isnan(kendall_tau([1, 1], [1, 2]))


def test_bootstrap_interval_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    low, high = bootstrap_ci(values, seed=3)
    error = 1.96 * values.std() / 20.0
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)
    assert bootstrap_ci(values, seed=3) == (low, high)
    assert bootstrap_ci([4.0, 4.0]) == (4.0, 4.0)
    low, high = bootstrap_ci(values, n=200, statistic=lambda sample: float(np.median(sample)))
    assert low < np.median(values) < high


def test_paired_bootstrap_resamples_clusters() -> None:
    rng = np.random.default_rng(0)
    effect = rng.normal(1.0, 1.0, size=40)
    other = rng.normal(0.0, 5.0, size=40)
    clusters = [f"p{index}" for index in range(40) for _ in range(4)]
    a, b = np.repeat(other + effect, 4), np.repeat(other, 4)
    difference, low, high = paired_bootstrap(a, b, clusters)
    naive = paired_bootstrap(a, b)
    assert difference == pytest.approx(effect.mean()) == naive[0]
    assert low < difference < high
    # Four copies of a prompt hold no more than one: the interval is as wide as without them.
    assert high - low == pytest.approx(np.subtract(*paired_bootstrap(other + effect, other)[:0:-1]), rel=0.1)
    assert naive[2] - naive[1] < 0.6 * (high - low)


def test_paired_bootstrap_weighs_strata_alike_and_resamples_each_alone() -> None:
    found = paired_bootstrap([3.0, 1.0, 1.0], [0.0, 0.0, 0.0], strata=["a", "b", "b"])
    assert found == (2.0, 2.0, 2.0)  # nothing varies inside a stratum
    clusters = ["x", "x", "y", "y"]
    assert paired_bootstrap([1.0, 3.0, 0.0, 4.0], [0.0] * 4, clusters, strata=["a"] * 4) == paired_bootstrap(
        [1.0, 3.0, 0.0, 4.0], [0.0] * 4, clusters
    )


def test_paired_bootstrap_weighs_rows_not_clusters() -> None:
    assert paired_bootstrap([3.0, 1.0, 1.0], [0.0, 0.0, 0.0], ["a", "b", "b"])[0] == pytest.approx(5 / 3)
    assert paired_bootstrap([3.0, 1.0], [1.0, -1.0], ["a", "a"]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_ci([]),
        lambda: bootstrap_ci([1.0, math.nan]),
        lambda: bootstrap_ci([1.0], n=0),
        lambda: bootstrap_ci([1.0], level=1.0),
        lambda: paired_bootstrap([1.0], [1.0, 2.0]),
        lambda: paired_bootstrap([1.0], [1.0], ["a", "b"]),
        lambda: paired_bootstrap([1.0], [1.0], strata=["a", "b"]),
        lambda: kendall_tau([1.0, 2.0], [1.0]),
    ],
    ids=["empty", "nan", "no resamples", "level", "unpaired", "clusters", "strata", "tau unpaired"],
)
def test_statistics_refuse_bad_input(call: Any) -> None:
    with pytest.raises(InvalidRequestError):
        call()


# --- parts of the report ----------------------------------------------------------------------------------------------


def test_cut_samples_count_as_the_cap() -> None:
    samples = PromptSamples([10, 3000, 50, 0], [True, True, False, True], 5)
    assert samples.capped(2048).tolist() == [10.0, 2048.0, 2048.0, 0.0]
    for bad in (PromptSamples([], [], 1), PromptSamples([1], [], 1), PromptSamples([-1], [True], 1)):
        with pytest.raises(InvalidRequestError, match="needs samples"):
            bad.capped(2048)


def test_relative_errors_by_hand() -> None:
    assert relative_errors([50.0, 150.0, 3.0], [100.0, 100.0, 0.0]).tolist() == [0.5, 0.5, 3.0]
    with pytest.raises(InvalidRequestError, match="2 finite numbers"):
        relative_errors([1.0, math.nan], [1.0, 1.0])


@given(st.lists(lengths, min_size=1, max_size=15))
def test_the_constant_is_the_best_one(truth: list[float]) -> None:
    best = relative_errors(np.full(len(truth), fit_constant(truth)), truth).mean()
    for other in truth:  # the loss is convex and piecewise linear: its minimum is at one of these
        assert best <= relative_errors(np.full(len(truth), other), truth).mean() + 1e-9


@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=15))
def test_the_factor_is_the_best_one(rows: list[tuple[float, float]]) -> None:
    truth, shape = (np.asarray(column) for column in zip(*rows, strict=True))
    best = relative_errors(fit_constant(truth, shape) * shape, truth).mean()
    for other in truth / shape:
        assert best <= relative_errors(other * shape, truth).mean() + 1e-9


def test_prompt_length_recovers_a_power_law() -> None:
    tokens = np.asarray([1.0, 4.0, 9.0, 100.0])
    slope, factor = fit_prompt_length(tokens, 20.0 * tokens**0.5)
    assert (slope, factor) == pytest.approx((0.5, 20.0))
    assert fit_prompt_length([7, 7], [10.0, 10.0]) == (0.0, 10.0)


def test_pinball_is_least_at_the_quantile() -> None:
    outcomes = np.arange(1.0, 101.0)
    assert pinball_loss(10.0, [20.0, 5.0], 0.9).tolist() == pytest.approx([9.0, 0.5])
    losses = [pinball_loss(z, outcomes, 0.9).mean() for z in outcomes]
    assert int(np.argmin(losses)) + 1 in (90, 91)


def test_noise_floor_is_the_error_of_the_truth() -> None:
    assert noise_floor([[5.0, 5.0, 5.0]]) == 0.0
    assert noise_floor([[90.0, 110.0], [7.0]]) == pytest.approx(20.0 / 100.0 / 2.0)  # one sample has no halves
    assert math.isnan(noise_floor([[7.0]]))
    rng = np.random.default_rng(0)
    draws = rng.normal(100.0, 20.0, size=(3000, 16))
    expected = np.abs(draws.mean(axis=1) - 100.0).mean() / 100.0
    assert noise_floor(list(draws), splits=5) == pytest.approx(expected, rel=0.05)


# --- the report -------------------------------------------------------------------------------------------------------


def prompt(values: Sequence[int], finished: bool = True, prompt_tokens: int = 10) -> PromptSamples:
    return PromptSamples(values, [finished] * len(values), prompt_tokens)


def test_a_report_by_hand() -> None:
    quantiles = {0.5: 101.0, 0.9: 121.0, 0.95: 2048.0}
    data = DomainData(
        predictions=[Prediction(151.0, 101.0, quantiles, 0.1), Prediction(201.0, 251.0, quantiles, 0.1)],
        samples=[prompt([80, 120]), PromptSamples([200, 9], [True, False], 40)],
        train=[prompt([100]), prompt([400], prompt_tokens=40)],
        baselines={"linear_probe": [100.0, 1124.0], "prompt_encoder": None},
    )
    report = evaluate({"math": data}, seed=1)["math"]
    assert (report["prompts"], report["samples"], report["cap"], report["cut_share"]) == (2, 4, 2048, 0.25)
    assert report["truth_mean"] == (100.0 + 1124.0) / 2  # (200 + 2048) / 2 = 1124
    second = 924.0 / 1124.0
    assert report["mre"] == pytest.approx((0.5 + second) / 2)  # the EOS is taken off: 151 -> 150, 201 -> 200
    assert report["median_error"] == pytest.approx((0.5 + second) / 2)
    assert report["mre_mean"] == pytest.approx((0.0 + 874.0 / 1124.0) / 2)
    assert report["noise_floor"] == pytest.approx((40 / 100 / 2 + 1848 / 1124 / 2) / 2)
    assert report["kendall_tau"] == 1.0
    assert report["mre_ci"] == pytest.approx([0.5, second])
    # l = 81, 121, 201 and beyond the cap, against 101, 121 and a saturated quantile: half of the mass of 0.1 above the
    # cap lies below the level 0.95, so the cut answer is half covered.
    assert (report["coverage_p50"], report["coverage_p90"]) == (0.25, 0.5)
    assert report["coverage_p95"] == pytest.approx((3 + 0.5) / 4)
    assert report["coverage_p95_strict"] == 0.75
    assert set(report["reliability"]) == {"0.5", "0.9", "0.95"}
    assert (report["saturated_p50"], report["saturated_p95"]) == (0.0, 1.0)
    assert report["coverage_p90_resolved"] == 0.5
    assert math.isnan(report["coverage_p95_resolved"])
    expected = [pinball_loss(z, [81, 121, 201, 2048], q).mean() for q, z in quantiles.items()]
    assert report["pinball"] == pytest.approx(np.mean(expected))
    constants = [pinball_loss(z, [81, 121, 201, 2048], q).mean() for q, z in ((0.5, 101), (0.9, 401), (0.95, 401))]
    assert report["pinball_constant"] == pytest.approx(np.mean(constants))
    # Of two samples each is what is known of the other.
    halves = [(81, 121), (121, 81), (201, 2048), (2048, 201)]
    own = [pinball_loss(known, judged, q) for known, judged in halves for q in quantiles]
    assert report["pinball_own"] == pytest.approx(np.mean(own))
    baselines = report["baselines"]
    assert baselines["constant"] == pytest.approx((0.0 + 1024.0 / 1124.0) / 2)  # 100: weight 1/100 against 1/400
    assert baselines["constant_mean"] == pytest.approx((1.5 + 874.0 / 1124.0) / 2)
    assert baselines["prompt_length"] == pytest.approx((0.0 + 724.0 / 1124.0) / 2)  # slope 1: ten tokens a token
    assert baselines["linear_probe"] == 0.0
    assert math.isnan(baselines["prompt_encoder"])
    assert report["baseline_gain"]["prompt_encoder"] is None
    assert report["baseline_gain"]["linear_probe"][0] == pytest.approx(-report["mre"])
    assert report["baseline_fit"]["prompt_length_slope"] == pytest.approx(1.0)
    assert baselines["constant_on_test"] <= min(baselines["constant"], baselines["constant_mean"])


def test_an_ideal_predictor_is_at_the_noise_floor_and_covered() -> None:
    rng = np.random.default_rng(0)
    means = np.exp(rng.normal(5.0, 0.5, size=150))
    samples = [prompt(rng.geometric(1 / mean, size=64).tolist()) for mean in means]
    predictions = [
        Prediction(mean + 1, mean + 1, {q: math.log(1 - q) / math.log(1 - 1 / mean) + 1 for q in (0.5, 0.9, 0.95)}, 0.0)
        for mean in means
    ]
    report = evaluate_domain(DomainData(predictions, samples, samples))
    assert report["mre"] == pytest.approx(report["noise_floor"], rel=0.25)
    for level in (50, 90, 95):
        assert report[f"coverage_p{level}"] == pytest.approx(level / 100, abs=0.02)
    assert report["pinball"] < report["pinball_constant"]
    assert report["mre"] < report["baselines"]["constant"]
    assert report["baseline_gain"]["constant"][1] > 0.0


def test_without_a_distribution_head() -> None:
    data = DomainData([Prediction(0.5)], [prompt([10, 20])], [prompt([10])])
    report = evaluate_domain(data)
    assert report["mre"] == 1.0  # a horizon under one token is an empty answer, not a negative one
    for name in ("mre_mean", "coverage_p50", "coverage_p90_strict", "coverage_p90_resolved", "pinball", "kendall_tau"):
        assert math.isnan(report[name])
    assert report["pinball_constant"] > 0.0


@pytest.mark.parametrize(
    "data",
    [
        DomainData([], [], [prompt([1])]),
        DomainData([Prediction(5.0)], [], [prompt([1])]),
        DomainData([Prediction(5.0)], [prompt([1])], []),
        DomainData([Prediction(math.nan)], [prompt([1])], [prompt([1])]),
        DomainData([Prediction(5.0)], [prompt([1])], [prompt([1])], {"probe": [1.0, 2.0]}),
    ],
)
def test_incomplete_data_is_refused(data: DomainData) -> None:
    with pytest.raises(InvalidRequestError):
        evaluate_domain(data)


# --- the atom above the cap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [0.0, 0.03, 0.2, 0.6])
def test_coverage_of_a_calibrated_model_is_the_level_whatever_is_cut(beyond: float) -> None:
    """Drawn by brute force: lengths of a known law, cut at the cap, and levels drawn at random inside the atom."""
    cap, rng = 100, np.random.default_rng(0)
    law = np.full(cap + 1, (1.0 - beyond) / cap)
    law[cap] = beyond  # lengths 1..cap, and everything longer
    cumulative = np.cumsum(law)
    quantiles = {q: float(min(np.searchsorted(cumulative, q - 1e-12) + 1, cap)) for q in GRID}
    draws = rng.choice(np.arange(1, cap + 2), p=law, size=40_000).astype(float)
    report = quantile_metrics([Prediction(1.0, 1.0, quantiles, beyond)], [draws], draws, cap)
    where = np.minimum(draws, cap + 1).astype(int)
    level_of = cumulative[where - 1] - rng.random(len(draws)) * law[where - 1]  # randomised transform: uniform
    for q in LEVELS:
        name = f"p{round(100 * q)}"
        assert report[f"coverage_{name}"] == pytest.approx(q, abs=0.012)
        assert report[f"coverage_{name}"] == pytest.approx((level_of <= q).mean(), abs=0.012)
        assert report[f"coverage_{name}_strict"] == pytest.approx(min(q, 1.0 - beyond), abs=0.012)
        saturated = q > 1.0 - beyond + 1e-9
        assert report[f"saturated_{name}"] == float(saturated)
        assert math.isnan(report[f"coverage_{name}_resolved"]) == saturated
    assert max(abs(float(q) - share) for q, share in report["reliability"].items()) < 0.012


def test_too_little_mass_above_the_cap_is_no_cover() -> None:
    """A model that claims 2 % beyond the cap where 30 % are cut covers 68 + 0.3 * 0 at 0.95, not 95."""
    lengths = np.concatenate([np.full(70, 10.0), np.full(30, 101.0)])
    claimed = Prediction(1.0, 1.0, {0.5: 10.0, 0.9: 10.0, 0.95: 10.0}, 0.02)
    report = quantile_metrics([claimed], [lengths], lengths, 100)
    assert report["coverage_p95"] == 0.7
    honest = quantile_metrics(
        [Prediction(1.0, 1.0, {0.5: 10.0, 0.9: 100.0, 0.95: 100.0}, 0.3)], [lengths], lengths, 100
    )
    assert honest["coverage_p95"] == pytest.approx(0.95)
    assert honest["coverage_p90"] == pytest.approx(0.9)


# --- oracle, along, probe ---------------------------------------------------------------------------------------------


def test_the_oracle_is_the_horizon_of_the_samples_themselves() -> None:
    gamma = 0.997
    lengths = np.asarray([10.0, 10.0, 1000.0, 1000.0])
    crossed, same = oracle_horizon_errors([lengths], gamma, splits=400)
    horizon = math.log(np.mean(gamma ** (lengths + 1))) / math.log(gamma) - 1
    assert same[0] == pytest.approx(abs(horizon - 505.0) / 505.0)
    assert same[0] > 0.5  # Jensen: far below the mean
    # Halves: both short or both long with probability 1/3, else one of each, which is the whole again.
    apart = np.mean([abs(10 - 1000) / 1000, abs(1000 - 10) / 10])
    assert crossed[0] == pytest.approx(apart / 3 + same[0] * 2 / 3, rel=0.1)
    assert oracle_horizon_errors([[50.0] * 8], gamma)[0].tolist() == pytest.approx([0.0], abs=1e-9)
    assert len(oracle_horizon_errors([[50.0]], gamma)[0]) == 0


def test_errors_along_the_answer_by_hand() -> None:
    lengths = np.asarray([100, 7])
    assert places(7) == [0, 1, 3, 5, 6]
    horizons = np.asarray([[120.0, 75.0, 40.0, 25.0, 10.0], [7.0, 6.0, 4.0, 2.0, 3.0]])
    report = along_metrics(horizons, None, lengths, ["a", "b"])
    assert set(report) == {f"{fraction:g}" for fraction in FRACTIONS}
    assert report["0"]["error"] == pytest.approx((0.2 + 0.0) / 2) == report["0"]["error_remaining"]
    assert report["0.5"]["error"] == pytest.approx((10 / 100 + 0.0) / 2)
    assert report["0.5"]["error_remaining"] == pytest.approx((10 / 50 + 0.0) / 2)
    assert report["0.9"]["error_remaining"] == pytest.approx((0.0 + 2.0) / 2)
    assert report["0.9"]["error_static"] == pytest.approx((20 / 100 + 0.0) / 2)  # 120 - 90 = 30 where 10 are left
    assert math.isnan(report["0.5"]["error_mean"])
    assert along_metrics(horizons, horizons + 1.0, lengths, ["a", "b"])["0.25"]["error_mean"] == pytest.approx(
        (1 / 100 + 1 / 7) / 2
    )


def test_errors_along_the_answer_vary_by_prompt_and_not_by_answer() -> None:
    """Answers to one prompt that are off by the same: repeats of them are no news."""
    rng = np.random.default_rng(0)
    lengths, off = np.full(40, 100), np.repeat(rng.uniform(0.0, 100.0, 10), 4)
    horizons = np.stack([100.0 - at + off for at in places(100)], axis=1)
    clustered = along_metrics(horizons, None, lengths, [at // 4 for at in range(40)])["0"]
    alone = along_metrics(horizons[::4], None, lengths[::4], list(range(10)))["0"]
    apart = along_metrics(horizons, None, lengths, list(range(40)))["0"]
    assert clustered["error"] == pytest.approx(alone["error"])
    assert clustered["error_ci"] == pytest.approx(alone["error_ci"])

    def width(row: Any) -> float:
        return float(row["error_ci"][1] - row["error_ci"][0])

    assert width(clustered) == pytest.approx(2 * width(apart), rel=0.15)


def test_the_probe_finds_the_layer_that_knows() -> None:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(400, 3, 8)).astype(np.float16)
    truth = np.exp(4.0 + 0.5 * states[:, 1, 2].astype(float) + 0.05 * rng.normal(size=400))
    probe = fit_probe(states[:300], truth[:300])
    assert probe.layer == 1
    error = relative_errors(probe.predict(states[300:]), truth[300:]).mean()
    assert error == pytest.approx(probe.cross_validated, abs=0.02)
    assert error < 0.1
    with pytest.raises(InvalidRequestError, match="train prompts"):
        fit_probe(states[:5], truth[:5])
