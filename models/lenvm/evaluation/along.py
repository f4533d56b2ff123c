"""Error along the answer: at a fraction of a finished answer, how far is the predicted rest from the true one?

At fraction ``f`` of an answer with ``L`` content tokens the state is ``s_t`` with ``t = floor(f L)`` and the true rest
is ``L - t`` content tokens; predictions have the EOS taken off. Two denominators, both reported:

- ``error``: ``|predicted - (L - t)| / L``, relative to the whole answer. It is also the relative error of the predicted
  total ``t + predicted``, and at f = 0 the same as the other.
- ``error_remaining``: ``|predicted - (L - t)| / (L - t)``, relative to what is left, as Eq. 14 does. It grows towards
  the end, where a few tokens are a large part of the rest.

The truth is a single answer and not a mean over samples, so both start far above the MRE at ``s_0``. Cut answers have
no known rest and are left out. A place at a fraction of the length is no state that a caller could ask about (they do
not know the length), so nothing here says whether quantiles hold in mid-answer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lenvm.distribution import restricted_mean
from lenvm.errors import InvalidRequestError
from lenvm.evaluation.states import PromptAnswers, StateRow, score_states
from lenvm.evaluation.stats import paired_bootstrap
from lenvm.returns import horizon_from_logit
from lenvm.scoring import Scorer

__all__ = ["FRACTIONS", "along_metrics", "errors_along", "places"]

FloatArray: TypeAlias = NDArray[np.float64]

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.9)


def errors_along(
    scorer: Scorer,
    prompts: Sequence[PromptAnswers],
    *,
    answers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Domain -> fraction -> figures (``along_metrics``), over the first ``answers`` finished answers of each prompt.

    One pass over each answer. Raises InvalidRequestError where no answer has ended.
    """
    rows: list[StateRow] = []
    lengths: list[int] = []
    domains: list[str] = []
    names: list[str] = []
    for prompt in prompts:
        ended = [index for index in range(len(prompt.lengths)) if prompt.finished[index] and prompt.lengths[index] > 0]
        for index in ended[:answers]:
            length = int(prompt.lengths[index])
            rows.append(StateRow(prompt.prompt_ids, prompt.tokens(index), places(length)))
            lengths.append(length)
            domains.append(prompt.domain)
            names.append(prompt.prompt_id)
    if not rows:
        raise InvalidRequestError("no sampled answer has ended: there is no length to compare with")
    scores = score_states(scorer, rows, progress=progress)
    horizons = np.stack([np.asarray(horizon_from_logit(score.logits, scorer.gamma)) for score in scores]) - 1.0
    means = None
    if scorer.bins is not None:
        means = np.stack([restricted_mean(s.bin_logprobs, scorer.bins) for s in scores if s.bin_logprobs is not None])
        means = np.maximum(means - 1.0, 0.0)
    where, whole = np.asarray(domains), np.asarray(lengths)
    return {
        domain: along_metrics(
            np.maximum(horizons, 0.0)[where == domain],
            None if means is None else means[where == domain],
            whole[where == domain],
            [name for name, own in zip(names, domains, strict=True) if own == domain],
        )
        for domain in dict.fromkeys(domains)
    }


def places(length: int) -> list[int]:
    """Content tokens generated at each of ``FRACTIONS``: ``floor(f L)``, below L for an answer of 1 token or more."""
    return [int(fraction * length) for fraction in FRACTIONS]


def along_metrics(
    horizons: FloatArray, means: FloatArray | None, lengths: NDArray[np.int64], prompts: Sequence[Hashable]
) -> dict[str, dict[str, Any]]:
    """Figures at each fraction; predicted rests in content tokens [answers, fractions], lengths L [answers].

    ``prompts`` [answers] names whose answer each is: the interval resamples prompts, since answers to one are alike.

    ``error``, ``error_ci``, ``error_median`` and ``error_remaining`` are of the horizon, ``error_mean`` of the bins'
    mean (NaN without bins); ``error_static`` keeps the horizon of ``s_0`` and counts down from it: what a prediction at
    the prompt alone would be worth by then.
    """
    whole = lengths.astype(np.float64)
    report: dict[str, dict[str, Any]] = {}
    for at, fraction in enumerate(FRACTIONS):
        done = np.asarray([places(int(length))[at] for length in lengths], dtype=np.float64)
        rest = whole - done
        errors = np.abs(horizons[:, at] - rest) / whole
        static = np.abs(np.maximum(horizons[:, 0] - done, 0.0) - rest) / whole
        report[f"{fraction:g}"] = {
            "answers": len(errors),
            "error": float(errors.mean()),
            "error_ci": list(paired_bootstrap(errors, np.zeros_like(errors), prompts)[1:]),
            "error_median": float(np.median(errors)),
            "error_remaining": float((np.abs(horizons[:, at] - rest) / rest).mean()),
            "error_mean": float("nan") if means is None else float((np.abs(means[:, at] - rest) / whole).mean()),
            "error_static": float(static.mean()),
        }
    return report
