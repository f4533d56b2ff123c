"""Rows of candidates as answers: all rows of a call side by side, padded, so that NumPy does the work once for all.

What follows from the jobs alone is done while the device is still at work (``CandidateRows``); the rest takes the
scores (``answers``). On a GPU a decoding step of 32 rows is 1.5 ms: what Python does for each row after it counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lenvm.distribution import LengthBins
from lenvm.errors import InvalidRequestError, LenVMError
from lenvm.guidance import PreparedWeights, resolve_scale
from lenvm.returns import horizon_from_logit, value_from_logit
from lenvm.scoring import RowScore
from lenvm_service.engine.jobs import CandidateJob, Result

__all__ = ["CandidateRow", "CandidateRows"]


@dataclass(slots=True)
class CandidateRow:
    """A job with what the engine has found out about it. ``terminal``: which candidates end the answer, and so have no
    value of their own to be scored."""

    job: CandidateJob
    terminal: list[bool]
    prefix_tokens: int
    handle: str


class CandidateRows:
    """The rows of a call.

    Args:
        bins, gamma: of the model.
    """

    def __init__(self, rows: Sequence[CandidateRow], *, bins: LengthBins | None, gamma: float) -> None:
        self.rows, self.bins, self.gamma = rows, bins, gamma
        self.sizes = [len(row.terminal) for row in rows]
        width = max(self.sizes)
        self.terminal = np.array([row.terminal + [True] * (width - len(row.terminal)) for row in rows])
        scored = ~self.terminal
        self.scored = np.flatnonzero(scored)  # places of the scores, row by row
        self.missing = np.flatnonzero(self.terminal)
        is_eos = self.terminal.copy()
        for at, size in enumerate(self.sizes):
            is_eos[at, size:] = False  # padding: NaN, which guidance reads as candidates that cannot be
        self.is_eos = is_eos
        self.logprobs = np.full(self.terminal.shape, -np.inf)
        for at, row in enumerate(rows):
            if (given := row.job.logprobs) is not None:
                self.logprobs[at, : len(given)] = given
        self.generated = np.array([row.job.generated for row in rows])
        self.objectives = [row.job.objective for row in rows]
        scales = any(objective is not None and objective.kind == "scale" for objective in self.objectives)
        self._prepared = None if scales else self._prepare()

    def _prepare(self) -> PreparedWeights:
        return PreparedWeights(
            self.objectives, self.is_eos, self.generated, self.logprobs, bins=self.bins, gamma=self.gamma
        )

    def answers(self, scores: Sequence[RowScore]) -> list[Result]:
        """Aligned with the rows. Raises ArithmeticError where the model gave values that are not finite."""
        errors = {} if self._prepared is not None else self._resolve(scores)
        prepared = self._prepared or self._prepare()
        prefix = np.array([score.logits[-1] for score in scores])
        given = np.concatenate([score.candidate_logits for score in scores])
        if not (np.isfinite(prefix).all() and np.isfinite(given).all()):
            raise ArithmeticError("the model gave values that are not finite")  # whatever these are, no answers
        logits = np.full(self.terminal.shape, np.nan)
        logits.reshape(-1)[self.scored] = given
        bins = [part for score in scores if (part := score.candidate_bin_logprobs) is not None]
        if bins and prepared.reads_bins_alone:
            weights = prepared.of_scored(self.scored, np.concatenate(bins)).tolist()
        else:
            weights = prepared(logits, self._bin_logprobs(bins)).tolist()
        values, horizons = self._values(logits)
        own_values, own_horizons = value_from_logit(prefix).tolist(), horizon_from_logit(prefix, self.gamma).tolist()
        listed = zip(
            self.rows, self.sizes, scores, self.objectives, own_values, own_horizons, values, horizons,
            weights, strict=True,
        )  # fmt: skip
        width = self.terminal.shape[1]
        found: list[Result] = []
        for at, (row, size, score, objective, value, horizon, each, ahead, weighted) in enumerate(listed):
            if at in errors:
                found.append(errors[at])
                continue
            was_scale = objective is not None and objective is not row.job.objective
            if size < width:
                each, ahead, weighted = each[:size], ahead[:size], weighted[:size]
            found.append(
                {
                    "prefix_tokens": row.prefix_tokens,
                    "cached_tokens": score.cached_tokens,
                    "value": value,
                    "horizon": horizon,
                    "values": each if row.job.return_values else [],
                    "horizons": ahead if row.job.return_values else [],
                    "log_weights": None if objective is None else weighted,
                    "session": row.handle,
                    "objective": objective.to_dict() if was_scale and objective is not None else None,
                }
            )
        return found

    def _values(self, logits: NDArray[np.float64]) -> tuple[list[list[float]], list[list[float]]]:
        """Values and horizons after each candidate, 0 after one that ends the answer; empty where nobody wants them."""
        if not any(row.job.return_values for row in self.rows):
            none: list[list[float]] = [[]] * len(self.rows)
            return none, none
        logits.reshape(-1)[self.missing] = 0.0
        values, horizons = value_from_logit(logits), horizon_from_logit(logits, self.gamma)
        for numbers in (values, horizons):
            numbers.reshape(-1)[self.missing] = 0.0
        return values.tolist(), horizons.tolist()

    def guided(self) -> Counter[tuple[str, str]]:
        """Rows of each (kind, method), a scale counted as the tilt that it was resolved to."""
        given = [objective for objective in self.objectives if objective is not None]
        return Counter((objective.kind, objective.method) for objective in given)

    def _resolve(self, scores: Sequence[RowScore]) -> dict[int, LenVMError]:
        """Scales as tilts, now that the distribution at the prompt's end is known; rows whose scale cannot be."""
        errors: dict[int, LenVMError] = {}
        for at, (objective, score) in enumerate(zip(self.objectives, scores, strict=True)):
            if objective is None or objective.kind != "scale":
                continue
            try:
                assert self.bins is not None
                assert score.bin_logprobs is not None
                self.objectives[at] = resolve_scale(objective, score.bin_logprobs[-1], self.bins)
            except InvalidRequestError as error:
                errors[at] = InvalidRequestError(str(error), param=f"objective.{error.param}")
                self.objectives[at] = None
        return errors

    def _bin_logprobs(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any] | None:
        """[B, K, n]; NaN where nothing was scored."""
        if self.bins is None:
            return None
        whole = np.empty((self.terminal.size, self.bins.size))
        if parts:  # or every candidate of every row ends the answer
            whole[self.scored] = np.concatenate(parts)
        whole[self.missing] = np.nan
        return whole.reshape(*self.terminal.shape, -1)
