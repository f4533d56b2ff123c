"""Guidance across tokenizers and units: a row in the backbone's tokens as the row that the value model is asked about.

Prefix and candidates go through text; lengths are converted by ratios that are measured on the row itself, first on
its prompt and then more and more on its answer. Both are estimates: reports name them under ``approximate``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lenvm_client._state import Recent, digests
from lenvm_client._steps import GuidedRow, log_sum
from lenvm_client.errors import InvalidRequestError

__all__ = ["UNITS", "TextAdapter", "View", "count_units"]

UNITS = ("tokens", "words", "characters", "sentences")
# How many units of the prompt count in a ratio, beside those of the answer.
_PRIOR = {"tokens": 32.0, "words": 16.0, "characters": 64.0, "sentences": 2.0}
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|(?:(?![{_CJK}])[^\\W_])+(?:['’-](?:(?![{_CJK}])[^\\W_])+)*")
# Where tokenizers cut a text themselves: before a space between a letter or digit and a word.
_CUT = re.compile(r"(?<=[^\W_])(?= [^\W\d_])")
_CHUNK = 256  # characters
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+")


def count_units(text: str, unit: str) -> float:
    """Words (a CJK character is one each), characters (all of them) or sentences of ``text``; a sentence that has not
    ended yet counts as half a one."""
    if unit == "characters":
        return float(len(text))
    if unit == "words":
        return float(sum(1 for _ in _WORD.finditer(text)))
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return len(ends) + 0.5 * bool(text[ends[-1] if ends else 0 :].strip())


@dataclass(frozen=True)
class View:
    """A row as it is asked about. ``places``: of each candidate of the row, its place among ``candidates``; None where
    no token of the value model stands for it."""

    prefix: Sequence[int]
    generated: int
    candidates: tuple[int, ...]
    logprobs: tuple[float, ...]
    objective: Mapping[str, Any] | None
    end_ids: tuple[int, ...]
    places: tuple[int | None, ...] | None = None  # None: one by one

    def spread(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Log-weights of ``candidates`` as those of the row's own. One without a stand-in gets the mean weight of the
        others under the backbone: it makes the answer neither longer nor shorter."""
        if self.places is None:
            return tuple(weights)
        others = [at for at, token in enumerate(self.candidates) if token not in self.end_ids]
        others = others or list(range(len(self.candidates)))
        mean = log_sum([self.logprobs[at] + weights[at] for at in others]) - log_sum([self.logprobs[k] for k in others])
        return tuple(mean if at is None else weights[at] for at in self.places)


