"""Rows of the wire contract from what a scorer returns: the one home for the service, the command line and the demo.

NumPy is imported inside the functions: the command line must start without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lenvm.calibration import Calibration
    from lenvm.decoding import Generation
    from lenvm.distribution import LengthBins
    from lenvm.guidance import Objective

__all__ = ["generation_fields", "length_score_of", "level_name", "prediction_fields", "token_score_fields"]


def level_name(level: float) -> str:
    """The key of a quantile: ``0.5`` -> "0.5"."""
    return f"{level:.12g}"


def prediction_fields(
    logits: Any,
    bin_logprobs: Any,
    *,
    bins: LengthBins | None,
    gamma: float,
    quantiles: Sequence[float],
    max_tokens: Sequence[int | None],
    calibration: Calibration | None = None,
    distribution: bool = False,
) -> list[dict[str, Any]]:
    """One prediction for each of R prefixes: logits [R] and bin log-probs [R, n] (None without a distribution).

    ``max_tokens`` [R]: tokens that may still come, for ``p_exceeds_max_tokens = P(l > max_tokens)``; None: not asked.
    Lengths are remaining tokens l, EOS included. The distribution's fields are None without bins. With ``calibration``
    the quantiles, ``saturated`` and ``p_exceeds_max_tokens`` are of the calibrated distribution; the mean is always the
    network's, which is also what guidance goes by. With ``distribution`` each row has the bins of what its quantiles
    are of, ``{"lo": [n], "hi": [n], "probability": [n]}`` (None without bins); the last one is all of ``l > cap``.
    """
    import numpy as np

    from lenvm.distribution import quantile, restricted_mean, survival
    from lenvm.returns import horizon_from_logit, value_from_logit

    array = np.asarray(logits, dtype=np.float64)
    values, horizons = value_from_logit(array), horizon_from_logit(array, gamma)
    rows: list[dict[str, Any]] = [
        {
            "value": value,
            "horizon": horizon,
            "mean": None,
            "quantiles": None,
            "p_exceeds_max_tokens": None,
            "rank_key": horizon,
            "saturated": None,
        }
        for value, horizon in zip(values.tolist(), horizons.tolist(), strict=True)
    ]
    if distribution:
        for row in rows:
            row["distribution"] = None
    if bins is None or bin_logprobs is None:
        return rows
    means = restricted_mean(bin_logprobs, bins)
    spread = bin_logprobs if calibration is None else calibration.apply(array, bin_logprobs, bins, gamma)
    lengths, saturated = quantile(spread, bins, quantiles)
    limits = np.array([0 if limit is None else limit for limit in max_tokens])
    exceeds = survival(spread, bins, limits)
    names = [level_name(level) for level in quantiles]
    # Python's numbers of all rows at once: one by one they would cost a batch more than the arithmetic.
    beyond_cap = np.asarray(saturated.any(axis=-1)).tolist()
    numbers = zip(means.tolist(), lengths.tolist(), beyond_cap, exceeds.tolist(), strict=True)
    for row, limit, (mean, levels, beyond, over) in zip(rows, max_tokens, numbers, strict=True):
        # The mean orders work better than the horizon, which discounts long answers.
        row["mean"] = row["rank_key"] = mean
        row["quantiles"] = dict(zip(names, levels, strict=True))
        row["saturated"] = beyond
        row["p_exceeds_max_tokens"] = None if limit is None else over
    if distribution:
        shares = np.exp(np.asarray(spread, dtype=np.float64)).tolist()
        for row, share in zip(rows, shares, strict=True):
            row["distribution"] = {"lo": bins.lo.tolist(), "hi": bins.hi.tolist(), "probability": share}
    return rows


def token_score_fields(
    logits: NDArray[Any], completion_ids: Sequence[int], tokenizer: Any, *, gamma: float, eos_id: int | None
) -> dict[str, Any]:
    """Values and horizons of s_0..s_T and the T length shifts, from the logits of a completion's states.

    ``completion_ids``: content tokens. With ``eos_id`` the answer ends there: one token more, and ``V_T = 0``.
    """
    from lenvm.returns import horizon_from_logit, length_shift, value_from_logit

    values = [float(value) for value in value_from_logit(logits)]
    horizons = [float(length) for length in horizon_from_logit(logits, gamma)]
    ids = [int(token) for token in completion_ids]
    if eos_id is not None:
        ids.append(eos_id)
        values.append(0.0)
        horizons.append(0.0)
    return {
        "token_ids": ids,
        "tokens": [tokenizer.decode([token]) for token in ids],
        "values": values,
        "horizons": horizons,
        "length_shifts": [float(shift) for shift in length_shift(values, gamma)],
    }


def length_score_of(objective: Objective | None, length: int) -> float | None:
    """LIFEBench's length score, 0 to 100; None for an objective without a target above 0."""
    from lenvm.evaluation.lifebench import length_score

    if objective is None or not objective.target:
        return None
    if objective.kind == "equal_to" or objective.kind == "at_most" or objective.kind == "at_least":
        return length_score(length, objective.target, objective.kind)
    return None


def generation_fields(generation: Generation, objective: Objective | None, tokenizer: Any) -> dict[str, Any]:
    """One answer as JSON: text, content tokens, and what guidance did."""
    return {
        "text": tokenizer.decode(generation.token_ids),
        "token_ids": generation.token_ids,
        "content_tokens": len(generation.token_ids),
        "length_score": length_score_of(objective, len(generation.token_ids)),
        "text_cost": generation.text_cost,
        "forced_stop": generation.forced_stop,
        "finished": generation.finished,
        "logprob": generation.logprob,
        "seed": generation.seed,
    }
