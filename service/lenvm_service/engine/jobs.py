"""What the engine is asked, one job a row, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lenvm.errors import LenVMError
from lenvm.guidance import Objective

__all__ = ["CandidateJob", "Job", "PredictJob", "Prefix", "Reply", "Result", "TokenScoreJob"]


@dataclass(frozen=True)
class Prefix:
    """A prefix: all of its tokens (``session`` None), or a session's and those that were appended since."""

    token_ids: Sequence[int] = ()
    session: str | None = None


@dataclass(frozen=True)
class PredictJob:
    """How many tokens are still to come after ``prefix``? ``generated``: content tokens of the answer in it."""

    prefix: Prefix
    quantiles: Sequence[float] = (0.5, 0.9, 0.95)
    max_tokens: int | None = None
    generated: int = 0


@dataclass(frozen=True)
class TokenScoreJob:
    """Values at each token of a completion; ``eos``: the answer ends there (an EOS id at its end says so too)."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    eos: bool = False


@dataclass(frozen=True)
class CandidateJob:
    """Values and log-weights of possible next tokens. ``eos_ids`` end the answer beside the model's own EOS."""

    prefix: Prefix
    candidates: Sequence[int]
    generated: int = 0
    objective: Objective | None = None
    logprobs: Sequence[float] | None = None
    eos_ids: Sequence[int] = ()


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
