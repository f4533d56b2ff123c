"""The step loop of guided decoding: what is sent, what comes back, what happens when the service fails."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import math
import pickle
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from lenvm.decoding import Candidates
from lenvm.decoding.randomness import uniforms
from lenvm.decoding.sampler import choose
from lenvm_client import (
    AsyncGuidedDecoder,
    BadAnswerError,
    CandidateInput,
    CandidateScores,
    Client,
    ContextTooLongError,
    DeadlineExceededError,
    GuidedDecoder,
    GuidedRow,
    InvalidRequestError,
    LenVMClientError,
    MockTransport,
    ModelNotFoundError,
    OverloadedError,
    PrefixUnknownError,
    RowError,
    ServiceUnreachableError,
    UnauthorizedError,
    WeightedRow,
)
from lenvm_client._state import hashed as whole
from lenvm_client._state import objective_key
from lenvm_client.guided import uniform
from tests.unit.client_fakes import FakeScorer

EOS = 2
TILT = {"kind": "tilt", "lambda": 0.5}
OTHER = {"kind": "at_most", "target": 7}
SCALE = {"kind": "scale", "factor": 0.5}
DOWN = ServiceUnreachableError("refused")


def backbone(prefix: Sequence[int]) -> dict[int, float]:
    """Log-probs of tokens 2..9 after a prefix; EOS gets little."""
    logits = {token: math.cos(1.3 * sum(prefix) + token * len(prefix)) - 3.0 * (token == EOS) for token in range(2, 10)}
    total = math.log(sum(math.exp(value) for value in logits.values()))
    return {token: value - total for token, value in logits.items()}


def row(prefix: Sequence[int], generated: int, objective: Mapping[str, Any] | None = TILT, **more: Any) -> GuidedRow:
    law = backbone(prefix)
    return GuidedRow(
        prefix=prefix,
        candidates=list(law),
        logprobs=list(law.values()),
        generated=generated,
        objective=objective,
        **more,
    )


def loop(
    decoder: GuidedDecoder,
    prompts: Sequence[Sequence[int]],
    objectives: Sequence[Mapping[str, Any] | None],
    *,
    steps: int = 12,
    seeds: Sequence[int] | None = None,
    after: bool = False,
) -> list[list[int]]:
    """Sample until EOS or ``steps`` tokens; finished rows stay in the batch. Whole prefixes, EOS included. ``after``:
    each row says which one went before."""
    prefixes = [list(prompt) for prompt in prompts]
    answers: dict[int, WeightedRow] = {}
    for step in range(steps):
        rows = []
        for prefix, prompt, objective in zip(prefixes, prompts, objectives, strict=True):
            over = len(prefix) > len(prompt) and prefix[-1] == EOS
            before = answers.get(len(rows)) if after else None
            rows.append(row(prefix, len(prefix) - len(prompt) - over, objective, finished=over, after=before))
        if all(r.finished for r in rows):
            break
        for at, weighted in enumerate(decoder.step(rows)):
            answers[at] = weighted
            if not rows[at].finished:
                prefixes[at].append(weighted.draw(uniform((seeds or range(9))[at], step)))
    return prefixes


def final(
    prefixes: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], objectives: Sequence[Any]
) -> list[GuidedRow]:
    return [
        GuidedRow(prefix=prefix, generated=len(prefix) - len(prompt) - (prefix[-1] == EOS), objective=objective)
        for prefix, prompt, objective in zip(prefixes, prompts, objectives, strict=True)
    ]


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


class Clock:
    def __init__(self, decoder: Any) -> None:
        self.now = 50.0
        decoder._clock = self

    def __call__(self) -> float:
        return self.now


class TestCalls:
    def test_one_call_a_step_one_token_a_row(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        prompts, objectives = [[5, 6], [7], [8, 8, 8]], [TILT, None, OTHER]
        out = loop(decoder, prompts, objectives, steps=6, seeds=[0, 1, 4])
        steps = max(len(prefix) - len(prompt) for prefix, prompt in zip(out, prompts, strict=True))
        assert len(scorer.calls) <= steps
        first, *rest = scorer.calls
        assert [list(item.token_ids or ()) for item in first] == [[5, 6], [8, 8, 8]]
        assert rest
        for call in rest:
            for item in call:
                assert item.token_ids is None
                assert item.session is not None
                assert len(item.append) == 1
        # What the scorer resolved are the true prefixes, and guided rows only.
        for call in scorer.prefixes:
            assert all(any(prefix == tuple(out[at][: len(prefix)]) for at in (0, 2)) for prefix in call)
        assert all(item.eos_ids == (EOS,) for call in scorer.calls for item in call)

    def test_what_a_row_carries(self, scorer: FakeScorer) -> None:
        careful, hard = {**TILT, "min_eos_prob": 0.01}, {"kind": "equal_to", "target": 9, "method": "paper"}
        objectives = [TILT, careful, hard]
        GuidedDecoder(scorer, [EOS], [9]).step([row([5, 6, 7], 2, objective) for objective in objectives])
        (items,) = scorer.calls
        law = backbone([5, 6, 7])
        for item, objective in zip(items, objectives, strict=True):
            assert item == CandidateInput(
                token_ids=[5, 6, 7],
                candidates=tuple(law),
                logprobs=None if objective is TILT else tuple(law.values()),  # only where they are read
                generated=2,
                objective=objective,
                eos_ids=(EOS, 9),
                return_values=False,
            )

    def test_weights_are_aligned(self, scorer: FakeScorer) -> None:
        rows = [row([5], 0), row([6], 0, None), row([7], 0, OTHER)]
        answers = GuidedDecoder(scorer, [EOS]).step(rows)
        assert [answer.guided for answer in answers] == [True, False, True]
        for asked, answer in zip(rows, answers, strict=True):
            assert answer.ids == tuple(asked.candidates)
            objective = asked.objective
            expected = [
                0.0 if objective is None else scorer.weight(asked.prefix, token, objective)
                for token in asked.candidates
            ]
            assert list(answer.log_weights) == expected

    def test_no_call_where_there_is_nothing_to_guide(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        nothing = GuidedRow(prefix=[1], candidates=[3], logprobs=[-math.inf], objective=TILT)
        answers = decoder.step([row([5], 0, None), row([5, EOS], 0, TILT, finished=True), nothing])
        assert [len(answer.ids) for answer in answers] == [8, 0, 0]
        assert decoder.step([]) == []
        assert scorer.calls == []

    def test_eos_becomes_a_candidate_and_what_has_no_chance_is_left_out(self, scorer: FakeScorer) -> None:
        asked = GuidedRow(
            prefix=[5],
            candidates=[4, 6, 7],
            logprobs=[-1.0, -math.inf, -2.0],
            objective=TILT,
            eos_logprobs={EOS: -9.0, 4: -1.0},
        )
        (answer,) = GuidedDecoder(scorer, [EOS, 4]).step([asked])
        assert answer.ids == (4, 7, EOS)
        assert answer.logprobs == (-1.0, -2.0, -9.0)
        assert scorer.calls[0][0].candidates == (4, 7, EOS)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"logprobs": [-1.0]}, "as many logprobs"),
            ({"prefix": []}, "needs a prefix"),
            ({"candidates": [3, 3]}, "twice"),
            ({"logprobs": [-1.0, math.nan]}, "NaN"),
            ({"logprobs": [-1.0, math.inf]}, "NaN or"),
            ({"prefix": ["a"]}, "token ids"),
            ({"prefix": [1 << 70]}, "token ids"),
            ({"objective": "shorter"}, "an objective looks like"),
        ],
    )
    def test_rows_that_make_no_sense(self, scorer: FakeScorer, changes: dict[str, Any], match: str) -> None:
        fields: dict[str, Any] = {"prefix": [1], "candidates": [3, 4], "logprobs": [-1.0, -2.0], "objective": TILT}
        with pytest.raises(InvalidRequestError, match=match):
            GuidedDecoder(scorer, [EOS]).step([GuidedRow(**{**fields, **changes})])
        assert scorer.calls == []
        with pytest.raises(InvalidRequestError, match="on_error"):
            GuidedDecoder(scorer, [EOS], on_error="ignore")  # type: ignore[arg-type]

    def test_beams_may_move_repeat_and_vanish(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        decoder.step([row([5], 0)] * 3)
        decoder.step([row([5, 3], 1), row([5, 4], 1), row([5, 6], 1)])
        # The third beam won twice, the first came to the end of the line, the second is gone.
        answers = decoder.step([row([5, 6, 7], 2), row([5, 6, 8], 2), row([5, 3, 9], 2)])
        assert scorer.prefixes[-1] == [(5, 6, 7), (5, 6, 8), (5, 3, 9)]
        assert all(len(item.append) == 1 and item.session for item in scorer.calls[-1])
        assert [a.log_weights[0] for a in answers] == [scorer.weight(p, 2, TILT) for p in scorer.prefixes[-1]]

    def test_a_step_may_be_repeated(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        decoder.step([row([5], 0)])
        one = decoder.step([row([5, 3], 1)])
        assert decoder.step([row([5, 3], 1)]) == one
        assert scorer.calls[-1][0].append == ()
        assert scorer.prefixes[-1] == [(5, 3)]

    def test_limits_split_a_step(self, scorer: FakeScorer) -> None:
        rows = [row([5, at], 1) for at in range(3, 10)]
        whole = GuidedDecoder(FakeScorer(), [EOS]).step(rows)
        decoder = GuidedDecoder(scorer, [EOS], max_batch_rows=3)
        assert decoder.step(rows) == whole
        assert [len(call) for call in scorer.calls] == [3, 3, 1]
        assert decoder.report([]).calls == 3
        scorer.calls.clear()
        assert GuidedDecoder(scorer, [EOS], max_body_bytes=2000).step(rows) == whole
        assert [len(call) for call in scorer.calls] == [2, 2, 2, 1]
        # Every row carries the ids that end an answer: they count.
        scorer.calls.clear()
        GuidedDecoder(scorer, [EOS], range(1000, 1100), max_body_bytes=2000).step(rows)
        assert [len(call) for call in scorer.calls] == [1] * 7

    def test_forgetting_a_prefix_costs_only_a_longer_call(self, scorer: FakeScorer) -> None:
        out = loop(GuidedDecoder(scorer, [EOS]), [[5]], [TILT])
        small = FakeScorer()
        assert loop(GuidedDecoder(small, [EOS], max_prefixes=1), [[5]], [TILT]) == out
        other = FakeScorer()
        decoder = GuidedDecoder(other, [EOS], max_prefixes=1)
        loop(decoder, [[5], [6]], [TILT, TILT], steps=3)
        assert any(item.token_ids is not None for item in other.calls[1])


class TestScale:
    def test_the_resolved_tilt_is_sent_later(self, scorer: FakeScorer) -> None:
        loop(
            GuidedDecoder(scorer, [EOS]),
            [[5, 6], [9]],
            [SCALE, {"kind": "scale", "factor": 2.0}],
            steps=4,
            seeds=[3, 5],
        )
        first, *rest = scorer.calls
        assert [item.objective["kind"] for item in first if item.objective] == ["scale", "scale"]
        assert rest
        tilts = {11: 0.01 * 11, 9: 0.01 * 9}
        for items, prefixes in zip(rest, scorer.prefixes[1:], strict=True):
            for item, prefix in zip(items, prefixes, strict=True):
                prompt = 11 if prefix[0] == 5 else 9
                assert item.objective == {"kind": "tilt", "lambda": tilts[prompt]}

    def test_a_lost_first_step_is_made_good(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        scorer.fail = DOWN
        assert not decoder.step([row([5, 6], 0, SCALE)])[0].guided
        scorer.fail = None
        clock.now += 1
        assert not decoder.step([row([5, 6, 3], 1, SCALE)])[0].guided
        ((item,),) = scorer.calls[1:]
        assert (item.token_ids, item.generated, item.objective) == ([5, 6], 0, SCALE)
        assert decoder.step([row([5, 6, 3, 4], 2, SCALE)])[0].guided
        (item,) = scorer.calls[2]
        assert (item.token_ids, item.generated) == ([5, 6, 3, 4], 2)
        assert item.objective == {"kind": "tilt", "lambda": 0.11}
        report = decoder.report([GuidedRow(prefix=[5, 6, 3, 4, 5], generated=3, objective=SCALE)])
        assert (report.steps, report.guided_steps, report.fallbacks) == (3, 1, 2)

    def test_a_scale_that_was_not_resolved_is_a_bad_answer(self) -> None:
        class Forgetful(FakeScorer):
            def _row(self, index: int, row: CandidateInput) -> CandidateScores | RowError:
                return CandidateScores(index=index, values=(), horizons=(), log_weights=(0.0,) * 8, session="s")

        with pytest.raises(BadAnswerError, match="not resolved"):
            GuidedDecoder(Forgetful(), [EOS], on_error="raise").step([row([5], 0, SCALE)])


class TestPrefixUnknown:
    def test_the_whole_prefix_is_sent_again_once(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS], on_error="raise")
        decoder.step([row([5], 0), row([6], 0)])
        scorer.sessions.pop("s-6")
        answers = decoder.step([row([5, 3], 1), row([6, 3], 1)])
        assert [answer.guided for answer in answers] == [True, True]
        assert answers[1].log_weights[0] == scorer.weight([6, 3], 2, TILT)
        assert [len(call) for call in scorer.calls] == [2, 2, 1]
        assert scorer.calls[-1][0].token_ids == [6, 3]
        report = decoder.report([GuidedRow(prefix=[6, 3, 4], generated=2, objective=TILT)])
        assert (report.prefix_resends, report.calls, report.fallbacks) == (1, 3, 0)
        decoder.step([row([6, 3, 4], 2)])
        assert scorer.calls[-1][0].append == (4,)

    def test_only_once(self) -> None:
        class Lost(FakeScorer):
            def _row(self, index: int, row: CandidateInput) -> CandidateScores | RowError:
                if self.calls[1:]:
                    return RowError(index=index, type="prefix_unknown", message="never heard of it")
                return super()._row(index, row)

        lost = Lost()
        decoder = GuidedDecoder(lost, [EOS], on_error="raise")
        decoder.step([row([5], 0)])
        with pytest.raises(PrefixUnknownError, match="never heard"):
            decoder.step([row([5, 3], 1)])
        assert len(lost.calls) == 3
        passing = GuidedDecoder(Lost(), [EOS])
        passing.step([row([5], 0)])
        assert not passing.step([row([5, 3], 1)])[0].guided
        assert passing.report([]).errors == {"prefix_unknown": 1}


class TestFailures:
    def test_raise_gives_the_typed_error(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS], on_error="raise")
        decoder.step([row([5], 0)])
        scorer.fail = DOWN
        for _ in range(2):  # no rest: every step says so
            with pytest.raises(ServiceUnreachableError):
                decoder.step([row([5, 3], 1)])
        assert len(scorer.calls) == 3
        scorer.fail, scorer.refuse = None, {"at_most": "deadline_exceeded"}
        with pytest.raises(DeadlineExceededError) as caught:
            decoder.step([row([5, 3], 1), row([6], 0, OTHER)])
        assert caught.value.__notes__ == ["row 1 of the step, 0 tokens generated"]

    def test_passthrough_leaves_the_service_alone_for_longer_and_longer(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        decoder.step([row([5], 0)])
        scorer.fail = DOWN
        attempts: list[float] = []
        started = clock.now
        for _ in range(2000):
            before = len(scorer.calls)
            (answer,) = decoder.step([row([5, 3], 1)])
            assert set(answer.log_weights) == {0.0}
            assert not answer.guided
            if len(scorer.calls) > before:
                attempts.append(round(clock.now - started, 3))
            clock.now += 0.1
        gaps = [round(later - earlier, 3) for earlier, later in itertools.pairwise(attempts)]
        assert gaps[:8] == pytest.approx([0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0], abs=0.11)
        scorer.fail = None
        clock.now += 31
        assert decoder.step([row([5, 3], 1)])[0].guided  # one probe, and all is well
        assert decoder.step([row([5, 3, 4], 2)])[0].guided
        scorer.fail = DOWN
        calls = len(scorer.calls)
        decoder.step([row([5, 3, 4, 4], 3)])
        clock.now += 0.51  # the rest begins at half a second again
        decoder.step([row([5, 3, 4, 4], 3)])
        assert len(scorer.calls) == calls + 2

    def test_retry_after_lengthens_the_rest(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        scorer.fail = OverloadedError("full", retry_after_s=5.0)
        decoder.step([row([5], 0)])
        clock.now += 4.9
        decoder.step([row([5], 0)])
        assert len(scorer.calls) == 1
        clock.now += 0.2
        decoder.step([row([5], 0)])
        assert len(scorer.calls) == 2

    def test_an_outage_in_the_middle_is_counted(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        prefix = [5]
        for step in range(10):
            scorer.fail = DOWN if 3 <= step < 6 else None
            clock.now += 10
            (answer,) = decoder.step([row(prefix, step)])
            prefix.append(max(answer.ids))
        report = decoder.report([GuidedRow(prefix=prefix, generated=10, objective=TILT)])
        assert (report.steps, report.guided_steps, report.fallbacks) == (10, 7, 3)
        assert report.errors == {"ServiceUnreachableError": 3}
        assert report.calls == 10
        assert scorer.calls[6][0].token_ids == prefix[:7]  # after the gap: whole
        assert scorer.calls[7][0].append == (prefix[7],)

    def test_a_failed_row_does_not_unguide_its_neighbours(self, scorer: FakeScorer) -> None:
        scorer.refuse = {"at_most": "internal"}
        decoder = GuidedDecoder(scorer, [EOS])
        one, two = decoder.step([row([5], 0, OTHER), row([6], 0)])
        assert (one.guided, two.guided) == (False, True)
        decoder.step([row([5, 3], 1, OTHER), row([6, 3], 1)])
        assert len(scorer.calls) == 2  # no rest: the call itself went well
        report = decoder.report([GuidedRow(prefix=[5, 3, 3], generated=2, objective=OTHER)])
        assert (report.rows[0].fallbacks, report.errors) == (2, {"internal": 2})

    @pytest.mark.parametrize("failing", [False, True])
    def test_what_can_never_work_is_raised_before_the_first_guided_step(
        self, scorer: FakeScorer, failing: bool
    ) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        if failing:  # also where the first step was lost
            scorer.fail = DOWN
            decoder.step([row([5], 0)])
            scorer.fail = None
            clock.now += 1
        scorer.refuse = {"tilt": "invalid_request"}
        with pytest.raises(InvalidRequestError, match="refused"):
            decoder.step([row([5, 3], 1) if failing else row([5], 0)])

    @pytest.mark.parametrize("error", [UnauthorizedError("who?"), ModelNotFoundError("none")])
    def test_so_is_a_call_that_can_never_work(self, scorer: FakeScorer, error: LenVMClientError) -> None:
        scorer.fail = error
        with pytest.raises(type(error)):
            GuidedDecoder(scorer, [EOS]).step([row([5], 0)])

    @pytest.mark.parametrize(
        ("error", "hopeless"),
        [
            (BadAnswerError("nginx", status=404), True),
            (BadAnswerError("<html>", status=200), True),
            (ServiceUnreachableError("no such scheme", retryable=False), True),
            (BadAnswerError("a page of a proxy", status=500), False),
            (BadAnswerError("not a finite number", status=200, retryable=True), False),
            (BadAnswerError("cannot be unpacked"), False),
            (DOWN, False),
        ],
    )
    def test_another_server_is_no_service_that_fails(
        self, scorer: FakeScorer, error: LenVMClientError, hopeless: bool
    ) -> None:
        scorer.fail = error
        decoder = GuidedDecoder(scorer, [EOS])
        if hopeless:
            with pytest.raises(type(error)):
                decoder.step([row([5], 0)])
            assert decoder.report([]).errors == {}
        else:
            assert not decoder.step([row([5], 0)])[0].guided
        scorer.fail = None
        guided = GuidedDecoder(scorer, [EOS])
        guided.step([row([5], 0)])
        scorer.fail = error
        assert not guided.step([row([5, 3], 1)])[0].guided  # later, all of them are survived
        assert guided.report([]).errors == {type(error).__name__: 1}

    @pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"1" + b"0" * 400, b"NaN"])
    @pytest.mark.parametrize("place", ["index", "values", "retry_after"])
    def test_passthrough_survives_every_number(self, number: bytes, place: str) -> None:
        answer: dict[str, Any] = {"index": 0, "values": [0] * 8, "horizons": [0] * 8, "log_weights": [0] * 8}
        content = json.dumps({"model": "m", "scores": [answer | {place: 9 if place == "index" else [9] * 8}]}).encode()
        response = httpx2.Response(200, content=content.replace(b"9", number))
        if place == "retry_after":
            body = json.dumps({"error": {"type": "overloaded", "message": "m", "retryable": True, "retry_after_ms": 9}})
            content = body.encode().replace(b"9", number)
            response = httpx2.Response(429, content=content, headers={"retry-after": number.decode()})
        with Client(transport=MockTransport({"/score": response}), total_timeout=None, max_retries=0) as client:
            decoder = GuidedDecoder(client, [EOS])
            assert not decoder.step([row([5], 0)])[0].guided
        assert sum(decoder.report([]).errors.values()) == 1
        assert decoder._resume_at - decoder._clock() <= 3600.0

    def test_later_such_a_row_goes_on_without_calls(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        decoder.step([row([5], 0), row([6], 0, OTHER)])
        scorer.refuse = {"tilt": "context_too_long"}
        prefixes = [[5], [6]]
        for step in range(1, 4):
            prefixes = [[*prefix, 3] for prefix in prefixes]
            one, two = decoder.step([row(prefixes[0], step), row(prefixes[1], step, OTHER)])
            assert (one.guided, two.guided) == (False, True)
        assert [len(call) for call in scorer.calls] == [2, 2, 1, 1]
        report = decoder.report(
            [GuidedRow(prefix=[*p, 3], generated=4, objective=o) for p, o in zip(prefixes, [TILT, OTHER], strict=True)]
        )
        assert [r.fallbacks for r in report.rows] == [3, 0]
        assert report.errors == {ContextTooLongError.type: 1}

    @pytest.mark.parametrize("weights", [None, (0.0,), (math.nan,) * 8, (-math.inf,) * 8])
    def test_answers_that_do_not_fit(self, weights: Any) -> None:
        class Odd(FakeScorer):
            def _row(self, index: int, row: CandidateInput) -> CandidateScores | RowError:
                return CandidateScores(index=index, values=(), horizons=(), log_weights=weights, session="s")

        with pytest.raises(BadAnswerError, match="finite log_weights"):
            GuidedDecoder(Odd(), [EOS], on_error="raise").step([row([5], 0)])
        decoder = GuidedDecoder(Odd(), [EOS])
        assert not decoder.step([row([5], 0)])[0].guided
        assert decoder.report([]).errors == {"BadAnswerError": 1}

    def test_answers_that_are_missing(self) -> None:
        class Short(FakeScorer):
            def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
                return super().score_candidates(rows)[1:]

        with pytest.raises(BadAnswerError, match="1 rows were sent, 0 answers"):
            GuidedDecoder(Short(), [EOS], on_error="raise").step([row([5], 0)])

    def test_errors_of_others_go_through(self, scorer: FakeScorer) -> None:
        scorer.fail = KeyError("a bug")  # type: ignore[assignment]
        with pytest.raises(KeyError):
            GuidedDecoder(scorer, [EOS]).step([row([5], 0)])


class Crowded(FakeScorer):
    """Rows with the objective OTHER get ``overloaded`` this many times."""

    def __init__(self, times: int, retry_after_ms: float | None = 1500.0) -> None:
        super().__init__()
        self.times = times
        self.retry_after_ms = retry_after_ms

    def _row(self, index: int, row: CandidateInput) -> CandidateScores | RowError:
        if row.objective == OTHER and self.times:
            self.times -= 1
            after = self.retry_after_ms
            return RowError(index=index, type="overloaded", message="full", retryable=True, retry_after_ms=after)
        return super()._row(index, row)


class TestRowsThatMayPass:
    @staticmethod
    def decoder(scorer: FakeScorer) -> tuple[GuidedDecoder, list[float]]:
        decoder, waits = GuidedDecoder(scorer, [EOS], on_error="raise"), []
        decoder._sleep = waits.append  # type: ignore[method-assign]
        return decoder, waits

    @pytest.mark.parametrize("times", [1, 2])
    def test_they_are_sent_again_after_their_wait(self, times: int) -> None:
        scorer = Crowded(times)
        decoder, waits = self.decoder(scorer)
        answers = decoder.step([row([5], 0), row([6], 0, OTHER), row([7], 0)])
        assert [answer.guided for answer in answers] == [True] * 3
        assert answers[1].log_weights[0] == scorer.weight([6], 2, OTHER)
        assert waits == [1.5] * times
        assert [len(call) for call in scorer.calls] == [3] + [1] * times
        report = decoder.report([GuidedRow(prefix=[6, 3], generated=1, objective=OTHER)])
        assert (report.guided_steps, report.fallbacks, report.errors) == (1, 0, {})

    def test_twice_at_most(self) -> None:
        scorer = Crowded(3)
        decoder, waits = self.decoder(scorer)
        with pytest.raises(OverloadedError) as caught:
            decoder.step([row([5], 0), row([6], 0, OTHER)])
        assert caught.value.retry_after_s == 1.5
        assert waits == [1.5, 1.5]
        assert decoder.step([row([5], 0), row([6], 0, OTHER)])[1].guided  # the next step begins anew

    def test_where_they_do_not_say_when(self) -> None:
        decoder, waits = self.decoder(Crowded(1, None))
        assert decoder.step([row([6], 0, OTHER)])[0].guided
        assert waits == [0.5]

    def test_a_long_wait_is_the_callers(self) -> None:
        decoder, waits = self.decoder(Crowded(1, 31_000.0))
        with pytest.raises(OverloadedError):
            decoder.step([row([6], 0, OTHER)])
        assert waits == []

    def test_lost_sessions_do_not_wait_for_them(self) -> None:
        scorer = Crowded(0)
        decoder, waits = self.decoder(scorer)
        decoder.step([row([5], 0), row([6], 0, OTHER)])
        scorer.sessions.clear()
        scorer.times = 1
        decoder._sleep = lambda seconds: waits.append(len(scorer.calls))  # type: ignore[method-assign]
        answers = decoder.step([row([5, 3], 1), row([6, 3], 1, OTHER)])
        assert [answer.guided for answer in answers] == [True, True]
        # Of the second step: both rows, the first whole, a wait, the second (its session is gone too), that whole.
        assert waits == [3]
        assert [[item.token_ids for item in call] for call in scorer.calls[1:]] == [
            [None, None],
            [[5, 3]],
            [None],
            [[6, 3]],
        ]

    def test_async_waits_too(self) -> None:
        scorer, waits = Crowded(1), list[float]()

        class Async:
            async def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
                return scorer.score_candidates(rows)

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        decoder = AsyncGuidedDecoder(Async(), [EOS], on_error="raise")
        decoder._sleep = sleep  # type: ignore[method-assign, assignment]
        assert asyncio.run(decoder.step([row([6], 0, OTHER)]))[0].guided
        assert waits == [1.5]

    def test_passthrough_lets_the_service_rest_as_long_as_asked(self) -> None:
        scorer = Crowded(1)
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        rows = [row([5], 0), row([6], 0, OTHER)]
        assert [answer.guided for answer in decoder.step(rows)] == [True, False]
        clock.now += 1.4
        assert [answer.guided for answer in decoder.step(rows)] == [False, False]
        assert len(scorer.calls) == 1
        clock.now += 0.2
        assert [answer.guided for answer in decoder.step(rows)] == [True, True]
        assert decoder.report([]).errors == {"overloaded": 1}


class TestHosts:
    """What a decoder inside another engine needs."""

    def test_log_raises_nothing_and_says_each_trouble_once(
        self, scorer: FakeScorer, caplog: pytest.LogCaptureFixture
    ) -> None:
        decoder = GuidedDecoder(scorer, [EOS], on_error="log")
        clock = Clock(decoder)
        scorer.refuse = {"at_most": "invalid_request"}
        for step in range(3):
            answers = decoder.step([row([5] * (step + 1), step), row([6] * (step + 1), step, OTHER)])
            assert [answer.guided for answer in answers] == [True, False]
        # What the service will never take is not sent again.
        assert [len(call) for call in scorer.calls] == [2, 1, 1]
        scorer.fail = UnauthorizedError("a key, please")
        for _ in range(2):
            assert not decoder.step([row([7], 0)])[0].guided
            clock.now += 60
        assert [record.getMessage() for record in caplog.records] == [
            "guided decoding goes on without guidance: invalid_request: refused",
            "guided decoding goes on without guidance: unauthorized: a key, please",
        ]
        assert decoder.report([]).errors == {"invalid_request": 1, "unauthorized": 2}

    def test_rows_may_have_ends_of_their_own(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        own, ours = row([5], 0, end_ids=[7, 8]), row([6], 0)
        decoder.step([own, ours])
        assert [item.eos_ids for item in scorer.calls[0]] == [(7, 8), (EOS,)]
        asked = GuidedRow(prefix=[9], candidates=[4, 7], logprobs=[-1e-4, -9.0], objective=TILT, end_ids=[7])
        decoder.step([asked])
        done = GuidedRow(prefix=[9, 7], generated=0, objective=TILT, end_ids=[7])
        assert decoder.report([done]).forced_stops == 1
        assert decoder.report([GuidedRow(prefix=[9, 7], generated=1, objective=TILT)]).forced_stops == 0

    def test_rows_that_advance_by_blocks_go_on_from_a_session(self, scorer: FakeScorer) -> None:
        for reach, appended in ((3, [(), (3, 4, 6)]), (2, [(), ()])):
            decoder = GuidedDecoder(scorer, [EOS], max_append=reach)
            scorer.calls.clear()
            decoder.step([row([5, 6], 0)])
            decoder.step([row([5, 6, 3, 4, 6], 3)])
            assert [tuple(call[0].append) for call in scorer.calls] == appended
            assert scorer.prefixes[-1] == [(5, 6, 3, 4, 6)]


def candidates_of(weighted: WeightedRow) -> Candidates:
    """As lenvm's sampler holds them: sorted by id."""
    order = np.argsort(weighted.ids)
    ids = np.array([weighted.ids])[:, order]
    logprobs = np.array([weighted.logprobs])[:, order]
    return Candidates(ids, logprobs, ids == EOS, np.ones_like(ids, dtype=bool), np.zeros(1, dtype=np.int64), logprobs)


