"""A candidate scorer without a model: sessions, row errors and log-weights as the service has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lenvm_client import CandidateInput, CandidateScores, LenVMClientError, RowError

__all__ = ["FakeScorer"]


class FakeScorer:
    """Log-weights are a function of the whole prefix, the candidate and the objective, so that every mix-up shows."""

    def __init__(self) -> None:
        self.calls: list[list[CandidateInput]] = []
        self.prefixes: list[list[tuple[int, ...]]] = []  # as resolved, aligned with calls
        self.sessions: dict[str, tuple[int, ...]] = {}
        self.fail: LenVMClientError | None = None
        self.refuse: Mapping[str, Any] = {}  # kind of objective -> type of the row error

    @staticmethod
    def weight(prefix: Sequence[int], token: int, objective: Mapping[str, Any]) -> float:
        strength = float(objective.get("lambda", objective.get("target", 1)))
        return 1.5 * math.sin(strength * (sum(prefix) + 3 * len(prefix)) + 1.7 * token)

    def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        self.calls.append(list(rows))
        self.prefixes.append([])
        if self.fail is not None:
            raise self.fail
        return [self._row(at, row) for at, row in enumerate(rows)]

    def _row(self, index: int, row: CandidateInput) -> CandidateScores | RowError:
        known: tuple[int, ...] | None = ()
        if row.session is not None:
            known = self.sessions.get(row.session)
        if known is None:
            return RowError(index=index, type="prefix_unknown", message="send it whole")
        prefix = (*known, *(row.token_ids if row.session is None else row.append))
        self.prefixes[-1].append(prefix)
        objective = row.objective
        if objective is not None and objective["kind"] in self.refuse:
            return RowError(index=index, type=self.refuse[objective["kind"]], message="refused")
        resolved = None
        if objective is not None and objective["kind"] == "scale":
            if row.generated:
                return RowError(index=index, type="invalid_request", message="scale at the prompt boundary only")
            resolved = objective = {"kind": "tilt", "lambda": 0.01 * sum(prefix)}
        session = "s-" + ",".join(map(str, prefix))
        self.sessions[session] = prefix
        weights = None
        if objective is not None:
            weights = tuple(self.weight(prefix, token, objective) for token in row.candidates)
        count = len(row.candidates)
        return CandidateScores(
            index=index,
            values=(0.0,) * count,
            horizons=(0.0,) * count,
            log_weights=weights,
            session=session,
            objective=resolved,
        )
