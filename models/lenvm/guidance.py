"""From a length objective to log-weights: what guidance adds to each candidate's log-probability.

*posterior* samples from ``p(y) u(L(y))``: ``log_weight(c) = strength * log sum_l P(l | c) u(g + l)`` and
``log_weight(EOS) = strength * log u(g)``, with ``g`` the content tokens before the candidate and ``l`` the tokens that
remain after it, EOS included, so that the answer has ``L = g + l`` content tokens.
*paper* keeps the candidates that survive truncation and applies the rules of arXiv 2604.27039 to their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.distribution import LengthBins, log_geometric_sum, log_pmf
from lenvm.errors import InvalidRequestError
from lenvm.returns import check_gamma, discounted_return, horizon_from_logit, value_from_logit

__all__ = [
    "LOG_WEIGHT_FLOOR",
    "MAX_TARGET",
    "MIN_P",
    "TOP_K",
    "TOP_P",
    "Objective",
    "PreparedWeights",
    "check_objective",
    "eos_fade",
    "expect_step",
    "log_utility",
    "log_weights",
    "resolve_scale",
    "shared_utility",
    "utility",
]

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

LOG_WEIGHT_FLOOR = -1e4
"""Lowest log-weight, in nats: as good as forbidden, and still finite on the wire."""
MAX_TARGET = 1_000_000
"""Longest target, in content tokens."""

_MAX_RATE = 1e6  # bounds lambda and beta (nats a token), so that rate x length stays exact enough to be ordered
_TINY = {4: 1e-30, 8: 1e-200}  # by bytes of a number: far above what such a one loses of a product
_FADE_TOKENS = 20.0  # about a sentence
TOP_K, TOP_P, MIN_P = 15, 0.999, 0.01  # the paper's truncation; min-p for tilt, the others for hard rules
_KINDS = ("equal_to", "at_most", "at_least", "tilt", "scale")
_METHODS = ("posterior", "paper")
_SPACES = ("value", "length")
_WIRE_NAMES = {"lambda_": "lambda"}


@dataclass(frozen=True)
class Objective:
    """What length is wanted. Every field is checked: InvalidRequestError carries the wire name in ``param``.

    ``target`` (content tokens) belongs to equal_to, at_most and at_least; ``lambda_`` (nats a token, > 0 shortens) to
    tilt by posterior; ``beta`` (< 0 shortens) to tilt by paper; ``factor`` (of the mean length) to scale.
    ``tolerance`` is the relative softness of a target for posterior: ``u`` decays over ``max(1, tolerance * target)``
    tokens. ``space`` is where paper's equal_to compares. ``strength`` multiplies the log-weight; 0 is no guidance.
    ``min_eos_prob`` (posterior; needs logprobs) keeps an answer from ending in mid-sentence: an EOS that the generator
    finds less likely than this is not offered. Past the target of equal_to and at_most the bound falls, by a factor of
    e each tenth of the target or 20 tokens (the longer of the two), so that no answer runs on for ever. An exact model
    would hardly need it: such ends are rarer than one answer in ``1 / min_eos_prob``.
    """

    kind: Literal["equal_to", "at_most", "at_least", "tilt", "scale"]
    target: int | None = None
    lambda_: float | None = None
    beta: float | None = None
    factor: float | None = None
    tolerance: float = 0.05
    method: Literal["posterior", "paper"] = "posterior"
    strength: float = 1.0
    space: Literal["value", "length"] = "value"
    min_eos_prob: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", _KINDS), ("method", _METHODS), ("space", _SPACES)):
            if getattr(self, name) not in allowed:
                raise _invalid(name, f"must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.kind == "scale" and self.method == "paper":
            raise _invalid("method", "paper has no scale; use posterior, or tilt with beta")
        if self.space == "length" and self.method != "paper":
            raise _invalid("space", "length applies to method paper only; leave it out")
        self._check_parameters()
        object.__setattr__(self, "tolerance", _number(self.tolerance, "tolerance", low=0.0, high=_MAX_RATE))
        object.__setattr__(self, "strength", _number(self.strength, "strength", low=0.0, high=_MAX_RATE))
        object.__setattr__(self, "min_eos_prob", _number(self.min_eos_prob, "min_eos_prob", low=0.0, high=1.0))
        if self.min_eos_prob > 0.0 and self.method == "paper":
            raise _invalid("min_eos_prob", "applies to method posterior only; leave it out")

    def _check_parameters(self) -> None:
        wanted = {"tilt": "beta" if self.method == "paper" else "lambda_", "scale": "factor"}.get(self.kind, "target")
        for name in ("target", "lambda_", "beta", "factor"):
            if name != wanted and getattr(self, name) is not None:
                raise _invalid(name, f"does not apply to {self.kind} by {self.method}; give {_wire(wanted)} instead")
        value = getattr(self, wanted)
        if value is None:
            raise _invalid(wanted, f"is needed for {self.kind} by {self.method}")
        if wanted == "target":
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= MAX_TARGET:
                raise _invalid("target", f"must be a whole number of tokens from 0 to {MAX_TARGET}, not {value!r}")
            object.__setattr__(self, "target", int(value))
            return
        number = _number(value, wanted, low=0.0 if wanted == "factor" else -_MAX_RATE, high=_MAX_RATE)
        if wanted == "factor" and number == 0.0:
            raise _invalid("factor", "must be above 0; to stop at once use at_most with target 0")
        object.__setattr__(self, wanted, number)

    def to_dict(self) -> dict[str, Any]:
        """Wire form: parameters that are not set are left out."""
        values = {_wire(field.name): getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Objective:
        """From the wire form; null counts as not given. Raises InvalidRequestError, for unknown fields too."""
        if not isinstance(data, Mapping):
            raise InvalidRequestError("objective must be an object with a kind", param="objective")
        try:
            # Every row of every step of a generation asks for the same thing. With types: True equals 1, and is no
            # number of tokens.
            return _known_objective(tuple((name, type(value), value) for name, value in data.items()))
        except TypeError:  # a value that cannot be hashed: refused by its name
            return cls._read(data)

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Objective:
        names = {_wire(field.name): field.name for field in fields(cls)}
        for name in data:
            if name not in names:
                raise InvalidRequestError(f"objective.{name} is unknown; use {', '.join(names)}", param=str(name))
        if data.get("kind") is None:
            raise _invalid("kind", f"is needed: one of {', '.join(_KINDS)}")
        return cls(**{names[name]: value for name, value in data.items() if value is not None})


@lru_cache(maxsize=4096)
def _known_objective(items: tuple[tuple[str, type, Any], ...]) -> Objective:
    return Objective._read({name: value for name, _, value in items})


def check_objective(
    objective: Objective | None, *, bins: LengthBins | None, gamma: float, has_logprobs: bool = True
) -> None:
    """Raise InvalidRequestError where this model or this call cannot serve the objective; ``log_weights`` does so too.

    A caller with many rows checks them one by one first, so that one bad row does not fail its neighbours.
    """
    if objective is None:
        return
    if objective.kind == "scale":
        raise _invalid("kind", "scale must be resolved at the prompt boundary first (resolve_scale)")
    if objective.method == "paper":
        if not has_logprobs:
            raise InvalidRequestError("method paper needs the candidates' logprobs; send them", param="logprobs")
    elif objective.min_eos_prob > 0.0 and not has_logprobs:
        raise InvalidRequestError("min_eos_prob needs the candidates' logprobs; send them", param="logprobs")
    elif bins is None and not _is_own_tilt(objective, gamma):
        raise _invalid("method", "posterior needs a model with a length distribution (num_bins > 0); use paper")


def log_weights(
    objectives: Sequence[Objective | None],
    value_logits: ArrayLike,
    bin_logprobs: ArrayLike | None,
    is_eos: ArrayLike,
    generated: ArrayLike,
    logprobs: ArrayLike | None,
    *,
    bins: LengthBins | None,
    gamma: float,
) -> FloatArray:
    """Log-weights [B, K], finite and at least ``LOG_WEIGHT_FLOOR``; a row whose objective is None gets zeros.

    value_logits [B, K] and bin_logprobs [B, K, n] belong to the state after each candidate (ignored where is_eos
    [B, K]); generated [B] counts content tokens before the candidates. logprobs [B, K] (paper only) are natural logs,
    full vocabulary, at the sampler's temperature, and must include the 15 likeliest tokens.
    A row whose best log-weight leaves +-5000 nats is shifted as a whole (no sampler sees that), so that candidates keep
    their order however far an answer is past its target. Non-finite inputs count as impossible candidates.
    Raises InvalidRequestError for shapes that disagree and for what ``check_objective`` refuses.
    """
    usable = None if bin_logprobs is None else bins
    return PreparedWeights(objectives, is_eos, generated, logprobs, bins=usable, gamma=gamma)(
        value_logits, bin_logprobs
    )


class PreparedWeights:
    """``log_weights`` in two steps: what follows from the objectives alone is worked out here, perhaps while a device
    is still at work on the values; a call with these gives the log-weights.

    Arguments and errors as for ``log_weights``; ``bins`` is None where there will be no ``bin_logprobs``.
    """

    def __init__(
        self,
        objectives: Sequence[Objective | None],
        is_eos: ArrayLike,
        generated: ArrayLike,
        logprobs: ArrayLike | None,
        *,
        bins: LengthBins | None,
        gamma: float,
    ) -> None:
        self._eos = np.asarray(is_eos, dtype=np.bool_)
        self._counts = np.asarray(generated)
        self._log_p = None if logprobs is None else np.asarray(logprobs, dtype=np.float64)
        self._bins, self._gamma = bins, gamma
        _check_shapes(len(objectives), self._eos, self._counts, self._log_p)
        posterior: list[int] = []
        paper: list[int] = []
        for objective in {id(objective): objective for objective in objectives}.values():
            check_objective(objective, bins=bins, gamma=gamma, has_logprobs=self._log_p is not None)
        for row, objective in enumerate(objectives):
            if objective is not None and objective.strength > 0.0:
                (posterior if objective.method == "posterior" else paper).append(row)
        whole = slice(None)  # copies nothing
        self._groups: list[tuple[list[int] | slice, FloatArray, _Posterior | None, list[Objective]]] = []
        for rows in (posterior, paper):
            if not rows:
                continue
            chosen = [objective for row in rows if (objective := objectives[row]) is not None]
            at: list[int] | slice = whole if len(rows) == len(objectives) else rows
            log_p = None if self._log_p is None else self._log_p[at]
            rule = _Posterior(chosen, self._eos[at], self._counts[at], log_p, bins) if rows is posterior else None
            self._groups.append((at, np.array([objective.strength for objective in chosen]), rule, chosen))

    def __call__(self, value_logits: ArrayLike, bin_logprobs: ArrayLike | None) -> FloatArray:
        """value_logits [B, K] and bin_logprobs [B, K, n] -> log-weights [B, K]; see ``log_weights``."""
        logits = np.asarray(value_logits, dtype=np.float64)
        if logits.shape != self._eos.shape:
            message = f"value_logits must be {self._eos.shape}, not {logits.shape}"
            raise InvalidRequestError(message, param="candidates")
        bin_logp = None
        if self._bins is not None:
            bin_logp = np.asarray(bin_logprobs, dtype=np.float64)
            if bin_logp.shape != (shape := (*logits.shape, self._bins.size)):
                message = f"bin_logprobs must be {shape}, not {bin_logp.shape}"
                raise InvalidRequestError(message, param="bin_logprobs")
        weights = np.zeros(logits.shape)
        for at, strength, posterior, chosen in self._groups:
            if posterior is not None:
                raw = posterior(logits[at], None if bin_logp is None else bin_logp[at])
            else:
                assert self._log_p is not None
                raw = _paper(chosen, logits[at], self._eos[at], self._counts[at], self._log_p[at], self._gamma)
            weights[at] = _bounded(raw, strength)
        return weights

    @property
    def reads_bins_alone(self) -> bool:
        """Whether :meth:`of_scored` can be asked: every row has an objective by posterior, over bins."""
        return (
            self._bins is not None
            and len(self._groups) == 1
            and self._groups[0][0] == slice(None)
            and self._groups[0][2] is not None
        )

    def of_scored(
        self,
        places: NDArray[np.intp],
        bin_logprobs: NDArray[np.floating[Any]],
        means: NDArray[np.float32] | None = None,
    ) -> FloatArray:
        """The same log-weights [B, K] from the candidates that were scored alone: their places [S] among the B K, in
        order, and their bin_logprobs [S, n]. The others are EOS or no candidates. Nothing is padded for it. ``means``
        [S], float32: expected ``shared_utility`` of all rows, where a device has worked that out."""
        ((_, strength, posterior, _),) = self._groups
        assert posterior is not None
        raw = np.full(self._eos.shape, -np.inf)
        raw.reshape(-1)[places] = posterior.expected(bin_logprobs, places // self._eos.shape[1], means)
        return _bounded(posterior.with_eos(raw), strength)


def resolve_scale(objective: Objective, bin_logprobs: ArrayLike, bins: LengthBins) -> Objective:
    """The tilt that a scale stands for: bin log-probs [n] at the prompt boundary fix lambda for the whole answer.

    lambda makes the tilted mean of ``L = l - 1`` equal to ``factor`` x the mean (lengths past the cap count as
    ``cap + 1``). Raises InvalidRequestError where no answer that the model thinks possible is that short or long.
    """
    if objective.kind != "scale" or objective.factor is None:
        raise _invalid("kind", f"{objective.kind} needs no resolving; pass it to log_weights as it is")
    logp = np.asarray(bin_logprobs, dtype=np.float64)
    if logp.ndim != 1 or bool(np.isnan(logp).any()) or not float(logp.max(initial=-np.inf)) > -np.inf:
        raise InvalidRequestError("scale needs one length distribution, the prompt's: log-probs [n]", param="factor")
    per_length = log_pmf(logp, bins)
    support = np.isfinite(per_length)
    lengths = np.arange(len(per_length), dtype=np.float64)[support]  # content tokens, L = l - 1
    per_length = per_length[support]

    def tilted_mean(rate: float) -> float:
        exponents = per_length - rate * lengths
        mass = np.exp(exponents - exponents.max())
        return float(mass @ lengths / mass.sum())

    wanted = objective.factor * tilted_mean(0.0)
    rate = 0.0 if objective.factor == 1.0 or wanted == 0.0 else _solve_decreasing(tilted_mean, wanted)
    return replace(objective, kind="tilt", factor=None, lambda_=rate)


def _solve_decreasing(mean: Any, wanted: float) -> float:
    """The rate at which the decreasing function ``mean`` equals ``wanted``: doubling for a bracket, then bisection."""
    sign = 1.0 if mean(0.0) > wanted else -1.0
    near, far = 0.0, 1e-6
    while (mean(sign * far) - wanted) * sign > 0.0:
        near, far = far, 2.0 * far
        if far > 1e3:
            raise _invalid(
                "factor", f"asks for a mean of {wanted:.4g} tokens, which is out of reach here; move it to 1"
            )
    while True:
        middle = 0.5 * (near + far)
        if not near < middle < far or far - near < 1e-15 * far:
            return sign * middle
        if (mean(sign * middle) - wanted) * sign > 0.0:
            near = middle
        else:
            far = middle


class _Posterior:
    """``log sum_l P(l | c) u(g + l)`` [P, K], ``log u(g)`` where EOS, -inf where ``min_eos_prob`` takes an EOS away;
    -inf and NaN may occur. ``logprobs`` are read for ``min_eos_prob`` alone."""

    def __init__(
        self,
        objectives: Sequence[Objective],
        eos: BoolArray,
        generated: NDArray[Any],
        logprobs: FloatArray | None,
        bins: LengthBins | None,
    ) -> None:
        # Rows of one batch mostly want the same length and are as far: what they want of each bin is worked out once.
        shapes = {id(objective): utility(objective) for objective in objectives}
        counts = generated.tolist()
        if len(shapes) == 1 and counts.count(counts[0]) == len(counts):  # and broadcast
            asked = [(*utility(objectives[0]), float(counts[0]))]
        else:
            asked = [(*shapes[id(objective)], float(each)) for objective, each in zip(objectives, counts, strict=True)]
        alike = dict.fromkeys(asked)
        of_row = [0] * len(objectives)
        if len(alike) > 1:
            number = {each: at for at, each in enumerate(alike)}
            of_row = [number[each] for each in asked]
        self._of_row = np.array(of_row)
        shape = np.array(asked).reshape(-1, 4)
        pivot, left_rate, self._right_rate, self._count = (shape[:, i : i + 1] for i in range(4))
        count = self._count
        self._log_u: FloatArray | None = None
        if bins is not None:
            of_bins = _one_bin_utility if len(alike) == 1 else _bin_utilities
            self._log_u, self._peak, self._u = of_bins(tuple(alike), bins)
        past = np.where(count > pivot, self._right_rate, -left_rate) * (count - pivot)
        self._eos, self._at_eos = eos, np.broadcast_to(-past, eos.shape)
        if logprobs is not None and any(objective.min_eos_prob for objective in objectives):
            self._at_eos = np.where(_too_unlikely(objectives, eos, generated, logprobs), -np.inf, self._at_eos)

    def __call__(self, logits: FloatArray, bin_logp: FloatArray | None) -> FloatArray:
        if bin_logp is not None and self._log_u is not None:
            rows, each, bins = bin_logp.shape
            raw = self.expected(bin_logp.reshape(-1, bins), np.repeat(np.arange(rows), each)).reshape(rows, each)
        else:  # only tilts at the model's own gamma get here: E[gamma^l] = 1 + V, exactly
            tilt = -np.logaddexp(0.0, np.nan_to_num(logits)) - self._right_rate * self._count
            raw = np.where(np.isfinite(logits), tilt, -np.inf)
        return self.with_eos(raw)

    def with_eos(self, raw: FloatArray) -> FloatArray:
        """``raw`` [P, K] with what an EOS is worth where one stands."""
        return np.where(self._eos, self._at_eos, raw)

    def expected(
        self, bin_logp: NDArray[np.floating[Any]], rows: NDArray[np.intp], means: NDArray[np.float32] | None = None
    ) -> FloatArray:
        """``log sum_l P(l) u(g + l)`` [S] for bin log-probs [S, n] of candidates of these rows [S]; in float32 good to
        1e-6 or so, in less than half of the time. ``means``: see ``PreparedWeights.of_scored``."""
        assert self._log_u is not None
        # One product where all rows want the same of each bin, as those of one batch mostly do.
        of_row = self._of_row[rows] if len(self._u) > 1 else None
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            if means is None:
                u, tiny = self._u[0 if of_row is None else of_row], _TINY[bin_logp.itemsize]
                # Not by BLAS, whose sums hang on how many rows there are.
                mean = np.einsum("sn,n->s" if of_row is None else "sn,sn->s", np.exp(bin_logp), u)
            else:
                assert of_row is None
                mean, tiny = means.astype(np.float64), _TINY[means.itemsize]
            raw: FloatArray = (self._peak[0] if of_row is None else self._peak[of_row]) + np.log(mean)
            # Where next to nothing is left of the product the sum is taken in logs; that takes twice as long.
            if len(small := np.flatnonzero(~(mean > tiny))):
                terms = bin_logp[small].astype(np.float64) + self._log_u[0 if of_row is None else of_row[small]]
                peak = terms.max(axis=-1, keepdims=True)
                peak = np.where(np.isfinite(peak), peak, 0.0)
                raw[small] = peak[:, 0] + np.log(np.exp(terms - peak).sum(axis=-1))
        return raw


def _bin_utilities(asked: Sequence[tuple[float, ...]], bins: LengthBins) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What each bin is worth to each of ``asked`` (``utility`` and content tokens so far): log u [P, n], its largest
    [P], and u relative to that."""
    once = np.array(asked).reshape(-1, 4)
    at = once[:, 3:]
    log_u = _log_mean_utility(once[:, :1], once[:, 1:2], once[:, 2:3], at + bins.lo, at + bins.hi)
    peak: FloatArray = log_u.max(axis=-1)
    return log_u, peak, np.exp(log_u - peak[:, None])


