"""What goes into the sampler and what comes out, and the hook through which it is guided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import InvalidRequestError

__all__ = ["Candidates", "Generation", "Guide", "Request", "SamplingParams"]


@dataclass(frozen=True)
class SamplingParams:
    """How the generator samples. ``temperature`` 0 is greedy. ``top_k`` None means the whole vocabulary when unguided
    and ``DEFAULT_CANDIDATES`` when guided. ``top_p`` cuts what ``top_k`` left, renormalised. Every EOS id stays a
    candidate, whatever the truncation."""

    temperature: float = 0.7
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        def check(ok: bool, param: str, wanted: str) -> None:
            if not ok:
                raise InvalidRequestError(f"{param} must be {wanted}, got {getattr(self, param)!r}", param=param)

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for name in ("temperature", "top_p", "min_p"):
            check(isinstance(getattr(self, name), int | float), name, "a number")
        check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "finite and at least 0")
        check(self.top_k is None or (whole(self.top_k) and self.top_k >= 1), "top_k", "a whole number of at least 1")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 <= self.min_p < 1, "min_p", "in [0, 1)")
        check(whole(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", "a whole number of at least 1")

    @property
    def full_vocabulary(self) -> bool:
        """True if nothing is truncated, so that unguided sampling needs no candidate list."""
        return self.top_k is None and self.top_p == 1.0 and self.min_p == 0.0 and self.temperature > 0


@dataclass(frozen=True)
class Request:
    """One generation to make: tokenised prompt, seed of its random stream, and its own limit where it has one."""

    prompt_ids: Sequence[int]
    seed: int = 0
    max_new_tokens: int | None = None


@dataclass
class Generation:
    """What came out. ``text_cost``: log q - log p summed over sampled tokens, EOS included (nats, at the sampler's
    temperature and truncation); NaN for a guided greedy answer, which follows no distribution. ``logprob``: log p of
    the content tokens at temperature 1, full vocabulary. The graphed path keeps neither ``logprob`` (NaN) nor
    ``forced_stop`` (False)."""

    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    forced_stop: bool = False
    text_cost: float = 0.0
    logprob: float = 0.0
    seed: int = 0

    @property
    def length(self) -> int:
        """Content tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Candidates:
    """Possible next tokens of ``B`` rows. ``logprobs``: natural log, full vocabulary, at the sampler's temperature."""

    ids: NDArray[np.int64]  # [B, K]
    logprobs: NDArray[np.float64]  # [B, K]
    is_eos: NDArray[np.bool_]  # [B, K]
    kept: NDArray[np.bool_]  # [B, K] False: padding, or cut by top-p / min-p
    generated: NDArray[np.int64]  # [B] content tokens so far
    raw_logprobs: NDArray[np.float64]  # [B, K] at temperature 1


class Guide(Protocol):
    """Adds log-weights to candidates. Rows are named by the request's index in the call."""

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Rows begin to generate after these prompts."""

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> NDArray[np.float64]:
        """Finite ``[B, K]`` log-weights for the rows' candidates."""

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Each row went on with this (content) token."""

    def finish(self, rows: Sequence[int]) -> None:
        """Rows ended; their states may go."""