class TestReport:
    def test_text_cost_draws_and_forced_stops_are_those_of_the_sampler(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        stops: set[tuple[bool, bool]] = set()
        for seed in range(60):
            decoder.start()
            prefix, cost, forced = [5 + seed % 4], 0.0, False
            while prefix[-1] != EOS and len(prefix) < 12:
                (weighted,) = decoder.step([row(prefix, len(prefix) - 1)])
                candidates, order = candidates_of(weighted), np.argsort(weighted.ids)
                draw = uniform(seed, len(prefix) - 1)
                weights = np.array([weighted.log_weights])[:, order]
                chosen, costs = choose(candidates, weights, np.array([draw]), greedy=False)
                greedy, _ = choose(candidates, weights, np.array([draw]), greedy=True)
                token = int(candidates.ids[0, chosen[0]])
                assert weighted.draw(draw) == token
                assert weighted.best() == int(candidates.ids[0, greedy[0]])
                cost += float(costs[0])
                forced = token == EOS and dict(zip(weighted.ids, weighted.logprobs, strict=True))[EOS] < math.log(1e-3)
                prefix.append(token)
            (end,) = final([prefix], [[0]], [TILT])
            (report,) = decoder.report([end]).rows
            assert report.text_cost == pytest.approx(cost, rel=1e-12, abs=1e-12)
            assert report.steps == report.guided_steps == len(prefix) - 1
            assert report.forced_stop is forced
            stops.add((prefix[-1] == EOS, forced))
        assert (True, False) in stops

    def test_a_forced_stop(self, scorer: FakeScorer) -> None:
        for logprob, expected in ((math.log(4e-4), True), (math.log(6e-4), False)):
            decoder = GuidedDecoder(scorer, [EOS], [9])
            asked = GuidedRow(prefix=[5], candidates=[4, EOS, 9], logprobs=[-0.01, logprob, logprob], objective=TILT)
            decoder.step([asked])
            for last, forced in ((EOS, expected), (9, expected), (4, False)):
                done = GuidedRow(prefix=[5, last], generated=int(last == 4), objective=TILT)
                assert decoder.report([done]).forced_stops == forced

    def test_a_batch_is_its_rows(self) -> None:
        prompts, objectives = [[5, 6], [7], [8, 8], [7], [7]], [TILT, None, OTHER, TILT, SCALE]
        seeds = [0, 1, 2, 3, 4]
        decoder = GuidedDecoder(FakeScorer(), [EOS])
        together = loop(decoder, prompts, objectives, seeds=seeds, steps=30)
        report = decoder.report(final(together, prompts, objectives))
        for at, (prompt, objective) in enumerate(zip(prompts, objectives, strict=True)):
            alone = GuidedDecoder(FakeScorer(), [EOS])
            (out,) = loop(alone, [prompt], [objective], seeds=[seeds[at]], steps=30)
            assert out == together[at]
            assert alone.report(final([out], [prompt], [objective])).rows == (report.rows[at],)
        assert report.rows[1].text_cost == 0.0
        assert report.rows[1].guided_steps == report.rows[1].fallbacks == 0
        assert report.rows[1].steps == len(together[1]) - 1
        assert report.text_cost == pytest.approx(sum(r.text_cost for r in report.rows))
        assert any(prefix[-1] == EOS and len(prefix) < max(map(len, together)) for prefix in together)

    def test_greedy_follows_no_distribution(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        decoder.start(sampled=False)
        decoder.step([row([5], 0)])
        report = decoder.report([GuidedRow(prefix=[5, 3], generated=1, objective=TILT)])
        assert math.isnan(report.text_cost)
        assert report.to_dict()["text_cost"] is None
        assert report.to_dict()["rows"][0]["steps"] == 1

    def test_a_token_that_was_no_candidate_has_no_cost(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        decoder.step([row([5], 0)])
        assert math.isnan(decoder.report([GuidedRow(prefix=[5, 99], generated=1, objective=TILT)]).text_cost)

    def test_counters_start_again(self, scorer: FakeScorer) -> None:
        decoder = GuidedDecoder(scorer, [EOS])
        clock = Clock(decoder)
        answer = scorer.score_candidates

        def slow(rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
            clock.now += 0.25
            return answer(rows)

        scorer.score_candidates = slow  # type: ignore[method-assign]
        decoder.step([row([5], 0)])
        decoder.step([row([5, 3], 1)])
        assert decoder.report([]).service_seconds == 0.5
        decoder.start()
        assert (decoder.report([]).calls, decoder.report([]).service_seconds) == (0, 0.0)
        decoder.step([row([5], 0)])  # a new generation from the same prompt: nothing of the old one is counted
        done = GuidedRow(prefix=[5, 3], generated=1, objective=TILT)
        assert decoder.report([done]).steps == 1
        assert scorer.calls[-1][0].append == ()  # but its prefix is known
        assert decoder.report([GuidedRow(prefix=[5], objective=TILT)]).steps == 0

    def test_the_uniforms_are_the_samplers(self) -> None:
        seeds, steps = [0, 1, 7, 12345678901, (1 << 63) - 1], [0, 1, 2, 500, 2047]
        theirs = uniforms(torch.tensor(seeds), torch.tensor(steps)).tolist()
        assert [uniform(seed, step) for seed, step in zip(seeds, steps, strict=True)] == theirs

    def test_draws_reach_both_ends(self) -> None:
        weighted = WeightedRow((7, 3), (math.log(0.25), math.log(0.75)), (0.0, 0.0))
        assert [weighted.draw(u) for u in (0.0, 0.7499, 0.7501, 1 - 2**-53)] == [3, 3, 7, 7]
        tied = WeightedRow((7, 3), (-1.0, -1.0), (0.0, 0.0))
        assert tied.best() == 3


def test_async_is_the_same(scorer: FakeScorer) -> None:
    class Async:
        async def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
            return scorer.score_candidates(rows)

    async def run() -> list[Any]:
        decoder = AsyncGuidedDecoder(Async(), [EOS])
        seen: list[Any] = [await decoder.step([row([5], 0), row([6], 0, None)])]
        scorer.sessions.clear()
        seen.append(await decoder.step([row([5, 3], 1)]))
        scorer.fail = DOWN
        seen.append(await decoder.step([row([5, 3, 4], 2)]))
        seen.append(decoder.report([GuidedRow(prefix=[5, 3, 4, 4], generated=3, objective=TILT)]).rows)
        scorer.refuse, scorer.fail = {"at_most": "invalid_request"}, None
        decoder._resume_at = 0.0
        with pytest.raises(InvalidRequestError):
            await decoder.step([row([7], 0, OTHER)])
        return seen

    other = FakeScorer()
    decoder = GuidedDecoder(other, [EOS])
    expected: list[Any] = [decoder.step([row([5], 0), row([6], 0, None)])]
    other.sessions.clear()
    expected.append(decoder.step([row([5, 3], 1)]))
    other.fail = DOWN
    expected.append(decoder.step([row([5, 3, 4], 2)]))
    expected.append(decoder.report([GuidedRow(prefix=[5, 3, 4, 4], generated=3, objective=TILT)]).rows)
    assert asyncio.run(run()) == expected


def test_over_the_wire() -> None:
    transport = MockTransport()
    with Client(transport=transport) as client:
        decoder = GuidedDecoder(client, [EOS])
        decoder.step([row([5, 6], 0), row([7], 0, SCALE), row([8], 0, None)])
        decoder.step([row([5, 6, 4], 1), row([7, 4], 1, SCALE), row([8, 4], 1, None)])
    first, second = transport.requests[0].body["inputs"], transport.requests[1].body["columns"]
    assert [item["token_ids"] for item in first] == [[5, 6], [7]]
    assert second["append"] == [[4], [4]]
    assert all(session.startswith("s-mock-") for session in second["session"])
    assert second["objective"][1] == {"kind": "tilt", "lambda": 0.0}
    assert second["eos_ids"] == [EOS]
    assert first[0]["eos_ids"] == [EOS]


def test_the_key_of_an_objective_is_that_of_what_it_says() -> None:
    wanted = {"kind": "equal_to", "target": 1}
    assert objective_key(wanted) == objective_key(dict(wanted)) == objective_key({"target": 1, "kind": "equal_to"})
    others = [None, {}, {**wanted, "target": True}, {**wanted, "target": 1.0}, {**wanted, "extra": [1]}]
    keys = {objective_key(other) for other in others}
    assert len(keys) == len(others)
    assert objective_key(wanted) not in keys
    assert objective_key({"kind": [1]}) != objective_key({"kind": [2]})  # nothing that can be hashed


class TestAfter:
    """A row that says what it comes after is asked about before its prefix was looked at."""

    def test_same_calls_tokens_and_reports(self) -> None:
        prompts, objectives = [[5, 6], [7], [8, 8, 8], [4]], [TILT, None, OTHER, SCALE]
        found = []
        for after in (False, True):
            decoder = GuidedDecoder(scorer := FakeScorer(), [EOS], on_error="raise")
            out = loop(decoder, prompts, objectives, seeds=[0, 1, 4, 2], after=after)
            found.append((out, str(decoder.report(final(out, prompts, objectives)).rows), str(scorer.calls)))
        assert found[0] == found[1]

    def test_nothing_is_hashed_before_the_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[int] = []
        monkeypatch.setattr("lenvm_client._core.hashed", lambda prefix: hashed.append(len(prefix)) or whole(prefix))
        decoder = GuidedDecoder(scorer := FakeScorer(), [EOS], on_error="raise")
        loop(decoder, [[5, 6]], [TILT], steps=4, seeds=[0], after=True)
        assert len(scorer.calls) > 2
        assert hashed == [2]  # the prompt

    @pytest.mark.parametrize(
        "prefix", [[5, 6], [5, 6, 4, 4], [5, 7, 4], [7], (5, 6, 4), [5, 6, 1 << 40]], ids=lambda prefix: str(prefix)
    )
    def test_what_does_not_go_on_from_it_is_looked_at(self, prefix: Any) -> None:
        decoder = GuidedDecoder(scorer := FakeScorer(), [EOS], on_error="raise")
        (first,) = decoder.step([row([5, 6], 0)])
        assert first.mark.length == 2
        before = decoder._flow([row(prefix, 1, after=first)])
        (asked,) = next(before)  # type: ignore[misc]
        plain = GuidedDecoder(FakeScorer(), [EOS], on_error="raise")
        plain.step([row([5, 6], 0)])
        (wanted,) = next(plain._flow([row(prefix, 1)]))  # type: ignore[misc]
        assert asked == wanted
        assert len(scorer.calls) == 1
        before.close()

    def test_a_session_that_is_gone_is_sent_again_as_a_whole(self) -> None:
        decoder = GuidedDecoder(scorer := FakeScorer(), [EOS], on_error="raise")
        (first,) = decoder.step([row([5, 6], 0)])
        scorer.sessions.clear()
        (second,) = decoder.step([row([5, 6, 4], 1, after=first)])
        assert second.guided
        assert [[item.token_ids, item.append] for item in scorer.calls[-1]] == [[[5, 6, 4], ()]]
        assert decoder.report([row([5, 6, 4, 4], 2)]).prefix_resends == 1

    def test_it_keeps_no_chain_of_rows_alive(self) -> None:
        decoder = GuidedDecoder(FakeScorer(), [EOS], on_error="raise")
        prefix = [5, 6]
        (weighted,) = decoder.step([row(prefix, 0)])
        first = weakref.ref(weighted)
        for step in range(1, 4):
            prefix.append(4)
            (weighted,) = decoder.step([row(list(prefix), step, after=weighted)])
        assert first() is None


class Overlapped(FakeScorer):
    """As a ``Client``: what the decoder has still to do is done before the answer is read."""

    def __init__(self) -> None:
        super().__init__()
        self.overlapped = 0

    @property
    def _overlaps(self) -> bool:
        return "score_candidates" not in self.__dict__

    def _score_overlapped(self, rows: Sequence[CandidateInput], meanwhile: Any) -> list[CandidateScores | RowError]:
        if self.overlapped % 3 != 2:  # another transport would not call it
            meanwhile()
        self.overlapped += 1
        return self.score_candidates(rows)


class TestMeanwhile:
    """What a caller wants done while the service is asked."""

    @pytest.mark.parametrize("objective", [TILT, None])
    def test_it_is_called_once_before_the_answer(self, objective: Any) -> None:
        for scorer in (FakeScorer(), Overlapped()):
            decoder = GuidedDecoder(scorer, [EOS], on_error="raise")
            called: list[int] = []
            for step in range(3):
                decoder.step([row([5, 6, *[4] * step], step, objective)], partial(called.append, 1))
                assert len(called) == step + 1

    @pytest.mark.parametrize("error", [InvalidRequestError("mine"), DOWN, ZeroDivisionError("mine")])
    def test_its_error_is_the_caller_s(self, error: Exception) -> None:
        def fail() -> None:
            raise error

        for scorer in (FakeScorer(), Overlapped()):
            decoder = GuidedDecoder(scorer, [EOS])
            with pytest.raises(type(error)) as caught:
                decoder.step([row([5, 6], 0)], fail)
            assert caught.value is error
            assert len(scorer.calls) == 1
            (weighted,) = decoder.step([row([5, 6], 0)])
            assert weighted.guided

    def test_the_asynchronous_twin(self) -> None:
        order: list[str] = []
        inner = FakeScorer()

        class Slow:
            async def score_candidates(self, rows: Sequence[CandidateInput]) -> Any:
                order.append("asked")
                await asyncio.sleep(0.01)
                order.append("answered")
                return inner.score_candidates(rows)

        def fail() -> None:
            raise DOWN

        async def run() -> None:
            decoder = AsyncGuidedDecoder(Slow(), [EOS])
            await decoder.step([row([5, 6], 0)], lambda: order.append("meanwhile"))
            await decoder.step([row([5, 6], 0, None)], lambda: order.append("alone"))
            with pytest.raises(ServiceUnreachableError):
                await decoder.step([row([5, 6], 0)], fail)

        asyncio.run(run())
        assert order == ["asked", "meanwhile", "answered", "alone", "asked", "answered"]

    def test_a_cancelled_step_leaves_no_call_behind(self) -> None:
        ended: list[str] = []

        class Slow:
            async def score_candidates(self, rows: Sequence[CandidateInput]) -> Any:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    ended.append("cancelled")
                    raise

        async def run() -> None:
            decoder = AsyncGuidedDecoder(Slow(), [EOS])
            for turns in (1, 3):
                step = asyncio.create_task(decoder.step([row([5, 6], 0)], lambda: None))
                for _ in range(turns):
                    await asyncio.sleep(0)
                step.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await step
            assert len(asyncio.all_tasks()) == 1

        asyncio.run(run())
        assert ended


def test_what_a_step_gives_can_be_copied_and_stored() -> None:
    decoder = GuidedDecoder(FakeScorer(), [EOS])
    (weighted,) = decoder.step([row([5, 6], 0)])
    assert weighted.mark is not None
    pickled = pickle.loads(pickle.dumps(weighted))  # noqa: S301  # our own
    for copied in (pickled, copy.deepcopy(weighted), replace(weighted)):
        assert copied == weighted
        assert copied.mark is None
    assert set(asdict(weighted)) == {"ids", "logprobs", "log_weights", "guided"}


class TestOverlap:
    """What a step leaves for the next one's wait changes no token and no report."""

    @pytest.mark.parametrize("sampled", [True, False])
    def test_same_answers_and_reports(self, scorer: FakeScorer, sampled: bool) -> None:
        prompts, objectives = [[5, 6], [7], [8, 8, 8], [4]], [TILT, None, OTHER, SCALE]
        found = []
        for each in (scorer, Overlapped()):
            decoder = GuidedDecoder(each, [EOS], on_error="raise")
            for _ in range(2):  # the second generation begins with what the first one left
                decoder.start(sampled=sampled)
                out = loop(decoder, prompts, objectives, seeds=[0, 1, 4, 2])
                found.append((out, str(decoder.report(final(out, prompts, objectives)).rows)))
        assert found[:2] == found[2:]

    def test_a_report_after_any_step_is_up_to_date(self) -> None:
        scorer = Overlapped()
        decoder = GuidedDecoder(scorer, [EOS], on_error="raise")
        prefix = [5, 6]
        for step in range(4):
            (weighted,) = decoder.step([row(prefix, step)])
            prefix.append(weighted.ids[1])
            report = decoder.report([row(prefix, step + 1)])
            assert (report.steps, report.guided_steps) == (step + 1, step + 1)
            assert math.isfinite(report.text_cost)
            assert not decoder._left
        assert scorer.overlapped == 4

    def test_what_the_step_before_left_is_done_while_the_call_is_under_way(self) -> None:
        seen: list[tuple[int, int]] = []

        class Watching(Overlapped):
            def _score_overlapped(self, rows: Any, meanwhile: Any) -> Any:
                before = len(decoder._left)
                meanwhile()
                seen.append((before, len(decoder._left)))
                return self.score_candidates(rows)

        decoder = GuidedDecoder(Watching(), [EOS], on_error="raise")
        loop(decoder, [[5, 6], [8]], [TILT, OTHER], steps=3, seeds=[0, 4])
        assert seen[0] == (0, 0)
        assert seen[1] == (2, 0)

    def test_steps_side_by_side_are_all_counted(self) -> None:
        class Slow:
            def __init__(self) -> None:
                self.inner = FakeScorer()

            async def score_candidates(self, rows: Sequence[CandidateInput]) -> Any:
                await asyncio.sleep(0)
                return self.inner.score_candidates(rows)

        async def run() -> list[int]:
            decoder = AsyncGuidedDecoder(Slow(), [EOS], on_error="raise")
            prefixes = [[5, 6], [8, 8]]
            for step in range(4):
                answers = await asyncio.gather(*(decoder.step([row(prefix, step)]) for prefix in prefixes))
                for prefix, (weighted,) in zip(prefixes, answers, strict=True):
                    prefix.append(weighted.ids[1])
            reports = decoder.report([row(prefix, 4) for prefix in prefixes]).rows
            return [report.guided_steps for report in reports]

        assert asyncio.run(run()) == [4, 4]

    @pytest.mark.parametrize("how", ["instance", "wrapper", "later"])
    def test_the_scorer_that_is_there_is_the_one_that_is_called(self, how: str, scorer: FakeScorer) -> None:
        class Wrapper:
            def __init__(self, inner: Any) -> None:
                self.inner, self.calls = inner, 0

            def score_candidates(self, rows: Any) -> Any:
                self.calls += 1
                return self.inner.score_candidates(rows)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.inner, name)

        overlapped = Overlapped()
        wrapper = Wrapper(overlapped)
        decoder = GuidedDecoder(overlapped if how != "wrapper" else wrapper, [EOS], on_error="raise")
        if how == "instance":
            overlapped.score_candidates = Wrapper(FakeScorer()).score_candidates  # type: ignore[method-assign]
        elif how == "later":
            decoder.scorer = scorer
        decoder.step([row([5, 6], 0)])
        assert overlapped.overlapped == 0
        assert len(scorer.calls) == (how == "later")
        assert wrapper.calls == (how == "wrapper")

    def test_a_subclass_s_own_call_is_made(self) -> None:
        class Counting(Client):
            calls = 0

            def score_candidates(self, rows: Any, **more: Any) -> Any:
                self.calls += 1
                return super().score_candidates(rows, **more)

        with Counting(transport=MockTransport()) as client:
            GuidedDecoder(client, [EOS], on_error="raise").step([row([5, 6], 0)])
            assert client.calls == 1