# Nobody writes into what it gives.
_one_bin_utility = lru_cache(maxsize=1024)(_bin_utilities)


def expect_step(objective: Objective, generated: int, bins: LengthBins | None) -> None:
    """Work out now what a batch will take that wants this after ``generated`` content tokens: a loop's next step, while
    nobody waits."""
    if bins is not None and objective.method == "posterior" and objective.kind != "scale":
        _one_bin_utility(((*utility(objective), float(generated)),), bins)


def shared_utility(
    objectives: Sequence[Objective | None], generated: Sequence[int], bins: LengthBins | None
) -> NDArray[np.float32] | None:
    """What each bin is worth to every row alike [n], relative to the best: its mean over a candidate's distribution is
    what ``PreparedWeights.of_scored`` takes. None where rows want different things, or float32 would not do."""
    objective = objectives[0]
    alike = len(set(map(id, objectives))) == len(set(generated)) == 1
    if not alike or bins is None or objective is None or objective.method != "posterior" or objective.kind == "scale":
        return None
    if not 0.0 < objective.strength <= 1.0:
        return None
    _, _, u = _one_bin_utility(((*utility(objective), float(generated[0])),), bins)
    found: NDArray[np.float32] = u[0].astype(np.float32)
    return found


def _too_unlikely(
    objectives: Sequence[Objective], eos: BoolArray, generated: NDArray[Any], logprobs: FloatArray
) -> BoolArray:
    """Which EOS candidates ``min_eos_prob`` takes away: [P, K]; all EOS ids count together."""
    with np.errstate(divide="ignore"):
        bound = np.log(np.array([objective.min_eos_prob for objective in objectives]))
    target, fade = np.array([(float(o.target or 0), eos_fade(o)) for o in objectives]).T
    bound = bound - fade * np.maximum(generated.astype(np.float64) - target, 0.0)
    stop = np.logaddexp.reduce(np.where(eos, logprobs, -np.inf), axis=-1)
    found: BoolArray = eos & (stop < bound)[:, None]
    return found


