"""The routes over a fake engine: what they answer, in which form, with which headers."""

from __future__ import annotations

import gc
import json
import re
import weakref
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from lenvm import __version__
from lenvm.guidance import Objective
from lenvm_service.api import create_app, middleware, responses
from lenvm_service.api.errors import error_response
from lenvm_service.api.examples import REQUEST_EXAMPLES, RESPONSE_EXAMPLES
from lenvm_service.engine.jobs import CandidateJob, PredictJob, Prefix, TokenScoreJob
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.fake_engine import KNOWN, FakeEngine

FORMS = {
    "/predict_length": responses.PredictResponse,
    "/score": responses.ScoreResponse,
    "/tokenize": responses.TokenizeResponse,
    "/detokenize": responses.DetokenizeResponse,
    "/feedback": responses.FeedbackResponse,
    "/v1/models": responses.ModelsResponse,
    "/info": responses.InfoResponse,
    "/health/live": responses.LiveResponse,
    "/health/ready": responses.ReadyResponse,
}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def client(engine: FakeEngine, metrics: Metrics) -> TestClient:
    return TestClient(create_app({"fake": engine, "other": FakeEngine("other")}, Settings(), metrics))


def ok(client: TestClient, path: str, body: Any = None) -> dict[str, Any]:
    answer = client.get(path) if body is None else client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    form = responses.StepResponse if "columns" in (body or {}) else FORMS[path]
    form.model_validate_json(answer.content, strict=True, extra="forbid")
    found: dict[str, Any] = answer.json()
    return found


def test_predict_length(client: TestClient, engine: FakeEngine) -> None:
    found = ok(
        client,
        "/predict_length",
        {
            "inputs": [
                {"prompt": "ab"},
                {"messages": [{"role": "user", "content": "ab"}], "generated": 0},
                {"token_ids": [5, 6], "generated": 1},
                {"session": KNOWN, "append": [7], "generated": None},
                {"session": KNOWN},
            ],
            "max_tokens": 9,
            "quantiles": [0.25, 0.5, 0.25],
            "priority": -3,
        },
    )
    assert {name: found[name] for name in ("model", "model_sha", "gamma", "cap", "warnings")} == {
        "model": "fake",
        "model_sha": "f" * 16,
        "gamma": 0.99,
        "cap": 64,
        "warnings": [],
    }
    assert [row["index"] for row in found["predictions"]] == [0, 1, 2, 3, 4]
    assert found["predictions"][0]["quantiles"] == {"0.25": 4, "0.5": 4}
    assert (found["timings_ms"]["queue"], found["timings_ms"]["inference"]) == (1.5, 2.5)
    text = [1, *map(ord, "userab")]
    jobs, deadline, priority = engine.calls[0]
    assert (deadline, priority) == (None, -3)
    given = {"quantiles": (0.25, 0.5), "max_tokens": 9}
    assert jobs == [
        PredictJob(Prefix(text), **given),
        PredictJob(Prefix(text), **given),
        PredictJob(Prefix([5, 6]), **given, generated=1),
        PredictJob(Prefix([7], session=KNOWN), **given),
        PredictJob(Prefix((), session=KNOWN), **given),
    ]


def test_score_takes_both_kinds_of_rows_in_one_call(client: TestClient, engine: FakeEngine) -> None:
    found = ok(
        client,
        "/score",
        {
            "inputs": [
                {"prompt": "a", "completion": "bc", "candidates": None},
                {"token_ids": [5], "completion_ids": [6], "eos": True},
                {"token_ids": [5], "candidates": [2, 3], "generated": 4, "completion": None},
                {
                    "session": KNOWN,
                    "append": [3],
                    "candidates": [2, 3],
                    "logprobs": [-1, -0.5],
                    "generated": 5,
                    "objective": {"kind": "equal_to", "target": 9, "beta": None},
                    "eos_ids": [3],
                    "return_values": False,
                },
            ]
        },
    )
    assert [len(row["values"]) for row in found["scores"]] == [3, 3, 2, 2]
    assert [row.get("log_weights") for row in found["scores"][2:]] == [None, [0.0, 0.0]]
    assert engine.calls[0][0] == [
        TokenScoreJob([1, *map(ord, "usera")], [ord("b"), ord("c")]),
        TokenScoreJob([5], [6], eos=True),
        CandidateJob(Prefix([5]), [2, 3], generated=4),
        CandidateJob(
            Prefix([3], session=KNOWN),
            [2, 3],
            generated=5,
            objective=Objective(kind="equal_to", target=9),
            logprobs=[-1.0, -0.5],
            eos_ids=(3,),
            return_values=False,
        ),
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict_length", {"prompt": "ab", "generated": 0, "max_tokens": 4}),
        ("/score", {"prompt": "ab", "completion": "c"}),
        ("/score", {"token_ids": [5], "candidates": [2, 3], "inputs": None}),
    ],
)
def test_one_input_may_be_flat(client: TestClient, path: str, body: dict[str, Any]) -> None:
    found = ok(client, path, body)
    assert [row["index"] for row in found.get("predictions", found.get("scores"))] == [0]


