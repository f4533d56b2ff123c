"""/predict_length for several models in one call, and its answer as headers."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from lenvm_service.api import create_app
from lenvm_service.api.responses import PredictModelsResponse
from lenvm_service.engine.jobs import PredictJob, Prefix
from lenvm_service.errors import DeadlineExceededError, OverloadedError
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.fake_engine import KNOWN, FakeEngine

FORM = {"x-lenvm-headers": "1"}


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return {name: FakeEngine(name, bins=name != "bare") for name in ("first", "second", "bare")}


@pytest.fixture
def app(engines: dict[str, FakeEngine]) -> Any:
    return create_app(engines, Settings(), Metrics())


@pytest.fixture
def client(app: Any) -> TestClient:
    return TestClient(app)


def parts(client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post("/predict_length", json=body)
    assert answer.status_code == 200, answer.text
    PredictModelsResponse.model_validate_json(answer.content, strict=True, extra="forbid")
    found: list[dict[str, Any]] = answer.json()["results"]
    assert [part["index"] for part in found] == list(range(len(body["models"])))
    return found


def test_an_entry_is_what_that_model_alone_would_answer(client: TestClient, engines: dict[str, FakeEngine]) -> None:
    body = {"inputs": [{"prompt": "ab"}, {"prompt": ""}], "max_tokens": 9, "priority": -3, "generator": "another"}
    together = parts(client, {**body, "models": ["second", "bare", "first"], "model": None})
    assert [part["cap"] for part in together] == [64, None, 64]
    for part in together:
        alone = client.post("/predict_length", json={**body, "model": part["model"]}).json()
        for answer in (part, alone):
            assert answer.pop("timings_ms")["inference"] == 2.5
            assert answer["warnings"][0]["code"] == "generator_mismatch"
            assert answer["predictions"][1]["error"].pop("request_id")
        assert part == {"index": part["index"], **alone}
    for engine in engines.values():
        job = PredictJob(Prefix([1, *map(ord, "userab")]), quantiles=(0.5, 0.9, 0.95), max_tokens=9)
        assert engine.calls == [([job], None, -3)] * 2
        assert engine.reserved == engine.released


def test_the_models_are_asked_at_once(client: TestClient, engines: dict[str, FakeEngine]) -> None:
    """None answers before all have been asked."""
    waiting: list[str] = []

    def together(engine: FakeEngine) -> Any:
        async def submit(*arguments: Any, **named: Any) -> Any:
            waiting.append(engine.name)
            async with asyncio.timeout(60.0):
                while len(waiting) < len(engines):
                    await asyncio.sleep(0)
            return await FakeEngine.submit(engine, *arguments, **named)

        return submit

    for engine in engines.values():
        engine.submit = together(engine)  # type: ignore[method-assign]
    assert all("error" not in part for part in parts(client, {"prompt": "a", "models": list(engines)}))


def test_one_model_that_fails_is_an_error_of_its_entry(client: TestClient, engines: dict[str, FakeEngine]) -> None:
    engines["second"].full = OverloadedError("full", retry_after_s=2.0)
    engines["bare"].fail = ZeroDivisionError("secret")
    found = parts(client, {"prompt": "a", "models": ["bare", "nobody", "first", "second"]})
    assert [part["model"] for part in found] == ["bare", "nobody", "first", "second"]
    assert found[2]["predictions"][0]["mean"] == 4.0
    errors = [found[at]["error"] for at in (0, 1, 3)]
    assert [error["type"] for error in errors] == ["internal", "model_not_found", "overloaded"]
    assert [error["param"] for error in errors] == ["models[0]", "models[1]", "models[3]"]
    assert errors[2]["retry_after_ms"] == 2000
    assert "secret" not in errors[0]["message"]
    for name, change in (("first", {"state": "loading"}), ("second", {"full": None})):
        for attribute, value in change.items():
            setattr(engines[name], attribute, value)
    engines["bare"].fail = DeadlineExceededError("too late")
    found = parts(client, {"prompt": "a", "models": list(engines), "deadline_ms": 60_000})
    assert [part.get("error", {}).get("type") for part in found] == ["not_ready", None, "deadline_exceeded"]
    assert engines["second"].calls[-1][1] == engines["bare"].calls[-1][1] is not None
    assert all(engine.released == engine.reserved[-len(engine.released) :] for engine in engines.values())


@pytest.mark.parametrize(
    ("models", "status", "kind"),
    [
        (["x", "y"], 404, "model_not_found"),
        (["x", "full"], 429, "overloaded"),
        (["x", "late", "full"], 429, "overloaded"),
        (["x", "late"], 504, "deadline_exceeded"),
    ],
)
def test_where_no_model_answers_the_call_fails(models: list[str], status: int, kind: str) -> None:
    engines = {name: FakeEngine(name) for name in ("full", "late")}
    engines["full"].full = OverloadedError("full", retry_after_s=2.0)
    engines["late"].fail = DeadlineExceededError("too late")
    client = TestClient(create_app(engines, Settings(), Metrics()))
    answer = client.post("/predict_length", json={"prompt": "a", "models": models})
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert answer.headers.get("retry-after") == ("2" if status == 429 else None)
    flat = client.post("/predict_length", json={"prompt": "", "models": ["x", "late"]})
    assert (flat.status_code, flat.json()["error"]["param"]) == (422, "prompt")


def test_ids_do_not_go_to_models_of_different_tokenizers(client: TestClient, engines: dict[str, FakeEngine]) -> None:
    body = {"inputs": [{"prompt": "a"}, {"token_ids": [1]}, {"session": KNOWN}], "models": ["first", "second"]}
    assert all("error" not in row for part in parts(client, body) for row in part["predictions"])
    config = engines["second"].config
    backbone = dataclasses.replace(config.backbone, tokenizer_sha256="2" * 64)
    engines["second"].config = dataclasses.replace(config, backbone=backbone)
    for part in parts(client, body):
        good, *bad = part["predictions"]
        assert good["mean"] == 4.0
        assert [row["error"]["param"] for row in bad] == ["inputs[1].token_ids", "inputs[2].session"]
        assert all("different tokenizers" in row["error"]["message"] for row in bad)
    body["models"] = ["second", "nobody"]
    assert all("error" not in row for row in parts(client, body)[0]["predictions"])  # the only one that answers


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"models": ["first"], "model": "first"}, "models"),
        ({"models": ["first", "first"]}, "models"),
        ({"models": []}, "too_short"),
        ({"models": ["m"] * 65}, "too_long"),
        ({"models": "first"}, "list_type"),
        ({"models": [1]}, "string_type"),
    ],
)
def test_wrong_models_are_refused(client: TestClient, change: dict[str, Any], code: str) -> None:
    answer = client.post("/predict_length", json={"prompt": "a", **change})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, code)
    assert answer.json()["error"]["param"].startswith("models")
    assert client.post("/score", json={"prompt": "a", "completion": "b", "models": ["first"]}).status_code == 422


@pytest.mark.parametrize("done", [[], ["first"]], ids=["none has answered", "one has answered"])
def test_a_caller_that_goes_stops_every_model(
    app: Any, engines: dict[str, FakeEngine], caplog: pytest.LogCaptureFixture, done: list[str]
) -> None:
    sent: list[Any] = []

    async def main() -> None:
        for engine in engines.values():
            engine.hold = None if engine.name in done else asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append("the request")
                return {"type": "http.request", "body": b'{"prompt": "a", "models": ["first", "second", "bare"]}'}
            async with asyncio.timeout(60.0):
                while not all(engine.calls for engine in engines.values()):
                    await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/predict_length", "query_string": b"", "headers": []}
        await app(scope, receive, send)

    asyncio.run(main())
    assert sent == ["the request"]
    assert [engine.cancelled for engine in engines.values()] == [int(name not in done) for name in engines]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(engine.released == engine.reserved for engine in engines.values())


def given(answer: Any) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("x-lenvm-")}


def test_the_header_form(client: TestClient, engines: dict[str, FakeEngine]) -> None:
    answer = client.post("/predict_length", json={"prompt": "a"}, headers=FORM)
    assert answer.json()["predictions"][0]["mean"] == 4.0
    assert given(answer) == {
        "x-lenvm-p50": "4",
        "x-lenvm-p90": "4",
        "x-lenvm-p95": "4",
        "x-lenvm-mean": "4",
        "x-lenvm-rank-key": "4",
        "x-lenvm-prediction-id": KNOWN,
    }
    answer = client.post("/predict_length", json={"prompt": "a", "quantiles": [0.9, 0.3]}, headers=FORM)
    assert {"x-lenvm-p90", "x-lenvm-mean"} <= set(given(answer))
    assert not {"x-lenvm-p50", "x-lenvm-p95"} & set(given(answer))
    row = {"mean": None, "quantiles": None, "rank_key": 1234.5678, "prediction_id": "p"}
    engines["first"]._row = lambda job: row  # type: ignore[method-assign]
    answer = client.post("/predict_length", json={"prompt": "a"}, headers=FORM)
    assert given(answer) == {"x-lenvm-rank-key": "1234.5678", "x-lenvm-prediction-id": "p"}


def test_the_header_form_is_for_one_prediction_and_only_when_asked_for(client: TestClient) -> None:
    assert given(client.post("/predict_length", json={"prompt": "a"})) == {}
    assert given(client.post("/predict_length", json={"prompt": "a"}, headers={"x-lenvm-headers": "0"})) == {}
    for body, param in (({"inputs": [{"prompt": "a"}]}, "inputs"), ({"prompt": "a", "models": ["first"]}, "models")):
        answer = client.post("/predict_length", json=body, headers=FORM)
        assert (answer.status_code, answer.json()["error"]["param"], given(answer)) == (422, param, {})
    answer = client.post("/predict_length", json={"prompt": ""}, headers=FORM)
    assert (answer.status_code, given(answer)) == (422, {})
