"""The client's scorer interface without HTTP: a value model in this process for ``GuidedDecoder`` and its drivers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from lenvm.config import DEFAULT_MODEL
from lenvm.errors import InvalidRequestError, LenVMError
from lenvm.guidance import Objective
from lenvm_client import CandidateInput, CandidateScores, InternalServerError, RowError
from lenvm_client.errors import service_error
from lenvm_service.engine import CandidateJob, EngineCore, EngineOptions, Prefix, Result, load_core

__all__ = ["JobScorer", "LocalScorer"]


class JobScorer:
    """A :class:`lenvm_client.CandidateScorer` over whatever answers jobs; as thread-safe as that is.

    It answers as the service does, row errors and session handles included. Rows give ``token_ids`` or a ``session``.

    Args:
        run: jobs -> results, aligned.
        tenant: whose prefixes they are.
    """

    def __init__(self, run: Callable[[Sequence[CandidateJob]], Sequence[Result]], tenant: str = "") -> None:
        self._run = run
        self._tenant = tenant

    def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        """Answers aligned with ``rows``; a bad row is a RowError.

        Raises InternalServerError of ``lenvm_client`` where the model itself fails, so that guided decoding may go on
        without it.
        """
        jobs: list[CandidateJob] = []
        results: dict[int, Result] = {}
        places: list[int] = []
        for at, row in enumerate(rows):
            try:
                jobs.append(_job(row, self._tenant))
                places.append(at)
            except LenVMError as error:
                results[at] = error
        try:
            results.update(zip(places, self._run(jobs), strict=True))
        except Exception as error:
            said = " ".join(str(error).split()) or "no reason given"
            raise InternalServerError(f"the value model failed ({type(error).__name__}: {said})") from error
        return [_answer(at, results[at]) for at in range(len(rows))]


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
