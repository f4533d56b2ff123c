"""Returns, horizons and length shifts: the arithmetic between a length and its discounted value (arXiv 2604.27039).

Lengths ``l`` are remaining tokens with the end-of-sequence token (EOS) included; a terminal state has ``l = 0``.
Values follow the paper's sign: ``V`` in (-1, 0], lower is longer. All work is done in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import InvalidRequestError

__all__ = [
    "bellman_targets",
    "censored_value_loss",
    "check_gamma",
    "discounted_return",
    "gamma_for_length",
    "horizon",
    "horizon_from_logit",
    "length_shift",
    "value_from_logit",
]

Array: TypeAlias = NDArray[Any] | Sequence[Any]
FloatArray: TypeAlias = NDArray[np.float64]

# The range of a return is open at -1. Past about 37 / (1 - gamma) tokens float64 would round to -1 exactly, and a
# horizon read back from it would be infinite, so the last float above -1 stands in.
_LOWEST_VALUE = float(np.nextafter(-1.0, 0.0))


def check_gamma(gamma: float) -> float:
    """The discount as a float; InvalidRequestError unless it is a finite number in (0, 1)."""
    if not _is_number(gamma) or not 0.0 < gamma < 1.0:
        raise InvalidRequestError(f"gamma must be a number between 0 and 1 (exclusive), not {gamma!r}", param="gamma")
    return float(gamma)


@overload
def discounted_return(length: float, gamma: float) -> float: ...
@overload
def discounted_return(length: Array, gamma: float) -> FloatArray: ...
def discounted_return(length: float | Array, gamma: float) -> float | FloatArray:
    """``G = -(1 - gamma^l)`` in (-1, 0] for ``l`` remaining tokens, any shape (the paper's return).

    Raises InvalidRequestError for a negative or NaN length.
    """
    lengths = np.asarray(length, dtype=np.float64)
    if not bool(np.all(lengths >= 0.0)):
        raise InvalidRequestError("length must be zero or more tokens, and not NaN", param="length")
    return _plain(np.maximum(np.expm1(lengths * math.log(check_gamma(gamma))), _LOWEST_VALUE))


@overload
def horizon(value: float, gamma: float) -> float: ...
@overload
def horizon(value: Array, gamma: float) -> FloatArray: ...
def horizon(value: float | Array, gamma: float) -> float | FloatArray:
    """``ln(1 + V) / ln(gamma)`` in tokens, any shape: the length whose return is V; at most the mean (paper App. F).

    Raises InvalidRequestError for a value outside (-1, 0]; from a saturated logit use ``horizon_from_logit``.
    """
    values = np.asarray(value, dtype=np.float64)
    if not bool(np.all((values > -1.0) & (values <= 0.0))):
        raise InvalidRequestError("value must lie in (-1, 0]; read a logit with horizon_from_logit", param="value")
    return _plain(np.abs(np.log1p(values)) / -math.log(check_gamma(gamma)))


@overload
def horizon_from_logit(z: float, gamma: float) -> float: ...
@overload
def horizon_from_logit(z: Array, gamma: float) -> FloatArray: ...
def horizon_from_logit(z: float | Array, gamma: float) -> float | FloatArray:
    """``softplus(z) / (-ln gamma)`` in tokens, any shape: ``horizon(-sigmoid(z))`` without its loss of precision."""
    return _plain(np.logaddexp(0.0, np.asarray(z, dtype=np.float64)) / -math.log(check_gamma(gamma)))


@overload
def value_from_logit(z: float) -> float: ...
@overload
def value_from_logit(z: Array) -> FloatArray: ...
def value_from_logit(z: float | Array) -> float | FloatArray:
    """``V = -sigmoid(z)`` in (-1, 0], any shape, stable at both ends."""
    return _plain(np.maximum(-np.exp(-np.logaddexp(0.0, -np.asarray(z, dtype=np.float64))), _LOWEST_VALUE))


def gamma_for_length(l99: float) -> float:
    """The paper's rule ``1 - gamma^L99 = 0.99``: the discount at which 99 % of the value is spent after ``l99`` tokens.

    Raises InvalidRequestError for a length that is not positive and finite, or so extreme that gamma rounds to 0 or 1.
    """
    if not _is_number(l99) or not 0.0 < l99 < math.inf:
        raise InvalidRequestError(f"l99 must be a positive number of tokens, not {l99!r}", param="l99")
    gamma = 0.01 ** (1.0 / l99) if l99 > 1e-3 else 0.0
    if not 0.0 < gamma < 1.0:
        raise InvalidRequestError(f"l99 = {l99!r} gives a gamma of {gamma!r}; choose a realistic length", param="l99")
    return gamma


@overload
def censored_value_loss(value: float, cut_after: float, gamma: float) -> float: ...
@overload
def censored_value_loss(value: Array, cut_after: float | Array, gamma: float) -> FloatArray: ...
@overload
def censored_value_loss(value: float, cut_after: Array, gamma: float) -> FloatArray: ...
def censored_value_loss(value: float | Array, cut_after: float | Array, gamma: float) -> float | FloatArray:
    """``max(0, V + 1 - gamma^c)^2``, broadcast: the loss of a value at a state whose answer was cut ``c`` tokens later.

    All that is known is ``l > c``, that is ``G <= -(1 - gamma^c)``: a value at or below the bound costs nothing.
    """
    bound = np.asarray(discounted_return(np.asarray(cut_after, dtype=np.float64), gamma))
    return _plain(np.square(np.maximum(0.0, np.asarray(value, dtype=np.float64) - bound)))


def bellman_targets(values: Array, gamma: float) -> FloatArray:
    """``r + gamma V_t`` with ``r = -(1 - gamma)``: values [..., T + 1] of s_0..s_T -> [..., T], what V_{t-1} should be.

    Where token T is EOS, the caller passes ``V_T = 0``. Raises InvalidRequestError without a single state.
    """
    gamma = check_gamma(gamma)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise InvalidRequestError("values must hold at least the state before the first token", param="values")
    return gamma * array[..., 1:] - (1.0 - gamma)


def length_shift(values: Array, gamma: float) -> FloatArray:
    """``-(r + gamma V_t - V_{t-1})``: values [..., T + 1] of s_0..s_T -> [..., T], one shift a token.

    Positive = the token made the rest longer; zero mean under the generator where the values are exact. (The paper's
    Eq. 12 and 16 are worded for ``v = -V`` with the reward's sign flipped too.) After EOS the caller passes ``V = 0``.
    """
    targets = bellman_targets(values, gamma)
    shifts: FloatArray = np.asarray(values, dtype=np.float64)[..., :-1] - targets
    return shifts


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _plain(array: FloatArray) -> float | FloatArray:
    """A float for a scalar, the array otherwise."""
    return float(array) if np.ndim(array) == 0 else array
