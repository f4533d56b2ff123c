"""The client's wire layer: bodies, answers, errors, and when a call is made again. No input, no output."""

from __future__ import annotations

import copy
import dataclasses
import email.utils
import json
import math
import pickle
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from lenvm_client import _calls, _decode, _types, errors
from lenvm_client._state import Tally
from lenvm_client._steps import RowReport
from lenvm_client._types import (
    CandidateInput,
    CandidateScores,
    CompletionInput,
    FeedbackItem,
    PredictInput,
    Prediction,
    PredictLengthResponse,
    RowError,
    ServiceInfo,
    TokenScores,
)
from lenvm_client._wire import Call, Reply, RetryPolicy, Send, Wait, candidate_scores, error_of, exchange

OPTIONS = _calls.options(None, None, None, None, None)
PREDICTION = {
    "index": 0,
    "prompt_tokens": 5,
    "cached_tokens": 0,
    "value": -0.25,
    "horizon": 96,
    "mean": 120.5,
    "quantiles": {"0.5": 90, "0.9": 300},
    "p_exceeds_max_tokens": None,
    "rank_key": 120.5,
    "saturated": False,
    "session": "s-1",
    "prediction_id": "s-1",
}
CANDIDATES = {
    "index": 0,
    "prefix_tokens": 3,
    "cached_tokens": 2,
    "value": -0.2,
    "horizon": 70.0,
    "values": [-0.1, 0],
    "horizons": [30.0, 0.0],
    "log_weights": [-1.5, -2.0],
    "session": "s-2",
    "objective": None,
}


def reply(data: Any, status: int = 200, **headers: str) -> Reply:
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, content)


def error_body(kind: str, **more: Any) -> dict[str, Any]:
    error = {"type": kind, "message": "said", "code": kind, "param": None, "request_id": "r1", "retryable": False}
    return {"error": {**error, "retry_after_ms": None, **more}}


def body_of(call: Call[Any]) -> Any:
    assert call.content is not None
    return json.loads(call.content)


def predict(inputs: Any, **options: Any) -> Call[PredictLengthResponse]:
    return _calls.predict_length(inputs, {**OPTIONS, **options}, None, None)


