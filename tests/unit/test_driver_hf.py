"""The transformers driver on the tiny backbone, with a scorer whose log-weights tell every prefix apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from lenvm.decoding import Candidates, Request, Sampler, SamplingParams
from lenvm_client import (
    GuidanceReport,
    GuidedDecoder,
    InvalidRequestError,
    ServiceUnreachableError,
    TextAdapter,
    resample,
)
from lenvm_client.drivers.hf import LenVMLogitsProcessor, generate
from tests.unit.client_fakes import FakeScorer

EOS, STOP, PAD = 2, 40, 0
TILT = {"kind": "tilt", "lambda": 0.5}
OTHER = {"kind": "at_most", "target": 7}
SCALE = {"kind": "scale", "factor": 0.5}
PROMPTS = [[1, 30, 31, 32, 33], [1, 50], [1, 60, 61, 62], [1, 50]]
OBJECTIVES = [TILT, None, OTHER, SCALE]


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_backbone)


def padded(prompts: Sequence[Sequence[int]], pad: int = PAD, width: int = 0) -> dict[str, torch.Tensor]:
    width = max(width, *map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def answers(sequences: torch.Tensor, width: int, ends: Sequence[int] = (EOS,)) -> list[list[int]]:
    """What was generated, up to and with the token that ended it."""
    out = []
    for row in sequences[:, width:].tolist():
        end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        out.append(row[:end])
    return out


def next_logits(model: Any, prefix: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(prefix)])).logits[0, -1].double()


def law(
    model: Any,
    prefix: Sequence[int],
    objective: Mapping[str, Any] | None,
    *,
    temperature: float,
    top_k: int,
    ends: Sequence[int],
    banned: Sequence[int] = (),
) -> dict[int, tuple[float, float]]:
    """Candidates with (log p, log q), both over the candidates."""
    logits = next_logits(model, prefix)
    logits[list(banned)] = -torch.inf
    logp = torch.log_softmax(logits / temperature, -1)
    ids = sorted({*logp.topk(top_k).indices.tolist(), *ends})
    base = logp[ids]
    weights = [0.0 if objective is None else FakeScorer.weight(prefix, token, objective) for token in ids]
    guided = base + torch.tensor(weights, dtype=torch.float64)
    p, q = (torch.log_softmax(x, -1).tolist() for x in (base, guided))
    return {token: (a, b) for token, a, b in zip(ids, p, q, strict=True)}


def run(
    model: Any, scorer: Any, prompts: Sequence[Sequence[int]], **options: Any
) -> tuple[list[list[int]], GuidanceReport]:
    inputs = padded(prompts)
    options = {"temperature": 0.8, "top_k": 6, "max_new_tokens": 24, "pad_token_id": PAD, **options}
    sequences, report = generate(model, scorer, inputs, **options)
    ends = (EOS, *options.get("stop_token_ids", ()))
    return answers(sequences, inputs["input_ids"].shape[1], ends), report


class TestResampling:
    """One of several answers: which, and what is told of it."""

    WANTED = (
        {"kind": "at_most", "target": 7},
        {"kind": "tilt", "lambda": 0.2},
        None,
        {"kind": "at_least", "target": 9},
    )

    def test_one_of_each_prompts_answers_is_drawn_by_its_weight(self, model: Any) -> None:
        seeds = list(range(100, 112))
        options: dict[str, Any] = {"stop_token_ids": (STOP,), "seeds": seeds}
        wanted = [objective for objective in self.WANTED for _ in range(3)]
        every, told = run(model, FakeScorer(), [p for p in PROMPTS for _ in range(3)], objectives=wanted, **options)
        found, report = run(model, FakeScorer(), PROMPTS, objectives=self.WANTED, resample=3, **options)
        assert len(found) == len(report.rows) == 4
        for at, (answer, objective) in enumerate(zip(found, self.WANTED, strict=True)):
            own, rows = every[3 * at : 3 * at + 3], told.rows[3 * at : 3 * at + 3]
            if objective is None:
                assert (answer, report.rows[at]) == (own[0], rows[0])
                continue
            lengths = [len(each) - (each[-1] in (EOS, STOP)) for each in own]
            expected = resample(objective, lengths, [row.text_cost for row in rows], rng=Random(seeds[3 * at]))
            assert answer == own[expected.index]
            assert report.rows[at].text_cost == pytest.approx(expected.text_cost)
            assert report.rows[at].steps == len(answer)

    def test_without_seeds_torch_draws(self, model: Any) -> None:
        def once(seed: int) -> Any:
            torch.manual_seed(seed)
            found, report = run(model, FakeScorer(), PROMPTS[:2], objectives=TILT, resample=4)
            return found, report.rows

        assert once(3) == once(3)
        assert len({str(once(seed)) for seed in range(4)}) > 1

    def test_what_does_not_fit(self, model: Any) -> None:
        words = TextAdapter(lambda ids: " ".join(map(str, ids)))
        for options, message in (
            ({"resample": 0}, "at least 1"),
            ({"resample": 2, "num_beams": 2}, "num_beams"),
            ({"resample": 2, "num_return_sequences": 2}, "num_return_sequences"),
            ({"resample": 2, "temperature": 0.0}, "finite"),
            ({"resample": 2, "objectives": SCALE}, "posterior"),
            ({"resample": 2, "return_dict_in_generate": True}, "return_dict_in_generate"),
            ({"resample": 2, "seeds": [1, 2]}, "seeds"),
            ({"resample": 2, "objectives": {**OTHER, "unit": "words"}, "text": words}, "by their tokens"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                run(model, FakeScorer(), PROMPTS[:2], **{"objectives": TILT, "max_new_tokens": 4, **options})


class After(StoppingCriteria):  # type: ignore[misc]
    """Ends row 0 at a length, as a stop string would."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= self.length] + [False] * (len(input_ids) - 1))


