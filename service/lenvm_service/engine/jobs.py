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
from lenvm_service.prefix_cache import SessionRecord

__all__ = [
    "DEFAULT_QUANTILES",
    "CandidateJob",
    "Job",
    "PredictJob",
    "Prefix",
    "Reply",
    "Result",
    "Shared",
    "TokenScoreJob",
    "new_tokens",
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


Job: TypeAlias = PredictJob | TokenScoreJob | CandidateJob
Result: TypeAlias = dict[str, Any] | LenVMError
"""A row of the wire contract without its ``index``, or the error that it gets instead."""


@dataclass(frozen=True)
class Reply:
    """Answers of a request, aligned with its jobs. ``queue_ms``: until its first batch began; ``inference_ms``: in the
    batches that held its jobs."""

    results: list[Result]
    queue_ms: float
    inference_ms: float


def new_tokens(job: Job) -> int:
    """Tokens that a job brings, at least one: what a queue counts."""
    if isinstance(job, TokenScoreJob):
        tokens = len(job.prompt_ids) + len(job.completion_ids)
    else:
        tokens = len(job.prefix.token_ids) + (len(job.candidates) if isinstance(job, CandidateJob) else 0)
    return max(1, tokens)
