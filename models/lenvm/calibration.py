"""Calibration of the length distribution: a monotone map of its levels that depends on what the model itself says.

**Form.** With ``u = P(l' <= l)`` of the network at a state and features ``x`` of that state, the calibrated level is

    ``G(u | x) = sigmoid(a(x) log u - b(x) log(1 - u) + c(x))``,  ``a = exp(w_a . [1, x])``, ``b = exp(w_b . [1, x])``,
    ``c = w_c . [1, x]``

(beta calibration, Kull et al. 2017, with coefficients that vary). It is increasing in ``u``, keeps 0 and 1, and is the
identity where all weights are 0. ``x`` are standardised figures of the model's own answer (``FEATURES``): what a state
looks like to the model does the work of a domain label, which a query does not carry. Outside the range that was seen
when fitting, ``x`` is held at its edge.

**Fit.** Maximum likelihood of the probability integral transforms on held-out prompts. An answer that ended has its
transform in ``(F(l - 1), F(l)]``, one that was cut after ``c`` more tokens in ``(F(c), 1]``: both are intervals, so the
likelihood is exact and cut answers are neither dropped nor taken as ended.
How much it may do is chosen by cross-validation over prompts (the answers of one are not independent): nothing at all,
one map for every state, or one that bends with ``x`` under a ridge. The least of these within a standard error of the
best is taken, since what the prompts do not bear out would be carried over to others.
States at the prompt boundary and in mid-answer are fitted together, since a query does not say which it is. States in
mid-answer must be chosen without a look at the answer's length (after 64 tokens, say, and not at half of it).

**Stored** in ``lenvm.json`` under ``calibration`` (``to_dict``): ``method`` ("beta"), ``features`` (their names),
``center`` and ``scale`` [d], ``low`` and ``high`` [d] (range of the standardised features), ``weights`` [3, d + 1]
(rows a, b, c; the first column is the constant), ``fit`` (what it was fitted on, for people).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.distribution import LengthBins, quantile, restricted_mean, survival
from lenvm.errors import ArtifactError, InvalidRequestError
from lenvm.returns import horizon_from_logit

__all__ = ["FEATURES", "Calibration", "Observations", "features", "fit_calibration", "observe"]

FloatArray: TypeAlias = NDArray[np.float64]

FEATURES = ("log_horizon", "log_mean", "logit_beyond_cap", "entropy", "log_spread")
METHOD = "beta"
# On each weight of a feature, strongest first; infinity: the constants alone, None: the identity.
_RIDGES: tuple[float | None, ...] = (None, math.inf, 0.3, 0.1, 0.03, 0.01, 0.003)
_CONSTANT = 1e-3  # on the constants: keeps a handful of answers from making a wild map
_FOLDS = 5
_TINY = 1e-9  # levels nearer to 0 or 1 than this count as this


@dataclass(frozen=True)
class Calibration:
    """The fitted map; see the module. Arrays: center, scale, low, high [d], weights [3, d + 1]."""

    center: FloatArray
    scale: FloatArray
    low: FloatArray
    high: FloatArray
    weights: FloatArray
    fit: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, level: ArrayLike, above: ArrayLike, x: ArrayLike) -> FloatArray:
        """The logit of ``G``: level u and ``above = 1 - u`` [..., m], features x [..., d] -> [..., m]."""
        standard = np.clip((np.asarray(x, dtype=np.float64) - self.center) / self.scale, self.low, self.high)
        coefficients = standard @ self.weights[:, 1:].T + self.weights[:, 0]
        a, b, c = (coefficients[..., i, None] for i in range(3))
        with np.errstate(divide="ignore"):
            # ``above`` apart from ``level``: in the upper tail 1 - u would have lost its digits.
            logit = np.exp(a) * np.log(np.asarray(level)) - np.exp(b) * np.log(np.asarray(above)) + c
        return np.asarray(logit, dtype=np.float64)

    def apply(self, logits: ArrayLike, bin_logprobs: ArrayLike, bins: LengthBins, gamma: float) -> FloatArray:
        """Calibrated bin log-probs: value logits [...] and bin log-probs [..., n] of states -> [..., n], normalised.

        The level is mapped at the last length of every bin, and mass stays uniform inside a bin.
        """
        probability = np.exp(np.asarray(bin_logprobs, dtype=np.float64))
        probability = probability / probability.sum(axis=-1, keepdims=True)
        level = np.cumsum(probability, axis=-1)[..., :-1]
        above = np.cumsum(probability[..., ::-1], axis=-1)[..., ::-1][..., 1:]
        x = features(logits, bin_logprobs, bins, gamma)
        logit = self.logits(np.clip(level, 0.0, 1.0), np.clip(above, 0.0, 1.0), x)
        ends = np.concatenate([np.full_like(logit[..., :1], -np.inf), logit, np.full_like(logit[..., :1], np.inf)], -1)
        left, right = ends[..., :-1], ends[..., 1:]
        # A difference of two numbers near 1 is taken of their complements, so that small tails stay exact.
        upper = left > 0.0
        mass = _sigmoid(np.where(upper, -left, right)) - _sigmoid(np.where(upper, -right, left))
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.maximum(mass, 0.0)), dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields, as stored in ``lenvm.json``."""
        arrays = {name: getattr(self, name).tolist() for name in ("center", "scale", "low", "high", "weights")}
        return {"method": METHOD, "features": list(FEATURES), **arrays, "fit": dict(self.fit)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> Calibration | None:
        """The inverse of ``to_dict``; None gives None (an artifact without calibration).

        Raises:
            ArtifactError: another method or other features than this release knows, or arrays of wrong size or value.
        """
        if data is None:
            return None
        try:
            if data["method"] != METHOD or tuple(data["features"]) != FEATURES:
                raise ValueError(f"method {data['method']!r} with features {data['features']!r} is not known")
            d = len(FEATURES)
            arrays = {name: _array(data[name], (d,), name) for name in ("center", "scale", "low", "high")}
            if not (arrays["scale"] > 0.0).all() or (arrays["low"] > arrays["high"]).any():
                raise ValueError("scale must be positive and low at most high")
            return cls(**arrays, weights=_array(data["weights"], (3, d + 1), "weights"), fit=dict(data["fit"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"calibration is damaged or of another release ({error}): calibrate again") from None


def features(logits: ArrayLike, bin_logprobs: ArrayLike, bins: LengthBins, gamma: float) -> FloatArray:
    """What the map depends on: value logits [...] and bin log-probs [..., n] -> [..., 5], in the order of ``FEATURES``.

    Natural logs of horizon and restricted mean (tokens), logit of ``P(l > cap)``, entropy over the bins (nats), and log
    of the ratio of the 90 % and the 10 % quantile.
    """
    logp = np.asarray(bin_logprobs, dtype=np.float64)
    horizon = horizon_from_logit(np.asarray(logits, dtype=np.float64), gamma)
    beyond = np.clip(np.exp(logp[..., -1]), 1e-4, 1.0 - 1e-4)
    probability = np.exp(logp)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(probability > 0.0, probability * logp, 0.0).sum(axis=-1)
    ends = np.log(quantile(logp, bins, [0.1, 0.9])[0].astype(np.float64))
    parts = [
        np.log(np.maximum(horizon, 1.0)),
        np.log(np.maximum(restricted_mean(logp, bins), 1.0)),
        np.log(beyond) - np.log1p(-beyond),
        entropy,
        ends[..., 1] - ends[..., 0],
    ]
    return np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=-1)


@dataclass(frozen=True)
class Observations:
    """What was seen at m states: features x [m, d], and that the network's level of the truth lies in ``(low, high]``.

    ``weight`` [m] is relative; ``group`` [m] numbers the prompts. A cut answer has ``high = 1``.
    """

    x: FloatArray
    low: FloatArray
    high: FloatArray
    weight: FloatArray
    group: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence[Observations]) -> Observations:
        """All of them, one after the other."""
        names = ("x", "low", "high", "weight", "group")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def covered(self, level: float) -> FloatArray:
        """Which states a quantile at ``level`` covers [m]: 0, 1, or the share of the interval below the level."""
        width = np.maximum(self.high - self.low, _TINY)
        return np.asarray(np.clip((level - self.low) / width, 0.0, 1.0), dtype=np.float64)


def observe(
    logits: ArrayLike,
    bin_logprobs: ArrayLike,
    remaining: ArrayLike,
    finished: ArrayLike,
    *,
    bins: LengthBins,
    gamma: float,
    group: ArrayLike,
    weight: ArrayLike = 1.0,
) -> Observations:
    """States with the lengths that came: logits [m], bin log-probs [m, n], remaining [m], finished [m].

    ``remaining`` is l (EOS included, at least 1) where ``finished``, else the tokens known to have followed (at
    least 0): l is larger than that. ``group`` [m]: number of the state's prompt.
    """
    logp = np.asarray(bin_logprobs, dtype=np.float64)
    known, ended = np.asarray(remaining, dtype=np.int64), np.asarray(finished, dtype=bool)
    if logp.ndim != 2 or known.shape != logp.shape[:1] or ended.shape != known.shape or (known < ended).any():
        raise InvalidRequestError("observations need one remaining length a state: 1 or more where it ended")
    low = _level(logp, bins, np.where(ended, known - 1, known))
    # Beyond the cap the distribution is one atom: what ended there is known no better than what was cut.
    high = np.where(ended & (known <= bins.cap), _level(logp, bins, known), 1.0)
    weights = np.broadcast_to(np.asarray(weight, dtype=np.float64), known.shape)
    groups = np.broadcast_to(np.asarray(group, dtype=np.int64), known.shape)
    return Observations(features(logits, logp, bins, gamma), low, high, weights, groups)


def fit_calibration(
    seen: Observations, *, ridges: Sequence[float | None] = _RIDGES, about: Mapping[str, Any] | None = None
) -> Calibration:
    """The map of greatest likelihood; ``about`` is stored beside it under ``fit``, with what cross-validation found.

    ``ridges``, strongest first (None: the identity, infinity: one map for every state), are compared by the likelihood
    of left-out prompts; ``form`` says which it is ("identity", "one map", "by state"). With fewer than 5 prompts the
    first is taken. Raises InvalidRequestError where there is nothing to fit on. Deterministic; needs torch.
    """
    if not len(seen.low) or not (seen.weight > 0.0).any():
        raise InvalidRequestError("there are no answers to calibrate on")
    share = seen.weight / seen.weight.sum()
    center = share @ seen.x
    scale = np.maximum(np.sqrt(share @ (seen.x - center) ** 2), 1e-6)
    standard = (seen.x - center) / scale
    low, high = (np.quantile(standard, q, axis=0) for q in (0.005, 0.995))
    design = np.concatenate([np.ones((len(standard), 1)), np.clip(standard, low, high)], axis=1)
    prompts, group = np.unique(seen.group, return_inverse=True)
    ridge, losses = ridges[0], None
    if len(ridges) > 1 and len(prompts) >= _FOLDS:
        losses = _cross_validate(design, seen, share, group, ridges)
        ridge = _choose(losses, ridges)
    weights = _maximise(design, seen.low, seen.high, share, ridge)
    found: dict[str, Any] = {"form": "identity" if ridge is None else "one map", "ridge": None}
    if ridge is not None and not math.isinf(ridge):
        found.update(form="by state", ridge=ridge)
    found.update(states=len(share), prompts=len(prompts))
    if losses is not None:
        found["nats_gained"] = float(losses[:, 0].sum() - losses[:, list(ridges).index(ridge)].sum())
    return Calibration(center, scale, low, high, weights, {**found, **(about or {})})


def _cross_validate(
    design: FloatArray, seen: Observations, share: FloatArray, group: NDArray[np.int64], ridges: Sequence[float | None]
) -> FloatArray:
    """Loss of left-out prompts [prompts, ridges], weighted so that a column sums to its mean loss."""
    fold = np.random.default_rng(0).permutation(group.max() + 1) % _FOLDS
    losses = np.zeros((group.max() + 1, len(ridges)))
    for left_out in range(_FOLDS):
        out = fold[group] == left_out
        rest = ~out
        for at, ridge in enumerate(ridges):
            weights = _maximise(design[rest], seen.low[rest], seen.high[rest], share[rest], ridge)
            coefficients = design[out] @ weights.T
            mass = np.maximum(_g(seen.high[out], coefficients) - _g(seen.low[out], coefficients), 1e-12)
            losses[:, at] += np.bincount(group[out], weights=-share[out] * np.log(mass), minlength=len(losses))
    return losses


def _choose(losses: FloatArray, ridges: Sequence[float | None]) -> float | None:
    """The strongest ridge whose loss exceeds the best by less than the standard error of that difference."""
    best = int(losses.sum(axis=0).argmin())
    for at, ridge in enumerate(ridges):
        worse = losses[:, at] - losses[:, best]
        if worse.sum() <= worse.std() * math.sqrt(len(worse)):
            return ridge
    return ridges[best]


def _maximise(
    design: FloatArray, low: FloatArray, high: FloatArray, share: FloatArray, ridge: float | None
) -> FloatArray:
    """Weights [3, d + 1] of greatest penalised likelihood: design [m, d + 1], intervals [m], shares [m]."""
    import torch

    width = design.shape[1]
    if ridge is None:
        return np.zeros((3, width))
    if math.isinf(ridge):
        design = design[:, :1]
    inputs, start, end = torch.from_numpy(design), torch.from_numpy(low), torch.from_numpy(high)
    shares = torch.from_numpy(share / share.sum())
    weights = torch.zeros(3, design.shape[1], dtype=torch.float64, requires_grad=True)
    penalty = torch.full_like(weights, ridge).index_fill_(1, torch.tensor([0]), _CONSTANT)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def level(u: Any, coefficients: Any) -> Any:
        inside = u.clamp(_TINY, 1.0 - _TINY)
        a, b, c = coefficients.unbind(1)
        g = torch.sigmoid(a.exp() * inside.log() - b.exp() * torch.log1p(-inside) + c)
        return torch.where(u <= _TINY, torch.zeros_like(g), torch.where(u >= 1.0 - _TINY, torch.ones_like(g), g))

    def closure() -> Any:
        optimizer.zero_grad()
        coefficients = inputs @ weights.T
        mass = (level(end, coefficients) - level(start, coefficients)).clamp_min(1e-12)
        loss = -(shares * mass.log()).sum() + (penalty * weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = np.zeros((3, width))
    found[:, : design.shape[1]] = weights.detach().numpy()
    return found


def _g(u: FloatArray, coefficients: FloatArray) -> FloatArray:
    """``G`` of levels [m] with coefficients a, b, c [m, 3]; 0 and 1 stay what they are."""
    inside = np.clip(u, _TINY, 1.0 - _TINY)
    a, b, c = coefficients.T
    mapped = _sigmoid(np.exp(a) * np.log(inside) - np.exp(b) * np.log1p(-inside) + c)
    return np.where(u <= _TINY, 0.0, np.where(u >= 1.0 - _TINY, 1.0, mapped))


def _level(logp: FloatArray, bins: LengthBins, length: ArrayLike) -> FloatArray:
    """``P(l' <= length)`` [m]; lengths past the cap count as the cap."""
    return np.asarray(np.clip(1.0 - survival(logp, bins, length), 0.0, 1.0), dtype=np.float64)


def _sigmoid(x: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):  # exp(-x) is infinite where the sigmoid is 0
        return np.asarray(1.0 / (1.0 + np.exp(-x)), dtype=np.float64)


def _array(value: Any, shape: tuple[int, ...], name: str) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != shape or not all(map(math.isfinite, array.ravel().tolist())):
        raise ValueError(f"{name} must be finite numbers of shape {shape}")
    return array