class TestBodies:
    def test_one_input_is_flat_and_what_is_not_given_is_left_out(self) -> None:
        assert body_of(predict("Why?")) == {"prompt": "Why?"}
        assert body_of(predict({"messages": [{"role": "user", "content": "é"}]})) == {
            "messages": [{"role": "user", "content": "é"}]
        }
        assert body_of(predict(PredictInput(session="s", append=(), generated=3))) == {
            "session": "s",
            "append": [],
            "generated": 3,
        }

    def test_several_inputs_may_mix_their_kinds(self) -> None:
        call = _calls.predict_length(
            ("a", {"token_ids": [1]}, PredictInput(token_ids=[2, 3])),
            _calls.options("default", None, {"temperature": 0.7}, 250, -1),
            64,
            [0.5],
        )
        assert body_of(call) == {
            "inputs": [{"prompt": "a"}, {"token_ids": [1]}, {"token_ids": [2, 3], "generated": 0}],
            "model": "default",
            "max_tokens": 64,
            "quantiles": [0.5],
            "generator": {"temperature": 0.7},
            "deadline_ms": 250,
            "priority": -1,
        }
        assert _calls.options("default", "named", None, None, None)["model"] == "named"

    def test_scores_of_both_kinds(self) -> None:
        rows = [
            CompletionInput(prompt="p", completion="c"),
            CandidateInput(
                token_ids=[1], candidates=[4, 5], logprobs=[-1.0, -2.0], objective={"kind": "tilt"}, eos_ids=[2]
            ),
        ]
        assert body_of(_calls.score(rows, OPTIONS))["inputs"] == [
            {"prompt": "p", "completion": "c"},
            {
                "token_ids": [1],
                "candidates": [4, 5],
                "logprobs": [-1.0, -2.0],
                "generated": 0,
                "objective": {"kind": "tilt"},
                "eos_ids": [2],
            },
        ]
        flat = _calls.score("p", OPTIONS, completion_ids=[7], eos=True)
        assert body_of(flat) == {"prompt": "p", "completion_ids": [7], "eos": True}
        with pytest.raises(errors.InvalidRequestError, match="give completion"):
            _calls.score("p", OPTIONS)
        with pytest.raises(errors.InvalidRequestError, match="single prompt"):
            _calls.score([CompletionInput(prompt="p")], OPTIONS, completion="c")

    def test_arrays_of_other_libraries_are_written_as_lists(self) -> None:
        row = CandidateInput(token_ids=np.array([1, 2]), candidates=(np.int64(3),), logprobs=np.array([-0.5]))  # type: ignore[arg-type]
        assert body_of(_calls.score(row, OPTIONS))["token_ids"] == [1, 2]
        assert body_of(_calls.score(row, OPTIONS))["candidates"] == [3]
        assert body_of(_calls.score(row, OPTIONS))["logprobs"] == [-0.5]

    def test_feedback_takes_one_item_or_several(self) -> None:
        item = FeedbackItem(prediction_id="s", generated_tokens=3, finish_reason="stop")
        wire = {"prediction_id": "s", "generated_tokens": 3, "finish_reason": "stop"}
        assert body_of(_calls.feedback(item, None)) == {"items": [wire]}
        assert body_of(_calls.feedback([item, wire], "m")) == {"items": [wire, wire], "model": "m"}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_is_refused_before_sending(self, bad: float) -> None:
        rows = [
            CandidateInput(token_ids=[1], candidates=[2]),
            CandidateInput(token_ids=[1], candidates=[2, 3], logprobs=[0, bad]),
        ]
        with pytest.raises(errors.InvalidRequestError, match="not finite") as caught:
            _calls.score(rows, OPTIONS)
        assert caught.value.param == "inputs[1].logprobs[1]"
        assert (caught.value.status, caught.value.code, caught.value.retryable) == (None, "non_finite", False)
        with pytest.raises(errors.InvalidRequestError, match="quantiles"):
            _calls.predict_length("p", OPTIONS, None, np.array([0.5, bad]))  # type: ignore[arg-type]

    def test_what_json_cannot_carry_is_refused(self) -> None:
        with pytest.raises(errors.InvalidRequestError, match="Unicode"):
            predict("lone \ud800")
        with pytest.raises(errors.InvalidRequestError, match="no JSON form"):
            predict({"prompt": object()})
        with pytest.raises(errors.InvalidRequestError, match="not bytes"):
            predict([b"bytes"])
        with pytest.raises(errors.InvalidRequestError, match="PredictInput, not CandidateInput"):
            predict([CandidateInput(token_ids=[1], candidates=[2])])


def test_answers_are_made_without_init() -> None:
    """What ``decode`` and ``GuidedDecoder`` take for granted of the types that they fill."""
    for kind in vars(_types).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            assert not hasattr(kind, "__post_init__"), kind
            assert not hasattr(kind, "__slots__"), kind
    names = ["steps", "guided_steps", "fallbacks", "prefix_resends", "forced_stop", "text_cost"]
    assert [field.name for field in dataclasses.fields(RowReport)] == names, "_core carries these from step to step"
    assert [field.name for field in dataclasses.fields(Tally)] == ["report", "given_up"]


