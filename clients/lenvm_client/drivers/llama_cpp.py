"""Guided decoding with llama-cpp-python: ``generate`` here, or ``LenVMLogitsProcessor`` in its own calls, both hooks::

    guide = LenVMLogitsProcessor(decoder, request)
    llama.create_completion(ids, logits_processor=LogitsProcessorList([guide]),
                            stopping_criteria=StoppingCriteriaList([guide.stop]))

Checked against llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from llama_cpp import LogitsProcessorList, StoppingCriteriaList

from lenvm_client._core import OnError
from lenvm_client._steps import GuidanceReport, GuidedRow
from lenvm_client._types import CandidateScorer
from lenvm_client.drivers._host import GuidedRequest
from lenvm_client.errors import InvalidRequestError
from lenvm_client.guided import GuidedDecoder, TextAdapter

__all__ = ["GuidedRequest", "LenVMLogitsProcessor", "generate"]


class LenVMLogitsProcessor:
    """Draws the next token: it gets 0, all others -inf. One instance serves one answer.

    llama.cpp calls it from C, where an error would be printed and lost: it is kept, the step left unguided, and
    ``stop``, a stopping criterion, raises it. ``stop`` also ends the answer before an end id that llama.cpp itself
    knows nothing of.

    Args:
        request: objective, EOS and stop ids, and sampling parameters.
        prompt_tokens: length of the prompt; None: all that the first call is given.
    """

    def __init__(self, decoder: GuidedDecoder, request: GuidedRequest, *, prompt_tokens: int | None = None) -> None:
        self.decoder, self.request, self.prompt_tokens = decoder, request.seeded(), prompt_tokens
        self.error: BaseException | None = None
        self.drawn: int | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``input_ids`` [T] and logits ``scores`` [V], float32, changed in place."""
        try:
            return self._guided([int(token) for token in input_ids], scores)
        except BaseException as error:  # a KeyboardInterrupt too: raised in C it would be lost
            self.error, self.drawn = self.error or error, None
            return scores

    def _guided(self, prefix: list[int], scores: Any) -> Any:
        if self.prompt_tokens is None:
            self.prompt_tokens = len(prefix)
        request, generated = self.request, len(prefix) - self.prompt_tokens
        logits = scores.astype(np.float64) / (request.temperature or 1.0)
        highest = logits.max()
        logprobs = logits - (highest + np.log(np.exp(logits - highest).sum()))
        count = min(request.top_k, len(logprobs))
        ids = np.argpartition(-logprobs, count - 1)[:count]
        ids = ids[np.lexsort((ids, -logprobs[ids]))]
        ends = logprobs[list(request.end_ids)].tolist()
        row = request.row(prefix, generated, ids.tolist(), logprobs[ids].tolist(), ends)
        self.drawn = request.choose(self.decoder.step([row])[0], generated)
        scores[:] = -np.inf
        scores[self.drawn] = 0.0
        return scores

    def stop(self, input_ids: Any, logits: Any) -> bool:
        """Asked after each draw: True where it ended the answer. Raises the error of the draw."""
        if self.error is not None:
            raise self.error
        return self.drawn in self.request.end_ids


def generate(
    llama: Any,
    scorer: CandidateScorer,
    prompt_ids: Sequence[int],
    *,
    objective: Mapping[str, Any] | None,
    max_tokens: int,
    temperature: float = 0.7,
    top_k: int = 16,
    seed: int | None = None,
    stop_token_ids: Iterable[int] = (),
    on_error: OnError = "passthrough",
    text: TextAdapter | None = None,
) -> tuple[list[int], GuidanceReport]:
    """The content tokens of one answer, EOS not included, and the report.

    Args:
        llama: a ``llama_cpp.Llama``.
        prompt_ids: with the chat template, e.g. ``llama.tokenize(prompt, special=True, add_bos=False)``.
        objective: wire form; None is unguided, with the same sampler. temperature: 0 is greedy.
        top_k: candidates a step, beside the EOS and stop ids. Nothing else truncates.
        on_error, text: see ``GuidedDecoder``.

    Raises LenVMClientError: see ``GuidedDecoder``; InvalidRequestError for arguments that do not fit each other.
    """
    if getattr(llama, "draft_model", None) is not None:
        message = "speculative decoding cannot be guided: make the Llama without draft_model"
        raise InvalidRequestError(message, param="llama")
    if not prompt_ids or max_tokens < 1 or temperature < 0 or top_k < 1:
        raise InvalidRequestError("needs prompt ids, max_tokens and top_k of at least 1, temperature not below 0")
    if len(prompt_ids) + max_tokens > llama.n_ctx():
        message = f"{len(prompt_ids)} prompt tokens and {max_tokens} new ones do not fit into n_ctx {llama.n_ctx()}"
        raise InvalidRequestError(message, param="max_tokens")
    ends = tuple(dict.fromkeys((llama.token_eos(), *stop_token_ids)))
    decoder = GuidedDecoder(scorer, ends, on_error=on_error, text=text)
    decoder.start(sampled=temperature > 0)
    request = GuidedRequest(objective=objective, end_ids=ends, temperature=temperature, top_k=top_k, seed=seed)
    guide = LenVMLogitsProcessor(decoder, request, prompt_tokens=len(prompt_ids))
    answer: list[int] = []
    # Greedy: of the one token that is left, llama.cpp's own sampling takes nothing away.
    tokens = llama.generate(
        list(prompt_ids),
        temp=0.0,
        logits_processor=LogitsProcessorList([guide]),
        stopping_criteria=StoppingCriteriaList([guide.stop]),
    )
    for token in tokens:
        answer.append(int(token))
        if len(answer) == max_tokens:
            break
    tokens.close()
    ended = len(answer) < max_tokens and guide.drawn in ends
    whole = [*prompt_ids, *answer, *([guide.drawn] if ended and guide.drawn is not None else [])]
    row = GuidedRow(prefix=whole, generated=len(answer), objective=objective)
    return answer, decoder.report([row])
