"""Objectives, the posterior's closed form against sums over lengths, and hand-worked cases of the paper's rules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lenvm.distribution import LengthBins, log_pmf, log_softmax, value_at
from lenvm.errors import InvalidRequestError
from lenvm.guidance import (
    LOG_WEIGHT_FLOOR,
    MAX_TARGET,
    Objective,
    PreparedWeights,
    check_objective,
    log_weights,
    resolve_scale,
)

FloatArray = NDArray[np.float64]
GAMMA = 0.997
BINS = LengthBins(cap=300, unit=8, ratio=1.3)
EOS = 3  # the column that holds EOS in these tests


def log_u(objective: Objective, length: float) -> float:
    """The design's table, once more and independently."""
    if objective.kind == "tilt":
        return -float(objective.lambda_ or 0.0) * length
    target = objective.target or 0
    missed = -abs(length - target) / max(1.0, objective.tolerance * target)
    allowed = {"equal_to": False, "at_most": length <= target, "at_least": length >= target}[objective.kind]
    return 0.0 if allowed else missed


def brute_force(objective: Objective, logp: FloatArray, generated: int) -> FloatArray:
    """log sum_l P(l | c) u(g + l), length by length in long doubles: [K, n] -> [K]; EOS in column EOS."""
    lengths = generated + np.arange(1, BINS.cap + 2)
    table = np.array([log_u(objective, float(length)) for length in lengths], dtype=np.longdouble)
    terms = log_pmf(logp, BINS).astype(np.longdouble) + table
    peak = terms.max(axis=-1, keepdims=True)
    weights = (peak[:, 0] + np.log(np.exp(terms - peak).sum(axis=-1))).astype(np.float64)
    weights[EOS] = log_u(objective, float(generated))
    return np.asarray(objective.strength * weights, dtype=np.float64)


def call(
    objectives: list[Objective | None],
    *,
    logp: FloatArray | None = None,
    generated: Any = 0,
    logprobs: Any = None,
    z: Any = None,
    bins: LengthBins | None = BINS,
    k: int = 5,
) -> FloatArray:
    """log_weights for B rows of K candidates, EOS in column EOS."""
    b = len(objectives)
    eos = np.zeros((b, k), dtype=bool)
    eos[:, EOS] = True
    return log_weights(
        objectives,
        np.zeros((b, k)) if z is None else z,
        logp,
        eos,
        np.broadcast_to(np.asarray(generated), (b,)),
        logprobs,
        bins=bins,
        gamma=GAMMA,
    )


def bin_logp(seed: int, *shape: int, scale: float = 3.0) -> FloatArray:
    return log_softmax(np.random.default_rng(seed).normal(scale=scale, size=(*shape, BINS.size)))


objectives = st.one_of(
    st.builds(
        Objective,
        kind=st.sampled_from(["equal_to", "at_most", "at_least"]),
        target=st.integers(0, 700),
        tolerance=st.one_of(st.just(0.0), st.floats(0.0, 2.0)),
        strength=st.floats(0.1, 3.0),
    ),
    st.builds(Objective, kind=st.just("tilt"), lambda_=st.one_of(st.just(0.0), st.floats(-0.5, 0.5))),
)