def test_the_model_is_chosen_by_name(client: TestClient) -> None:
    assert ok(client, "/predict_length", {"prompt": "a", "model": "other"})["model"] == "other"
    assert ok(client, "/predict_length", {"prompt": "a", "model": None})["model"] == "fake"


def test_tokenize_and_detokenize(client: TestClient) -> None:
    ids = ok(client, "/tokenize", {"prompt": "hé"})
    assert ids == {"model": "fake", "token_ids": [1, *map(ord, "userhé")]}
    messages = [{"role": "user", "content": "hé"}]
    assert ok(client, "/tokenize", {"messages": messages, "model": "other"})["token_ids"] == ids["token_ids"]
    assert ok(client, "/detokenize", {"token_ids": [104, 233]}) == {"model": "fake", "text": "hé"}
    assert ok(client, "/detokenize", {"token_ids": []})["text"] == ""


def test_feedback_has_a_result_for_each_item(client: TestClient) -> None:
    item = {"generated_tokens": 5, "finish_reason": "stop"}
    found = ok(
        client,
        "/feedback",
        {
            "items": [
                {**item, "prediction_id": KNOWN},
                {**item, "prediction_id": "x"},
                {**item, "token_ids": [1]},
                {**item},
            ]
        },
    )
    assert found["accepted"] == 2
    assert [row.get("accepted") for row in found["results"]] == [True, None, True, None]
    assert [row["error"]["type"] for row in found["results"] if "error" in row] == ["prefix_unknown", "invalid_request"]
    assert found["results"][1]["error"]["param"] == "items[1].prediction_id"


def test_models_info_and_health(client: TestClient) -> None:
    assert [model["id"] for model in ok(client, "/v1/models")["data"]] == ["fake", "other"]
    info = ok(client, "/info")
    assert info["version"] == __version__
    assert [model["name"] for model in info["models"]] == ["fake", "other"]
    assert info["limits"] == {
        "max_body_bytes": 2097152,
        "max_batch_rows": 512,
        "max_candidates": 1024,
        "max_queue_tokens": 262144,
    }
    assert ok(client, "/health/live") == {"status": "live"}
    assert ok(client, "/health/ready") == {"status": "ready", "models": {"fake": "ready", "other": "ready"}}


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (None, None),
        ("org/fake-backbone", None),
        ("Fake-Backbone", None),
        ({"temperature": 0.7, "top_p": 1, "max_new_tokens": 64}, None),
        ("mine/fake-backbone", "the backbone org/fake-backbone"),
        ("another", "the backbone org/fake-backbone"),
        ({"backbone": "fake-backbone", "temperature": 1.0, "max_new_tokens": 65}, "temperature 0.7 and max_new_tokens"),
    ],
)
def test_a_generator_of_another_kind_is_warned_about(client: TestClient, claim: Any, expected: str | None) -> None:
    warnings = ok(client, "/predict_length", {"prompt": "a", "generator": claim})["warnings"]
    assert [warning["code"] for warning in warnings] == ([] if expected is None else ["generator_mismatch"])
    assert expected is None or expected in warnings[0]["message"]


def test_every_answer_has_an_id_and_its_time(client: TestClient) -> None:
    for answer in (
        client.get("/info"),
        client.get("/nothing"),
        client.put("/score"),
        client.post("/score", content=b"{"),
        client.get("/metrics"),
        client.get("/docs"),
    ):
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        assert float(answer.headers["x-total-ms"]) > 0
        assert "total;dur=" in answer.headers["server-timing"]
    answer = client.post("/predict_length", json={"prompt": "a"})
    assert (answer.headers["x-queue-ms"], answer.headers["x-inference-ms"]) == ("1.500", "2.500")
    assert answer.headers["server-timing"].startswith("queue;dur=1.500, inference;dur=2.500, total;dur=")


def test_the_callers_request_id_comes_back(client: TestClient) -> None:
    for good in ("abc-1", "x" * 128, "with space"):
        answer = client.post("/score", content=b"{", headers={"x-request-id": good})
        assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"] == good
    for bad in (b"", b"x" * 129, b"tab\there", "é".encode("latin-1")):
        assert re.fullmatch(r"[0-9a-f]{32}", client.get("/info", headers={"x-request-id": bad}).headers["x-request-id"])


