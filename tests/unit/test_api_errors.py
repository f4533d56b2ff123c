"""What is wrong, and what comes back: the one error body, the right status, and neighbours that are answered."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from lenvm.errors import ContextTooLongError, InvalidRequestError, PoolExhaustedError
from lenvm_service.api import create_app
from lenvm_service.api.errors import ERROR_TABLE
from lenvm_service.api.responses import ErrorResponse
from lenvm_service.errors import (
    DeadlineExceededError,
    InternalError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    PrefixUnknownError,
)
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.fake_engine import KNOWN, FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine) -> Any:
    return create_app({"fake": engine}, Settings(max_batch_rows=8, max_candidates=16, max_body_bytes=65536), Metrics())


@pytest.fixture
def client(app: Any, engine: FakeEngine) -> Iterator[TestClient]:
    client = TestClient(app)
    yield client
    # Whatever was sent: the service goes on serving.
    engine.fail, engine.hold, engine.state, engine.alive = None, None, "ready", True
    app.state.service.draining = False
    assert client.post("/predict_length", json={"prompt": "still there?"}).status_code == 200


def refused(answer: httpx2.Response, status: int, kind: str, *, code: str | None = None, param: Any = ...) -> Any:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    ErrorResponse.model_validate_json(answer.content, strict=True, extra="forbid")
    error = answer.json()["error"]
    assert error["type"] == kind
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["retryable"] is ERROR_TABLE[kind].retryable
    assert "\n" not in error["message"]
    if code is not None:
        assert error["code"] == code
    if param is not ...:
        assert error["param"] == param
    return error


def row_error(client: TestClient, path: str, row: Any, good: dict[str, Any]) -> Any:
    """The bad row's error; it stands between two good ones, which must be answered."""
    answer = client.post(path, json={"inputs": [good, row, good]})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    rows = found.get("predictions") or found["scores"]
    assert [("error" in entry, entry["index"]) for entry in rows] == [(False, 0), (True, 1), (False, 2)]
    ErrorResponse.model_validate({"error": rows[1]["error"]}, strict=True, extra="forbid")
    return rows[1]["error"]


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (OverloadedError("full", retry_after_s=2.2), 429, "overloaded", "3"),
        (OverloadedError("full"), 429, "overloaded", "1"),
        (PoolExhaustedError("no block left"), 429, "overloaded", "1"),
        (NotReadyError("loading", retry_after_s=0.25), 503, "not_ready", "1"),
        (DeadlineExceededError("too late"), 504, "deadline_exceeded", None),
        (ContextTooLongError("too long"), 422, "context_too_long", None),
        (PrefixUnknownError("gone"), 422, "prefix_unknown", None),
        (PayloadTooLargeError("too much"), 413, "payload_too_large", None),
        (InvalidRequestError("wrong", param="inputs"), 422, "invalid_request", None),
        (InternalError("secret text"), 500, "internal", None),
        (RuntimeError("secret text"), 500, "internal", None),
    ],
)
def test_what_the_engine_raises(
    client: TestClient, engine: FakeEngine, error: Exception, status: int, kind: str, retry_after: str | None
) -> None:
    engine.fail = error
    answer = client.post("/predict_length", json={"inputs": [{"prompt": "a"}]})
    body = refused(answer, status, kind)
    assert answer.headers.get("retry-after") == retry_after
    assert (body["retry_after_ms"] is not None) is (retry_after is not None)
    assert "secret" not in answer.text
    assert answer.headers["x-queue-ms"] == "0.000"