def eos_fade(objective: Objective) -> float:
    """How fast the bound of ``min_eos_prob`` falls past the target, nats a token: a fixed pace, not that of ``u``,
    which at a small tolerance would be over before the next sentence is. Sentences are no shorter in short answers."""
    return 1.0 / max(_FADE_TOKENS, 0.1 * (objective.target or 0)) if objective.kind in ("equal_to", "at_most") else 0.0


def utility(objective: Objective) -> tuple[float, float, float]:
    """``u`` as (N, left, right): ``log u(L) = -left * (N - L)`` up to N and ``-right * (L - N)`` past it."""
    if objective.kind == "tilt":
        return 0.0, 0.0, float(objective.lambda_ or 0.0)
    target = float(objective.target or 0)
    rate = 1.0 / max(1.0, objective.tolerance * target)
    return target, rate * (objective.kind != "at_most"), rate * (objective.kind != "at_least")


def log_utility(objective: Objective, lengths: ArrayLike) -> FloatArray:
    """``log u`` of answers with so many content tokens [n]: 0 where the objective is met, less the further it is not.

    Of a tilt it is ``-lambda L``."""
    length = np.asarray(lengths, dtype=np.float64)
    pivot, left, right = utility(objective)
    return np.asarray(np.where(length > pivot, right, -left) * (pivot - length), dtype=np.float64)