@given(st.lists(objectives, min_size=1, max_size=4), st.integers(0, 600), st.integers(0, 10**6))
def test_posterior_closed_form_equals_the_sum_over_lengths(rows: list[Objective], generated: int, seed: int) -> None:
    logp = bin_logp(seed, len(rows), 5)
    weights = call([*rows], logp=logp, generated=[generated + row for row in range(len(rows))])
    for row, objective in enumerate(rows):
        expected = brute_force(objective, logp[row], generated + row)
        np.testing.assert_allclose(weights[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", [0, 40, 90_000])
def test_scored_candidates_alone_give_what_padded_ones_give(target: int) -> None:
    """Far from a target next to nothing is left of the product of probabilities and utility."""
    rows = [Objective(kind="equal_to", target=target, tolerance=0.01), Objective(kind="tilt", lambda_=0.3)] * 2
    is_eos = np.zeros((4, 5), dtype=bool)
    is_eos[0, 2] = is_eos[1, :] = is_eos[3, 4] = True
    generated = np.array([0, 3, 0, 900])
    logp = bin_logp(3, 4, 5, scale=60.0)
    prepared = PreparedWeights(rows, is_eos, generated, None, bins=BINS, gamma=0.99)
    assert prepared.reads_bins_alone
    places = np.flatnonzero(~is_eos)
    found = prepared.of_scored(places, logp.reshape(-1, BINS.size)[places])
    each = [  # by the sum in logs, a row at a time
        brute_force(objective, own, int(count)) for objective, own, count in zip(rows, logp, generated, strict=True)
    ]
    logp[is_eos] = np.nan
    np.testing.assert_array_equal(found, prepared(np.zeros((4, 5)), logp))
    assert np.isfinite(found).all()
    for at in (0, 2, 3):
        scored = ~is_eos[at]
        scored[EOS] = False
        kept = found[at, scored] - found[at, scored].max(), each[at][scored] - each[at][scored].max()
        np.testing.assert_allclose(*kept, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("other", [None, Objective(kind="equal_to", target=4, method="paper")])
def test_other_rows_are_not_for_scored_candidates_alone(other: Objective | None) -> None:
    is_eos = np.zeros((2, 3), dtype=bool)
    rows = [Objective(kind="equal_to", target=4), other]
    logprobs = np.full((2, 3), -1.0)
    assert not PreparedWeights(rows, is_eos, [0, 0], logprobs, bins=BINS, gamma=0.99).reads_bins_alone
    assert not PreparedWeights([other] * 2, is_eos, [0, 0], logprobs, bins=BINS, gamma=0.99).reads_bins_alone


def test_posterior_far_past_a_target_keeps_its_order_and_stops() -> None:
    """200,000 tokens past the target every u underflows; EOS must still win, and a shorter rest beat a longer one."""
    logp = np.full((1, 5, BINS.size), -np.inf)
    for candidate, length in enumerate((2, 5, 250, 1, 2000)):
        logp[0, candidate, BINS.index(length)] = 0.0
    for objective in (Objective("equal_to", 10), Objective("at_most", 10), Objective("equal_to", 10, tolerance=0.0)):
        weights = call([objective], logp=logp, generated=200_000)[0]
        assert weights[EOS] > weights[0] > weights[1] > weights[2] > weights[4] > LOG_WEIGHT_FLOOR
        assert weights[0] - weights[1] == pytest.approx(3.0)  # exp(-(L - N)), and lengths 2 and 5
    weights = call([Objective("at_least", 10**6, tolerance=0.0)], logp=logp, generated=5)[0]
    assert weights[4] > weights[2] > weights[1] > weights[0] > weights[EOS] > LOG_WEIGHT_FLOOR
    strong = call([Objective("tilt", lambda_=-1e6, strength=1e6)], logp=logp, generated=10**6)[0]
    assert strong.tolist() == [LOG_WEIGHT_FLOOR] * 4 + [0.0]


@pytest.mark.parametrize("fill", [-np.inf, np.nan, np.inf])
@pytest.mark.parametrize("kind", ["equal_to", "at_most", "at_least", "tilt"])
@pytest.mark.parametrize("method", ["posterior", "paper"])
def test_weights_are_finite_whatever_comes_in(fill: float, kind: Any, method: Any) -> None:
    parameter = {"beta" if method == "paper" else "lambda": 0.5} if kind == "tilt" else {"target": 50}
    objective = Objective.from_dict({"kind": kind, "method": method, **parameter})
    good = bin_logp(1, 3, 5)
    logp, z, logprobs = good.copy(), np.zeros((3, 5)), np.log(np.full((3, 5), 0.2))
    logp[0], z[0], logprobs[0] = fill, fill, fill  # a whole row
    logp[1, 2], z[1, 2], logprobs[1, 2] = fill, fill, fill  # one candidate
    logp[2, 2, 4] = -np.inf  # one impossible bin
    weights = call([objective] * 3, logp=logp, generated=[0, 7, 400], logprobs=logprobs, z=z)
    assert np.isfinite(weights).all()
    assert (weights >= LOG_WEIGHT_FLOOR).all()
    if method == "posterior":
        assert weights[1, 2] == LOG_WEIGHT_FLOOR
        untouched = call([objective] * 3, logp=good, generated=[0, 7, 400])
        np.testing.assert_array_equal(np.delete(weights[1], 2), np.delete(untouched[1], 2))


def test_rows_are_independent_and_none_is_no_guidance() -> None:
    rows = [
        Objective("equal_to", 64),
        None,
        Objective("tilt", beta=-2.0, method="paper"),
        Objective("tilt", lambda_=0.01, strength=2.0),
        Objective("at_least", 200, method="paper"),
        Objective("at_most", 30, strength=0.0),
    ]
    rng = np.random.default_rng(3)
    logp, z = bin_logp(2, 6, 5), rng.normal(size=(6, 5))
    logprobs = np.log(rng.dirichlet(np.ones(5), size=6))
    generated = np.array([0, 5, 9, 100, 30, 20])
    together = call(rows, logp=logp, generated=generated, logprobs=logprobs, z=z)
    assert together.dtype == np.float64
    assert not together[1].any()
    assert not together[5].any()
    for row, objective in enumerate(rows):
        one = slice(row, row + 1)
        alone = call([objective], logp=logp[one], generated=generated[one], logprobs=logprobs[one], z=z[one])
        np.testing.assert_array_equal(alone[0], together[row])
    assert call([], logp=bin_logp(2, 0, 5), z=np.zeros((0, 5))).shape == (0, 5)


def test_a_value_is_the_tilting_weight_of_its_own_gamma() -> None:
    """tilt at lambda = -ln(gamma) needs no bins: log(1 + V), and the same up to rounding from the bins."""
    logp = bin_logp(5, 2, 5)
    values = value_at(logp, BINS, GAMMA)
    z = np.log(-values) - np.log1p(values)
    objective = Objective("tilt", lambda_=-math.log(GAMMA))
    from_bins = call([objective] * 2, logp=logp, z=np.zeros((2, 5)), generated=[0, 40])
    from_value = call([objective] * 2, logp=None, z=z, generated=[0, 40], bins=None)
    np.testing.assert_allclose(from_value, from_bins, atol=1e-9)
    expected = np.delete(np.log1p(values[0]), EOS)
    np.testing.assert_allclose(np.delete(from_bins[0], EOS), expected, atol=1e-9)
    assert from_bins[0, EOS] == 0.0
    assert from_bins[1, EOS] == pytest.approx(40 * math.log(GAMMA))
    z[0, 0] = np.nan
    assert call([objective] * 2, logp=None, z=z, bins=None)[0, 0] == LOG_WEIGHT_FLOOR


@given(st.floats(0.2, 1.6), st.integers(0, 10**6), st.floats(0.0, 4.0))
def test_scale_solves_the_tilt_at_the_prompt_boundary(factor: float, seed: int, spread: float) -> None:
    logp = bin_logp(seed, scale=spread)
    pmf = np.exp(log_pmf(logp, BINS))
    lengths = np.arange(BINS.cap + 1)  # L = l - 1
    mean = float(pmf @ lengths)
    objective = Objective("scale", factor=factor, strength=0.5)
    if factor * mean > 0.95 * BINS.cap:
        return  # next to the longest answer the bins know; see the test below
    tilt = resolve_scale(objective, logp, BINS)
    assert (tilt.kind, tilt.factor, tilt.strength) == ("tilt", None, 0.5)
    assert tilt.lambda_ is not None
    assert (tilt.lambda_ > 0) == (factor < 1.0) or factor == 1.0
    tilted = np.log(pmf) - tilt.lambda_ * lengths
    tilted = np.exp(tilted - tilted.max())
    assert float(tilted @ lengths / tilted.sum()) == pytest.approx(factor * mean, rel=1e-9)


def test_scale_edge_cases() -> None:
    flat = log_softmax(np.zeros(BINS.size))
    assert resolve_scale(Objective("scale", factor=1.0), flat, BINS).lambda_ == 0.0
    with pytest.raises(InvalidRequestError, match="out of reach") as caught:
        resolve_scale(Objective("scale", factor=50.0), flat, BINS)
    assert caught.value.param == "factor"
    certain = np.full(BINS.size, -np.inf)
    certain[0] = 0.0  # nothing but EOS to come: every factor of 0 tokens is 0 tokens
    assert resolve_scale(Objective("scale", factor=0.5), certain, BINS).lambda_ == 0.0
    with pytest.raises(InvalidRequestError, match="resolve_scale"):
        call([Objective("scale", factor=0.5)], logp=bin_logp(0, 1, 5))
    with pytest.raises(InvalidRequestError, match="needs no resolving"):
        resolve_scale(Objective("tilt", lambda_=0.1), flat, BINS)
    for bad in (np.full(BINS.size, np.nan), np.full(BINS.size, -np.inf), flat[None]):
        with pytest.raises(InvalidRequestError, match="length distribution"):
            resolve_scale(Objective("scale", factor=0.5), bad, BINS)


# The paper's rules, worked by hand. Candidates: a (remaining l = 10), b (l = 40), c (l = 200), EOS, d (l = 40 too).
REST = np.array([10.0, 40.0, 200.0, 0.0, 40.0])


def paper(
    kind: Any, target: int, generated: int, probs: list[float], *, space: Any = "value", rest: FloatArray = REST
) -> int:
    """The chosen candidate, after checking that it stands at 0 and the others at the floor."""
    with np.errstate(divide="ignore"):
        z = np.log(np.expm1(-math.log(GAMMA) * rest))[None]
        logprobs = np.log(np.array([probs]))
    objective = Objective(kind, target, method="paper", space=space)
    weights = call([objective], generated=generated, logprobs=logprobs, z=z, bins=None)[0]
    chosen = int(weights.argmax())
    assert weights[chosen] == 0.0
    assert (np.delete(weights, chosen) == LOG_WEIGHT_FLOOR).all()
    return chosen


LIKELY = [0.3, 0.3, 0.2, 0.1, 0.1]  # EOS survives
START = [0.4, 0.3, 0.2, 1e-6, 0.0999]  # EOS is beyond top-p 0.999, as at the start of an answer


def test_paper_equal_to_takes_the_nearest_to_the_remaining_target() -> None:
    assert paper("equal_to", 12, 0, LIKELY) == 0
    assert paper("equal_to", 112, 100, LIKELY) == 0  # the remaining target counts, not the target
    assert paper("equal_to", 190, 0, LIKELY) == 2
    assert paper("equal_to", 100, 98, LIKELY) == EOS  # 2 left: nearer to 0 than to 10
    assert paper("equal_to", 100, 500, LIKELY) == EOS
    assert paper("equal_to", 100, 500, START) == 0  # EOS did not survive: the shortest rest instead


@pytest.mark.parametrize("space", ["value", "length"])
def test_paper_equal_to_counts_exactly(space: str) -> None:
    """L = g + l: with 10 of 20 content tokens emitted, a candidate with l = 10 (EOS included) lands on 20."""
    rest = np.array([9.0, 10.0, 11.0, 0.0, 12.0])
    for target, chosen in ((19, 0), (20, 1), (21, 2), (22, 4), (10, EOS)):
        assert paper("equal_to", target, 10, LIKELY, rest=rest, space=space) == chosen


def test_paper_equal_to_ties_go_to_the_likelier() -> None:
    assert paper("equal_to", 45, 0, [0.3, 0.1, 0.2, 0.1, 0.3]) == 4
    assert paper("equal_to", 45, 0, [0.3, 0.3, 0.2, 0.1, 0.1]) == 1


def test_paper_equal_to_in_length_space_differs_from_value_space() -> None:
    """Values are concave in the length: 1,030 is nearer to 130 in tokens, and to 2,000 in value."""
    rest = np.array([130.0, 2000.0, 5000.0, 0.0, 6000.0])
    assert paper("equal_to", 1030, 0, LIKELY, rest=rest, space="length") == 0
    assert paper("equal_to", 1030, 0, LIKELY, rest=rest, space="value") == 1


def test_paper_at_most_takes_the_shortest_but_does_not_stop_at_step_0() -> None:
    assert paper("at_most", 100, 0, START) == 0
    assert paper("at_most", 100, 60, START) == 0  # at every step, not only past the target
    assert paper("at_most", 100, 60, LIKELY) == EOS  # EOS among the survivors is the shortest of all


def test_paper_at_least_takes_the_longest_then_stops() -> None:
    assert paper("at_least", 100, 0, LIKELY) == 2
    assert paper("at_least", 100, 99, LIKELY) == 2  # EOS survives, and is the last choice
    assert paper("at_least", 100, 100, LIKELY) == EOS
    assert paper("at_least", 100, 100, START) == 0  # EOS did not survive: the shortest rest leads to it


def test_paper_at_most_and_at_least_over_a_whole_answer() -> None:
    """Step by step: EOS survives truncation from step 3 on. At Most stops there; At Least only from its target on."""

    def stop_step(kind: str, target: int) -> int:
        return next(g for g in range(100) if paper(kind, target, g, START if g < 3 else LIKELY) == EOS)

    assert stop_step("at_most", 20) == 3
    assert stop_step("at_least", 20) == 20


def test_paper_truncates_at_top_k_15_then_top_p() -> None:
    k = 20
    probs = np.array([0.05 - 0.0001 * i for i in range(k)])
    z = np.zeros((1, k))
    eos = np.zeros((1, k), dtype=bool)
    for rank, chosen in ((14, 14), (15, 0)):  # the 15th likeliest survives, the 16th does not
        z[:] = 0.0
        z[0, rank] = 5.0  # by far the longest
        weights = log_weights(
            [Objective("at_least", 50, method="paper")], z, None, eos, [0], np.log(probs)[None], bins=None, gamma=GAMMA
        )
        assert weights[0].argmax() == chosen
    # Top-p keeps the token that crosses 0.999 and nothing after it: before the fourth, 0.9991 is already kept.
    assert paper("at_least", 50, 0, [0.9, 0.0991, 0.0, 0.0, 0.0009]) == 1
    assert paper("at_least", 50, 0, [0.9, 0.0979, 0.002, 0.0, 0.0001]) == 2


def test_paper_tilt_weighs_the_survivors_of_min_p() -> None:
    """beta (1 - gamma^l) = -beta V: beta < 0 shortens; EOS has V = 0; under 1 % of the likeliest nothing survives."""
    rest = REST.copy()
    rest[EOS] = 999.0  # the value model's answer for EOS is ignored
    z = np.log(np.expm1(-math.log(GAMMA) * rest))[None]
    logprobs = np.log([[0.6, 0.3, 0.0061, 0.09, 0.0059]])
    weights = call([Objective("tilt", beta=-3.0, method="paper")], logprobs=logprobs, z=z, bins=None)[0]
    expected = [-3.0 * (1.0 - GAMMA**10), -3.0 * (1.0 - GAMMA**40), -3.0 * (1.0 - GAMMA**200), 0.0, LOG_WEIGHT_FLOOR]
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "kind"),
        ({"kind": "exactly", "target": 5}, "kind"),
        ({"kind": ["tilt"], "lambda": 0.1}, "kind"),
        ({"kind": "equal_to"}, "target"),
        ({"kind": "equal_to", "target": None}, "target"),
        ({"kind": "equal_to", "target": -1}, "target"),
        ({"kind": "equal_to", "target": math.nan}, "target"),
        ({"kind": "equal_to", "target": math.inf}, "target"),
        ({"kind": "equal_to", "target": 12.0}, "target"),
        ({"kind": "equal_to", "target": "12"}, "target"),
        ({"kind": "equal_to", "target": True}, "target"),
        ({"kind": "equal_to", "target": MAX_TARGET + 1}, "target"),
        ({"kind": "equal_to", "target": 5, "lambda": 0.1}, "lambda"),
        ({"kind": "at_most", "target": 5, "factor": 0.5}, "factor"),
        ({"kind": "at_least", "target": 5, "tolerance": -0.1}, "tolerance"),
        ({"kind": "at_least", "target": 5, "tolerance": math.nan}, "tolerance"),
        ({"kind": "at_least", "target": 5, "tolerance": math.inf}, "tolerance"),
        ({"kind": "at_least", "target": 5, "tolerance": True}, "tolerance"),
        ({"kind": "at_least", "target": 5, "strength": -1.0}, "strength"),
        ({"kind": "at_least", "target": 5, "strength": math.inf}, "strength"),
        ({"kind": "at_least", "target": 5, "method": "magic"}, "method"),
        ({"kind": "at_least", "target": 5, "space": "log"}, "space"),
        ({"kind": "equal_to", "target": 5, "space": "length"}, "space"),
        ({"kind": "equal_to", "target": 5, "Lambda": 1}, "Lambda"),
        ({"kind": "tilt", "lambda_": 1}, "lambda_"),
        ({"kind": "tilt"}, "lambda"),
        ({"kind": "tilt", "lambda": math.nan}, "lambda"),
        ({"kind": "tilt", "lambda": 1e9}, "lambda"),
        ({"kind": "tilt", "lambda": 0.1, "target": 5}, "target"),
        ({"kind": "tilt", "lambda": 0.1, "beta": 0.1}, "beta"),
        ({"kind": "tilt", "beta": 0.1}, "beta"),
        ({"kind": "tilt", "lambda": 0.1, "method": "paper"}, "lambda"),
        ({"kind": "tilt", "method": "paper"}, "beta"),
        ({"kind": "scale"}, "factor"),
        ({"kind": "scale", "factor": 0.0}, "factor"),
        ({"kind": "scale", "factor": -1.0}, "factor"),
        ({"kind": "scale", "factor": 0.5, "method": "paper"}, "method"),
        ({"kind": "at_most", "target": 5, "min_eos_prob": 1.1}, "min_eos_prob"),
        ({"kind": "at_most", "target": 5, "min_eos_prob": -0.1}, "min_eos_prob"),
        ({"kind": "at_most", "target": 5, "min_eos_prob": 0.1, "method": "paper"}, "min_eos_prob"),
    ],
)
def test_bad_objectives_are_refused_in_one_line(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Objective.from_dict(fields)
    assert caught.value.param == param
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "equal_to", "target": 0},
        {"kind": "equal_to", "target": MAX_TARGET, "tolerance": 0, "strength": 2},
        {"kind": "at_most", "target": 64, "method": "paper", "space": "length"},
        {"kind": "tilt", "lambda": -0.01},
        {"kind": "tilt", "beta": -1.0, "method": "paper", "lambda": None},
        {"kind": "scale", "factor": 0.5},
        {"kind": "at_most", "target": 64, "min_eos_prob": 0.001},
    ],
)
def test_objectives_survive_the_wire(fields: dict[str, Any]) -> None:
    objective = Objective.from_dict(fields)
    wire = objective.to_dict()
    assert Objective.from_dict(wire) == objective
    assert {name: wire[name] for name, value in fields.items() if value is not None} == {
        name: value for name, value in fields.items() if value is not None
    }
    assert "lambda_" not in wire