def test_an_unforeseen_failure_is_logged_with_its_request_id(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail = RuntimeError("the cause")
    refused(client.post("/score", json={"prompt": "a", "completion": "b"}), 500, "internal")
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the cause"


def test_wrong_paths_and_methods(client: TestClient) -> None:
    for path in ("/nothing", "/score/", "//score", "/health", "/v1/models/x"):
        refused(client.get(path), 404, "invalid_request", code="not_found", param=None)
    answer = client.get("/score")
    refused(answer, 405, "invalid_request", code="method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert client.delete("/info").headers["allow"] == "GET"
    assert client.options("/score").status_code == 405


def test_an_unknown_model(client: TestClient) -> None:
    for path, body in (
        ("/predict_length", {"prompt": "a"}),
        ("/score", {"prompt": "a", "completion": "b"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"token_ids": [1]}),
        ("/feedback", {"items": [{}]}),
    ):
        error = refused(client.post(path, json={**body, "model": "nobody"}), 404, "model_not_found")
        assert "fake" in error["message"]


def test_a_model_that_is_not_ready(client: TestClient, engine: FakeEngine) -> None:
    del engine.tokenizer  # there is none before it is loaded
    for state in ("loading", "failed", "stopped"):
        engine.state = state
        for path, body in (("/predict_length", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            answer = client.post(path, json=body)
            refused(answer, 503, "not_ready")
            assert int(answer.headers["retry-after"]) >= 1
        refused(client.get("/health/ready"), 503, "not_ready")
        assert client.get("/health/live").status_code == 200
        assert client.get("/info").json()["models"][0]["state"] == state
    from tests.support.fake_engine import FakeTokenizer

    engine.tokenizer = FakeTokenizer()


def test_while_an_engine_recovers_work_may_wait_for_it(client: TestClient, engine: FakeEngine) -> None:
    engine.state = "recovering"
    refused(client.get("/health/ready"), 503, "not_ready")
    assert client.post("/predict_length", json={"prompt": "a"}).status_code == 200


def test_an_engine_without_a_heartbeat(client: TestClient, engine: FakeEngine) -> None:
    engine.alive = False
    refused(client.get("/health/live"), 503, "not_ready")
    refused(client.get("/health/ready"), 503, "not_ready")
    refused(client.post("/predict_length", json={"prompt": "a"}), 503, "not_ready")


def test_draining_refuses_new_work_and_closes_connections(client: TestClient, app: Any) -> None:
    app.state.service.draining = True
    for path in ("/predict_length", "/score", "/tokenize", "/detokenize", "/feedback"):
        answer = client.post(path, content=b"not even read")
        refused(answer, 503, "draining")
        assert answer.headers["connection"] == "close"
        assert answer.headers["retry-after"] == "1"
    answer = client.get("/health/ready")
    refused(answer, 503, "draining")
    live = client.get("/health/live")
    assert (live.status_code, live.headers["connection"]) == (200, "close")


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "json_invalid"),
        (b"{", "json_invalid"),
        (b'{"prompt": "a"} x', "json_invalid"),
        (b'{"prompt": NaN}', "json_invalid"),
        (b'{"token_ids": [Infinity]}', "json_invalid"),
        (b'{"token_ids": [-Infinity]}', "json_invalid"),
        (b'{"prompt": "\\ud800"}', "json_invalid"),
        (b'{"prompt": ' + b"[" * 100_0 + b"]" * 100_0 + b"}", "json_invalid"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "json_invalid"),
        (b"\xef\xbb\xbf{}", "json_invalid"),
        (b'{"prompt": "\xff"}', "not_utf8"),
        ('{"prompt": "é"}'.encode("latin-1"), "not_utf8"),
        ('{"prompt": "a"}'.encode("utf-16"), "not_utf8"),
    ],
)
def test_what_is_no_json_text(client: TestClient, body: bytes, code: str) -> None:
    for path in ("/predict_length", "/score", "/tokenize", "/detokenize", "/feedback"):
        refused(client.post(path, content=body), 400, "invalid_request", code=code)


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"text"', b"true"])
def test_what_is_no_object(client: TestClient, body: bytes) -> None:
    refused(client.post("/score", content=body), 422, "invalid_request", code="not_an_object")


def test_any_content_type_is_read_as_json(client: TestClient) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        answer = client.post("/predict_length", content=b'{"prompt": "a"}', headers={"content-type": kind})
        assert answer.status_code == 200


@pytest.mark.parametrize("declared", ["70000", "9" * 5000])
def test_a_body_that_says_it_is_too_large_is_not_read(app: Any, declared: str) -> None:
    async def receive() -> Any:
        raise AssertionError("the body was read")

    status, _, body = asyncio.run(call(app, receive, [(b"content-length", declared.encode())]))
    assert (status, json.loads(body)["error"]["type"]) == (413, "payload_too_large")


def test_a_chunked_body_is_cut_off_at_the_limit(app: Any) -> None:
    read = 0

    async def receive() -> Any:
        nonlocal read
        read += 4096
        return {"type": "http.request", "body": b" " * 4096, "more_body": True}

    status, _, body = asyncio.run(call(app, receive, []))
    assert (status, json.loads(body)["error"]["type"]) == (413, "payload_too_large")
    assert read == 65536 + 4096


async def call(app: Any, receive: Any, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[bytes, bytes], bytes]:
    """One POST /predict_length by hand: status (0: none was sent), headers, body."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/predict_length",
        "raw_path": b"/predict_length",
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    if not sent:
        return 0, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


# -- envelopes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"inputs": []}, "inputs", "too_short"),
        ({"inputs": None}, "inputs", "missing"),
        ({"inputs": {"prompt": "a"}}, "inputs", "list_type"),
        ({"inputs": "a"}, "inputs", "list_type"),
        ({"prompt": "b"}, "prompt", "inputs_and_flat"),
        ({"colour": 1}, "colour", "extra_forbidden"),
        ({"colour": None}, "colour", "extra_forbidden"),
        ({"model": 1}, "model", "string_type"),
        ({"max_tokens": -1}, "max_tokens", "greater_than_equal"),
        ({"max_tokens": True}, "max_tokens", "int_type"),
        ({"max_tokens": "5"}, "max_tokens", "int_type"),
        ({"max_tokens": 1.5}, "max_tokens", "int_type"),
        ({"max_tokens": 10**30}, "max_tokens", "less_than_equal"),
        ({"quantiles": []}, "quantiles", "too_short"),
        ({"quantiles": [0.5, 1]}, "quantiles[1]", "less_than"),
        ({"quantiles": [0]}, "quantiles[0]", "greater_than"),
        ({"quantiles": [0.5] * 65}, "quantiles", "too_long"),
        ({"quantiles": 0.5}, "quantiles", "list_type"),
        ({"deadline_ms": 0}, "deadline_ms", "greater_than"),
        ({"deadline_ms": "soon"}, "deadline_ms", "float_type"),
        ({"deadline_ms": True}, "deadline_ms", "float_type"),
        ({"priority": 1.5}, "priority", "int_type"),
        ({"priority": 10**9}, "priority", "less_than_equal"),
        ({"generator": 5}, "generator", "generator"),
        ({"generator": {"temperature": -1}}, "generator.temperature", "generator"),
        ({"generator": {"seed": 1}}, "generator.seed", "generator"),
    ],
)
def test_a_wrong_envelope(client: TestClient, change: dict[str, Any], param: str, code: str) -> None:
    answer = client.post("/predict_length", json={"inputs": [{"prompt": "a"}], **change})
    refused(answer, 422, "invalid_request", param=param, code=code)


def test_an_overflowing_number_is_refused(client: TestClient) -> None:
    body = b'{"prompt": "a", "deadline_ms": 1e999}'
    refused(client.post("/predict_length", content=body), 422, "invalid_request", param="deadline_ms")


def test_too_many_rows(client: TestClient) -> None:
    refused(client.post("/predict_length", json={"inputs": [{"prompt": "a"}] * 9}), 413, "payload_too_large")
    refused(client.post("/score", json={"inputs": [{}] * 9}), 413, "payload_too_large")
    refused(client.post("/feedback", json={"items": [{}] * 9}), 413, "payload_too_large")


def test_messages_quote_only_a_little_of_the_request(client: TestClient) -> None:
    body = {"prompt": "a", "x" * 5000: 1}
    error = refused(client.post("/predict_length", json=body), 422, "invalid_request")
    assert len(error["message"]) <= 300
    assert len(error["param"]) <= 200
    objective = {"kind": "y" * 5000}
    answer = client.post("/score", json={"token_ids": [1], "candidates": [1], "objective": objective})
    assert len(refused(answer, 422, "invalid_request")["message"]) <= 300


# -- rows --------------------------------------------------------------------------------------------------------------

PREDICT_ROWS: list[tuple[Any, str]] = [
    ({}, "inputs[1]"),
    (None, "inputs[1]"),
    ("text", "inputs[1]"),
    ([1, 2], "inputs[1]"),
    ({"prompt": "a", "token_ids": [1]}, "inputs[1]"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "inputs[1]"),
    ({"session": KNOWN, "token_ids": [1]}, "inputs[1]"),
    ({"prompt": "a", "append": [1]}, "inputs[1]"),
    ({"prompt": ""}, "inputs[1].prompt"),
    ({"prompt": " \n"}, "inputs[1].prompt"),
    ({"prompt": 5}, "inputs[1].prompt"),
    ({"messages": []}, "inputs[1].messages"),
    ({"messages": "hello"}, "inputs[1].messages"),
    ({"messages": [{"role": "user"}]}, "inputs[1].messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "inputs[1].messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "inputs[1].messages[0].name"),
    ({"messages": [{"role": "forbidden", "content": "a"}]}, "inputs[1].messages"),
    ({"token_ids": []}, "inputs[1].token_ids"),
    ({"token_ids": [1, "2"]}, "inputs[1].token_ids[1]"),
    ({"token_ids": [True]}, "inputs[1].token_ids[0]"),
    ({"token_ids": [1.5]}, "inputs[1].token_ids[0]"),
    ({"token_ids": [-1]}, "inputs[1].token_ids[0]"),
    ({"token_ids": [10**30]}, "inputs[1].token_ids[0]"),
    ({"token_ids": [1000]}, "inputs[1].token_ids"),
    ({"token_ids": [None]}, "inputs[1].token_ids[0]"),
    ({"token_ids": [[1]]}, "inputs[1].token_ids[0]"),
    ({"session": ""}, "inputs[1].session"),
    ({"session": "x" * 257}, "inputs[1].session"),
    ({"session": KNOWN, "append": ["a"]}, "inputs[1].append[0]"),
    ({"prompt": "a", "generated": -1}, "inputs[1].generated"),
    ({"prompt": "a", "generated": 2.5}, "inputs[1].generated"),
    ({"prompt": "a", "colour": 1}, "inputs[1].colour"),
    ({"prompt": "a", "candidates": [1]}, "inputs[1].candidates"),
]


@pytest.mark.parametrize(("row", "param"), PREDICT_ROWS)
def test_a_bad_row_of_predict_length(client: TestClient, row: Any, param: str) -> None:
    error = row_error(client, "/predict_length", row, {"prompt": "good"})
    assert (error["type"], error["param"]) == ("invalid_request", param)


CANDIDATES: dict[str, Any] = {"token_ids": [5], "candidates": [2, 3], "generated": 0}
TOKENS: dict[str, Any] = {"prompt": "a", "completion": "b"}
SCORE_ROWS: list[tuple[Any, str]] = [
    ({"prompt": "a"}, "inputs[1]"),
    (["a"], "inputs[1]"),
    ({**TOKENS, "completion_ids": [1]}, "inputs[1]"),
    ({**TOKENS, "session": KNOWN}, "inputs[1].session"),
    ({**TOKENS, "objective": {"kind": "at_most", "target": 1}}, "inputs[1].objective"),
    ({"prompt": "a", "completion": ""}, "inputs[1].completion"),
    ({"prompt": "a", "completion_ids": []}, "inputs[1].completion_ids"),
    ({"prompt": "a", "completion_ids": [1000]}, "inputs[1].completion_ids"),
    ({**TOKENS, "eos": 1}, "inputs[1].eos"),
    ({**CANDIDATES, "completion": "b"}, "inputs[1].completion"),
    ({**CANDIDATES, "candidates": []}, "inputs[1].candidates"),
    ({**CANDIDATES, "candidates": 3}, "inputs[1].candidates"),
    ({**CANDIDATES, "candidates": [3, "4"]}, "inputs[1].candidates[1]"),
    ({**CANDIDATES, "logprobs": [-1.0]}, "inputs[1].logprobs"),
    ({**CANDIDATES, "logprobs": [-1.0, "x"]}, "inputs[1].logprobs[1]"),
    ({**CANDIDATES, "eos_ids": [1] * 65}, "inputs[1].eos_ids"),
    ({**CANDIDATES, "prompt": "x"}, "inputs[1]"),
    ({**CANDIDATES, "objective": "short"}, "inputs[1].objective"),
    ({**CANDIDATES, "objective": {}}, "inputs[1].objective.kind"),
    ({**CANDIDATES, "objective": {"kind": "shorter"}}, "inputs[1].objective.kind"),
    ({**CANDIDATES, "objective": {"kind": ["at_most"]}}, "inputs[1].objective.kind"),
    ({**CANDIDATES, "objective": {"kind": "at_most"}}, "inputs[1].objective.target"),
    ({**CANDIDATES, "objective": {"kind": "at_most", "target": True}}, "inputs[1].objective.target"),
    ({**CANDIDATES, "objective": {"kind": "at_most", "target": 3, "colour": 1}}, "inputs[1].objective.colour"),
    ({**CANDIDATES, "objective": {"kind": "tilt", "lambda": "x"}}, "inputs[1].objective.lambda"),
    ({**CANDIDATES, "generated": 3, "objective": {"kind": "scale", "factor": 0.5}}, "inputs[1].objective.kind"),
]


@pytest.mark.parametrize(("row", "param"), SCORE_ROWS)
@pytest.mark.parametrize("good", [TOKENS, CANDIDATES], ids=["tokens", "candidates"])
def test_a_bad_row_of_score(client: TestClient, row: Any, param: str, good: dict[str, Any]) -> None:
    error = row_error(client, "/score", row, good)
    assert (error["type"], error["param"]) == ("invalid_request", param)


def test_numbers_that_overflow_inside_a_row(client: TestClient) -> None:
    body = (
        b'{"inputs": [{"token_ids": [5], "candidates": [2], "logprobs": [-1e999]},'
        b'{"token_ids": [5], "candidates": [2], "objective": {"kind": "tilt", "lambda": 1e999}}]}'
    )
    rows = client.post("/score", content=body).json()["scores"]
    assert [row["error"]["param"] for row in rows] == ["inputs[0].logprobs[0]", "inputs[1].objective.lambda"]


def test_too_many_candidates_are_a_row_error(client: TestClient) -> None:
    error = row_error(client, "/score", {**CANDIDATES, "candidates": [1] * 17}, CANDIDATES)
    assert (error["type"], error["param"]) == ("payload_too_large", "inputs[1].candidates")


def test_a_stale_session_is_a_row_error(client: TestClient) -> None:
    for path, row in (("/predict_length", {}), ("/score", {"candidates": [1]})):
        good = {"token_ids": [1], **row}
        error = row_error(client, path, {"session": "gone", **row}, good)
        assert (error["type"], error["param"], error["retryable"]) == ("prefix_unknown", "inputs[1].session", False)
        refused(client.post(path, json={"session": "gone", **row}), 422, "prefix_unknown", param="session")


def test_all_rows_may_be_bad(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post("/predict_length", json={"inputs": [{}, {"prompt": ""}]})
    assert answer.status_code == 200
    assert engine.calls == []
    assert answer.json()["timings_ms"]["inference"] == 0.0


def test_a_tokenizer_that_breaks_fails_its_row_alone(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    encode = engine.tokenizer.encode

    def broken(text: str, **named: Any) -> list[int]:
        if text == "boom":
            raise ZeroDivisionError("secret text")
        found: list[int] = encode(text, **named)
        return found

    engine.tokenizer.encode = broken
    error = row_error(client, "/score", {"token_ids": [1], "completion": "boom"}, {**TOKENS})
    assert error["type"] == "internal"
    assert "secret" not in error["message"]
    assert "secret text" in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/predict_length", {"prompt": ""}, "prompt"),
        ("/predict_length", {"token_ids": [1000]}, "token_ids"),
        ("/predict_length", {"prompt": "a", "token_ids": [1]}, None),
        ("/score", {**CANDIDATES, "objective": {"kind": "at_most"}}, "objective.target"),
        ("/score", {**CANDIDATES, "generated": 1, "objective": {"kind": "scale", "factor": 0.5}}, "objective.kind"),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": ""}, "prompt"),
        ("/tokenize", {"token_ids": [1]}, "token_ids"),
        ("/detokenize", {}, "token_ids"),
        ("/detokenize", {"token_ids": [5, 1000]}, "token_ids[1]"),
        ("/detokenize", {"token_ids": ["a"]}, "token_ids[0]"),
        ("/feedback", {}, "items"),
        ("/feedback", {"items": [], "prediction_id": "x"}, "prediction_id"),
    ],
)
def test_without_neighbours_the_error_is_that_of_the_request(
    client: TestClient, path: str, body: dict[str, Any], param: str | None
) -> None:
    refused(client.post(path, json=body), 422, "invalid_request", param=param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"generated_tokens": -1}, "items[0].generated_tokens"),
        ({"generated_tokens": None}, "items[0].generated_tokens"),
        ({"finish_reason": "eos"}, "items[0].finish_reason"),
        ({"token_ids": [1]}, "items[0]"),
        ({"colour": 1}, "items[0].colour"),
    ],
)
def test_a_bad_item_of_feedback(client: TestClient, change: dict[str, Any], param: str) -> None:
    item = {"prediction_id": KNOWN, "generated_tokens": 1, "finish_reason": "length"}
    found = client.post("/feedback", json={"items": [{**item, **change}, item]}).json()
    assert found["accepted"] == 1
    assert found["results"][0]["error"]["param"] == param


# -- time and callers that go ------------------------------------------------------------------------------------------


def test_a_deadline_is_kept_even_where_the_engine_does_not(client: TestClient, engine: FakeEngine) -> None:
    engine.hold = asyncio.Event()
    # Long enough that a slow machine has asked the engine by then: a deadline gone before that never reaches it.
    refused(client.post("/predict_length", json={"prompt": "a", "deadline_ms": 1500}), 504, "deadline_exceeded")
    assert engine.cancelled == 1
    assert engine.calls[0][1] is not None


def test_a_deadline_that_passed_before_the_engine_was_asked(client: TestClient, engine: FakeEngine) -> None:
    refused(client.post("/predict_length", json={"prompt": "a", "deadline_ms": 1e-6}), 504, "deadline_exceeded")
    assert engine.calls == []


def test_the_default_deadline(engine: FakeEngine) -> None:
    client = TestClient(create_app({"fake": engine}, Settings(default_deadline_ms=30_000), Metrics()))
    client.post("/predict_length", json={"prompt": "a"})
    client.post("/predict_length", json={"prompt": "a", "deadline_ms": 60_000})
    first, second = (deadline for _, deadline, _ in engine.calls)
    assert first is not None
    assert second is not None
    assert 20 < second - first < 40


def _body(*parts: bytes) -> list[dict[str, Any]]:
    return [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]


@pytest.mark.parametrize("when", ["while the body is read", "while the engine works"])
def test_a_caller_that_goes(app: Any, engine: FakeEngine, caplog: pytest.LogCaptureFixture, when: str) -> None:
    engine.hold = asyncio.Event()
    gone = {"type": "http.disconnect"}
    early = when == "while the body is read"
    messages = [*_body(b'{"prompt": ', b'"a"}')[: 1 if early else 2], gone]

    async def receive() -> Any:
        await asyncio.sleep(0)
        return messages.pop(0)

    caplog.set_level(logging.INFO)
    status, _, _ = asyncio.run(call(app, receive, []))
    assert status == 0
    assert (len(engine.calls), engine.cancelled) == ((0, 0) if early else (1, 1))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (line,) = [record for record in caplog.records if record.name == "lenvm_service.access"]
    assert (line.fields["status"], line.fields["error_type"]) == (499, "client_gone")  # type: ignore[attr-defined]
    assert app.state.service.requests == set()


def test_abandoned_requests_are_answered(app: Any, engine: FakeEngine) -> None:
    engine.hold = asyncio.Event()

    async def run() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:

            async def slow_body() -> AsyncIterator[bytes]:
                yield b'{"prompt": '
                await asyncio.sleep(60)

            waiting = asyncio.create_task(client.post("/predict_length", json={"prompt": "a"}))
            reading = asyncio.create_task(client.post("/predict_length", content=slow_body()))
            while len(engine.calls) < 1 or len(app.state.service.requests) < 2:
                await asyncio.sleep(0.005)
            app.state.service.draining = True
            app.state.service.abandon()
            return [await waiting, await reading]

    for answer in asyncio.run(run()):
        refused(answer, 503, "draining")
    assert engine.cancelled == 1


def test_a_cancellation_by_the_engine_is_no_cancellation_of_the_request(client: TestClient, engine: FakeEngine) -> None:
    async def cancelled(*_: Any, **__: Any) -> Any:
        raise asyncio.CancelledError

    engine.submit = cancelled  # type: ignore[method-assign]
    refused(client.post("/predict_length", json={"prompt": "a"}), 500, "internal")
    del engine.submit


def test_floods_of_problems_are_refused_at_the_first(client: Any) -> None:
    """Naming 100,000 of them would keep the event loop busy for seconds."""
    flood = {"inputs": [{"messages": [{}] * 1000}]}
    (row,) = client.post("/predict_length", json=flood).json()["predictions"]
    assert row["error"]["param"] == "inputs[0].messages[0].role"
    many = {f"field{at}": 1 for at in range(100)}
    answer = client.post("/predict_length", json=many)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "too_many_fields")
    (row,) = client.post("/predict_length", json={"inputs": [many]}).json()["predictions"]
    assert row["error"]["code"] == "too_many_fields"