def _log_mean_utility(
    pivot: FloatArray, left_rate: FloatArray, right_rate: FloatArray, first: FloatArray, last: FloatArray
) -> FloatArray:
    """``log mean u(L)`` over whole L in first..last [P, n], for rows [P, 1] of ``utility``.

    Each side of the pivot is a geometric series, summed in closed form in log space: no table over lengths, and nothing
    underflows however far the bin lies from the target.
    """
    left_top = np.minimum(last, pivot)
    left = left_rate * (left_top - pivot) + log_geometric_sum(left_rate, np.maximum(left_top - first + 1.0, 0.0))
    right_start = np.maximum(first, pivot + 1.0)
    right_count = np.maximum(last - right_start + 1.0, 0.0)
    right = right_rate * (pivot - right_start) + log_geometric_sum(right_rate, right_count)
    return np.asarray(np.logaddexp(left, right) - np.log(last - first + 1.0), dtype=np.float64)


def _paper(
    objectives: Sequence[Objective],
    logits: FloatArray,
    eos: BoolArray,
    generated: NDArray[Any],
    logprobs: FloatArray,
    gamma: float,
) -> FloatArray:
    """The paper's rules [P, K]: 0 for the one chosen candidate (tilt: ``-beta V`` for survivors), -inf for the rest."""
    usable = np.isfinite(logits) | eos
    logits = np.where(np.isfinite(logits), logits, 0.0)
    values = np.where(eos, 0.0, value_from_logit(logits))
    lengths = np.where(eos, 0.0, horizon_from_logit(logits, gamma))
    tilt = np.array([objective.kind == "tilt" for objective in objectives])[:, None]
    beta = np.array([objective.beta or 0.0 for objective in objectives])[:, None]
    target = np.array([float(objective.target or 0) for objective in objectives])[:, None]
    by_length = np.array([objective.space == "length" for objective in objectives])[:, None]
    equal_to = np.array([objective.kind == "equal_to" for objective in objectives])[:, None]
    at_least = np.array([objective.kind == "at_least" for objective in objectives])[:, None]

    count = generated.astype(np.float64)[:, None]
    remaining = np.maximum(target - count, 0.0)
    distance = np.where(by_length, np.abs(lengths - remaining), np.abs(values - discounted_return(remaining, gamma)))
    longest_first = at_least & (count < target)
    cost = np.where(equal_to, distance, np.where(longest_first, values, -values))

    logprobs = np.where(np.isfinite(logprobs), logprobs, -np.inf)
    survives = np.where(tilt, _survives_min_p(logprobs), _survives_top_k_top_p(logprobs)) & usable
    cost = np.where(survives, cost, np.inf)
    best = cost <= cost.min(axis=-1, keepdims=True) + 1e-12  # float noise must not decide between equals
    chosen = np.argmax(np.where(best & survives, logprobs, -np.inf), axis=-1)
    is_chosen = survives & (np.arange(cost.shape[1]) == chosen[:, None])
    return np.where(np.where(tilt, survives, is_chosen), np.where(tilt, -beta * values, 0.0), -np.inf)


