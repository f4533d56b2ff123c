"""Returns: round trips, bounds, Bellman recursion, length shifts on a small chain, censored loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.errors import InvalidRequestError
from lenvm.returns import (
    bellman_targets,
    censored_value_loss,
    check_gamma,
    discounted_return,
    gamma_for_length,
    horizon,
    horizon_from_logit,
    length_shift,
    value_from_logit,
)

GAMMAS = st.floats(0.5, 0.9999)
LENGTHS = st.integers(0, 4096)
LOGITS = st.floats(-700.0, 700.0)
VALUES = st.floats(-1.0, 0.0, exclude_min=True)


@given(GAMMAS, LENGTHS)
def test_return_lies_in_its_range_and_equals_the_discounted_sum_of_rewards(gamma: float, length: int) -> None:
    value = discounted_return(length, gamma)
    assert -1.0 < value <= 0.0
    rewards = -(1.0 - gamma) * gamma ** np.arange(length, dtype=np.float64)
    assert value == pytest.approx(float(rewards.sum()), abs=1e-9)


@given(GAMMAS, LENGTHS)
def test_return_obeys_the_bellman_recursion(gamma: float, length: int) -> None:
    expected = -(1.0 - gamma) + gamma * discounted_return(length, gamma)
    assert discounted_return(length + 1, gamma) == pytest.approx(expected, abs=1e-12)


@given(st.floats(0.99, 0.9999), st.integers(0, 1500))
def test_horizon_reads_a_length_back_from_its_return(gamma: float, length: int) -> None:
    assert horizon(discounted_return(length, gamma), gamma) == pytest.approx(length, rel=1e-6, abs=1e-9)


@given(LOGITS, GAMMAS)
def test_horizon_from_logit_agrees_with_the_value_and_stays_finite(z: float, gamma: float) -> None:
    value = value_from_logit(z)
    assert -1.0 < value <= 0.0
    stable = horizon_from_logit(z, gamma)
    assert 0.0 <= stable < math.inf
    if z < 15.0:  # further up, a float64 value has no digits left; that is why the logit form exists
        assert horizon(value, gamma) == pytest.approx(stable, rel=1e-6, abs=1e-12)


@given(VALUES, VALUES, GAMMAS)
def test_horizon_falls_as_the_value_rises(first: float, second: float, gamma: float) -> None:
    low, high = sorted((first, second))
    assert horizon(low, gamma) >= horizon(high, gamma) >= 0.0


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=20), st.floats(0.995, 0.9999))
def test_horizon_of_the_mean_return_is_at_most_the_mean_length(lengths: list[int], gamma: float) -> None:
    value = float(np.mean(discounted_return(np.array(lengths), gamma)))
    assert horizon(value, gamma) <= np.mean(lengths) * (1.0 + 1e-6) + 1e-6


def test_scalars_give_floats_and_arrays_keep_their_shape() -> None:
    assert type(discounted_return(3, 0.9)) is float
    assert type(horizon(-0.5, 0.9)) is float
    assert type(value_from_logit(0.0)) is float
    assert value_from_logit(0.0) == -0.5
    assert discounted_return(np.zeros((2, 3)), 0.9).shape == (2, 3)
    assert horizon_from_logit(np.zeros((4, 1), dtype=np.float32), 0.9).shape == (4, 1)
    assert math.copysign(1.0, horizon(0.0, 0.9)) == 1.0
    assert discounted_return(2, 0.9) == pytest.approx(-0.19)


def test_a_return_too_long_for_float64_still_has_a_finite_horizon() -> None:
    value = discounted_return(10**9, 0.997)
    assert value > -1.0
    assert math.isfinite(horizon(value, 0.997))
    assert math.isfinite(horizon(value_from_logit(1e6), 0.997))


@given(st.floats(1.0, 1e6))
def test_gamma_rule_of_the_paper(l99: float) -> None:
    assert discounted_return(l99, gamma_for_length(l99)) == pytest.approx(-0.99)


@given(VALUES, st.integers(0, 4096), GAMMAS)
def test_censored_loss_is_zero_up_to_its_bound_and_squared_above(value: float, cut: int, gamma: float) -> None:
    bound = -(1.0 - gamma**cut)
    loss = censored_value_loss(value, cut, gamma)
    if value <= bound - 1e-12:
        assert loss == 0.0
    else:
        assert loss == pytest.approx((max(0.0, value - bound)) ** 2, abs=1e-12)
    assert censored_value_loss(discounted_return(cut, gamma), cut, gamma) == 0.0
    assert censored_value_loss(discounted_return(cut + 7, gamma), cut, gamma) == 0.0  # any longer answer is consistent


def test_censored_loss_broadcasts() -> None:
    assert censored_value_loss(np.zeros((2, 3)), np.array([1, 2, 3]), 0.9).shape == (2, 3)
    assert type(censored_value_loss(-0.1, 3, 0.9)) is float


# A chain with exact values. State 0: token a (0.7) -> state 1, token b (0.3) -> state 2. State 1 then ends with 0.8 a
# step, state 2 with 0.05: b lengthens, a shortens. An end leads to value 0.
GAMMA = 0.95
NEXT: dict[int, list[tuple[float, int | None]]] = {
    0: [(0.7, 1), (0.3, 2)],
    1: [(0.8, None), (0.2, 1)],
    2: [(0.05, None), (0.95, 2)],
}


def chain_values() -> dict[int | None, float]:
    """Exact: V = -(1 - E[gamma^l]), and E[gamma^l] solves x = gamma (p_end + (1 - p_end) x)."""
    weight = {state: GAMMA * p_end / (1.0 - GAMMA * (1.0 - p_end)) for state, p_end in ((1, 0.8), (2, 0.05))}
    weight[0] = GAMMA * (0.7 * weight[1] + 0.3 * weight[2])
    return {None: 0.0, **{state: x - 1.0 for state, x in weight.items()}}


@pytest.mark.parametrize("state", [0, 1, 2])
def test_the_shift_has_zero_mean_under_the_policy_and_values_are_fixed_points(state: int) -> None:
    values = chain_values()
    pairs = np.array([[values[state], values[after]] for _, after in NEXT[state]])
    chances = np.array([chance for chance, _ in NEXT[state]])
    assert chances @ length_shift(pairs, GAMMA)[:, 0] == pytest.approx(0.0, abs=1e-14)
    assert chances @ bellman_targets(pairs, GAMMA)[:, 0] == pytest.approx(values[state], abs=1e-14)


def test_the_shift_is_positive_on_a_token_that_lengthens() -> None:
    values = chain_values()
    assert length_shift([values[0], values[2]], GAMMA)[0] > 0.01
    assert length_shift([values[0], values[1]], GAMMA)[0] < -0.01
    assert length_shift([values[2], 0.0], GAMMA)[0] < -0.01  # EOS where a long rest was expected


@given(GAMMAS, st.integers(1, 60))
def test_shifts_are_zero_where_the_length_is_certain(gamma: float, length: int) -> None:
    values = discounted_return(np.arange(length, -1, -1), gamma)  # T + 1 states, EOS the last token
    shifts = length_shift(values, gamma)
    assert shifts.shape == (length,)
    np.testing.assert_allclose(shifts, 0.0, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.9", None])
def test_gamma_out_of_range_is_refused(gamma: object) -> None:
    with pytest.raises(InvalidRequestError, match="gamma must be") as caught:
        check_gamma(gamma)  # type: ignore[arg-type]
    assert caught.value.param == "gamma"


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        discounted_return(-1, 0.9)
    with pytest.raises(InvalidRequestError):
        discounted_return(np.array([1.0, math.nan]), 0.9)
    for value in (-1.0, 0.1, math.nan):
        with pytest.raises(InvalidRequestError):
            horizon(value, 0.9)
    for l99 in (0.0, -5.0, math.nan, math.inf, 1e-9, 1e300, True):
        with pytest.raises(InvalidRequestError):
            gamma_for_length(l99)
    with pytest.raises(InvalidRequestError):
        length_shift([], 0.9)
    assert length_shift([-0.5], 0.9).shape == (0,)
