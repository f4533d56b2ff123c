"""Length prediction at the prompt boundary, measured as the paper does (arXiv 2604.27039, Eq. 13-15): metrics only.

Truth of a prompt = mean over its samples of ``min(L, cap)`` content tokens, a cut sample counting as ``cap``.
A prediction is made at ``s_0``, where the remaining length is ``l = L + 1`` (EOS included): one token is taken off.
``coverage`` holds what is measured of the quantiles, ``along`` the error in mid-answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.coverage import Prediction, quantile_metrics
from lenvm.evaluation.stats import bootstrap_ci, kendall_tau, paired_bootstrap

__all__ = [
    "DomainData",
    "Prediction",
    "PromptSamples",
    "evaluate",
    "evaluate_domain",
    "fit_constant",
    "fit_prompt_length",
    "noise_floor",
    "oracle_horizon_errors",
    "pooled",
    "relative_errors",
]

FloatArray: TypeAlias = NDArray[np.float64]

CAP = 2048
GAMMA = 0.997


@dataclass(frozen=True)
class PromptSamples:
    """The sampled answers of one prompt: content tokens, and whether each ended by itself."""

    lengths: Sequence[int]
    finished: Sequence[bool]
    prompt_tokens: int

    def capped(self, cap: int) -> FloatArray:
        """``min(L, cap)`` [samples]; a cut sample is ``cap`` whatever it had reached."""
        lengths = np.asarray(self.lengths, dtype=np.float64)
        finished = np.asarray(self.finished, dtype=bool)
        if lengths.ndim != 1 or not len(lengths) or lengths.shape != finished.shape or lengths.min() < 0:
            raise InvalidRequestError("a prompt needs samples, each with a length of 0 or more and finished or not")
        return np.where(finished, np.minimum(lengths, cap), float(cap))


@dataclass(frozen=True)
class DomainData:
    """One domain: predictions and their samples prompt by prompt, train samples to fit the baselines on.

    ``baselines`` holds further predictors (linear probe, prompt encoder) as content tokens [prompts]; None is one that
    was not given and is reported as NaN. ``uncalibrated``: the network's own quantiles, where ``predictions`` holds
    calibrated ones.
    """

    predictions: Sequence[Prediction]
    samples: Sequence[PromptSamples]
    train: Sequence[PromptSamples]
    baselines: Mapping[str, ArrayLike | None] = field(default_factory=dict)
    uncalibrated: Sequence[Prediction] = ()


def evaluate(
    domains: Mapping[str, DomainData], *, cap: int = CAP, gamma: float = GAMMA, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The ``metrics`` of ``reports/prediction.json``: ``evaluate_domain`` for each domain."""
    return {name: evaluate_domain(data, cap=cap, gamma=gamma, seed=seed) for name, data in domains.items()}


