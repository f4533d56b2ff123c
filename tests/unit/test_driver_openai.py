"""The three loops over a real HTTP server that serves the tiny model with OpenAI's schema."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from lenvm_client import BadAnswerError, InvalidRequestError, ServiceUnreachableError
from lenvm_client.drivers import hf
from lenvm_client.drivers._completions import Completions
from lenvm_client.drivers.openai import generate
from lenvm_client.guided import uniform
from tests.support.completions_server import CompletionsServer, serve
from tests.unit.client_fakes import FakeScorer

EOS, STOP = 2, 40
PROMPT = [1, 30, 31, 32, 33]
TILT: Mapping[str, Any] = {"kind": "tilt", "lambda": 0.5}
SCALE: Mapping[str, Any] = {"kind": "scale", "factor": 0.5}
VOCABULARY = 128


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)


@pytest.fixture
def server(model: Any) -> Iterator[CompletionsServer]:
    def next_logits(prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([list(prefix)])).logits[0, -1] for prefix in prefixes])

    with serve(CompletionsServer(next_logits, EOS)) as running:
        yield running


def run(server: CompletionsServer, scorer: FakeScorer, **options: Any) -> tuple[list[int], Any]:
    options = {"objective": TILT, "max_tokens": 20, "temperature": 0.8, "seed": 5, "on_error": "raise", **options}
    with Completions(server.url, "tiny") as completions:
        return generate(completions, scorer, PROMPT, eos_ids=[EOS, STOP], **options)


class TestStep:
    @pytest.mark.parametrize("silent_eos", [False, True])
    @pytest.mark.parametrize(("seed", "objective"), [(5, TILT), (6, SCALE), (7, None)])
    def test_tokens_are_those_of_hf(
        self, model: Any, server: CompletionsServer, seed: int, objective: Any, silent_eos: bool
    ) -> None:
        """All log-probs are told, so that the law is the same."""
        server.silent_eos = silent_eos
        sequences, theirs = hf.generate(
            model,
            FakeScorer(),
            torch.tensor([PROMPT]),
            objectives=objective,
            temperature=0.8,
            top_k=VOCABULARY,
            seeds=[seed],
            eos_token_id=EOS,
            stop_token_ids=[STOP],
            max_new_tokens=20,
            pad_token_id=0,
        )
        expected = sequences[0, len(PROMPT) :].tolist()
        scorer = FakeScorer()
        answer, report = run(server, scorer, objective=objective, seed=seed, top_k=VOCABULARY)
        assert answer == [token for token in expected if token not in (EOS, STOP)]
        assert report.rows[0].text_cost == pytest.approx(theirs.rows[0].text_cost, abs=1e-4)
        assert (report.steps, report.guided_steps) == (theirs.steps, theirs.guided_steps)
        assert all(len(row.append) == 1 for call in scorer.calls[1:] for row in call)

    def test_greedy(self, model: Any, server: CompletionsServer) -> None:
        sequences, _ = hf.generate(
            model, FakeScorer(), torch.tensor([PROMPT]), objectives=TILT, temperature=0.0, top_k=VOCABULARY,
            eos_token_id=EOS, stop_token_ids=[STOP], max_new_tokens=8, pad_token_id=0,
        )  # fmt: skip
        answer, report = run(server, FakeScorer(), temperature=0.0, max_tokens=8, top_k=VOCABULARY)
        assert answer == [t for t in sequences[0, len(PROMPT) :].tolist() if t not in (EOS, STOP)]
        assert math.isnan(report.text_cost)

    def test_an_eos_that_is_not_told_can_still_be_drawn(self, model: Any, server: CompletionsServer) -> None:
        class Force(FakeScorer):
            @staticmethod
            def weight(prefix: Sequence[int], token: int, objective: Mapping[str, Any]) -> float:
                return 50.0 * (token == EOS)

        scorer = Force()
        answer, report = run(server, scorer, top_k=3, objective={**TILT, "min_eos_prob": 1e-9})
        assert answer == []
        (row,) = scorer.calls[0]
        assert len(row.candidates) == 4
        told = sorted(row.logprobs or ())
        at_eos = (row.logprobs or ())[row.candidates.index(EOS)]
        assert at_eos == told[0]
        assert math.fsum(map(math.exp, told)) == pytest.approx(1.0)
        assert report.steps == 1


class TestBlock:
    def test_one_call_for_the_ends_of_all_continuations(self, server: CompletionsServer) -> None:
        scorer = FakeScorer()
        answer, report = run(server, scorer, loop="block", block_tokens=4, n=3, max_tokens=10)
        assert len(scorer.calls) == len(server.bodies) == report.steps == report.guided_steps
        assert math.isnan(report.text_cost)
        prefix = list(PROMPT)
        for step, (call, body) in enumerate(zip(scorer.calls, server.bodies, strict=True)):
            assert body["prompt"] == prefix
            assert body["n"] == len(call) == 3
            weights = []
            for row, resolved in zip(call, scorer.prefixes[step], strict=True):
                (token,) = row.candidates
                assert list(resolved[: len(prefix)]) == prefix
                assert row.generated == len(resolved) - len(PROMPT)
                assert len(row.append) <= 5  # prefix deltas only
                assert (row.session is None) == (step == 0)
                weights.append(scorer.weight(resolved, token, TILT))
            total = sum(map(math.exp, weights))
            draw, chosen = uniform(5, step), 0
            while draw > sum(map(math.exp, weights[: chosen + 1])) / total:
                chosen += 1
            kept = [*scorer.prefixes[step][chosen], *call[chosen].candidates]
            prefix = [token for token in kept if token not in (EOS, STOP)]
        assert answer == prefix[len(PROMPT) :]
        assert len(answer) <= 10

    def test_a_scale_is_resolved_first(self, server: CompletionsServer) -> None:
        scorer = FakeScorer()
        _, report = run(server, scorer, objective=SCALE, loop="block", block_tokens=4, n=2, max_tokens=8)
        assert scorer.calls[0][0].objective == SCALE
        assert all(row.objective == {"kind": "tilt", "lambda": 0.01 * sum(PROMPT)} for row in scorer.calls[1])
        assert report.fallbacks == 0

    def test_a_service_that_fails_leaves_the_choice_to_the_backbone(self, server: CompletionsServer) -> None:
        scorer = FakeScorer()
        scorer.fail = ServiceUnreachableError("gone")
        answer, report = run(server, scorer, loop="block", n=2, block_tokens=4, on_error="passthrough")
        assert answer
        assert report.guided_steps == 0
        assert report.fallbacks == report.steps
        assert report.errors == {"ServiceUnreachableError": 1}


class TestBias:
    def test_eos_is_moved_by_its_log_weight_against_that_of_the_state(self, server: CompletionsServer) -> None:
        scorer = FakeScorer()
        answer, report = run(server, scorer, loop="bias", block_tokens=3, max_tokens=9, seed=8)
        assert len(answer) > 3
        assert "logit_bias" not in server.bodies[0] or server.bodies[0]["logit_bias"] == {}
        for body in server.bodies[1:]:
            prefix = body["prompt"]
            expected = scorer.weight(prefix, EOS, TILT) - scorer.weight(prefix[:-1], prefix[-1], TILT)
            assert body["logit_bias"] == {str(EOS): pytest.approx(expected), str(STOP): pytest.approx(expected)}
        assert report.steps == len(server.bodies)
        assert report.guided_steps == len(server.bodies) - 1

    def test_a_bias_ends_the_answer(self, server: CompletionsServer) -> None:
        class Force(FakeScorer):
            @staticmethod
            def weight(prefix: Sequence[int], token: int, objective: Mapping[str, Any]) -> float:
                return 500.0 * (token == EOS)

        answer, _ = run(server, Force(), loop="bias", block_tokens=3, max_tokens=30, seed=8)
        assert len(answer) == 3
        assert server.bodies[1]["logit_bias"] == {str(EOS): 100.0, str(STOP): 100.0}


class TestServers:
    def test_answers_of_other_forms(self) -> None:
        content = {
            "tokens": None,
            "content": [
                {"id": 7, "token": "a", "logprob": -1.0, "top_logprobs": [{"id": 9, "token": "b", "logprob": -0.5}]},
                {"id": EOS, "token": "", "logprob": -1.0, "top_logprobs": []},
            ],
        }
        texts = {"tokens": ["a", "b"], "top_logprobs": [{"a": -0.1, "?": -3.0, "b": None}, {}]}
        ids = {"a": 7, "b": 9}
        sent: list[httpx2.Request] = []
        replies: list[Any] = []

        def handle(request: httpx2.Request) -> httpx2.Response:
            sent.append(request)
            return httpx2.Response(200, json={"choices": [replies.pop(0)]})

        with httpx2.Client(transport=httpx2.MockTransport(handle)) as http:
            plain = Completions("http://x/v1/", "m", api_key="k", http=http, extra_body={"more": 1})
            replies.append({"logprobs": content, "finish_reason": "length"})
            (choice,) = plain([1], [EOS], max_tokens=2)
            assert (choice.ids, choice.top, choice.ended) == ([7], {9: -0.5}, True)
            assert sent[0].headers["authorization"] == "Bearer k"
            assert str(sent[0].url) == "http://x/v1/completions"
            assert b'"more":1' in sent[0].content
            replies.append({"logprobs": texts, "finish_reason": "stop"})
            with pytest.raises(BadAnswerError, match="without ids"):
                plain([1], [EOS])
            replies.append({"logprobs": texts, "finish_reason": "stop"})
            named = Completions("http://x/v1", "m", http=http, token_id=ids.get, decode=repr)
            (choice,) = named([1, 2], [EOS])
            assert (choice.ids, choice.top, choice.ended) == ([7, 9], {7: -0.1}, True)
            assert b'"prompt":"[1, 2]"' in sent[-1].content
            replies.append({"token_ids": [5, 6], "logprobs": None, "finish_reason": "length"})
            (choice,) = plain([1], [EOS])
            assert (choice.ids, choice.top, choice.ended) == ([5, 6], {}, False)
            replies.append({"text": "ab", "logprobs": None, "finish_reason": "length"})
            reading = Completions("http://x/v1", "m", http=http, encode=lambda text: [ids[each] for each in text])
            assert reading([1], [EOS])[0].ids == [7, 9]
            replies.append({"logprobs": 7})
            with pytest.raises(BadAnswerError, match="no answer of an OpenAI-compatible server"):
                plain([1], [EOS])

    def test_failures_are_typed(self, server: CompletionsServer) -> None:
        server.fail = 503
        with pytest.raises(BadAnswerError, match="says 503"):
            run(server, FakeScorer())
        with Completions("http://127.0.0.1:1/v1", "m") as gone, pytest.raises(ServiceUnreachableError):
            generate(gone, FakeScorer(), PROMPT, objective=TILT, max_tokens=3, eos_ids=[EOS])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"max_tokens": 0}, "at least 1"),
            ({"temperature": -1.0}, "temperature"),
            ({"loop": "block", "objective": {"kind": "equal_to", "target": 3, "method": "paper"}}, "paper's rules"),
        ],
    )
    def test_arguments(self, server: CompletionsServer, options: dict[str, Any], match: str) -> None:
        with pytest.raises(InvalidRequestError, match=match):
            run(server, FakeScorer(), **options)
        assert server.bodies == []

    def test_a_server_without_log_probs(self, server: CompletionsServer, monkeypatch: pytest.MonkeyPatch) -> None:
        def mute(body: dict[str, Any]) -> dict[str, Any]:
            return {"choices": [{"token_ids": [5], "logprobs": None, "finish_reason": "length"}]}

        monkeypatch.setattr(server, "complete", mute)
        with pytest.raises(BadAnswerError, match="no log-probs"):
            run(server, FakeScorer())
