"""Guided decoding over any OpenAI-compatible server with ``/v1/completions``, from outside: three loops.

``step`` asks for one token at a time with the log-probs of the ``top_k`` likeliest, guides them and sends the choice
back: the guided law itself, as far as the server tells log-probs. ``block`` lets the server write ``n`` continuations,
asks once what lengths their ends lead to, and keeps one: no log-probs needed, a call for ``block_tokens`` tokens.
``bias`` only moves the server's EOS by ``logit_bias``, anew for each block: for servers that tell nothing.

Prompts are sent as token ids, and ids are wanted back; servers differ in how they give them: llama.cpp's gives ``id``s
by itself, vLLM with ``extra_body={"return_tokens_as_token_ids": True}``. Else give ``token_id``, which finds the id of
a token's text, ``encode`` for the block loops, and ``decode`` where even prompts must be text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lenvm_client._core import OnError
from lenvm_client._steps import GuidanceReport, GuidedRow, RowReport, WeightedRow, log_sum, uniform
from lenvm_client._types import CandidateScorer
from lenvm_client.drivers._completions import Choice, Completions
from lenvm_client.errors import BadAnswerError, InvalidRequestError
from lenvm_client.guided import GuidedDecoder, TextAdapter

__all__ = ["Completions", "generate"]

LARGEST_BIAS = 100.0  # of OpenAI's API


def generate(
    completions: Completions,
    scorer: CandidateScorer,
    prompt_ids: Sequence[int],
    *,
    objective: Mapping[str, Any] | None,
    max_tokens: int,
    eos_ids: Sequence[int],
    loop: Literal["step", "block", "bias"] = "step",
    temperature: float = 0.7,
    top_k: int = 20,
    block_tokens: int = 16,
    n: int = 8,
    seed: int | None = None,
    on_error: OnError = "passthrough",
    text: TextAdapter | None = None,
) -> tuple[list[int], GuidanceReport]:
    """The content tokens of one answer, EOS not included, and the report (its steps are blocks in the block loops, and
    its text cost is then NaN).

    In the step loop log-probs are those of the ``top_k`` (servers allow up to 20, some fewer), brought to the
    temperature here and normalised over these; an EOS that is not among them counts with the most that it can have, so
    that the answer can end. ``temperature`` 0 is greedy there. ``eos_ids``: EOS first, then stop ids.

    Raises LenVMClientError: see ``Completions`` and ``GuidedDecoder``; InvalidRequestError for arguments that do not
    fit each other.
    """
    if not prompt_ids or not eos_ids or min(max_tokens, top_k, block_tokens, n) < 1 or temperature < 0:
        raise InvalidRequestError("needs prompt_ids, eos_ids, counts of at least 1, and a temperature not below 0")
    if loop != "step" and objective is not None and objective.get("method") == "paper":
        raise InvalidRequestError("the paper's rules compare candidates of one step: use loop='step'", param="loop")
    # A block of the answer, or what re-encoding a text changes.
    decoder = GuidedDecoder(scorer, eos_ids, on_error=on_error, text=text, max_append=max(8, block_tokens + 1))
    decoder.start(sampled=loop == "step" and temperature > 0)
    seed = random.getrandbits(63) if seed is None else seed
    run = _Run(completions, decoder, list(prompt_ids), objective, temperature, seed)
    if loop == "step":
        return run.steps(max_tokens, top_k)
    return run.blocks(max_tokens, block_tokens, n if loop == "block" else 1, biased=loop == "bias")


class _Run:
    def __init__(
        self,
        completions: Completions,
        decoder: GuidedDecoder,
        prompt: list[int],
        objective: Any,
        temperature: float,
        seed: int,
    ) -> None:
        self.completions, self.decoder, self.objective = completions, decoder, objective
        self.prompt, self.temperature, self.seed = prompt, temperature, seed

    def steps(self, max_tokens: int, top_k: int) -> tuple[list[int], GuidanceReport]:
        ends, answer, last = self.decoder.end_ids, list[int](), -1
        while len(answer) < max_tokens:
            prefix = [*self.prompt, *answer]
            # At temperature 1 log-probs are the same before and after it.
            options: dict[str, Any] = {"max_tokens": 1, "logprobs": top_k, "temperature": 1.0}
            (choice, *_) = self.completions(prefix, ends, **options)
            if choice.ended and not choice.top:  # some servers tell nothing about an EOS that they drew themselves
                options["logit_bias"] = {str(end): -LARGEST_BIAS for end in ends}
                (choice, *_) = self.completions(prefix, ends, **options)
            logs = _tempered(choice.top, ends, self.temperature or 1.0)
            row = GuidedRow(
                prefix=prefix,
                candidates=list(logs),
                logprobs=list(logs.values()),
                generated=len(answer),
                objective=self.objective,
            )
            (weighted,) = self.decoder.step([row])
            last = weighted.draw(uniform(self.seed, len(answer))) if self.temperature > 0 else weighted.best()
            if last in ends:
                break
            answer.append(last)
        whole = [*self.prompt, *answer, *([last] if last in ends else [])]
        row = GuidedRow(prefix=whole, generated=len(answer), objective=self.objective)
        return answer, self.decoder.report([row])

    def blocks(self, max_tokens: int, size: int, n: int, *, biased: bool) -> tuple[list[int], GuidanceReport]:
        ends, answer, steps, guided, ended = self.decoder.end_ids, list[int](), 0, 0, False
        asked = self.objective is not None
        if asked and self.objective.get("kind") == "scale":
            self.decoder.step([self._row(self.prompt, ends[0], 0)])  # resolved at the prompt boundary alone
        while len(answer) < max_tokens and not ended:
            prefix = [*self.prompt, *answer]
            options: dict[str, Any] = {"temperature": self.temperature, "n": n}
            if self.completions.encode is None:
                options["logprobs"] = 1  # for the ids
            options["max_tokens"] = min(size, max_tokens - len(answer))
            options["seed"] = int(uniform(self.seed, steps) * (1 << 31))
            bias = self._bias(prefix, len(answer)) if biased and asked and answer else None
            if bias is not None:
                options["logit_bias"] = {str(end): bias for end in ends}
            choices = self.completions(prefix, ends, **options)
            law = None if biased or not asked else self._law(prefix, choices, len(answer))
            kept = choices[0 if law is None else law.draw(uniform(self.seed, steps))]
            answer, ended = [*answer, *kept.ids], kept.ended or not kept.ids
            steps, guided = steps + 1, guided + (bias is not None or (law is not None and law.guided))
        report = RowReport(steps, guided, steps - guided if asked else 0, text_cost=math.nan)
        return answer, replace(self.decoder.report([]), rows=(report,))

    def _law(self, prefix: list[int], choices: Sequence[Choice], generated: int) -> WeightedRow:
        """Which continuation to keep. The server drew them from its own law: they are alike but for the log-weights of
        the states that they end in."""
        rows = []
        for choice in choices:
            # The last token is a candidate of all before it.
            whole = [*prefix, *choice.ids, *([self.decoder.end_ids[0]] if choice.ended or not choice.ids else [])]
            rows.append(self._row(whole[:-1], whole[-1], generated + len(whole) - len(prefix) - 1))
        weighted = self.decoder.step(rows)
        guided = all(each.guided for each in weighted)
        weights = tuple(each.log_weights[0] if guided else 0.0 for each in weighted)
        return WeightedRow(tuple(range(len(rows))), (0.0,) * len(rows), weights, guided)

    def _row(self, prefix: Sequence[int], token: int, generated: int) -> GuidedRow:
        """One candidate alone: its log-weight is that of the state that it leads to."""
        return GuidedRow(
            prefix=prefix, candidates=[token], logprobs=[0.0], generated=generated, objective=self.objective
        )

    def _bias(self, prefix: list[int], generated: int) -> float | None:
        """What ending here is worth against going on as the value model expects: the guided law's log-odds of EOS
        against the backbone's, as far as the value of this state is the mean of its children's."""
        here = self._row(prefix[:-1], prefix[-1], generated - 1)
        going, ending = self.decoder.step([here, self._row(prefix, self.decoder.end_ids[0], generated)])
        if not (going.guided and ending.guided):
            return None
        bias = ending.log_weights[0] - going.log_weights[0]
        return max(-LARGEST_BIAS, min(LARGEST_BIAS, bias))


def _tempered(top: Mapping[int, float], ends: Sequence[int], temperature: float) -> dict[int, float]:
    """Log-probs at a temperature, over the tokens that are known, EOS ids among them."""
    logs = {token: logprob for token, logprob in top.items() if logprob > -math.inf}
    if not logs:
        raise BadAnswerError("the server sends no log-probs: use loop='block' or loop='bias'")
    rest = 1.0 - math.fsum(math.exp(logprob) for logprob in logs.values())
    if ends[0] not in logs and rest > 0.0:
        logs[ends[0]] = min(math.log(rest), *logs.values())
    scaled = {token: logprob / temperature for token, logprob in logs.items()}
    total = log_sum(list(scaled.values()))
    return {token: value - total for token, value in scaled.items()}