class TextAdapter:
    """Lets ``GuidedDecoder`` guide a backbone whose tokenizer is not the value model's, and reach targets in words,
    characters or sentences (``"unit"`` beside the ``"target"`` or ``"lambda"`` of an objective; "tokens" are the
    backbone's own). Every step decodes the whole answer and encodes the end of it.

    Args:
        decode: ids of the backbone -> text, special tokens left out, spaces kept as they are.
        encode: text -> ids of the value model, no special tokens added. None: the backbone has the same tokenizer.
        encode_prompt: ids of a prompt of the backbone -> ids of the value model's prompt, e.g. the same messages in its
            own chat template. By default through text, which loses the template's special tokens.
        eos_id: the value model's EOS, which stands for every id that ends an answer; needed with ``encode``.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        encode: Callable[[str], Sequence[int]] | None = None,
        *,
        encode_prompt: Callable[[Sequence[int]], Sequence[int]] | None = None,
        eos_id: int | None = None,
        max_prompts: int = 1024,
    ) -> None:
        if encode is not None and eos_id is None:
            raise InvalidRequestError("another tokenizer needs the value model's eos_id", param="eos_id")
        self._decode, self._encode, self._encode_prompt, self._eos_id = decode, encode, encode_prompt, eos_id
        self._prompts: Recent[bytes, tuple[str, list[int]]] = Recent(max_prompts)
        self._first_ids: dict[int, int | None] = {}
        self._chunks: Recent[str, list[int]] = Recent(4 * max_prompts)
        self._splits: bool | None = None  # does the encoding of a text begin with those of its first words?

    @classmethod
    def from_tokenizers(cls, backbone: Any, model: Any = None) -> TextAdapter:
        """Of transformers' tokenizers; ``model``: the value model's, None where it has the backbone's."""

        def decode(ids: list[int]) -> str:
            return str(backbone.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        def encode(text: str) -> list[int]:
            return [int(token) for token in model.encode(text, add_special_tokens=False)]

        return cls(decode) if model is None else cls(decode, encode, eos_id=model.eos_token_id)

    def estimates(self, objective: Mapping[str, Any] | None) -> tuple[str, ...]:
        """What is estimated for a row of this objective: "tokenizer" and the unit, where they are not the model's."""
        unit = "tokens" if objective is None else str(objective.get("unit", "tokens"))
        return ("tokenizer",) * (self._encode is not None) + (unit,) * (unit != "tokens")

    def view(self, row: GuidedRow, ids: Sequence[int], logprobs: Sequence[float], end_ids: tuple[int, ...]) -> View:
        """``row`` with the candidates ``ids`` as the value model sees it."""
        start = len(row.prefix) - row.generated
        prompt, answer = row.prefix[:start], [int(token) for token in row.prefix[start:]]
        prompt_text, prompt_ids = self._prompt(prompt)
        text = self._decode(answer).rstrip("\ufffd")  # the last character may be incomplete
        answer_ids = answer if self._encode is None else self._encoded(text, self._encode)
        objective, ratio = row.objective, 1.0
        if objective is not None:
            unit = objective.get("unit", "tokens")
            if unit not in UNITS:
                raise InvalidRequestError(f"unit must be one of {', '.join(UNITS)}, not {unit!r}", param="unit")
            tokens = unit == "tokens"
            there = float(len(answer)) if tokens else count_units(text, unit)
            if not tokens or self._encode is not None:
                before = float(len(prompt)) if tokens else count_units(prompt_text, unit)
                share = min(1.0, _PRIOR[unit] / before) if before else 0.0
                units = before * share + there
                ratio = (len(prompt_ids) * share + len(answer_ids)) / units if units else 1.0
                ratio = ratio or 1.0
            objective = _converted(objective, ratio, there, len(answer_ids))
        prefix = [*prompt_ids, *answer_ids]
        if self._encode is None:
            return View(prefix, len(answer_ids), tuple(ids), tuple(logprobs), objective, end_ids)
        candidates, logs, ends, places = self._map(ids, logprobs, end_ids)
        return View(prefix, len(answer_ids), candidates, logs, objective, ends, places)

    def _encoded(self, text: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
        """A text grows at its end: what lies before is encoded once, in chunks."""
        if self._splits is None:
            self._splits = [*encode("one two")] == [*encode("one"), *encode(" two")]
        ids, start = list[int](), 0
        while self._splits and (cut := _CUT.search(text, start + _CHUNK)):
            chunk = text[start : cut.start()]
            known = self._chunks.get(chunk)
            if known is None:
                known = [int(token) for token in encode(chunk)]
                self._chunks.put(chunk, known)
            ids, start = ids + known, cut.start()
        return [*ids, *(int(token) for token in encode(text[start:]))]

    def _prompt(self, prompt: Sequence[int]) -> tuple[str, list[int]]:
        key = digests(prompt)[1]
        known = self._prompts.get(key)
        if known is None:
            text = self._decode([int(token) for token in prompt])
            if self._encode_prompt is not None:
                ids = self._encode_prompt(prompt)
            else:
                ids = prompt if self._encode is None else self._encode(text)
            known = (text, [int(token) for token in ids] or [self._eos_id or 0])
            self._prompts.put(key, known)
        return known

    def _map(
        self, ids: Sequence[int], logprobs: Sequence[float], end_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...], tuple[int | None, ...]]:
        """Candidates of the value model, each once, with what the backbone gives to all that it stands for."""
        found: dict[int, list[float]] = {}
        stand_ins: list[int | None] = []
        for token, logprob in zip(ids, logprobs, strict=True):
            stand_in = self._eos_id if token in end_ids else self._first_id(token)
            stand_ins.append(stand_in)
            if stand_in is not None:
                found.setdefault(stand_in, []).append(logprob)
        places = {token: at for at, token in enumerate(found)}
        logs = tuple(log_sum(each) for each in found.values())
        ends = () if self._eos_id is None else (self._eos_id,)
        return tuple(found), logs, ends, tuple(None if token is None else places[token] for token in stand_ins)

    def _first_id(self, token: int) -> int | None:
        """The value model's first token of a candidate's text."""
        if token not in self._first_ids:
            # Decoders drop a leading space: behind itself the token keeps it.
            piece = self._decode([token, token])[len(self._decode([token])) :]
            encoded = self._encode(piece) if self._encode is not None and piece and "\ufffd" not in piece else ()
            first = int(encoded[0]) if len(encoded) else None
            self._first_ids[token] = None if first == self._eos_id else first
        return self._first_ids[token]


def _converted(objective: Mapping[str, Any], ratio: float, there: float, generated: int) -> dict[str, Any]:
    """The objective in tokens of the value model: what is still to come is converted, what is there is counted."""
    out = {name: value for name, value in objective.items() if name != "unit"}
    if ratio == 1.0 and there == generated:
        return out
    if isinstance(out.get("target"), int | float):
        out["target"] = max(0, round(generated + (out["target"] - there) * ratio))
    if isinstance(out.get("lambda"), int | float):
        out["lambda"] = out["lambda"] / ratio
    return out
