"""What the drivers inside a serving engine share: what a request asks for, its candidates, the token that is drawn for
it, and one decoder for the process. No tensors here.

The drivers draw by themselves, with the request's seed: what the engine does after them (temperature, top-p, ...) finds
one token left and cannot cut or reweigh what was drawn from the guided law. A request draws the same tokens in every
engine, whatever batch it shares.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from lenvm_client._steps import GuidedRow, WeightedRow, uniform
from lenvm_client._text import UNITS, TextAdapter
from lenvm_client._types import CandidateInput, CandidateScores, RowError
from lenvm_client.errors import InvalidRequestError, ServiceTimeoutError
from lenvm_client.guided import GuidedDecoder

__all__ = ["DeadlineScorer", "GuidedRequest", "candidates", "decoder_from_environment", "parse_objective"]

KINDS = ("equal_to", "at_most", "at_least", "tilt", "scale")
KEY = "lenvm"

Score: TypeAlias = Callable[[Sequence[CandidateInput]], list[CandidateScores | RowError]]


@dataclass(frozen=True, kw_only=True)
class GuidedRequest:
    """What a request of a serving engine asks for. ``top_k``, ``top_p`` and ``min_p`` cut the backbone's law before it
    is guided; EOS and stop ids (``end_ids``) stay. ``temperature`` 0 is greedy. ``seed`` None: a fresh one."""

    objective: Mapping[str, Any] | None
    end_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 16
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def seeded(self) -> GuidedRequest:
        """With a seed in [0, 2^63)."""
        seed = random.getrandbits(63) if self.seed is None else self.seed & (1 << 63) - 1
        return replace(self, seed=seed)

    def choose(self, weighted: WeightedRow, generated: int) -> int:
        """The next token, ``generated`` content tokens in."""
        return weighted.draw(uniform(self.seed or 0, generated)) if self.temperature > 0 else weighted.best()

    def row(
        self,
        prefix: Sequence[int],
        generated: int,
        ids: Sequence[int],
        logprobs: Sequence[float],
        end_logprobs: Sequence[float],
    ) -> GuidedRow:
        """``ids``: the likeliest tokens, likeliest first; ``end_logprobs`` go with ``end_ids``."""
        kept = candidates(logprobs, self.top_k, self.top_p, self.min_p)
        return GuidedRow(
            prefix=prefix,
            candidates=ids[:kept],
            logprobs=logprobs[:kept],
            generated=generated,
            objective=self.objective,
            eos_logprobs=dict(zip(self.end_ids, end_logprobs, strict=True)),
            end_ids=self.end_ids,
        )


def candidates(logprobs: Sequence[float], top_k: int, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """How many of the likeliest tokens survive: natural logs over the whole vocabulary, highest first."""
    kept, total = 0, 0.0
    for logprob in logprobs[:top_k]:
        p = math.exp(logprob)
        if kept and (total >= top_p or p < min_p * math.exp(logprobs[0])):
            break
        kept, total = kept + 1, total + p
    return kept


def parse_objective(
    arguments: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ
) -> tuple[Mapping[str, Any] | None, int]:
    """The objective and the ``top_k`` of a request's free arguments: ``{"lenvm": {"kind": "equal_to", "target": 200}}``
    as an object or as JSON text, and ``lenvm_top_k`` beside it. None where there is no objective.

    Raises InvalidRequestError."""
    given = (arguments or {}).get(KEY)
    if given is None:
        return None, 16
    try:
        objective = json.loads(given) if isinstance(given, str) else given
        json.dumps(objective, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{KEY} must be an objective as JSON: {error}", param=KEY) from error
    if not isinstance(objective, Mapping) or objective.get("kind") not in KINDS:
        raise InvalidRequestError(f'{KEY} must look like {{"kind": "equal_to", "target": 200}}', param=KEY)
    unit = objective.get("unit", "tokens")
    if unit not in UNITS or (unit != "tokens" and not environment.get("LENVM_CLIENT_TOKENIZER")):
        message = f"unit must be one of {', '.join(UNITS)}; all but tokens need LENVM_CLIENT_TOKENIZER"
        raise InvalidRequestError(message, param=KEY)
    top_k = (arguments or {}).get(f"{KEY}_top_k", 16)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= 256:
        raise InvalidRequestError(f"{KEY}_top_k must be a whole number from 1 to 256", param=f"{KEY}_top_k")
    return objective, top_k


class DeadlineScorer:
    """A scorer whose calls answer within ``seconds`` or raise ServiceTimeoutError, whatever the network does. A call
    that is late goes on in its thread; until it has ended, further calls fail at once."""

    def __init__(self, score: Score, seconds: float) -> None:
        self.score, self.seconds = score, seconds
        self._late: Future[Any] | None = None

    def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        if self._late is not None and not self._late.done():
            raise ServiceTimeoutError("an earlier call is still late")
        future: Future[list[CandidateScores | RowError]] = Future()

        def call() -> None:
            try:
                future.set_result(self.score(rows))
            except BaseException as error:  # reaches the caller
                future.set_exception(error)

        # Not a pool's: those are waited for when the interpreter exits.
        threading.Thread(target=call, name="lenvm-score", daemon=True).start()
        try:
            answers = future.result(self.seconds)
        except TimeoutError as error:
            if future.done():
                raise  # the scorer's own
            self._late = future
            raise ServiceTimeoutError(f"no answer within {self.seconds} s") from error
        return answers


def decoder_from_environment(environment: Mapping[str, str] = os.environ) -> GuidedDecoder:
    """The decoder of an engine's process: the service at ``LENVM_CLIENT_URL`` (``http://127.0.0.1:8000``), with
    ``LENVM_CLIENT_API_KEY``, ``LENVM_CLIENT_MODEL`` and, for each step, ``LENVM_CLIENT_DEADLINE_S`` (0.25). Steps that
    are late or fail go on unguided.

    ``LENVM_CLIENT_TOKENIZER`` names the backbone's tokenizer as transformers know it, for targets in words, characters
    or sentences; ``LENVM_CLIENT_MODEL_TOKENIZER`` that of the value model, where it is another: see ``TextAdapter``."""
    from lenvm_client.client import Client

    deadline = float(environment.get("LENVM_CLIENT_DEADLINE_S", 0.25))
    if not 0 < deadline < math.inf:
        raise InvalidRequestError("LENVM_CLIENT_DEADLINE_S must be above 0", param="LENVM_CLIENT_DEADLINE_S")
    client = Client(
        environment.get("LENVM_CLIENT_URL", "http://127.0.0.1:8000"),
        model=environment.get("LENVM_CLIENT_MODEL"),
        api_key=environment.get("LENVM_CLIENT_API_KEY"),
        timeout=deadline,
        max_retries=0,
    )
    # The service drops by itself what would come too late.
    score = partial(client.score_candidates, deadline_ms=1000.0 * deadline)
    text = None
    names = [environment.get(f"LENVM_CLIENT_{name}") for name in ("TOKENIZER", "MODEL_TOKENIZER")]
    if names[0]:
        from transformers import AutoTokenizer

        text = TextAdapter.from_tokenizers(*(AutoTokenizer.from_pretrained(name) for name in names if name))
    return GuidedDecoder(DeadlineScorer(score, deadline), (), on_error="log", text=text)