@pytest.mark.parametrize("kind", ["equal_to", "at_most", "at_least"])
def test_an_unlikely_eos_is_not_offered(kind: Any) -> None:
    """Up to the target the bound stands; past it, it falls by e each tenth of it, or each 20 tokens where that is
    slower (at_least has no far side)."""
    logp = bin_logp(0, 1, 5)
    for target, generated, eos_prob, offered in (
        (100, 50, 0.9e-3, False),
        (100, 50, 1.1e-3, True),
        (100, 100, 0.9e-3, False),
        (100, 140, 1e-3 * math.exp(-1.9), kind != "at_least"),
        (100, 140, 1e-3 * math.exp(-2.1), False),
        (1000, 1200, 1e-3 * math.exp(-1.9), kind != "at_least"),
        (1000, 1200, 1e-3 * math.exp(-2.1), False),
    ):
        plain, careful = Objective(kind, target), Objective(kind, target, min_eos_prob=1e-3)
        logprobs = np.log(np.full((1, 5), 0.2))
        logprobs[0, EOS] = math.log(eos_prob)
        expected = call([plain], logp=logp, generated=[generated], logprobs=logprobs)
        found = call([careful], logp=logp, generated=[generated], logprobs=logprobs)
        others = np.arange(5) != EOS
        np.testing.assert_array_equal(found[0, others], expected[0, others])
        assert (found[0, EOS] == expected[0, EOS]) == offered
        assert offered or found[0, EOS] == LOG_WEIGHT_FLOOR
    # A tilt has no target past which it could fall, nor rise where it lengthens.
    logprobs = np.log(np.full((1, 5), 0.2))
    tilted = call([Objective("tilt", lambda_=-0.01, min_eos_prob=1e-3)], logp=logp, generated=[900], logprobs=logprobs)
    assert tilted[0, EOS] > LOG_WEIGHT_FLOOR
    with pytest.raises(InvalidRequestError, match="min_eos_prob needs") as caught:
        call([careful], logp=logp)
    assert caught.value.param == "logprobs"