def evaluate_domain(data: DomainData, *, cap: int = CAP, gamma: float = GAMMA, seed: int = 0) -> dict[str, Any]:
    """Every figure of one domain, errors as fractions and lengths in tokens; NaN where a figure does not exist.

    ``baselines.NAME`` is that predictor's MRE and ``baseline_gain.NAME`` is ``[baseline MRE - mre, low, high]``, paired
    by prompt; ``gain_over.NAME`` is the share of the baseline's MRE that is gone, ``1 - mre / baseline MRE``.
    ``constant_on_test`` is fitted on the test truths themselves: no constant can do better.
    ``mre_mean``: of the mean read from the bins. ``oracle_horizon``: the MRE of the horizon of an exact value, measured
    on half of the samples against the other half; ``oracle_horizon_same``: on the same samples, which leaves the gap
    between horizon and mean alone (``oracle_horizon_errors``).
    Raises InvalidRequestError for predictions that are not one a prompt, or not finite.
    """
    if not data.predictions or len(data.predictions) != len(data.samples) or not data.train:
        raise InvalidRequestError("each prompt needs one prediction and its samples, and the baselines need train data")
    per_prompt = [item.capped(cap) for item in data.samples]
    truth = np.asarray([lengths.mean() for lengths in per_prompt])
    predicted = _content([item.horizon for item in data.predictions])
    errors = relative_errors(predicted, truth)
    report: dict[str, Any] = {
        "prompts": len(truth),
        "samples": sum(len(lengths) for lengths in per_prompt),
        "cap": cap,
        "cut_share": float(np.mean([not done for item in data.samples for done in item.finished])),
        "truth_mean": float(truth.mean()),
        "truth_median": float(np.median(truth)),
        "mre": float(errors.mean()),
        "mre_ci": list(bootstrap_ci(errors, seed=seed)),
        "median_error": float(np.median(errors)),
        "noise_floor": noise_floor(per_prompt, seed=seed),
        "kendall_tau": kendall_tau(predicted, truth),
    }
    means = [item.mean for item in data.predictions]
    mean_errors = relative_errors(_content([m for m in means if m is not None]), truth) if None not in means else None
    report["mre_mean"] = float("nan") if mean_errors is None else float(mean_errors.mean())
    report["mre_mean_ci"] = None if mean_errors is None else list(bootstrap_ci(mean_errors, seed=seed))
    crossed, same = oracle_horizon_errors(per_prompt, gamma, seed=seed)
    report["oracle_horizon"] = float(crossed.mean()) if len(crossed) else float("nan")
    report["oracle_horizon_ci"] = list(bootstrap_ci(crossed, seed=seed)) if len(crossed) else None
    report["oracle_horizon_same"] = float(same.mean())
    train_remaining = np.concatenate([item.capped(cap) + 1.0 for item in data.train])
    remaining = [lengths + 1.0 for lengths in per_prompt]
    report |= quantile_metrics(data.predictions, remaining, train_remaining, cap)
    if data.uncalibrated:
        report["uncalibrated"] = quantile_metrics(data.uncalibrated, remaining, train_remaining, cap)
    report |= _baselines(data, truth, errors, cap, seed)
    return report