class TestTheLaw:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
    def test_log_weights_are_applied_exactly(self, model: Any, temperature: float) -> None:
        """After the temperature that follows, the law of the next token is q: candidates alone, p exp(weight)."""
        decoder = GuidedDecoder(FakeScorer(), [EOS])
        inputs = padded(PROMPTS[:3])
        processor = LenVMLogitsProcessor(
            decoder, OBJECTIVES[:3], temperature=temperature, top_k=5, attention_mask=inputs["attention_mask"]
        )
        scores = torch.stack([next_logits(model, prompt) for prompt in PROMPTS[:3]]).float()
        out = torch.softmax(processor(inputs["input_ids"], scores) / temperature, -1)
        for at, (prompt, objective) in enumerate(zip(PROMPTS[:3], OBJECTIVES[:3], strict=True)):
            expected = torch.zeros(128)
            for token, (_, q) in law(model, prompt, objective, temperature=temperature, top_k=5, ends=[EOS]).items():
                expected[token] = math.exp(q)
            torch.testing.assert_close(out[at], expected, rtol=1e-4, atol=1e-6)

    def test_generate_leaves_the_law_alone(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the model's own truncation nor a default one cuts after us: what is sampled from is q."""
        for name, value in {"top_p": 0.5, "top_k": 2, "min_p": 0.4, "typical_p": 0.4, "epsilon_cutoff": 0.3}.items():
            monkeypatch.setattr(model.generation_config, name, value)
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(
            torch, "multinomial", lambda probs, **_: seen.append(probs.clone()) or probs.argmax(-1, True)
        )
        generate(model, FakeScorer(), torch.tensor([PROMPTS[0]]), objectives=TILT, temperature=0.6, max_new_tokens=1)
        expected = law(model, PROMPTS[0], TILT, temperature=0.6, top_k=16, ends=[EOS])
        assert set(seen[0][0].nonzero()[:, 0].tolist()) == set(expected)
        for token, (_, q) in expected.items():
            assert seen[0][0, token].item() == pytest.approx(math.exp(q), rel=1e-4)

    def test_sampled_frequencies(self, model: Any) -> None:
        """Through the whole of ``generate``, 4,000 draws of the next token."""
        count = 4000
        torch.manual_seed(3)
        out, _ = generate(
            model,
            FakeScorer(),
            torch.tensor([PROMPTS[0]]),
            objectives=TILT,
            temperature=0.9,
            top_k=5,
            max_new_tokens=1,
            num_return_sequences=count,
        )
        drawn = torch.bincount(out[:, -1], minlength=128) / count
        expected = law(model, PROMPTS[0], TILT, temperature=0.9, top_k=5, ends=[EOS])
        for token in range(128):
            q = math.exp(expected[token][1]) if token in expected else 0.0
            assert abs(drawn[token].item() - q) <= 5 * math.sqrt(q * (1 - q) / count)

    def test_greedy_takes_the_best_at_temperature_one(self, model: Any) -> None:
        for options in ({"temperature": 0.0}, {"do_sample": False}):
            out, report = run(model, FakeScorer(), PROMPTS[:3], objectives=OBJECTIVES[:3], max_new_tokens=12, **options)
            for prompt, objective, answer in zip(PROMPTS, OBJECTIVES, out, strict=False):
                prefix = list(prompt)
                for token in answer:
                    laws = law(model, prefix, objective, temperature=1.0, top_k=6, ends=[EOS])
                    assert token == max(laws, key=lambda t: laws[t][1])
                    prefix.append(token)
            assert math.isnan(report.text_cost)
            assert report.guided_steps == len(out[0]) + len(out[2])


class TestRows:
    def test_a_batch_is_its_rows_alone(self, model: Any) -> None:
        seeds = [11, 12, 13, 14]
        together, report = run(model, FakeScorer(), PROMPTS, objectives=OBJECTIVES, seeds=seeds)
        for at, prompt in enumerate(PROMPTS):
            alone, own = run(model, FakeScorer(), [prompt], objectives=[OBJECTIVES[at]], seeds=[seeds[at]])
            assert alone == [together[at]]
            assert own.rows[0].steps == report.rows[at].steps == len(together[at])
            assert own.rows[0].text_cost == pytest.approx(report.rows[at].text_cost, abs=1e-4)
        assert len({len(answer) for answer in together}) > 1  # some ended while others went on

    def test_the_sampler_of_lenvm_draws_the_same(self, model: Any, tiny_backbone: Path) -> None:
        """Same seeds, same candidates, same weights: in-process sampling and ``generate`` agree token by token."""
        from lenvm.backbones import load_backbone

        class Guide:
            def __init__(self) -> None:
                self.prefixes: dict[int, list[int]] = {}

            def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
                self.prefixes |= {row: list(prompt) for row, prompt in zip(rows, prompts, strict=True)}

            def log_weights(self, rows: Sequence[int], candidates: Candidates) -> Any:
                weights = torch.zeros(candidates.ids.shape, dtype=torch.float64).numpy()
                for at, row in enumerate(rows):
                    for k, token in enumerate(candidates.ids[at].tolist()):
                        weights[at, k] = FakeScorer.weight(self.prefixes[row], token, TILT)
                return weights

            def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
                for row, token in zip(rows, tokens, strict=True):
                    self.prefixes[row].append(token)

            def finish(self, rows: Sequence[int]) -> None:
                pass

        sampler = Sampler(load_backbone(tiny_backbone), eos_ids=[EOS])
        params = SamplingParams(temperature=0.8, top_k=6, max_new_tokens=24)
        requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        theirs = sampler.generate(requests, params, guide=Guide())
        ours, report = run(model, FakeScorer(), PROMPTS, objectives=TILT, seeds=range(4))
        for generation, answer, row in zip(theirs, ours, report.rows, strict=True):
            assert answer == generation.token_ids + [EOS] * generation.finished
            assert row.text_cost == pytest.approx(generation.text_cost, abs=1e-4)
            assert row.forced_stop == generation.forced_stop

    @pytest.mark.parametrize("pad", [PAD, EOS, 77])
    def test_padding_changes_nothing_and_is_never_sent(self, model: Any, pad: int) -> None:
        tight, _ = run(model, FakeScorer(), PROMPTS[1:2], objectives=TILT, seeds=[5])
        scorer = FakeScorer()
        inputs = padded(PROMPTS[1:3], pad, width=11)
        out, _ = generate(
            model,
            scorer,
            inputs,
            objectives=[TILT, OTHER],
            temperature=0.8,
            top_k=6,
            max_new_tokens=24,
            pad_token_id=pad,
            seeds=[5, 6],
        )
        assert answers(out, 11)[0] == tight[0]
        for prefix in (prefix for call in scorer.prefixes for prefix in call):
            assert any(prefix[: len(p)] == tuple(p) for p in PROMPTS[1:3])
            assert EOS not in prefix

    def test_without_a_mask_the_pad_id_says_it(self, model: Any) -> None:
        expected, _ = run(model, FakeScorer(), PROMPTS[:3], objectives=OBJECTIVES[:3], seeds=[1, 2, 3])
        scorer = FakeScorer()
        ids = padded(PROMPTS[:3])["input_ids"]
        options = {"temperature": 0.8, "top_k": 6, "max_new_tokens": 24}
        out, _ = generate(model, scorer, ids, objectives=OBJECTIVES[:3], pad_token_id=PAD, seeds=[1, 2, 3], **options)
        assert answers(out, 5) == expected
        assert scorer.prefixes[0] == [tuple(PROMPTS[0]), tuple(PROMPTS[2])]
        # An id that ends answers may well begin a prompt: it is no padding then.
        generate(model, scorer, torch.tensor([[EOS, 50]]), objectives=TILT, pad_token_id=EOS, **options)
        assert any((EOS, 50) in call for call in scorer.prefixes)

    def test_eos_is_always_a_candidate_and_stop_ids_end_too(self, model: Any) -> None:
        rare = min(range(3, 128), key=lambda token: next_logits(model, PROMPTS[0])[token].item())

        class Force(FakeScorer):
            @staticmethod
            def weight(prefix: Sequence[int], token: int, objective: Mapping[str, Any]) -> float:
                return 100.0 if token == objective["target"] else 0.0

        for end in (EOS, STOP, rare):
            scorer = Force()
            goal = {"kind": "equal_to", "target": end}
            out, report = run(
                model,
                scorer,
                PROMPTS[:1],
                objectives=goal,
                stop_token_ids=[STOP, rare],
                eos_token_id=[EOS],
                max_new_tokens=9,
            )
            assert out == [[end]]
            assert scorer.calls[0][0].eos_ids == (EOS, STOP, rare)
            assert {EOS, STOP, rare} <= set(scorer.calls[0][0].candidates)
            assert report.steps == 1
            p = torch.softmax(next_logits(model, PROMPTS[0]) / 0.8, -1)
            assert report.forced_stops == (p[[EOS, STOP, rare]].sum().item() < 1e-3)
            assert report.text_cost == pytest.approx(-math.log(p[end] / p[list(scorer.calls[0][0].candidates)].sum()))

    def test_finished_rows_cost_nothing(self, model: Any) -> None:
        scorer = FakeScorer()
        out, report = run(model, scorer, PROMPTS, objectives=[TILT, TILT, OTHER, SCALE], seeds=[11, 12, 13, 14])
        lengths = [len(answer) for answer in out]
        assert min(lengths) < max(lengths)
        for step, call in enumerate(scorer.calls):
            assert len(call) == sum(length > step for length in lengths)
        assert len(scorer.calls) == report.calls == max(lengths)
        assert [row.steps for row in report.rows] == lengths
        assert all(len(item.append) == 1 for call in scorer.calls[1:] for item in call)

    def test_several_sequences_of_a_prompt(self, model: Any) -> None:
        scorer = FakeScorer()
        seeds = [1, 2, 3, 4, 5, 6]
        out, report = run(model, scorer, PROMPTS[:2], objectives=[TILT, OTHER], num_return_sequences=3, seeds=seeds)
        assert len(out) == len(report.rows) == 6
        for at, answer in enumerate(out):
            alone, _ = run(
                model, FakeScorer(), PROMPTS[at // 3 :][:1], objectives=[[TILT, OTHER][at // 3]], seeds=[seeds[at]]
            )
            assert answer == alone[0]

    def test_text_cost_is_that_of_the_law(self, model: Any) -> None:
        torch.manual_seed(0)
        out, report = run(model, FakeScorer(), PROMPTS[:3], objectives=OBJECTIVES[:3])
        for prompt, objective, answer, row in zip(PROMPTS, OBJECTIVES, out, report.rows, strict=False):
            prefix, cost = list(prompt), 0.0
            for token in answer:
                p, q = law(model, prefix, objective, temperature=0.8, top_k=6, ends=[EOS])[token]
                cost += q - p
                prefix.append(token)
            assert row.text_cost == pytest.approx(cost, abs=1e-4)


class TestBeams:
    def test_beams_are_searched_under_q(self, model: Any) -> None:
        """Against a plain beam search over log q (fixed length: nothing may end before)."""
        scorer, width, steps = FakeScorer(), 3, 5
        beams = [(0.0, list(PROMPTS[0]))]
        for _ in range(steps):
            grown = [
                (score + q, [*prefix, token])
                for score, prefix in beams
                for token, (_, q) in law(model, prefix, TILT, temperature=1.0, top_k=6, ends=[], banned=[EOS]).items()
            ]
            beams = sorted(grown, reverse=True)[:width]
        out, report = generate(
            model,
            scorer,
            torch.tensor([PROMPTS[0]]),
            objectives=TILT,
            do_sample=False,
            top_k=6,
            num_beams=width,
            num_return_sequences=width,
            min_new_tokens=steps,
            max_new_tokens=steps,
            pad_token_id=PAD,
        )
        assert out.tolist() == [prefix for _, prefix in beams]
        assert [row.steps for row in report.rows] == [steps] * width
        assert [row.guided_steps for row in report.rows] == [steps] * width
        assert math.isnan(report.text_cost)
        # However the beams were reordered, every row after the first step was one token on a known session.
        assert len(scorer.calls) == steps
        assert all(len(item.append) == 1 for call in scorer.calls[1:] for item in call)

    def test_a_batch_of_beams_with_several_objectives(self, model: Any) -> None:
        options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 12}
        together, report = run(model, FakeScorer(), PROMPTS[:3], objectives=OBJECTIVES[:3], **options)
        assert len(report.rows) == 6
        for at in range(3):
            alone, own = run(model, FakeScorer(), [PROMPTS[at]], objectives=[OBJECTIVES[at]], **options)
            assert together[2 * at : 2 * at + 2] == alone
            steps = [row.steps for row in report.rows[2 * at : 2 * at + 2]]
            assert steps == [row.steps for row in own.rows] == [len(answer) for answer in alone]


class TestStops:
    """Rows that end without an EOS, where the padding behind them may be one."""

    @staticmethod
    def generate(model: Any, scorer: FakeScorer, **options: Any) -> tuple[torch.Tensor, GuidanceReport]:
        inputs = padded([PROMPTS[0], PROMPTS[2]])
        options = {"max_new_tokens": 10, "seeds": [1, 2], **options}
        sequences, report = generate(model, scorer, inputs, objectives=TILT, temperature=0.8, top_k=6, **options)
        return sequences, report

    @pytest.mark.parametrize("pad", [PAD, EOS, None])
    @pytest.mark.parametrize("stop", ["criterion", "string"])
    def test_padding_is_never_a_drawn_eos(self, model: Any, tokenizer: Any, pad: int | None, stop: str) -> None:
        free, _ = self.generate(model, FakeScorer(), pad_token_id=PAD)
        first = free[0, 5:].tolist()
        assert EOS not in first[:4]
        options: dict[str, Any] = {"stopping_criteria": [After(5 + 3)]}
        if stop == "string":
            options = {"stop_strings": [tokenizer.decode([first[2]])], "tokenizer": tokenizer}
        scorer = FakeScorer()
        sequences, report = self.generate(model, scorer, pad_token_id=pad, **options)
        steps = first[:3].index(first[2]) + 1
        assert sequences[0, 5:].tolist()[:steps] == first[:steps]
        assert set(sequences[0, 5 + steps :].tolist()) == {EOS if pad is None else pad}
        row, prefix, cost = report.rows[0], list(PROMPTS[0]), 0.0
        for token in first[:steps]:
            p, q = law(model, prefix, TILT, temperature=0.8, top_k=6, ends=[EOS])[token]
            cost, prefix = cost + q - p, [*prefix, token]
        assert row.text_cost == pytest.approx(cost, abs=1e-4)
        assert (row.steps, row.guided_steps, row.forced_stop) == (steps, steps, False)
        # Nothing is scored once a row has ended, and no padding is ever sent.
        assert [sum(prefix[:5] == tuple(PROMPTS[0]) for prefix in call) for call in scorer.prefixes] == [
            int(step < steps) for step in range(len(scorer.calls))
        ]
        assert all(token not in (PAD, EOS) for call in scorer.prefixes for prefix in call for token in prefix)

    def test_an_eos_before_the_stop_is_an_eos(self, model: Any) -> None:
        class Force(FakeScorer):
            @staticmethod
            def weight(prefix: Sequence[int], token: int, objective: Mapping[str, Any]) -> float:
                return 100.0 if token == EOS else 0.0

        for at in (1, 2):  # together with the stop, and one step before it
            _, report = self.generate(model, Force(), pad_token_id=EOS, stopping_criteria=[After(5 + at)])
            assert [row.steps for row in report.rows] == [1, 1]
            logits = next_logits(model, PROMPTS[0]) / 0.8
            p = torch.softmax(logits, -1)[EOS].item()
            assert report.rows[0].forced_stop == (p < 1e-3)
            assert report.rows[0].text_cost > 0

    def test_criteria_that_end_all_rows_keep_their_place(self, model: Any) -> None:
        from transformers import MaxLengthCriteria

        # In the place of transformers' own, as without guidance; max_new_tokens alone would allow two.
        criteria = [MaxLengthCriteria(5 + 4)]
        sequences, report = self.generate(
            model, FakeScorer(), pad_token_id=PAD, max_new_tokens=2, stopping_criteria=criteria
        )
        assert sequences.shape[1] == 5 + 4
        assert report.steps == sum(len(answer) for answer in answers(sequences, 5))

    def test_beams_need_a_padding_that_shows_the_end(self, model: Any) -> None:
        stops: dict[str, Any] = {"stopping_criteria": [After(5 + 3)], "num_beams": 2, "do_sample": False}
        for pad in (None, EOS, PAD):  # for 0, transformers takes the EOS instead
            with pytest.raises(InvalidRequestError, match="beams with stop strings or criteria need"):
                self.generate(model, FakeScorer(), pad_token_id=pad, seeds=None, **stops)
        _, report = self.generate(model, FakeScorer(), pad_token_id=77, seeds=None, **stops)
        assert all(0 < row.steps <= 10 for row in report.rows)
        with pytest.raises(InvalidRequestError, match="ends no answer"):
            LenVMLogitsProcessor(GuidedDecoder(FakeScorer(), [EOS]), [TILT], pad_token_id=EOS, padding_ends=True)

    def test_stop_strings_need_a_tokenizer(self, model: Any) -> None:
        with pytest.raises(InvalidRequestError, match="give tokenizer"):
            self.generate(model, FakeScorer(), pad_token_id=PAD, stop_strings=["x"])


class TestGenerationConfig:
    def test_the_users_is_read_and_left_alone(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import GenerationConfig
        from transformers.generation import utils

        said: list[str] = []
        monkeypatch.setattr(utils.logger, "warning_once", lambda message, *_: said.append(message))
        monkeypatch.setattr(model.generation_config, "min_p", 0.4)  # fills what is None in a config object
        config = GenerationConfig(
            do_sample=True, top_p=0.3, top_k=2, temperature=0.1, max_new_tokens=12, eos_token_id=EOS, pad_token_id=PAD
        )
        before = config.to_dict()
        inputs = padded(PROMPTS[:2])
        options: dict[str, Any] = {"objectives": [TILT, OTHER], "temperature": 0.8, "top_k": 6}
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(
            torch, "multinomial", lambda probs, **_: seen.append(probs.clone()) or probs.argmax(-1, True)
        )
        from_config, _ = generate(model, FakeScorer(), inputs, generation_config=config, **options)
        assert config.to_dict() == before
        assert said == []
        expected = law(model, PROMPTS[0], TILT, temperature=0.8, top_k=6, ends=[EOS])
        assert set(seen[0][0].nonzero()[:, 0].tolist()) == set(expected)
        plain, _ = generate(model, FakeScorer(), inputs, max_new_tokens=12, pad_token_id=PAD, **options)
        assert from_config.tolist() == plain.tolist()
        short, _ = generate(model, FakeScorer(), inputs, generation_config=config, max_new_tokens=1, **options)
        assert short.shape[1] == 5 + 1  # what is given directly comes first

    def test_a_watermark_would_reweigh_the_law(self, model: Any) -> None:
        from transformers import GenerationConfig

        mark = {"bias": 2.5, "seeding_scheme": "lefthash"}
        for options in (
            {"watermarking_config": mark},
            {"generation_config": GenerationConfig(watermarking_config=mark)},
        ):
            with pytest.raises(InvalidRequestError, match="watermark"):
                run(model, FakeScorer(), PROMPTS[:1], objectives=TILT, **options)


class TestFailures:
    def test_a_service_that_stops_in_the_middle(self, model: Any) -> None:
        class Dying(FakeScorer):
            def score_candidates(self, rows: Any) -> Any:
                if len(self.calls) == 3:
                    self.fail = ServiceUnreachableError("gone")
                return super().score_candidates(rows)

        options: dict[str, Any] = {"objectives": [TILT], "seeds": [4], "max_new_tokens": 12}
        (answer,), report = run(model, Dying(), PROMPTS[:1], **options)
        assert len(answer) > 4
        assert report.guided_steps == 3
        assert report.fallbacks == len(answer) - 3
        assert report.errors == {"ServiceUnreachableError": 1}  # and left alone since
        with pytest.raises(ServiceUnreachableError, match="gone"):
            run(model, Dying(), PROMPTS[:1], **options, on_error="raise")

    def test_an_impossible_objective_is_raised(self, model: Any) -> None:
        scorer = FakeScorer()
        scorer.refuse = {"tilt": "invalid_request"}
        with pytest.raises(InvalidRequestError, match="refused"):
            run(model, scorer, PROMPTS[:2], objectives=[OTHER, TILT])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"top_p": 0.9}, "top_p cannot be given"),
            ({"attention_mask": None}, "ids go into inputs"),
            ({"objectives": [TILT]}, "as many objectives"),
            ({"objectives": []}, "as many objectives"),
            ({"seeds": [1]}, "one for each sequence"),
            ({"seeds": [1, 2], "num_beams": 2}, "without beams"),
            ({"seeds": [1, 2], "do_sample": False}, "sampling"),
            ({"temperature": 0.0, "do_sample": True}, "temperature"),
            ({"top_k": 0}, "top_k"),
            ({"stop_token_ids": [-1]}, "ids of the vocabulary, 0 to 127"),
            ({"stop_token_ids": [128]}, "ids of the vocabulary"),
            ({"stop_token_ids": [1.5]}, "ids of the vocabulary"),
        ],
    )
    def test_arguments_that_do_not_fit(self, model: Any, options: dict[str, Any], match: str) -> None:
        with pytest.raises(InvalidRequestError, match=match):
            run(model, FakeScorer(), PROMPTS[:2], **{"objectives": [TILT, None], **options})

    @pytest.mark.parametrize(
        "inputs", [[[1, 50]], torch.tensor([1, 50]), torch.zeros(0, 3, dtype=torch.int64), {}, None, torch.ones(1, 2)]
    )
    def test_inputs_that_are_no_ids(self, model: Any, inputs: Any) -> None:
        with pytest.raises(InvalidRequestError, match=r"tensor \[B, T\]"):
            generate(model, FakeScorer(), inputs, objectives=TILT, max_new_tokens=2)

    def test_right_padding_is_refused(self, model: Any) -> None:
        inputs = {"input_ids": torch.tensor([[1, 50, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        with pytest.raises(InvalidRequestError, match="on the left"):
            generate(model, FakeScorer(), inputs, objectives=TILT, max_new_tokens=2)

    def test_processors_of_the_user_come_first(self, model: Any) -> None:
        def ban(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, 3:64] = -torch.inf
            return scores

        scorer = FakeScorer()
        out, _ = run(model, scorer, PROMPTS[:1], objectives=TILT, logits_processor=[ban], return_dict_in_generate=False)
        assert all(token == EOS or token >= 64 or token < 3 for token in out[0])
        assert all(token < 3 or token >= 64 for call in scorer.calls for item in call for token in item.candidates)

    def test_a_dict_output_and_stop_strings_style_endings(self, model: Any) -> None:
        scorer = FakeScorer()
        inputs = padded([PROMPTS[0], PROMPTS[2]])
        output, report = generate(
            model,
            scorer,
            inputs,
            objectives=TILT,
            temperature=0.8,
            max_new_tokens=10,
            pad_token_id=PAD,
            seeds=[1, 2],
            stopping_criteria=[After(5 + 3)],
            return_dict_in_generate=True,
        )
        assert report.rows[0].steps == 3
        assert not report.rows[0].forced_stop
        assert output.sequences.shape[0] == 2
        assert all(PAD not in prefix for call in scorer.prefixes for prefix in call)
        assert [len(call) for call in scorer.calls][:5] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("padding_ends", [False, True])
def test_rows_read_step_by_step_are_those_read_as_a_whole(padding_ends: bool) -> None:
    dice = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 7, (16, 14), generator=dice)
    ends = torch.tensor([EOS, STOP, PAD])
    for at in range(16):
        ids[at, : at % 3] = PAD  # to the left of the prompt, which is 4 long
        if at % 4:
            place = 4 + (3 * at) % 9
            ids[at, place] = ends[at % 3]
            ids[at, place + 1 :] = PAD
    mask = torch.ones_like(ids[:, :4])
    for at in range(16):
        mask[at, : at % 3] = 0

    def processor(keeps: bool) -> LenVMLogitsProcessor:
        made = LenVMLogitsProcessor(
            GuidedDecoder(FakeScorer(), [EOS], [STOP]),
            [TILT] * 16,
            attention_mask=mask,
            pad_token_id=PAD,
            padding_ends=padding_ends,
            rows_keep_places=keeps,
        )
        made.rows(ids[:, :4])
        return made

    keeping, plain = processor(True), processor(False)
    for width in (5, 6, 9, 10, 14):
        if width == 9:  # a stop string ended row 0, and padding follows
            ids[0, 8:] = PAD
            for each in (keeping, plain):
                each._stops.ended[0] = 8
        assert keeping.rows(ids[:, :width]) == plain.rows(ids[:, :width])
    assert sum(row.finished for row in plain.rows(ids)) > 8