def _survives_top_k_top_p(logprobs: FloatArray) -> BoolArray:
    """Top-k, then top-p of what top-k left (renormalised, as samplers chain them): [P, K] -> [P, K]."""
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :TOP_K]
    top = np.take_along_axis(logprobs, order, axis=-1)
    mass = np.exp(top - np.where(np.isfinite(top[:, :1]), top[:, :1], 0.0))
    before = np.cumsum(mass, axis=-1) - mass
    survives = np.zeros(logprobs.shape, dtype=np.bool_)
    kept = (before < TOP_P * mass.sum(axis=-1, keepdims=True)) & (mass > 0.0)
    np.put_along_axis(survives, order, kept, axis=-1)
    return survives


def _survives_min_p(logprobs: FloatArray) -> BoolArray:
    """At least ``min-p`` times as likely as the likeliest: [P, K] -> [P, K]."""
    survives: BoolArray = logprobs >= logprobs.max(axis=-1, keepdims=True) + math.log(MIN_P)
    return survives & np.isfinite(logprobs)


def _bounded(raw: FloatArray, strength: FloatArray) -> FloatArray:
    """``strength`` [P] times raw [P, K], finite: non-finite entries and hopeless candidates stand at the floor."""
    raw = np.where(np.isfinite(raw), raw, -np.inf)
    best = raw.max(axis=-1, keepdims=True)
    best = np.where(np.isfinite(best), best, 0.0)
    top = strength[:, None] * best
    top = np.where(np.abs(top) > -0.5 * LOG_WEIGHT_FLOOR, 0.0, top)
    return np.maximum(strength[:, None] * (raw - best) + top, LOG_WEIGHT_FLOOR)


