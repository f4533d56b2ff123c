"""Guidance of a backbone with another tokenizer than the value model's, and targets in words, characters, sentences.

The value model here reads characters (id = 100 + their order); the backbone writes whole words, and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm_client import (
    CandidateInput,
    CandidateScores,
    GuidedDecoder,
    GuidedRow,
    InvalidRequestError,
    RowError,
    TextAdapter,
)
from lenvm_client._text import count_units
from lenvm_client.guided import uniform
from tests.unit.client_fakes import FakeScorer

MODEL_EOS, EOS, STOP = 2, 0, 1
# Of the backbone. The last two are the halves of one character.
PIECES: list[bytes] = [b"", b"", b"ab ", b"cde ", b"f ", b"g. ", b"a", *("é".encode()[at : at + 1] for at in (0, 1))]
HALF, OTHER_HALF = 7, 8
TILT = {"kind": "tilt", "lambda": 0.5}


def decode(ids: Sequence[int]) -> str:
    return b"".join(PIECES[token] for token in ids).decode(errors="replace")


def encode(text: str) -> list[int]:
    return [100 + ord(character) for character in text]


def adapter(**options: Any) -> TextAdapter:
    return TextAdapter(decode, encode, **{"eos_id": MODEL_EOS, **options})


def row(prefix: Sequence[int], generated: int, objective: Mapping[str, Any] = TILT, **more: Any) -> GuidedRow:
    fields: dict[str, Any] = {"candidates": [2, 3, 6, EOS], "logprobs": [-1.0, -2.0, -1.5, -3.0], **more}
    return GuidedRow(prefix=prefix, generated=generated, objective=objective, **fields)


@pytest.mark.parametrize(
    ("text", "words", "sentences"),
    [
        ("", 0, 0),
        ("One two-three, don't!", 3, 1),
        ("Yes. No", 2, 1.5),
        ('He said "No." Then 3.5 left...', 7, 2),
        ("我们走。去 Berlin吗？", 6, 2),
        ("  \n ", 0, 0),
        ("ÀB c_d", 3, 0.5),
    ],
)
def test_units_are_counted_on_the_text(text: str, words: float, sentences: float) -> None:
    assert count_units(text, "words") == words
    assert count_units(text, "sentences") == sentences
    assert count_units(text, "characters") == len(text)


class TestOtherTokenizer:
    def test_prefix_and_candidates_go_through_text(self) -> None:
        scorer = FakeScorer()
        decoder = GuidedDecoder(scorer, [EOS], [STOP], text=adapter())
        (weighted,) = decoder.step([row([2, 4, 3], 1, {**TILT, "min_eos_prob": 1e-9})])
        ((sent,),) = scorer.calls
        assert sent.token_ids == encode("ab f cde ")
        assert sent.generated == len("cde ")
        assert sent.eos_ids == (MODEL_EOS,)
        # "ab " and "a" begin with the same character: one candidate, with the chance of both.
        assert sent.candidates == (100 + ord("a"), 100 + ord("c"), MODEL_EOS)
        assert sent.logprobs == pytest.approx((math.log(math.exp(-1.0) + math.exp(-1.5)), -2.0, -3.0))
        prefix = encode("ab f cde ")
        weights = {token: FakeScorer.weight(prefix, token, sent.objective or {}) for token in sent.candidates}
        a, c = 100 + ord("a"), 100 + ord("c")
        assert weighted.ids == (2, 3, 6, EOS)
        assert weighted.log_weights == pytest.approx((weights[a], weights[c], weights[a], weights[MODEL_EOS]))
        assert weighted.guided

    def test_sessions_are_gone_on_from_with_several_tokens_or_none(self) -> None:
        scorer = FakeScorer()
        decoder = GuidedDecoder(scorer, [EOS], text=adapter())
        for generated, answer in enumerate(([], [3], [3, HALF], [3, HALF, OTHER_HALF])):
            decoder.step([row([2, *answer], generated)])
        rows = [call[0] for call in scorer.calls]
        assert [None if each.token_ids is None else list(each.token_ids) for each in rows] == [
            encode("ab "),
            *[None] * 3,
        ]
        # Half a character is not there yet.
        assert [list(each.append) for each in rows] == [[], encode("cde "), [], encode("é")]
        assert [each.generated for each in rows] == [0, 4, 4, 5]
        report = decoder.report([row([2, 3, HALF, OTHER_HALF, 2], 4)])
        assert report.approximate == ("tokenizer",)
        assert report.to_dict()["approximate"] == ["tokenizer"]
        assert report.rows[0].guided_steps == 4

    @pytest.mark.parametrize("splits", [True, False])
    def test_a_long_answer_is_encoded_at_its_end_alone(self, splits: bool) -> None:
        """A tokenizer whose words do not stand for themselves is asked for the whole text."""
        asked: list[int] = []

        def count(text: str) -> list[int]:
            asked.append(len(text))
            return [*([] if splits else [99]), *encode(text)]

        decoder = TextAdapter(decode, count, eos_id=MODEL_EOS)
        answer = [3, 2, 5, 4] * 100
        for length in range(300, 400):
            view = decoder.view(row([2, *answer[:length]], length), [2], [-1.0], (EOS,))
            assert list(view.prefix) == [*count("ab "), *count(decode(answer[:length]))]
        asked.clear()
        decoder.view(row([2, *answer], 400), [2], [-1.0], (EOS,))
        longest = len(decode(answer))
        assert (sum(asked) < 300) if splits else asked == [longest]

    def test_an_encoding_that_changes_its_last_tokens_costs_a_few_of_them(self) -> None:
        """As byte pairs merge: "de" is one token as soon as both are there."""

        def merging(text: str) -> list[int]:
            return encode(text.replace("de", "\u0100"))

        pieces = {10: "xyzd", 11: "e", 12: "q"}
        scorer = FakeScorer()
        text = TextAdapter(lambda ids: "".join(pieces[each] for each in ids), merging, eos_id=MODEL_EOS)
        decoder = GuidedDecoder(scorer, [EOS], text=text)
        for generated, answer in enumerate(([], [12], [12, 10], [12, 10, 11])):
            decoder.step([row([12, *answer], generated, candidates=[11, 12], logprobs=[-1.0, -1.0])])
        last = scorer.calls[-1][0]
        assert scorer.prefixes[-1] == [tuple(merging("qqxyzde"))]
        assert last.token_ids is None  # goes on from "qq", not from "qqxyzd"
        assert list(last.append) == merging("xyzde")

    def test_a_candidate_without_a_stand_in_takes_the_mean_weight(self) -> None:
        scorer = FakeScorer()
        asked = row([2, 3], 1, candidates=[2, 3, HALF, EOS], logprobs=[-1.0, -2.0, -1.2, -3.0])
        (weighted,) = GuidedDecoder(scorer, [EOS], text=adapter()).step([asked])
        one, other, free, _ = weighted.log_weights
        share = math.exp(-1.0) / (math.exp(-1.0) + math.exp(-2.0))
        assert math.exp(free) == pytest.approx(share * math.exp(one) + (1 - share) * math.exp(other))

    def test_a_prompt_of_its_own_template(self) -> None:
        scorer = FakeScorer()
        seen: list[Sequence[int]] = []

        def prompt(ids: Sequence[int]) -> list[int]:
            seen.append(list(ids))
            return [7, 8, 9]

        decoder = GuidedDecoder(scorer, [EOS], text=adapter(encode_prompt=prompt))
        for generated, answer in enumerate(([], [3], [3, 4])):
            decoder.step([row([2, *answer], generated)])
        assert scorer.prefixes[-1] == [(7, 8, 9, *encode("cde f "))]
        assert seen == [[2]]

    def test_a_scale_is_resolved_in_the_model_s_own_tokens(self) -> None:
        scorer = FakeScorer()
        scale = {"kind": "scale", "factor": 0.5}
        decoder = GuidedDecoder(scorer, [EOS], text=adapter())
        decoder.step([row([2], 0, scale)])
        decoder.step([row([2, 3], 1, scale)])
        assert scorer.calls[0][0].objective == scale
        assert scorer.calls[1][0].objective == {"kind": "tilt", "lambda": 0.01 * sum(encode("ab "))}

    def test_a_unit_needs_an_adapter(self) -> None:
        scorer = FakeScorer()
        decoder = GuidedDecoder(scorer, [EOS])
        with pytest.raises(InvalidRequestError, match="give the decoder a TextAdapter"):
            decoder.step([row([2], 0, {"kind": "equal_to", "target": 5, "unit": "words"})])
        decoder.step([row([2], 0, {"kind": "equal_to", "target": 5, "unit": "tokens"})])
        assert scorer.calls[0][0].objective == {"kind": "equal_to", "target": 5}

    def test_arguments(self) -> None:
        with pytest.raises(InvalidRequestError, match="eos_id"):
            TextAdapter(decode, encode)
        decoder = GuidedDecoder(FakeScorer(), [EOS], text=TextAdapter(decode))
        with pytest.raises(InvalidRequestError, match="unit must be"):
            decoder.step([row([2], 0, {"kind": "equal_to", "target": 5, "unit": "pages"})])


class TestTargets:
    @pytest.mark.parametrize(
        ("unit", "prefix", "generated", "expected"),
        [
            # Prompt "ab f " (5 characters, 2 tokens, 2 words), answer "cde f " (6 characters, 2 tokens, 2 words).
            ("tokens", [2, 4, 3, 4], 2, 6 + (20 - 2) * 11 / 4),
            ("words", [2, 4, 3, 4], 2, 6 + (20 - 2) * 11 / 4),
            ("characters", [2, 4, 3, 4], 2, 20),
            ("tokens", [2, 4], 0, 20 * 5 / 2),
            ("sentences", [5, 5, 5, 5], 2, 6 + (20 - 2) * 12 / 4),
        ],
    )
    def test_what_is_to_come_is_converted_by_the_running_ratio(
        self, unit: str, prefix: list[int], generated: int, expected: float
    ) -> None:
        scorer = FakeScorer()
        objective = {"kind": "equal_to", "target": 20, "unit": unit, "tolerance": 0.1}
        GuidedDecoder(scorer, [EOS], text=adapter()).step([row(prefix, generated, objective)])
        assert scorer.calls[0][0].objective == {"kind": "equal_to", "target": round(expected), "tolerance": 0.1}

    def test_a_long_prompt_counts_no_more_than_a_few_units(self) -> None:
        scorer = FakeScorer()
        objective = {"kind": "equal_to", "target": 100, "unit": "words"}
        prompt, answer = [3] * 1000, [4] * 50
        GuidedDecoder(scorer, [EOS], text=adapter()).step([row([*prompt, *answer], 50, objective)])
        ratio = (16 * 4 + 50 * 2) / (16 + 50)
        sent = scorer.calls[0][0].objective
        assert sent is not None
        assert sent["target"] == round(50 * 2 + 50 * ratio)

    def test_a_target_that_is_passed_is_never_below_zero(self) -> None:
        scorer = FakeScorer()
        objective = {"kind": "at_most", "target": 1, "unit": "words"}
        GuidedDecoder(scorer, [EOS], text=adapter()).step([row([3] * 60, 50, objective)])
        sent = scorer.calls[0][0].objective
        assert sent is not None
        assert 0 <= sent["target"] < 50

    def test_a_tilt_is_a_rate(self) -> None:
        scorer = FakeScorer()
        GuidedDecoder(scorer, [EOS], text=adapter()).step([row([2, 4], 0, {**TILT, "unit": "words"})])
        assert scorer.calls[0][0].objective == {"kind": "tilt", "lambda": pytest.approx(0.5 / 2.5)}

    def test_words_of_a_backbone_with_the_same_tokenizer(self) -> None:
        """Ids pass as they are, one new token a step; only the target is converted."""
        scorer = FakeScorer()
        objective = {"kind": "equal_to", "target": 20, "unit": "words"}
        decoder = GuidedDecoder(scorer, [EOS], text=TextAdapter(decode))
        decoder.step([row([2, 4], 0, objective)])
        decoder.step([row([2, 4, 3], 1, objective)])
        first, second = (call[0] for call in scorer.calls)
        assert list(first.token_ids or ()) == [2, 4]
        assert (second.token_ids, second.append) == (None, (3,))
        assert second.candidates == (2, 3, 6, EOS)
        assert second.eos_ids == (EOS,)
        assert decoder.report([row([2, 4, 3], 1, objective), row([2, 4, 3], 1)]).approximate == ("words",)
        assert decoder.report([row([2, 4, 3], 1)]).approximate == ()


class Controller(FakeScorer):
    """Knows how long an answer is wanted, in its own tokens: ends there, and not before."""

    def _row(self, index: int, row: CandidateInput) -> CandidateScores | RowError:
        answer = super()._row(index, row)
        assert isinstance(answer, CandidateScores)
        assert row.objective is not None
        assert row.objective["kind"] == "equal_to"
        target = row.objective["target"]
        assert isinstance(target, int)
        early, late = row.generated - target, -1000.0 * (row.generated >= target)
        weights = tuple(-abs(early) / max(1.0, 0.05 * target) if at in row.eos_ids else late for at in row.candidates)
        return CandidateScores(
            index=index, values=answer.values, horizons=answer.horizons, log_weights=weights, session=answer.session
        )


@pytest.mark.parametrize("unit", ["tokens", "words", "characters", "sentences"])
def test_a_target_is_reached(unit: str) -> None:
    """A backbone that writes words of different lengths at random and would end after about 30 tokens."""
    target = {"tokens": 40, "words": 60, "characters": 200, "sentences": 12}[unit]
    law = {2: 0.3, 3: 0.3, 4: 0.1, 5: 0.27, EOS: 0.03}
    objective = {"kind": "equal_to", "target": target, "unit": unit}
    off = []
    for seed in range(6):
        decoder = GuidedDecoder(Controller(), [EOS], text=adapter(), on_error="raise")
        answer: list[int] = []
        while len(answer) < 200:
            asked = row(
                [2, 3, 5, *answer],
                len(answer),
                objective,
                candidates=list(law),
                logprobs=[math.log(p) for p in law.values()],
            )
            token = decoder.step([asked])[0].draw(uniform(seed, len(answer)))
            if token == EOS:
                break
            answer.append(token)
        reached = float(len(answer)) if unit == "tokens" else count_units(decode(answer), unit)
        off.append(abs(reached - target) / target)
    assert max(off) <= 0.25
    assert sum(off) / len(off) <= 0.12


def test_hf_counts_words(tiny_backbone: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lenvm_client.drivers.hf import generate

    model = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone)
    text = TextAdapter(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
    scorer = FakeScorer()
    objective = {"kind": "equal_to", "target": 4, "unit": "words"}
    out, report = generate(
        model,
        scorer,
        torch.tensor([tokenizer.encode("How many words? ")]),
        objectives=objective,
        seeds=[1],
        max_new_tokens=12,
        pad_token_id=0,
        text=text,
    )
    assert report.approximate == ("words",)
    assert report.guided_steps == report.steps == len(scorer.calls) > 1
    assert all(row.objective and "unit" not in row.objective for call in scorer.calls for row in call)
    assert out.shape[1] > len("How many words? ")
