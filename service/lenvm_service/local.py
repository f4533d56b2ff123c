"""The client's scorer interface without HTTP: a value model in this process for ``GuidedDecoder`` and its drivers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lenvm.errors import InvalidRequestError, LenVMError
from lenvm.guidance import Objective
from lenvm.modeling import DEFAULT_MODEL
from lenvm_client import CandidateInput, CandidateScores, RowError
from lenvm_service.engine import CandidateJob, EngineCore, EngineOptions, Prefix, Result
from lenvm_service.engine.engine import load_core

__all__ = ["LocalScorer"]


class LocalScorer:
    """A :class:`lenvm_client.CandidateScorer` that runs where it is called; not thread-safe.

    It answers as the service does, row errors and session handles included. Rows give ``token_ids`` or a ``session``.

    Args:
        model: a checkpoint folder or the name of a shipped one.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: precision of the backbone.

    Raises:
        ArtifactError, BackboneError: the model cannot be loaded.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.core: EngineCore = load_core(model, EngineOptions(device=device, dtype=dtype))[0]

    def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        """Answers aligned with ``rows``; a bad row is a RowError."""
        jobs: list[CandidateJob] = []
        results: dict[int, Result] = {}
        places: list[int] = []
        for at, row in enumerate(rows):
            try:
                jobs.append(_job(row))
                places.append(at)
            except LenVMError as error:
                results[at] = error
        results.update(zip(places, self.core.run(jobs), strict=True))
        return [_answer(at, results[at]) for at in range(len(rows))]


def _job(row: CandidateInput) -> CandidateJob:
    if row.session is None and row.token_ids is None:
        raise InvalidRequestError("give token_ids or a session: texts are for the service", param="token_ids")
    prefix = Prefix(row.token_ids or ()) if row.session is None else Prefix(row.append, row.session)
    objective = None if row.objective is None else Objective.from_dict(row.objective)
    return CandidateJob(prefix, row.candidates, row.generated, objective, row.logprobs, row.eos_ids)


def _answer(index: int, result: Result) -> CandidateScores | RowError:
    if isinstance(result, LenVMError):
        param = result.param if isinstance(result, InvalidRequestError) else None
        return RowError(index=index, type=result.code, code=result.code, message=str(result), param=param)
    fields: dict[str, Any] = dict(result)
    for name in ("values", "horizons", "log_weights"):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    return CandidateScores(index=index, **fields)
