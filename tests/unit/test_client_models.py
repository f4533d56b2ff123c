"""One call for several models: what is sent, the typed answer, and answers that do not fit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lenvm_client import (
    AsyncClient,
    BadAnswerError,
    Client,
    InvalidRequestError,
    MockTransport,
    ModelNotFoundError,
    ModelPredictions,
    OverloadedError,
    PredictModelsResponse,
    RowError,
)

ROW = {"index": 0, "prompt_tokens": 9, "cached_tokens": 0, "value": -0.1, "horizon": 1.0, "rank_key": 1.0}
PART = {"index": 0, "model": "a", "predictions": [ROW], "warnings": [{"code": "generator_mismatch", "message": "so"}]}
FAILED = {"index": 1, "model": "b", "error": {"type": "overloaded", "message": "full", "retry_after_ms": 2000}}


@pytest.fixture(params=["sync", "async"])
def predict(request: pytest.FixtureRequest) -> Any:
    def call(transport: MockTransport, inputs: Any, *, model: str | None = None, **options: Any) -> Any:
        if request.param == "sync":
            with Client(transport=transport, model=model, max_retries=0) as client:
                return client.predict_length(inputs, **options)

        async def main() -> Any:
            async with AsyncClient(transport=transport, model=model, max_retries=0) as client:
                return await client.predict_length(inputs, **options)

        return asyncio.run(main())

    return call


def test_what_is_sent_and_what_comes_back(predict: Any) -> None:
    transport = MockTransport()
    answer = predict(transport, ["x", "y"], models=("a", "b"), max_tokens=5, model="default")
    assert transport.requests[0].body == {
        "inputs": [{"prompt": "x"}, {"prompt": "y"}],
        "models": ["a", "b"],
        "max_tokens": 5,
    }
    assert isinstance(answer, PredictModelsResponse)
    assert [(part.index, part.model, part.cap) for part in answer] == [(0, "a", 2048), (1, "b", 2048)]
    assert [len(part.predictions) for part in answer.results] == [2, 2]
    assert answer.request_id is not None
    assert answer.timings_ms is not None


def test_a_model_that_failed_is_a_row_error(predict: Any) -> None:
    transport = MockTransport({"/predict_length": {"results": [PART, FAILED]}})
    answer = predict(transport, "x", models=["a", "b"])
    good, bad = answer.results
    assert isinstance(good, ModelPredictions)
    assert (good.prediction.horizon, good.warnings[0].code) == (1.0, "generator_mismatch")
    assert bad == RowError(index=1, type="overloaded", message="full", retry_after_ms=2000.0)
    with pytest.raises(OverloadedError):
        list(answer)


def test_a_call_in_which_no_model_answers_raises(predict: Any) -> None:
    with pytest.raises(ModelNotFoundError):
        predict(MockTransport({"/predict_length": ModelNotFoundError("none")}), "x", models=["a"])


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        ([PART], "2 models were asked"),
        ([FAILED, PART], "2 models were asked"),
        ([{**PART, "predictions": []}, FAILED], "1 inputs were sent"),
        ([{**PART, "model": None}, FAILED], "has no model"),
        (None, "has no results"),
    ],
)
def test_answers_that_do_not_fit_are_refused(predict: Any, results: Any, problem: str) -> None:
    with pytest.raises(BadAnswerError, match=problem):
        predict(MockTransport({"/predict_length": {"results": results}}), "x", models=["a", "b"])


@pytest.mark.parametrize("models", ["a", [], ()])
def test_models_must_be_a_list_of_names(predict: Any, models: Any) -> None:
    transport = MockTransport()
    with pytest.raises(InvalidRequestError, match="models"):
        predict(transport, "x", models=models)
    assert transport.requests == []