def test_numpy_integers_are_targets() -> None:
    objective = Objective("equal_to", np.int64(64))  # type: ignore[arg-type]
    assert type(objective.target) is int


def test_what_a_model_or_call_cannot_serve_is_refused() -> None:
    equal_to = Objective("equal_to", 10)
    with pytest.raises(InvalidRequestError, match="num_bins") as caught:
        call([None, equal_to], logp=None, bins=None)
    assert caught.value.param == "method"
    with pytest.raises(InvalidRequestError, match="num_bins"):
        call([Objective("tilt", lambda_=0.01)], logp=None, bins=None)  # not the model's own gamma
    with pytest.raises(InvalidRequestError, match="logprobs") as caught:
        call([Objective("at_most", 10, method="paper")], logp=bin_logp(0, 1, 5))
    assert caught.value.param == "logprobs"
    with pytest.raises(InvalidRequestError, match="gamma"):
        check_objective(Objective("tilt", lambda_=0.01), bins=None, gamma=1.5)
    check_objective(None, bins=None, gamma=GAMMA)
    check_objective(Objective("tilt", lambda_=-math.log(GAMMA)), bins=None, gamma=GAMMA)


def test_shapes_that_disagree_are_refused() -> None:
    row: list[Objective | None] = [Objective("equal_to", 10)]
    logp = bin_logp(0, 1, 5)
    for changed in (
        {"logp": logp[:, :4]},
        {"logp": logp[..., :-1]},
        {"z": np.zeros((2, 5))},
        {"z": np.zeros(5)},
        {"logprobs": np.zeros((1, 4))},
        {"generated": [-1]},
        {"generated": [1.5]},
    ):
        with pytest.raises(InvalidRequestError):
            call(row, **{"logp": logp, **changed})  # type: ignore[arg-type]
