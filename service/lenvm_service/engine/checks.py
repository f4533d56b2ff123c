"""What a row of candidates must be."""

from __future__ import annotations

import math

from lenvm.errors import InvalidRequestError
from lenvm.guidance import check_objective
from lenvm.scoring import Scorer
from lenvm_service.engine.jobs import CandidateJob

__all__ = ["check_candidates"]


def check_candidates(job: CandidateJob, scorer: Scorer) -> None:
    """Raise InvalidRequestError for candidates, log-probabilities or an objective that this model cannot answer."""
    candidates = job.candidates
    if not len(candidates):
        raise InvalidRequestError("candidates is empty: give at least one token id", param="candidates")
    if min(candidates) < 0 or max(candidates) >= scorer.vocab_size:
        raise InvalidRequestError(f"candidates must be in [0, {scorer.vocab_size})", param="candidates")
    if len(set(candidates)) != len(candidates):
        raise InvalidRequestError("candidates holds a token twice: give each once", param="candidates")
    if job.logprobs is not None:
        if len(job.logprobs) != len(job.candidates):
            raise InvalidRequestError(
                f"logprobs must have one entry for each of the {len(job.candidates)} candidates, "
                f"not {len(job.logprobs)}",
                param="logprobs",
            )
        if not all(map(math.isfinite, job.logprobs)):
            raise InvalidRequestError("logprobs must be finite: leave impossible candidates out", param="logprobs")
    objective = job.objective
    if objective is None:
        return
    if objective.kind == "scale":
        if scorer.bins is None:
            raise InvalidRequestError(
                "objective.kind scale needs a model with a length distribution (num_bins > 0)",
                param="objective.kind",
            )
        if job.generated:
            raise InvalidRequestError(
                "objective.kind scale is resolved at the prompt boundary: send the tilt that the first step gave",
                param="objective.kind",
            )
        return
    try:
        check_objective(objective, bins=scorer.bins, gamma=scorer.gamma, has_logprobs=job.logprobs is not None)
    except InvalidRequestError as error:
        param = error.param if error.param in (None, "logprobs") else f"objective.{error.param}"
        raise InvalidRequestError(str(error), param=param) from None