def pooled(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All domains in one row, each of the same weight: ``prompts`` in all, means of ``mre`` and ``baselines``, and the
    ``gain_over`` each of these means. NaN where a domain lacks the baseline."""
    rows = list(metrics.values())
    mre = float(np.mean([row["mre"] for row in rows]))
    baselines = {name: float(np.mean([row["baselines"][name] for row in rows])) for name in rows[0]["baselines"]}
    return {
        "prompts": sum(row["prompts"] for row in rows),
        "mre": mre,
        "baselines": baselines,
        "gain_over": _gain_over(mre, baselines),
    }


def _gain_over(mre: float, baselines: Mapping[str, float]) -> dict[str, float]:
    return {name: 1.0 - mre / other if other else float("nan") for name, other in baselines.items()}


def relative_errors(predicted: ArrayLike, truth: ArrayLike) -> FloatArray:
    """``|predicted - truth| / truth`` [prompts] (Eq. 14); a truth under one token counts as one."""
    expected = np.asarray(truth, dtype=np.float64)
    guess = np.asarray(predicted, dtype=np.float64)
    if guess.shape != expected.shape or not np.isfinite(guess).all():
        raise InvalidRequestError(f"predictions must be {len(expected)} finite numbers, one a prompt")
    return np.abs(guess - expected) / np.maximum(expected, 1.0)


def noise_floor(per_prompt: Sequence[ArrayLike], *, splits: int = 20, seed: int = 0) -> float:
    """Half the split-half difference: mean over prompts and random splits of ``|mean A - mean B| / truth / 2``.

    Halved because the difference of two half means varies twice as much as the mean of all K samples, which is what
    the truth is. ``per_prompt`` holds capped lengths; prompts with one sample are left out (NaN if all are).
    """
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for lengths in per_prompt:
        values = np.asarray(lengths, dtype=np.float64)
        half = len(values) // 2
        if not half:
            continue
        drawn = rng.permuted(np.tile(values, (splits, 1)), axis=1)
        gap = np.abs(drawn[:, :half].mean(axis=1) - drawn[:, half : 2 * half].mean(axis=1))
        found.append(float(gap.mean()) / max(float(values.mean()), 1.0) / 2.0)
    return float(np.mean(found)) if found else float("nan")


def oracle_horizon_errors(
    per_prompt: Sequence[ArrayLike], gamma: float, *, splits: int = 20, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """Relative errors of the horizon of an exact value, prompt by prompt: (cross-fitted, on the same samples).

    The horizon ``ln E[gamma^l] / ln gamma`` is at most ``E[l]`` (Jensen, paper App. F), so no value, however good,
    gives a horizon that equals the mean of lengths that vary. Cross-fitted: value from a random half of a prompt's
    samples, truth from the other half (mean over ``splits`` both ways; prompts with one sample are left out); it has
    the noise of two halves in it. On the same samples there is none, so that is the gap itself; the MRE that an exact
    value would be given lies between the two but for chance. Neither bounds a biased value from below: one that lies
    too high may come nearer to the mean. ``per_prompt``: capped lengths.
    """
    rng = np.random.default_rng(seed)
    crossed: list[float] = []
    same: list[float] = []
    for lengths in per_prompt:
        values = np.asarray(lengths, dtype=np.float64)
        same.append(float(relative_errors([_horizon(values, gamma)], [values.mean()])[0]))
        half = len(values) // 2
        if half:
            drawn = rng.permuted(np.tile(values, (splits, 1)), axis=1)
            a, b = drawn[:, :half], drawn[:, half : 2 * half]
            errors = [relative_errors(_horizon(x, gamma), y.mean(axis=1)) for x, y in ((a, b), (b, a))]
            crossed.append(float(np.mean(errors)))
    return np.asarray(crossed, dtype=np.float64), np.asarray(same, dtype=np.float64)


def _horizon(lengths: FloatArray, gamma: float) -> FloatArray:
    """Content tokens [...] of the horizon of the mean discount over samples of content lengths [..., samples]."""
    return np.asarray(np.log(np.mean(gamma ** (lengths + 1.0), axis=-1)) / np.log(gamma) - 1.0, dtype=np.float64)


def fit_constant(truth: ArrayLike, shape: ArrayLike = 1.0) -> float:
    """The ``c`` that minimises ``mean |c * shape - truth| / truth``: the median ratio, each weighted by its inverse."""
    expected = np.maximum(np.asarray(truth, dtype=np.float64), 1.0)
    scale = np.broadcast_to(np.asarray(shape, dtype=np.float64), expected.shape)
    ratio, weight = expected / scale, scale / expected
    order = np.argsort(ratio, kind="stable")
    reached = np.cumsum(weight[order])
    return float(ratio[order][np.searchsorted(reached, reached[-1] / 2.0)])


def fit_prompt_length(prompt_tokens: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """``(slope, factor)`` of ``factor * prompt_tokens ** slope``.

    The slope is the least squares one in logs, the factor then the best for the MRE (least squares aims at the log).
    """
    x = _log(prompt_tokens)
    y = _log(truth)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread > 0.0 else 0.0
    return slope, fit_constant(truth, np.exp(slope * x))


def _content(remaining: Sequence[float]) -> FloatArray:
    """Remaining tokens at ``s_0`` (EOS included) as content tokens."""
    return np.maximum(np.asarray(remaining, dtype=np.float64) - 1.0, 0.0)


def _log(tokens: ArrayLike) -> FloatArray:
    return np.asarray(np.log(np.maximum(np.asarray(tokens, dtype=np.float64), 1.0)), dtype=np.float64)


def _baselines(data: DomainData, truth: FloatArray, errors: FloatArray, cap: int, seed: int) -> dict[str, Any]:
    train = np.asarray([item.capped(cap).mean() for item in data.train])
    constant = fit_constant(train)
    slope, factor = fit_prompt_length([item.prompt_tokens for item in data.train], train)
    own_length = np.exp(slope * _log([item.prompt_tokens for item in data.samples]))
    predictors: dict[str, ArrayLike | None] = {
        "constant": np.full_like(truth, constant),
        "constant_mean": np.full_like(truth, train.mean()),
        "constant_on_test": np.full_like(truth, fit_constant(truth)),
        "prompt_length": factor * own_length,
        **data.baselines,
    }
    scores: dict[str, float] = {}
    gains: dict[str, list[float] | None] = {}
    for name, predicted in predictors.items():
        if predicted is None:
            scores[name], gains[name] = float("nan"), None
            continue
        theirs = relative_errors(predicted, truth)
        scores[name] = float(theirs.mean())
        gains[name] = list(paired_bootstrap(theirs, errors, seed=seed))
    fitted = {
        "train_prompts": len(train),
        "constant_tokens": constant,
        "train_mean_tokens": float(train.mean()),
        "prompt_length_slope": slope,
        "prompt_length_factor": factor,
    }
    relative = _gain_over(float(errors.mean()), scores)
    return {"baselines": scores, "baseline_gain": gains, "gain_over": relative, "baseline_fit": fitted}
