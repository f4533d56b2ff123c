"""Quantiles against the lengths that came: coverage, pinball loss, and what can be said where answers were cut.

Everything is in remaining tokens ``l`` at ``s_0`` (EOS included); an answer that was cut at the cap has ``l > cap``.

A quantile beyond the cap is *saturated*: it is reported as the cap, and no sample can check it, since all that is known
of a cut answer is that it lies above. Three figures say so together:

- ``coverage_pXX``: the probability integral transform, randomised inside the atom above the cap. A cut answer counts as
  covered by a saturated quantile at level q with probability ``(q - F) / (1 - F)``, where ``F = P(l <= cap)`` is the
  model's own: that much of its mass above the cap lies below the level. A calibrated model gets exactly q, since
  ``P(l <= cap) = F`` are covered anyway and ``(q - F) / (1 - F)`` of the rest. A model that puts too little mass above
  the cap is caught, as its F is too high.
- ``coverage_pXX_resolved``: over the prompts with an unsaturated quantile alone, which is a choice by the prediction
  and hence fair; ``saturated_pXX``: the share of prompts left out of it, on which the model abstains.
- ``coverage_pXX_strict``: a cut answer is never covered. It falls short of q wherever more than 1 - q of the answers
  are cut, whatever the model says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["GRID", "LEVELS", "Prediction", "pinball_loss", "quantile_metrics"]

FloatArray: TypeAlias = NDArray[np.float64]

LEVELS = (0.5, 0.9, 0.95)
GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))  # of the reliability diagram; LEVELS are among them


@dataclass(frozen=True)
class Prediction:
    """What the model says at ``s_0``, all in remaining tokens ``l`` with EOS; ``mean`` and quantiles need bins.

    ``beyond``: P(l > cap), of the same distribution as the quantiles.
    """

    horizon: float
    mean: float | None = None
    quantiles: Mapping[float, float] = field(default_factory=dict)
    beyond: float | None = None


def pinball_loss(quantile: ArrayLike, lengths: ArrayLike, level: float) -> FloatArray:
    """``max(q (y - z), (q - 1)(y - z))`` elementwise for the quantile ``z`` at level q and the outcome ``y``."""
    gap = np.asarray(lengths, dtype=np.float64) - np.asarray(quantile, dtype=np.float64)
    return np.maximum(level * gap, (level - 1.0) * gap)


def quantile_metrics(
    predictions: Sequence[Prediction], remaining: Sequence[FloatArray], train: FloatArray, cap: int
) -> dict[str, Any]:
    """Coverage (see the module), saturation and pinball loss over the individual samples of every prompt.

    ``remaining``: l of each prompt's samples, anything above ``cap`` for a cut one; ``train``: l of train samples, to
    fit the constant quantiles of ``pinball_constant`` on. NaN where there are no quantiles. ``pinball`` counts a length
    or quantile above the cap as the cap. ``pinball_own``: of the quantiles of one half of a prompt's own samples,
    judged on the other half, and the other way round: what so many samples of the very prompt would tell.
    ``reliability``: coverage at each level of ``GRID`` that was predicted.
    """
    counts = np.asarray([len(lengths) for lengths in remaining])
    pooled = np.concatenate(list(remaining))
    beyond = np.repeat(np.asarray([np.nan if p.beyond is None else p.beyond for p in predictions]), counts)
    outcome = np.minimum(pooled, cap)
    report: dict[str, Any] = {}
    losses, constant_losses = [], []
    for level in LEVELS:
        name = f"p{round(100 * level)}"
        values = _values(predictions, level)
        known = bool(np.isfinite(values).all())
        quantile = np.repeat(values, counts)
        resolved = quantile < cap
        strict = pooled <= quantile
        report[f"coverage_{name}"] = float(_covered(pooled, quantile, beyond, level, cap).mean())
        report[f"coverage_{name}_resolved"] = float(strict[resolved].mean()) if resolved.any() else float("nan")
        report[f"coverage_{name}_strict"] = float(strict.mean()) if known else float("nan")
        report[f"saturated_{name}"] = float((values >= cap).mean()) if known else float("nan")
        constant = min(float(np.quantile(train, level, method="inverted_cdf")), float(cap))
        losses.append(float(pinball_loss(np.minimum(quantile, cap), outcome, level).mean()))
        constant_losses.append(float(pinball_loss(constant, outcome, level).mean()))
    report["pinball"] = float(np.mean(losses))
    report["pinball_constant"] = float(np.mean(constant_losses))
    report["pinball_own"] = _own_pinball([np.minimum(lengths, cap) for lengths in remaining])
    report["reliability"] = {
        f"{level:g}": float(_covered(pooled, np.repeat(values, counts), beyond, level, cap).mean())
        for level in GRID
        if np.isfinite(values := _values(predictions, level)).all()
    }
    return report


def _own_pinball(remaining: Sequence[FloatArray]) -> float:
    """NaN where a prompt's samples cannot be halved."""
    if min(map(len, remaining), default=0) < 2:
        return float("nan")
    losses = [
        pinball_loss(np.quantile(known, level, method="inverted_cdf"), judged, level)
        for lengths in remaining
        for known, judged in ((lengths[::2], lengths[1::2]), (lengths[1::2], lengths[::2]))
        for level in LEVELS
    ]
    return float(np.concatenate(losses).mean())


def _values(predictions: Sequence[Prediction], level: float) -> FloatArray:
    return np.asarray([item.quantiles.get(level, np.nan) for item in predictions], dtype=np.float64)


def _covered(pooled: FloatArray, quantile: FloatArray, beyond: FloatArray, level: float, cap: int) -> FloatArray:
    """Probability that each sample is covered; NaN where quantile or mass above the cap is unknown."""
    atom = np.clip((level - (1.0 - beyond)) / np.maximum(beyond, 1e-12), 0.0, 1.0)
    # An answer that ended is at most the cap, hence below any saturated quantile; the atom alone is shared out.
    covered = np.where(pooled > cap, np.where(quantile >= cap, atom, 0.0), (pooled <= quantile).astype(np.float64))
    return np.where(np.isfinite(quantile) & np.isfinite(beyond), covered, np.nan)
