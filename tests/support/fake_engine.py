"""An engine without a model, for tests of the HTTP layer: it answers in the right form and fails when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from lenvm.config import BackboneRef, GeneratorRef, HeadConfig, LenVMConfig
from lenvm.distribution import LengthBins
from lenvm.errors import InvalidRequestError, LenVMError
from lenvm_service.engine.jobs import CandidateJob, Job, PredictJob, Reply, StepJob, TokenScoreJob, folded
from lenvm_service.engine.queueing import Reservation
from lenvm_service.errors import PrefixUnknownError

VOCABULARY = 1000
KNOWN = "known-session"


class FakeTokenizer:
    """A token is a character, modulo the vocabulary; the template puts the role before each message."""

    chat_template = "yes"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) % VOCABULARY for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        if any(message["role"] == "forbidden" for message in messages):
            raise ValueError("this role is not allowed")
        return [1, *self.encode("".join(message["role"] + message["content"] for message in messages))]


class FakeEngine:
    """``fail`` is raised by submit, ``hold`` keeps answers back until it is set; ``calls`` are the submits."""

    def __init__(self, name: str = "fake", *, state: str = "ready", bins: bool = True) -> None:
        self.name = name
        self.state = state
        self.alive = True
        self.failure: Exception | None = None
        self.tokenizer: Any = FakeTokenizer()
        self.vocab_size = VOCABULARY
        self.model_sha = "f" * 16
        self.config = LenVMConfig(
            name=name,
            backbone=BackboneRef("org/fake-backbone", "0" * 64, "1" * 64),
            head=HeadConfig(8, LengthBins(cap=64) if bins else None),
            gamma=0.99,
            generator=GeneratorRef("org/fake-backbone", 0.7, 1.0, 64),
        )
        self.fail: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.calls: list[tuple[list[Job], float | None, int]] = []
        self.cancelled = 0
        self.full: Exception | None = None  # raised where room is asked for
        self.reserved: list[int] = []
        self.released: list[int] = []
        self.started = self.closed = False

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.alive

    def start(self) -> None:
        self.started = True

    def close(self) -> None:
        self.closed = True

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "device": "cpu", "dtype": "float32"}

    def reserve(self, tokens: int, *, deadline: float | None = None) -> Reservation:
        self.reserved.append(tokens)
        if self.full is not None:
            raise self.full
        return Reservation(tokens, self.released.append)

    async def submit(
        self,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        priority: int = 0,
        reservation: Reservation | None = None,
    ) -> Reply:
        self.calls.append((list(jobs), deadline, priority))
        try:
            if self.hold is not None:
                await self.hold.wait()
            else:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fail is not None:
            raise self.fail
        return Reply([self._row(job) for job in jobs], queue_ms=1.5, inference_ms=2.5)

    def _row(self, job: Job) -> dict[str, Any] | LenVMError:
        if isinstance(job, StepJob):
            return folded([self._row(row) for row in job.rows()])
        if isinstance(job, TokenScoreJob):
            ids = [*job.completion_ids, *([2] if job.eos else [])]
            if max([*job.prompt_ids, *ids]) >= VOCABULARY:
                return InvalidRequestError("an id is out of range", param="completion_ids")
            return {
                "prompt_tokens": len(job.prompt_ids),
                "token_ids": ids,
                "tokens": [chr(token) for token in ids],
                "values": [-0.5] * (len(ids) + 1),
                "horizons": [3.0] * (len(ids) + 1),
                "length_shifts": [0.0] * len(ids),
            }
        if job.prefix.session not in (None, KNOWN):
            return PrefixUnknownError("this session is not known here: send the whole prefix", param="session")
        known = {"value": -0.5, "horizon": 3.0, "session": KNOWN, "cached_tokens": 0}
        if isinstance(job, PredictJob):
            if any(token >= VOCABULARY for token in job.prefix.token_ids):
                return InvalidRequestError("an id is out of range", param="token_ids")
            return {
                **known,
                "prompt_tokens": len(job.prefix.token_ids),
                "mean": 4.0,
                "quantiles": {f"{level:g}": 4 for level in job.quantiles},
                "p_exceeds_max_tokens": None if job.max_tokens is None else 0.25,
                "rank_key": 4.0,
                "saturated": False,
                "prediction_id": KNOWN,
            }
        return self._candidates(job, known)

    def _candidates(self, job: CandidateJob, known: dict[str, Any]) -> dict[str, Any] | LenVMError:
        if job.objective is not None and job.objective.kind == "scale" and job.generated:
            return InvalidRequestError("scale is resolved at the prompt boundary", param="kind")
        count = len(job.candidates)
        return {
            **known,
            "prefix_tokens": len(job.prefix.token_ids),
            "values": [-0.5] * count,
            "horizons": [3.0] * count,
            "log_weights": None if job.objective is None else [0.0] * count,
            "objective": None,
        }

    def feedback(
        self,
        prediction_id: str | None,
        token_ids: Sequence[int] | None,
        generated_tokens: int,
        finish_reason: str,
        tenant: str = "",
    ) -> None:
        if prediction_id not in (None, KNOWN):
            raise PrefixUnknownError("no such prediction is remembered", param="prediction_id")