@pytest.fixture(params=["pydantic's parser", "json"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pydantic installed, and without."""
    if request.param == "json":
        monkeypatch.setattr(_decode, "_fast_parser", lambda: None)


@pytest.mark.usefixtures("parser")
class TestAnswers:
    def test_predictions(self) -> None:
        bad = {"index": 1, **error_body("invalid_request", param="inputs[1].prompt", retry_after_ms=500)}
        warning = {"code": "generator_mismatch", "message": "other"}
        answer = predict(["a", "b"]).read(
            reply(
                {
                    "model": "m",
                    "model_sha": "f",
                    "gamma": 0.997,
                    "cap": 2048,
                    "predictions": [{**PREDICTION, "field_of_a_newer_service": 1}, bad],
                    "warnings": [warning],
                    "timings_ms": {"queue": 1, "inference": 2.5, "total": 4},
                },
                x_request_id="r9",
            )
        )
        good, failed = answer.predictions
        assert good == Prediction(**PREDICTION)  # type: ignore[arg-type]
        assert isinstance(good, Prediction)
        assert isinstance(good.horizon, float)
        assert isinstance(failed, RowError)
        error = failed.to_exception()
        assert isinstance(error, errors.InvalidRequestError)
        assert (error.param, error.retry_after_s, error.status) == ("inputs[1].prompt", 0.5, None)
        assert answer.warnings[0].code == "generator_mismatch"
        assert answer.timings_ms is not None
        assert answer.timings_ms.inference == 2.5
        assert answer.request_id == "r9"
        with pytest.raises(errors.InvalidRequestError, match="said"):
            list(answer)
        with pytest.raises(ValueError, match="2 predictions"):
            answer.prediction  # noqa: B018 - the access is the test

    def test_a_model_without_a_distribution(self) -> None:
        nothing = dict.fromkeys(["mean", "quantiles", "p_exceeds_max_tokens", "saturated"])
        answer = predict("a").read(reply({"model": "m", "predictions": [{**PREDICTION, **nothing}]}))
        assert answer.prediction.mean is None
        assert answer.prediction.quantiles is None

    def test_score_rows_are_told_apart(self) -> None:
        tokens = {"index": 0, "prompt_tokens": 2, "token_ids": [5], "tokens": ["x"], "values": [-0.2, 0.0]}
        tokens |= {"horizons": [70.0, 0.0], "length_shifts": [-0.1]}
        rows = [tokens, {**CANDIDATES, "index": 1, "log_weights": None}, {"index": 2, **error_body("prefix_unknown")}]
        inputs = [CompletionInput(prompt="p", completion="x"), *[CandidateInput(token_ids=[1], candidates=[4, 2])] * 2]
        answer = _calls.score(inputs, OPTIONS).read(reply({"model": "m", "scores": rows}))
        assert [type(row) for row in answer.scores] == [TokenScores, CandidateScores, RowError]
        first, second, third = answer.scores
        assert isinstance(first, TokenScores)
        assert isinstance(second, CandidateScores)
        assert first.tokens == ("x",)
        assert second.log_weights is None
        assert isinstance(third, RowError)
        assert isinstance(third.to_exception(), errors.PrefixUnknownError)

    def test_candidate_answers_must_fit_their_rows(self) -> None:
        rows = [CandidateInput(token_ids=[1], candidates=[4, 2])]
        call = _calls.score(rows, OPTIONS)

        def read(**changes: Any) -> Sequence[Any]:
            return candidate_scores(call.read(reply({"model": "m", "scores": [{**CANDIDATES, **changes}]})), rows)

        assert read()[0].log_weights == (-1.5, -2.0)
        for changes in ({"log_weights": [0.0]}, {"values": [0.0] * 3}, {"horizons": []}):
            with pytest.raises(errors.BadAnswerError, match="2 candidates"):
                read(**changes)
        with pytest.raises(errors.BadAnswerError, match="not an answer for candidates"):
            read(length_shifts=[0.0])

    def test_info(self) -> None:
        data = {
            "version": "1",
            "models": [{"name": "m", "gamma": 0.99, "eos_ids": [2], "stop_ids": [], "generator": {"temperature": 0.7}}],
            "limits": {"max_batch_rows": 512},
        }
        info = _calls.INFO.read(reply(data))
        assert isinstance(info, ServiceInfo)
        assert info.models[0].eos_ids == (2,)
        assert info.limits.max_batch_rows == 512
        assert info.limits.max_candidates is None

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"<html>hello</html>", "not JSON"),
            (b"\xff\xfe", "not JSON"),
            (b"[1]", "answer should be an object"),
            (b'{"predictions": []}', "answer has no model"),
            (b'{"model": 3, "predictions": []}', r"answer\.model should be str, is 3"),
            (b'{"model": "m", "predictions": {}}', r"answer\.predictions should be a list"),
            (b'{"model": "m", "predictions": [7]}', r"answer\.predictions\[0\] should be an object"),
            (b'{"model": "m", "predictions": []}', "do not match"),
            (json.dumps({"model": "m", "predictions": [{**PREDICTION, "index": 1}]}).encode(), "do not match"),
            (
                json.dumps({"model": "m", "predictions": [{**PREDICTION, "value": True}]}).encode(),
                r"\.value should be float",
            ),
            (
                json.dumps({"model": "m", "predictions": [{**PREDICTION, "prompt_tokens": 1.5}]}).encode(),
                "should be int",
            ),
            (json.dumps({"model": "m", "predictions": [{**PREDICTION, "quantiles": [1]}]}).encode(), "an object"),
            (json.dumps({"model": "m", "predictions": [{**PREDICTION, "rank_key": None}]}).encode(), "no rank_key"),
        ],
    )
    def test_what_is_not_of_the_contract(self, content: bytes, match: str) -> None:
        with pytest.raises(errors.BadAnswerError, match=match) as caught:
            predict("a").read(reply(content, x_request_id="r"))
        assert (caught.value.status, caught.value.request_id, caught.value.retryable) == (200, "r", False)

    @pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"1" + b"0" * 400, b"NaN", b"-Infinity"])
    @pytest.mark.parametrize("place", ["index", "value", "quantiles"])
    def test_numbers_that_are_not_finite(self, number: bytes, place: str) -> None:
        value: Any = {"0.5": "HERE"} if place == "quantiles" else "HERE"
        content = json.dumps({"model": "m", "predictions": [{**PREDICTION, place: value}]}).encode()
        with pytest.raises(errors.BadAnswerError, match=r"not a finite number|it holds") as caught:
            predict("a").read(reply(content.replace(b'"HERE"', number)))
        assert (caught.value.status, caught.value.retryable) == (200, True)

    @pytest.mark.parametrize("number", [b"1e400", b"1" + b"0" * 400])
    @pytest.mark.parametrize("place", ["values", "log_weights", "objective", "horizon"])
    def test_numbers_of_candidates_that_are_not_finite(self, number: bytes, place: str) -> None:
        value: Any = {"objective": {"kind": "tilt", "x": [0, "HERE"]}, "horizon": "HERE"}.get(place, [0.5, "HERE"])
        content = json.dumps({"model": "m", "scores": [{**CANDIDATES, place: value}]}).encode()
        call = _calls.score([CandidateInput(token_ids=[1], candidates=[4, 2])], OPTIONS)
        with pytest.raises(errors.BadAnswerError, match=rf"answer\.scores\[0\]\.{place}.* not a finite number"):
            call.read(reply(content.replace(b'"HERE"', number)))

    def test_numbers_keep_their_types(self) -> None:
        row = {**CANDIDATES, "values": [0, -0.5], "objective": {"kind": "tilt", "lambda": 1, "on": True}}
        call = _calls.score([CandidateInput(token_ids=[1], candidates=[4, 2])], OPTIONS)
        (scores,) = call.read(reply({"model": "m", "scores": [row]})).scores
        assert isinstance(scores, CandidateScores)
        assert [type(value) for value in scores.values] == [float, float]
        assert scores.objective == row["objective"]
        tokens = _calls.tokenize("a", None, None)
        assert tokens.read(reply({"model": "m", "token_ids": [3, 2.0]})).token_ids == (3, 2)
        for bad in (True, 2.5, "3", None):
            with pytest.raises(errors.BadAnswerError, match=r"token_ids\[1\]"):
                tokens.read(reply({"model": "m", "token_ids": [3, bad]}))

    def test_a_single_row_of_scores(self) -> None:
        tokens = {"index": 0, "values": [-0.2, 0.0], "horizons": [70.0, 0.0], "length_shifts": [-0.1]}
        failed = {"index": 0, **error_body("context_too_long")}
        completion, candidates = CompletionInput(prompt="p", completion="x"), CandidateInput(candidates=[4, 2])

        def read(inputs: Any, *rows: Any) -> Any:
            return _calls.score(inputs, OPTIONS).read(reply({"model": "m", "scores": rows}))

        assert read(completion, tokens).completion.length_shifts == (-0.1,)
        assert read(candidates, CANDIDATES).candidates.values == (-0.1, 0.0)
        with pytest.raises(ValueError, match=r"use \.candidates"):
            read(candidates, CANDIDATES).completion  # noqa: B018 - the access is the test
        with pytest.raises(ValueError, match=r"use \.completion"):
            read(completion, tokens).candidates  # noqa: B018
        both = read([completion, candidates], tokens, {**CANDIDATES, "index": 1})
        assert [type(row) for row in both] == [TokenScores, CandidateScores]
        with pytest.raises(ValueError, match="2 rows"):
            both.completion  # noqa: B018
        for access in (lambda answer: answer.completion, lambda answer: answer.candidates, list):
            with pytest.raises(errors.ContextTooLongError):
                access(read([completion], failed))


class TestErrors:
    TABLE: Mapping[str, tuple[int, type[errors.ServiceError]]] = {
        "invalid_request": (422, errors.InvalidRequestError),
        "unauthorized": (401, errors.UnauthorizedError),
        "model_not_found": (404, errors.ModelNotFoundError),
        "payload_too_large": (413, errors.PayloadTooLargeError),
        "context_too_long": (422, errors.ContextTooLongError),
        "prefix_unknown": (422, errors.PrefixUnknownError),
        "overloaded": (429, errors.OverloadedError),
        "not_ready": (503, errors.NotReadyError),
        "draining": (503, errors.DrainingError),
        "deadline_exceeded": (504, errors.DeadlineExceededError),
        "internal": (500, errors.InternalServerError),
    }

    @pytest.mark.parametrize("kind", TABLE)
    def test_every_type_has_its_class(self, kind: str) -> None:
        status, expected = self.TABLE[kind]
        body = error_body(kind, code="finer", param="inputs[0]", retryable=True, retry_after_ms=1500)
        with pytest.raises(expected) as caught:
            predict("a").read(reply(body, status, x_request_id="r1"))
        error = caught.value
        assert type(error) is expected
        assert (error.type, error.code, error.param, str(error)) == (kind, "finer", "inputs[0]", "said")
        assert (error.status, error.request_id, error.retryable, error.retry_after_s) == (status, "r1", True, 1.5)
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object; workers hand errors on this way
        assert (type(again), vars(again)) == (expected, vars(error))

    def test_every_class_is_of_the_table(self) -> None:
        def below(kind: type[errors.ServiceError]) -> set[type[errors.ServiceError]]:
            return {kind, *(more for child in kind.__subclasses__() for more in below(child))}

        assert below(errors.ServiceError) == {errors.ServiceError, *(kind for _, kind in self.TABLE.values())}

    def test_a_type_of_a_newer_service(self) -> None:
        error = error_of(reply(error_body("quota_exceeded"), 402))
        assert type(error) is errors.ServiceError
        assert error.type == "quota_exceeded"

    @pytest.mark.parametrize(
        ("status", "expected", "retryable"),
        [
            (502, errors.ServiceUnreachableError, True),
            (503, errors.ServiceUnreachableError, True),
            (504, errors.ServiceTimeoutError, True),
            (429, errors.OverloadedError, True),
            (401, errors.UnauthorizedError, False),
            (403, errors.UnauthorizedError, False),
            (413, errors.PayloadTooLargeError, False),
            (404, errors.BadAnswerError, False),
            (301, errors.BadAnswerError, False),
            (500, errors.BadAnswerError, False),
        ],
    )
    @pytest.mark.parametrize("content", [b"<html><h1>Bad  Gateway</h1></html>", b"", b'{"detail": "x"}', b"[]"])
    def test_what_a_proxy_says(
        self, status: int, expected: type[errors.LenVMClientError], retryable: bool, content: bytes
    ) -> None:
        error = error_of(reply(content, status, retry_after="2", x_request_id="p"))
        assert type(error) is expected
        assert (error.status, error.retryable, error.request_id) == (status, retryable, "p")
        assert f"status {status}" in str(error)
        assert "<" not in str(error)
        assert "\n" not in str(error)

    def test_ordinary_handlers_catch_them(self) -> None:
        assert issubclass(errors.ServiceUnreachableError, ConnectionError)
        assert issubclass(errors.ServiceTimeoutError, TimeoutError)
        assert isinstance(copy.copy(errors.ServiceTimeoutError("late", status=504)), errors.LenVMClientError)

    def test_retry_after_is_seconds_or_a_date(self) -> None:
        def after(value: str) -> float | None:
            return error_of(reply(error_body("overloaded"), 429, retry_after=value)).retry_after_s

        assert after("2.5") == 2.5
        assert after("-3") == 0.0
        assert after("soon") is None
        assert after("inf") is None
        assert after("1e999") is None
        assert after("9" * 400) is None
        assert after("nan") is None
        assert after("Fri, 31 Dec 999999999999999999 23:59:59 GMT") is None
        assert after("86400") == after("Fri, 31 Dec 9999 23:59:59 GMT") == 3600.0  # nobody waits longer
        in_a_minute = after(email.utils.formatdate(time.time() + 60, usegmt=True))
        assert in_a_minute is not None
        assert 50 < in_a_minute <= 60
        assert after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
        both = error_of(reply(error_body("overloaded", retry_after_ms=3000), 429, retry_after="1"))
        assert both.retry_after_s == 3.0

    @pytest.mark.parametrize(("wanted", "kept"), [(b"1e400", None), (b"1" + b"0" * 400, None), (b"1e300", 3600.0)])
    def test_an_absurd_wait_in_a_body(self, wanted: bytes, kept: float | None) -> None:
        content = json.dumps(error_body("overloaded", retryable=True, retry_after_ms="HERE")).encode()
        error = error_of(reply(content.replace(b'"HERE"', wanted), 429))
        assert isinstance(error, errors.OverloadedError)
        assert error.retry_after_s == kept
        row = RowError(index=0, type="overloaded", message="full", retry_after_ms=float(wanted))
        assert row.to_exception().retry_after_s == kept


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(
    policy: RetryPolicy,
    results: Sequence[Any],
    *,
    seconds: float = 0.0,
    draw: float = 0.5,
    call: Call[Any] | None = None,
) -> tuple[Any, list[float]]:
    """Run a call against these results, one for each send (the last for ever); the outcome, and the waits."""
    clock, waits, sent = Clock(), [], 0
    flow = exchange(call or predict("a"), policy, clock=clock, draw=lambda: draw)
    step = next(flow)
    try:
        while True:
            if isinstance(step, Wait):
                waits.append(step.seconds)
                clock.now += step.seconds
                step = flow.send(None)
                continue
            assert isinstance(step, Send)
            result = results[min(sent, len(results) - 1)]
            sent += 1
            clock.now += seconds
            step = flow.throw(result) if isinstance(result, Exception) else flow.send(result)
    except StopIteration as stop:
        return stop.value, waits
    except errors.LenVMClientError as error:
        return error, waits


GOOD = reply({"model": "m", "predictions": [PREDICTION]})
DOWN = errors.ServiceUnreachableError("refused")
LATE = errors.ServiceTimeoutError("late")


class TestRetries:
    @pytest.mark.parametrize(
        "failure",
        [
            DOWN,
            reply(error_body("overloaded", retryable=True), 429),
            reply(error_body("not_ready", retryable=True), 503),
            reply(error_body("deadline_exceeded", retryable=True), 504),
            reply(b"<html>Bad Gateway</html>", 502),
            reply(b"", 503),
        ],
    )
    def test_what_may_pass_is_tried_again(self, failure: Any) -> None:
        answer, waits = drive(RetryPolicy(), [failure, failure, GOOD])
        assert isinstance(answer, PredictLengthResponse)
        assert waits == [0.125, 0.25]  # full jitter: half of 0.25 and 0.5 at a draw of one half
        error, waits = drive(RetryPolicy(), [failure])
        assert isinstance(error, errors.LenVMClientError)
        assert error.retryable
        assert len(waits) == 2

    @pytest.mark.parametrize(
        "failure",
        [
            LATE,
            errors.ServiceUnreachableError("no such scheme", retryable=False),
            errors.BadAnswerError("garbled"),
            reply(error_body("invalid_request"), 422),
            reply(error_body("internal", retryable=True), 500),
            reply(error_body("draining", retryable=False), 503),
            reply(b"not json", 200),
            reply(b"", 404),
        ],
    )
    def test_what_will_not_pass_is_not(self, failure: Any) -> None:
        error, waits = drive(RetryPolicy(), [failure, GOOD])
        assert isinstance(error, errors.LenVMClientError)
        assert waits == []

    def test_time_outs_only_on_request(self) -> None:
        answer, waits = drive(RetryPolicy(retry_timeouts=True), [LATE, GOOD])
        assert isinstance(answer, PredictLengthResponse)
        assert len(waits) == 1

    def test_feedback_counts_so_it_is_not_said_twice(self) -> None:
        call = _calls.feedback(FeedbackItem(prediction_id="s", generated_tokens=3, finish_reason="stop"), None)
        good = reply({"accepted": 1, "results": [{"index": 0, "accepted": True}]})
        unsent = errors.ServiceUnreachableError("refused")
        unsent.sent = False
        busy = reply(error_body("overloaded", retryable=True), 429)
        for turned_away in (unsent, busy, reply(error_body("not_ready", retryable=True), 503), reply(b"", 503)):
            assert len(drive(RetryPolicy(), [turned_away, good], call=call)[1]) == 1
        policy = RetryPolicy(retry_timeouts=True)
        late = reply(error_body("deadline_exceeded", retryable=True), 504)
        for unknown in (DOWN, LATE, late, reply(b"<html>Bad Gateway</html>", 502)):
            error, waits = drive(policy, [unknown, good], call=call)
            assert isinstance(error, errors.LenVMClientError)
            assert waits == []
            assert len(drive(policy, [unknown, GOOD])[1]) == 1  # another call is made again

    def test_zero_retries(self) -> None:
        assert drive(RetryPolicy(max_retries=0), [DOWN, GOOD]) == (DOWN, [])

    def test_back_off_doubles_up_to_its_bound_under_full_jitter(self) -> None:
        policy = RetryPolicy(max_retries=7, total_s=None)
        _, waits = drive(policy, [DOWN], draw=1.0)
        assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
        assert drive(policy, [DOWN], draw=0.0)[1] == [0.0] * 7

    def test_the_service_says_when(self) -> None:
        busy = reply(error_body("overloaded", retryable=True, retry_after_ms=3000), 429)
        assert drive(RetryPolicy(), [busy, GOOD])[1] == [3.125]
        busy = reply(error_body("overloaded", retryable=True), 429, retry_after="2")
        assert drive(RetryPolicy(), [busy, GOOD])[1] == [2.125]

    def test_the_total_time_bounds_all_attempts_and_waits(self) -> None:
        busy = reply(error_body("overloaded", retryable=True, retry_after_ms=61_000), 429)
        error, waits = drive(RetryPolicy(), [busy, GOOD])
        assert isinstance(error, errors.OverloadedError)
        assert waits == []
        error, waits = drive(RetryPolicy(max_retries=100, total_s=10.0), [DOWN], seconds=4.0, draw=0.0)
        assert len(waits) == 2  # sends at 0, 4 and 8 s; the last ends at 12 s

    def test_a_send_is_told_what_is_left(self) -> None:
        clock = Clock()
        flow = exchange(predict("a"), RetryPolicy(total_s=10.0), clock=clock, draw=lambda: 0.0)
        assert next(flow) == Send(10.0)
        clock.now += 4.0
        assert flow.throw(DOWN) == Wait(0.0)
        assert flow.send(None) == Send(6.0)
        assert next(exchange(predict("a"), RetryPolicy(total_s=None), clock=clock, draw=lambda: 0.0)) == Send(None)


ROW = {
    "index": 0, "prefix_tokens": 9, "cached_tokens": 8, "value": -0.5, "horizon": 3.5, "values": [], "horizons": [],
    "log_weights": [-0.25, 0.0], "session": "s-1", "objective": None,
}  # fmt: skip


def test_a_plain_row_is_read_as_any_other() -> None:
    plain = _decode._plain_scores(ROW)
    assert plain == _decode.decode(_types.CandidateScores, ROW)
    assert plain is not None
    assert vars(plain).keys() == {field.name for field in dataclasses.fields(_types.CandidateScores)}


@pytest.mark.parametrize(
    "other",
    [
        {"log_weights": [-1, 0.0]},
        {"log_weights": [True, 0.0]},
        {"log_weights": [-0.5, math.inf]},
        {"log_weights": [math.inf, -math.inf]},
        {"log_weights": []},
        {"log_weights": None},
        {"value": -1},
        {"value": math.nan},
        {"horizon": math.inf},
        {"values": [-0.5, -0.25]},
        {"horizons": [2.0, 1.0]},
        {"index": True},
        {"session": None},
        {"objective": {"kind": "tilt", "lambda": 0.5}},
        {"further": 1},
    ],
)
def test_all_other_rows_are_looked_at_field_by_field(other: dict[str, Any]) -> None:
    assert _decode._plain_scores({**ROW, **other}) is None
    assert _decode._plain_scores(dict(reversed(ROW.items()))) is None
    assert _decode._plain_scores({name: value for name, value in ROW.items() if name != "value"}) is None
