"""What the playground asks the service's engines, as any request would: same queue, same batches, same tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lenvm.backbones import encode_chat
from lenvm.errors import LenVMError
from lenvm_service.api.ports import EngineLike
from lenvm_service.api.service import Service
from lenvm_service.engine.jobs import Job, PredictJob, Prefix, TokenScoreJob
from lenvm_service.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, check_text, check_tokens

__all__ = ["Prompted", "encode", "predict", "score_ids", "score_text"]


@dataclass(frozen=True)
class Prompted:
    """A prompt up to where the answer begins, and the engine that is asked about it. ``tenant``: who asks."""

    engine: EngineLike
    token_ids: list[int]
    tenant: str = ""


async def encode(service: Service, model: str | None, prompt: object, tenant: str) -> Prompted:
    """The prompt in the model's tokens. Raises a typed error for what cannot be served."""
    service.admit()
    engine = service.engine(model or None)
    text = check_text(prompt, "prompt")
    ids = await service.offload(len(text), lambda: encode_chat(engine.tokenizer, text))
    check_tokens(len(ids), "prompt", MAX_PROMPT_TOKENS)
    return Prompted(engine, ids, tenant)


async def predict(prompted: Prompted) -> dict[str, Any]:
    """The prediction at the prompt boundary, its distribution included."""
    prefix = Prefix(prompted.token_ids, tenant=prompted.tenant)
    return await _ask(prompted.engine, PredictJob(prefix, distribution=True))


async def score_text(service: Service, prompted: Prompted, completion: object, *, eos: bool) -> dict[str, Any]:
    """Values, horizons and length shifts of a completion; ``eos``: the answer ends after it."""
    text = check_text(completion, "completion")
    tokenizer = prompted.engine.tokenizer
    ids: list[int] = await service.offload(len(text), lambda: tokenizer.encode(text, add_special_tokens=False))
    check_tokens(len(ids), "completion", 2 * MAX_NEW_TOKENS)
    return await score_ids(prompted, ids, eos=eos)


async def score_ids(prompted: Prompted, completion_ids: Sequence[int], *, eos: bool) -> dict[str, Any]:
    """The same of tokens."""
    return await _ask(prompted.engine, TokenScoreJob(prompted.token_ids, list(completion_ids), eos))


async def _ask(engine: EngineLike, job: Job) -> dict[str, Any]:
    (result,) = (await engine.submit([job])).results
    if isinstance(result, LenVMError):
        raise result
    return result
