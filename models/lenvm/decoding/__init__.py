"""The one batched sampler: unguided or guided, used by rollouts, evaluation and ``generate``."""

from __future__ import annotations

from lenvm.decoding.sampler import DEFAULT_CANDIDATES, FORCED_STOP_PROBABILITY, Sampler
from lenvm.decoding.types import Candidates, Generation, Guide, Request, SamplingParams

__all__ = [
    "DEFAULT_CANDIDATES",
    "FORCED_STOP_PROBABILITY",
    "Candidates",
    "Generation",
    "Guide",
    "Request",
    "Sampler",
    "SamplingParams",
]