def test_numbers_that_json_cannot_hold_become_null(client: TestClient, engine: FakeEngine) -> None:
    engine._row = lambda job: {"value": float("nan"), "horizon": float("inf")}  # type: ignore[method-assign]
    answer = client.post("/predict_length", json={"prompt": "a"})
    assert answer.json()["predictions"] == [{"index": 0, "value": None, "horizon": None}]


def test_long_texts_are_encoded_off_the_event_loop(client: TestClient, engine: FakeEngine) -> None:
    import threading

    seen: list[bool] = []
    encode = engine.tokenizer.apply_chat_template
    main: list[int] = []

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append(threading.get_ident() == main[0])
        return encode(*arguments, **named)

    async def submit(*arguments: Any, **named: Any) -> Any:
        main.append(threading.get_ident())
        return await FakeEngine.submit(engine, *arguments, **named)

    engine.tokenizer.apply_chat_template = spy
    engine.submit = submit  # type: ignore[method-assign]
    with client:  # one event loop for all requests
        ok(client, "/predict_length", {"token_ids": [1]})
        ok(client, "/predict_length", {"prompt": "a"})
        ok(client, "/predict_length", {"prompt": "a" * 100_000})
    assert seen == [True, False]


def test_requests_are_counted_by_route_and_error(client: TestClient, metrics: Metrics) -> None:
    client.get("/nothing/secret")
    client.post("/score", content=b"{")
    ok(client, "/predict_length", {"prompt": "a"})
    text = client.get("/metrics").text
    for route, status, kind in (
        ("unmatched", 404, "invalid_request"),
        ("/score", 400, "invalid_request"),
        ("/predict_length", 200, "none"),
    ):
        labels = {"route": route, "status": str(status), "error_type": kind}
        assert metrics.registry.get_sample_value("lenvm_requests_total", labels) == 1.0
        assert f'route="{route}"' in text
    assert metrics.registry.get_sample_value("lenvm_requests_in_flight") == 0.0
    assert "secret" not in text


def test_an_application_below_a_prefix_knows_its_routes(engine: FakeEngine, metrics: Metrics) -> None:
    app = create_app({"fake": engine}, Settings(), metrics)
    client = TestClient(Starlette(routes=[Mount("/models/fake", app)]))
    answer = client.post("/models/fake/predict_length", json={"prompt": "a"})
    assert (answer.status_code, answer.headers["x-queue-ms"]) == (200, "1.500")
    labels = {"route": "/predict_length", "status": "200", "error_type": "none"}
    assert metrics.registry.get_sample_value("lenvm_requests_total", labels) == 1.0


def test_model_routes_are_called_directly_and_have_nothing_that_the_framework_would_do(
    engine: FakeEngine, metrics: Metrics
) -> None:
    app = create_app({"fake": engine}, Settings(), metrics)
    (middleware,) = app.user_middleware
    direct = middleware.kwargs["direct"]
    assert set(direct) == {"/predict_length", "/score"}
    for route in direct.values():
        assert (route.methods, route.dependencies, route.dependant.dependencies) == ({"POST"}, [], [])
        assert (route.status_code, route.response_class.value) == (None, JSONResponse)


def test_a_refusal_leaves_nothing_to_the_garbage_collector(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Exception]] = []

    def spy(error: Exception, request: Any) -> Any:
        kept.append(weakref.ref(error))
        return error_response(error, request)

    monkeypatch.setattr(middleware, "error_response", spy)
    gc.collect()
    gc.disable()
    try:
        for path in ("/predict_length", "/score"):
            body = {"model": "none such", "inputs": [{"token_ids": [1]}]}
            assert client.post(path, json=body).status_code == 404
            assert client.post(path, content=b"{").status_code == 400
        assert [ref() for ref in kept] == [None] * 4
    finally:
        gc.enable()


def test_the_examples_of_the_document_are_true(client: TestClient) -> None:
    known = {"28120": "281", "4093": "409", "smollm2-135m-instruct": "fake", "another-model": "other"}
    for path, examples in REQUEST_EXAMPLES.items():
        for example in examples.values():
            text = re.sub(r"s1\.[0-9a-f]+", KNOWN, json.dumps(example["value"])) if path == "/score" else ""
            text = text or json.dumps(example["value"])
            for theirs, ours in known.items():
                text = text.replace(theirs, ours)
            body = json.loads(text)
            if "models" in body:
                parts = client.post(path, json=body).json()["results"]
                assert [(part["model"], len(part["predictions"])) for part in parts] == [("fake", 1), ("other", 1)]
                continue
            found = ok(client, path, body)
            rows = found.get("predictions") or found.get("scores") or []
            assert not [row for row in rows if "error" in row]
            assert not found.get("errors")
    for path, response in RESPONSE_EXAMPLES.items():
        FORMS[path].model_validate(response, extra="forbid")


def test_probes_may_be_head_requests(client: Any) -> None:
    for path in ("/health/live", "/health/ready"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
