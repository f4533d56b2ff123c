"""What the engine is asked, one job a row, and what it answers. Nobody changes a job once it is made (frozen, it would
take three times as long to make, for every row of every step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import LenVMError
from lenvm.guidance import Objective
from lenvm.scoring import packed_ids
from lenvm_service.prefix_cache import SessionRecord

__all__ = [
    "DEFAULT_QUANTILES",
    "STEP_COLUMNS",
    "CandidateJob",
    "Job",
    "PredictJob",
    "Prefix",
    "Reply",
    "Result",
    "Shared",
    "StepJob",
    "TokenScoreJob",
    "folded",
    "new_tokens",
    "rows_of",
]


@dataclass(slots=True)
class Prefix:
    """A prefix: all of its tokens (``session`` None), or a session's and those that were appended since.

    ``tenant``: whose it is; nobody else's prefixes are of use to it. ``shared``: what the shared tier has of it.
    """

    token_ids: Sequence[int] = ()
    session: str | None = None
    tenant: str = ""
    shared: Shared | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Shared:
    """Blocks of a prefix that came from the shared tier, from number ``first`` on, or the numbers at its end."""

    first: int = 0
    payloads: Sequence[NDArray[np.uint8]] = ()
    record: SessionRecord | None = None


DEFAULT_QUANTILES = (0.5, 0.9, 0.95)


@dataclass(slots=True)
class PredictJob:
    """How many tokens are still to come after ``prefix``? ``generated``: content tokens of the answer in it;
    ``distribution``: the row has the probability of every bin too."""

    prefix: Prefix
    quantiles: Sequence[float] = DEFAULT_QUANTILES
    max_tokens: int | None = None
    generated: int = 0
    distribution: bool = False


@dataclass(slots=True)
class TokenScoreJob:
    """Values at each token of a completion; ``eos``: the answer ends there (an EOS id at its end says so too)."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    eos: bool = False


@dataclass(slots=True)
class CandidateJob:
    """Values and log-weights of possible next tokens. ``eos_ids`` end the answer beside the model's own EOS;
    ``return_values`` False: the log-weights alone are wanted."""

    prefix: Prefix
    candidates: Sequence[int]
    generated: int = 0
    objective: Objective | None = None
    logprobs: Sequence[float] | None = None
    eos_ids: Sequence[int] = ()
    return_values: bool = True


@dataclass(slots=True)
class StepJob:
    """A decoding step of R rows as one job: field by field what a ``CandidateJob`` for each row would say, whose prefix
    is a session and what was appended to it. Values are not wanted. ``logprobs`` None: of no row. ``odd``: some row was
    found not to be as it should be, so that there is no use in trying it as a step again."""

    sessions: Sequence[str]
    appended: Sequence[Sequence[int]]
    candidates: Sequence[Sequence[int]]
    generated: Sequence[int]
    objectives: Sequence[Objective | None]
    logprobs: Sequence[Sequence[float]] | None = None
    eos_ids: Sequence[int] = ()
    tenant: str = ""
    odd: bool = field(default=False, init=False, compare=False, repr=False)
    _packed: NDArray[np.int32] | None = field(default=None, init=False, compare=False, repr=False)

    def packed(self) -> NDArray[np.int32] | None:
        """All candidates, one row's after another's; None where one is no 32-bit integer. Worked out once."""
        if self._packed is None:
            self._packed = packed_ids(self.candidates, sum(map(len, self.candidates)))
        return self._packed

    def rows(self) -> list[CandidateJob]:
        """The same, row by row."""
        logprobs = [None] * len(self.sessions) if self.logprobs is None else self.logprobs
        listed = zip(
            self.sessions, self.appended, self.candidates, self.generated, self.objectives, logprobs, strict=True
        )
        return [
            CandidateJob(Prefix(new, session, self.tenant), ids, generated, objective, logs, self.eos_ids, False)
            for session, new, ids, generated, objective, logs in listed
        ]


STEP_COLUMNS = ("prefix_tokens", "cached_tokens", "value", "horizon", "log_weights", "session", "objective")
"""Fields of a step's answer: those of a row of candidates but for the values."""


def folded(results: Sequence[Result]) -> Result:
    """The answers of a step's rows as the one of its ``StepJob``: ``columns``, lists with None where a row failed, and
    ``errors`` by row."""
    errors = {at: result for at, result in enumerate(results) if isinstance(result, LenVMError)}
    rows = [{} if isinstance(result, LenVMError) else result for result in results]
    return {"columns": {name: [row.get(name) for row in rows] for name in STEP_COLUMNS}, "errors": errors}


Job: TypeAlias = PredictJob | TokenScoreJob | CandidateJob | StepJob
Result: TypeAlias = dict[str, Any] | LenVMError
"""A row of the wire contract without its ``index``, or the error that it gets instead. Of a ``StepJob``: ``folded``."""


@dataclass(frozen=True)
class Reply:
    """Answers of a request, aligned with its jobs. ``queue_ms``: until its first batch began; ``inference_ms``: in the
    batches that held its jobs."""

    results: list[Result]
    queue_ms: float
    inference_ms: float


def rows_of(job: Job) -> int:
    """Rows that a job answers."""
    return len(job.sessions) if isinstance(job, StepJob) else 1


def new_tokens(job: Job) -> int:
    """Tokens that a job brings, at least one: what a queue counts."""
    if isinstance(job, StepJob):
        tokens = sum(map(len, job.appended)) + sum(map(len, job.candidates))
    elif isinstance(job, TokenScoreJob):
        tokens = len(job.prompt_ids) + len(job.completion_ids)
    else:
        tokens = len(job.prefix.token_ids) + (len(job.candidates) if isinstance(job, CandidateJob) else 0)
    return max(1, tokens)