def _is_own_tilt(objective: Objective, gamma: float) -> bool:
    """Whether the value itself is the tilting weight: tilt at ``lambda = -ln gamma``."""
    own_rate = -math.log(check_gamma(gamma))
    return objective.kind == "tilt" and objective.lambda_ is not None and abs(objective.lambda_ - own_rate) <= 1e-9


def _check_shapes(rows: int, eos: BoolArray, generated: NDArray[Any], logprobs: FloatArray | None) -> None:
    if eos.ndim != 2 or eos.shape[0] != rows or eos.shape[1] == 0:
        raise InvalidRequestError(f"is_eos must be [{rows}, K] with K > 0, not {eos.shape}", param="candidates")
    if logprobs is not None and logprobs.shape != eos.shape:
        raise InvalidRequestError(f"logprobs must be {eos.shape}, not {logprobs.shape}", param="logprobs")
    if generated.shape != (rows,) or generated.dtype.kind not in "iu" or bool((generated < 0).any()):
        raise InvalidRequestError(f"generated must be {rows} whole numbers, zero or more", param="generated")


def _number(value: Any, name: str, *, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise _invalid(name, f"must be a number, not {value!r}")
    if not low <= value <= high:  # NaN fails every comparison
        raise _invalid(name, f"must be a finite number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def _wire(name: str) -> str:
    return _WIRE_NAMES.get(name, name)


def _invalid(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"objective.{_wire(name)} {problem}", param=_wire(name))
