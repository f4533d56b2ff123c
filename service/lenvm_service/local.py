"""The client's scorer interface without HTTP: a value model in this process for ``GuidedDecoder`` and its drivers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, SupportsIndex

from lenvm.config import DEFAULT_MODEL
from lenvm.errors import InvalidRequestError, LenVMError
from lenvm.guidance import Objective
from lenvm_client import CandidateInput, CandidateScores, InternalServerError, RowError
from lenvm_client._columns import StepAnswers, StepRows
from lenvm_client.errors import service_error
from lenvm_service.engine import CandidateJob, EngineCore, EngineOptions, Prefix, Result, load_core
from lenvm_service.engine.jobs import STEP_COLUMNS, Job, StepJob

__all__ = ["JobScorer", "LocalScorer"]


class JobScorer:
    """A :class:`lenvm_client.CandidateScorer` over whatever answers jobs; as thread-safe as that is.

    It answers as the service does, row errors and session handles included. Rows give ``token_ids`` or a ``session``.

    Args:
        run: jobs -> results, aligned (``EngineCore.run``). Rows come as a ``CandidateJob`` each; a step of
            ``GuidedDecoder`` of several rows that go on from sessions as one ``StepJob``.
        tenant: whose prefixes they are.
    """

    def __init__(self, run: Callable[[Sequence[Job]], Sequence[Result]], tenant: str = "") -> None:
        self._run = run
        self._tenant = tenant

    def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        """Answers aligned with ``rows``; a bad row is a RowError.

        Raises InternalServerError of ``lenvm_client`` where the model itself fails, so that guided decoding may go on
        without it.
        """
        jobs: list[Job] = []
        results: dict[int, Result] = {}
        places: list[int] = []
        for at, row in enumerate(rows):
            try:
                jobs.append(_job(row, self._tenant))
                places.append(at)
            except LenVMError as error:
                results[at] = error
        results.update(zip(places, self._results(jobs), strict=True))
        return [_answer(at, results[at]) for at in range(len(rows))]

    def _results(self, jobs: Sequence[Job]) -> Sequence[Result]:
        try:
            return self._run(jobs)
        except Exception as error:
            said = " ".join(str(error).split()) or "no reason given"
            raise InternalServerError(f"the value model failed ({type(error).__name__}: {said})") from error

    @property
    def _overlaps(self) -> bool:
        """Whether ``GuidedDecoder`` may call ``_score_overlapped``: a subclass may have its own call."""
        return type(self).score_candidates is JobScorer.score_candidates and "score_candidates" not in self.__dict__

    def _score_overlapped(
        self, rows: Sequence[CandidateInput], meanwhile: Callable[[], None]
    ) -> Sequence[CandidateScores | RowError]:
        """``score_candidates`` for ``GuidedDecoder``, whose steps go as one job each. ``meanwhile`` is not called:
        there is nothing to wait for beside it."""
        job = _step_job(rows, self._tenant) if isinstance(rows, StepRows) else None
        if job is None:
            return self.score_candidates(rows)
        (result,) = self._results([job])
        if isinstance(result, LenVMError):
            return [_answer(at, result) for at in range(len(rows))]
        columns, errors = result["columns"], result["errors"]
        weights = columns["log_weights"]
        # No sum is finite that holds what is not.
        if not errors and None not in weights and math.isfinite(sum(chain.from_iterable(weights))):
            numbers = (columns["prefix_tokens"], columns["cached_tokens"], columns["value"], columns["horizon"])
            return StepAnswers(columns["session"], weights, numbers)
        fields = [
            dict(zip(STEP_COLUMNS, row, strict=True)) for row in zip(*map(columns.get, STEP_COLUMNS), strict=True)
        ]
        return [_answer(at, errors.get(at) or {"values": (), "horizons": (), **its}) for at, its in enumerate(fields)]


class LocalScorer(JobScorer):
    """The value model itself, in this process: it runs where it is called; not thread-safe.

    Args:
        model: a checkpoint folder or an ONNX export, or the name of a shipped one.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: precision of the backbone.

    Raises:
        ArtifactError, BackboneError: the model cannot be loaded.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, *, device: str = "cpu", dtype: str = "float32") -> None:
        self.core: EngineCore = load_core(model, EngineOptions(device=device, dtype=dtype)).core
        super().__init__(lambda jobs: self.core.run(jobs))

    def device_processor(
        self,
        objectives: Sequence[Mapping[str, Any] | None],
        prompts: Sequence[Sequence[int]],
        **settings: Any,
    ) -> Any | None:
        """A logits processor for one ``generate`` of transformers that guides without a word from the host
        (``lenvm.decoding.device_processor.DeviceProcessor``, which says what ``settings`` are). None where the model
        does not run as CUDA graphs, for ``scale`` and targets in other units than tokens, and where prompts and answers
        do not fit, or no graph is recorded: then guidance goes step by step, and says what is wrong."""
        scorer: Any = self.core.scorer
        units = {(objective or {}).get("unit", "tokens") for objective in objectives}
        if (
            not getattr(scorer, "has_graphs", False)
            or settings["vocabulary"] > scorer.vocab_size
            or units != {"tokens"}
        ):
            return None
        from torch import OutOfMemoryError

        from lenvm.cuda_graph import GraphError
        from lenvm.decoding.device_processor import DeviceProcessor
        from lenvm.guides import ValueGuide

        try:
            wanted = [None if objective is None else Objective.from_dict(objective) for objective in objectives]
            rules = ValueGuide(scorer, wanted).device_rules(scorer.pool.device)
            return None if rules is None else DeviceProcessor(scorer, rules, prompts, **settings)
        except (LenVMError, GraphError, OutOfMemoryError):
            return None


