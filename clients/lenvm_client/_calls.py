"""One function or constant for each route: the call that the arguments of the client's method stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lenvm_client._types import (
    CandidateInput,
    CompletionInput,
    DetokenizeResponse,
    FeedbackItem,
    FeedbackResponse,
    Message,
    ModelList,
    PredictInput,
    PredictLengthResponse,
    PredictModelsResponse,
    ScoreResponse,
    ServiceInfo,
    TokenizeResponse,
)
from lenvm_client._wire import Call, RetryPolicy, input_rows, make_call
from lenvm_client.errors import (
    BadAnswerError,
    InvalidRequestError,
    LenVMClientError,
    ServiceTimeoutError,
    ServiceUnreachableError,
)

__all__ = ["Inputs", "ScoreInputs"]

Inputs: TypeAlias = str | Mapping[str, Any] | PredictInput | Iterable[str | Mapping[str, Any] | PredictInput]
ScoreInput: TypeAlias = Mapping[str, Any] | CompletionInput | CandidateInput
ScoreInputs: TypeAlias = str | ScoreInput | Iterable[ScoreInput]


@dataclass(frozen=True)
class Health:
    """What a health route says when all is well."""

    status: str


def options(
    default_model: str | None,
    model: str | None,
    generator: str | Mapping[str, Any] | None,
    deadline_ms: float | None,
    priority: int | None,
) -> dict[str, Any]:
    """What both POSTs take beside their inputs."""
    return {
        "model": model or default_model,
        "generator": generator,
        "deadline_ms": deadline_ms,
        "priority": priority,
    }


def predict_length(
    inputs: Inputs,
    options: Mapping[str, Any],
    max_tokens: int | None,
    quantiles: Sequence[float] | None,
    models: Sequence[str] | None = None,
) -> Call[PredictLengthResponse | PredictModelsResponse]:
    if isinstance(models, str) or (models is not None and not models):
        raise InvalidRequestError("models must be a list with at least one name", param="models")
    body = {
        **input_rows(inputs, PredictInput),
        "max_tokens": max_tokens,
        "quantiles": quantiles,
        "models": None if models is None else list(models),
        **options,
    }
    answer: type[PredictLengthResponse | PredictModelsResponse] = PredictLengthResponse
    if models is not None:
        answer = PredictModelsResponse
    return make_call("POST", "/predict_length", answer, body, rows_field="predictions")


def score(
    inputs: ScoreInputs,
    options: Mapping[str, Any],
    *,
    completion: str | None = None,
    completion_ids: Sequence[int] | None = None,
    eos: bool | None = None,
) -> Call[ScoreResponse]:
    given = {"completion": completion, "completion_ids": completion_ids, "eos": eos}
    if isinstance(inputs, str):
        if completion is None and completion_ids is None:
            raise InvalidRequestError("a prompt alone has nothing to score: give completion", param="completion")
        row = {"prompt": inputs, **given}
    elif any(value is not None for value in given.values()):
        raise InvalidRequestError("completion goes with a single prompt; put it into the inputs", param="completion")
    else:
        row = input_rows(inputs, CompletionInput)
    return make_call("POST", "/score", ScoreResponse, {**row, **options}, rows_field="scores")


def tokenize(prompt: str | None, messages: Sequence[Message] | None, model: str | None) -> Call[TokenizeResponse]:
    return make_call("POST", "/tokenize", TokenizeResponse, {"prompt": prompt, "messages": messages, "model": model})


def detokenize(token_ids: Sequence[int], model: str | None) -> Call[DetokenizeResponse]:
    return make_call("POST", "/detokenize", DetokenizeResponse, {"token_ids": token_ids, "model": model})


def feedback(
    items: FeedbackItem | Mapping[str, Any] | Iterable[FeedbackItem | Mapping[str, Any]], model: str | None
) -> Call[FeedbackResponse]:
    rows = [items] if isinstance(items, FeedbackItem | Mapping) else list(items)
    body = {"items": rows, "model": model}
    # Sent twice, an answer would count twice.
    return make_call("POST", "/feedback", FeedbackResponse, body, rows_field="results", repeatable=False)


MODELS = make_call("GET", "/v1/models", ModelList)
INFO = make_call("GET", "/info", ServiceInfo)
LIVE = make_call("GET", "/health/live", Health)
READY = make_call("GET", "/health/ready", Health)
ONCE = RetryPolicy(max_retries=0)


def is_unhealthy(error: LenVMClientError) -> bool:
    """True for "not now"; False for what no waiting cures, e.g. the wrong server."""
    if isinstance(error, ServiceUnreachableError | ServiceTimeoutError):
        return error.retryable
    return error.status == 503 and not isinstance(error, BadAnswerError)
