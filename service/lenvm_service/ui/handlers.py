"""What each control of the page does: from what a visitor gave to HTML. No Gradio here.

Every problem becomes a line that the visitor can read; what nobody foresaw is logged, and only that is said.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenvm.errors import LenVMError
from lenvm_client import LenVMClientError
from lenvm_service.answers import generation_fields
from lenvm_service.api.ports import EngineLike
from lenvm_service.api.service import Service
from lenvm_service.ui.asking import Prompted, encode, predict, score_ids, score_text
from lenvm_service.ui.distribution_view import distribution_html
from lenvm_service.ui.generation import Generators, check_reach
from lenvm_service.ui.guidance_view import build_objective, comparison_html, running_html
from lenvm_service.ui.html import note, problem
from lenvm_service.ui.limits import MAX_NEW_TOKENS, MAX_SEED, whole
from lenvm_service.ui.tokens_view import legend_html, tokens_html

if TYPE_CHECKING:
    from lenvm.guidance import Objective

__all__ = ["Controls", "Handlers"]

logger = logging.getLogger(__name__)

_FAILED = "The service failed on this; its log has the cause."


@dataclass(frozen=True)
class Controls:
    """The sliders of guidance, as a browser sends them."""

    kind: Any
    method: Any
    target: Any
    tilt: Any
    beta: Any
    tolerance: Any
    strength: Any

    def objective(self, max_new_tokens: int) -> Objective:
        """Raises InvalidRequestError for what guidance does not know, or what the answer's limit makes impossible."""
        found = build_objective(
            kind=self.kind,
            method=self.method,
            target=whole(self.target, "target", 0, MAX_NEW_TOKENS),
            tilt=self.tilt,
            beta=self.beta,
            tolerance=self.tolerance,
            strength=self.strength,
        )
        check_reach(found, max_new_tokens)
        return found


class Handlers:
    """Over the service's engines; generators are loaded when they are first wanted."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.generators = Generators(service.settings.device)

    async def predict(self, model: Any, prompt: Any, tenant: str) -> str:
        """The length distribution of the answer to a prompt."""
        try:
            prompted = await encode(self.service, model, prompt, tenant)
            row = await predict(prompted)
            bins = prompted.engine.config.head.bins
            return distribution_html(row, cap=bins.cap if bins else None, generator=_valid_for(prompted.engine))
        except Exception as error:
            return _said(error)

    async def score(self, model: Any, prompt: Any, completion: Any, ended: Any, tenant: str) -> str:
        """What each token of a completion did to the length."""
        try:
            prompted = await encode(self.service, model, prompt, tenant)
            row = await score_text(self.service, prompted, completion, eos=bool(ended))
            return legend_html() + tokens_html(row, finished=bool(ended))
        except Exception as error:
            return _said(error)

    async def generate(
        self, model: Any, prompt: Any, seed: Any, limit: Any, tenant: str
    ) -> AsyncIterator[tuple[str, bool, str]]:
        """An unguided answer as it comes, then its tokens: (text, whether it ended, HTML)."""
        text = ""
        try:
            prompted = await encode(self.service, model, prompt, tenant)
            stream = self._stream(prompted, [None], seed, limit)
            tokenizer = prompted.engine.tokenizer
            async with aclosing(stream) as parts:
                async for part in parts:
                    text = tokenizer.decode(part.token_ids[0])
                    if part.done is None:
                        yield text, False, note(_so_far(len(part.token_ids[0])))
                        continue
                    (answer,) = part.done
                    score = await _scored(prompted, answer.token_ids, answer.finished)
                    shown = "" if score is None else legend_html() + tokens_html(score, finished=answer.finished)
                    yield text, answer.finished, shown + _mismatch(prompted.engine)
        except Exception as error:
            yield text, False, _said(error)

    async def guide(
        self, model: Any, prompt: Any, controls: Controls, seed: Any, limit: Any, tenant: str
    ) -> AsyncIterator[str]:
        """A guided answer beside the unguided one of the same seed, as they come and then in figures."""
        try:
            most = whole(limit, "longest answer", 1, MAX_NEW_TOKENS)
            objective = controls.objective(most)
            prompted = await encode(self.service, model, prompt, tenant)
            tokenizer = prompted.engine.tokenizer
            stream = self._stream(prompted, [objective, None], seed, limit)
            async with aclosing(stream) as parts:
                async for part in parts:
                    if part.done is None:
                        texts = [tokenizer.decode(ids) for ids in part.token_ids]
                        yield running_html(objective, texts, [len(ids) for ids in part.token_ids], most)
                        continue
                    rows = [generation_fields(answer, objective, tokenizer) for answer in part.done]
                    scores = [await _scored(prompted, answer.token_ids, answer.finished) for answer in part.done]
                    yield comparison_html(objective, rows, scores, most) + _mismatch(prompted.engine)
        except Exception as error:
            yield _said(error)

    def _stream(self, prompted: Prompted, objectives: list[Objective | None], seed: Any, limit: Any) -> Any:
        return self.generators.stream(
            prompted,
            objectives,
            seed=whole(seed, "seed", 0, MAX_SEED),
            max_new_tokens=whole(limit, "longest answer", 1, MAX_NEW_TOKENS),
        )


async def _scored(prompted: Prompted, token_ids: list[int], finished: bool) -> dict[str, Any] | None:
    """None where there is nothing to score."""
    if not token_ids and not finished:
        return None
    return await score_ids(prompted, token_ids, eos=finished)


def _so_far(count: int) -> str:
    return f"Generating: {count:,} tokens so far." if count else "Loading the generator, reading the prompt."


def _valid_for(engine: EngineLike) -> str:
    generator = engine.config.generator
    return (
        f"Valid for answers of {generator.backbone} at temperature {generator.temperature:g}, "
        f"top-p {generator.top_p:g}."
    )


def _mismatch(engine: EngineLike) -> str:
    generator, backbone = engine.config.generator, engine.config.backbone.name
    if generator.backbone == backbone:
        return ""
    return note(f"The model was trained on answers of {generator.backbone}; {backbone} generated this one.")


def _said(error: Exception) -> str:
    if isinstance(error, LenVMError | LenVMClientError) and getattr(error, "code", "") != "internal":
        return problem(str(error))
    logger.error("the playground failed on a request", exc_info=error)
    return problem(_FAILED)