class _NotOnePrefixError(InvalidRequestError):
    reason = "exactly_one"


def _job(row: CandidateInput, tenant: str) -> CandidateJob:
    """Checked as the service's schema does it: what is no number would fail the neighbours in the core."""
    session, tokens = row.session, row.token_ids
    if (session is None) == (tokens is None) or row.messages is not None or row.prompt is not None:
        names = ("messages", "prompt", "token_ids", "session")
        given = [name for name in names if getattr(row, name) is not None]
        if len(given) == 1:
            raise InvalidRequestError("give token_ids or a session: texts are for the service", param=given[0])
        found = f"not {' and '.join(given)}" if given else "none is there"
        raise _NotOnePrefixError(f"give exactly one of token_ids and session; {found}")
    if session is not None:
        prefix = Prefix(_ids(row.append, "append"), session, tenant)
    else:
        assert tokens is not None
        prefix = Prefix(_ids(tokens, "token_ids"), tenant=tenant)
    return CandidateJob(
        prefix,
        _ids(row.candidates, "candidates"),
        row.generated if type(row.generated) is int else _ids([row.generated], "generated")[0],
        None if row.objective is None else Objective.from_dict(row.objective),
        None if row.logprobs is None else _numbers(row.logprobs, "logprobs"),
        _ids(row.eos_ids, "eos_ids"),
        row.return_values,
    )


def _step_job(rows: StepRows, tenant: str) -> StepJob | None:
    """The rows as one job; None where one is not plainly as it should be, which is told of it by itself."""
    logprobs, integers = rows.logprobs, (rows.generated, rows.eos_ids, *rows.appended, *rows.candidates)
    if set(map(type, chain.from_iterable(integers))) != {int}:
        return None
    if logprobs is not None and set(map(type, chain.from_iterable(logprobs))) != {float}:
        return None
    read: dict[int, Objective | None] = {}
    try:
        for wanted in rows.objectives:
            if id(wanted) not in read:
                read[id(wanted)] = None if wanted is None else Objective.from_dict(wanted)
    except InvalidRequestError:
        return None
    objectives = [read[id(wanted)] for wanted in rows.objectives]
    return StepJob(
        rows.sessions, rows.appended, rows.candidates, rows.generated, objectives, logprobs, rows.eos_ids, tenant
    )


def _ids(values: Sequence[SupportsIndex], param: str) -> list[int]:
    try:
        if set(map(type, values)) <= {int}:
            return list(values)  # type: ignore[arg-type]
        if any(isinstance(value, bool) for value in values):
            raise TypeError("a boolean is no number")
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise InvalidRequestError(f"{param} must be integers: {error}", param=param) from error


def _numbers(values: Sequence[float], param: str) -> list[float]:
    try:
        if set(map(type, values)) <= {float}:
            return list(values)
        return [float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequestError(f"{param} must be numbers: {error}", param=param) from error


def _answer(index: int, result: Result) -> CandidateScores | RowError:
    if isinstance(result, LenVMError):
        after = getattr(result, "retry_after_s", None)
        return RowError(
            index=index,
            type=result.code,
            code=getattr(result, "reason", result.code),
            message=str(result),
            param=getattr(result, "param", None),
            retryable=service_error(result.code, "").retryable,
            retry_after_ms=None if after is None else 1000.0 * after,
        )
    weights = result["log_weights"]
    return CandidateScores(
        index=index,
        values=tuple(result["values"]),
        horizons=tuple(result["horizons"]),
        log_weights=None if weights is None else tuple(weights),
        session=result["session"],
        objective=result["objective"],
        value=result["value"],
        horizon=result["horizon"],
        prefix_tokens=result["prefix_tokens"],
        cached_tokens=result["cached_tokens"],
    )
