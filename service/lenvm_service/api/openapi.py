"""The OpenAPI document: what FastAPI derives from the routes, and the request bodies, which our routes read themselves.

``python -m lenvm_service.api > docs/openapi.json`` writes the pinned copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from lenvm.guidance import Objective
from lenvm_service.api import schemas
from lenvm_service.api.errors import ERROR_TABLE
from lenvm_service.api.examples import ERROR_EXAMPLE, REQUEST_EXAMPLES, RESPONSE_EXAMPLES
from lenvm_service.api.predictions import HEADER_FORM
from lenvm_service.api.responses import ErrorResponse

__all__ = ["DESCRIPTION", "document", "documented", "install_openapi"]

DESCRIPTION = """\
Length Value Models: how many tokens are still to come, and which next token leads to the length you want.

Bodies are JSON in UTF-8; any content type is read as JSON. Token ids are those of the model's tokenizer. `null` counts
as not given, and a field that is not listed here is refused. Answers are aligned with the request; a bad row gets its
own error, with status 200, and its neighbours are answered. A single input may stand flat, without `inputs` around it:
its error is that of the request.
"""
_REF = "#/components/schemas/"
_BODIES: Mapping[str, tuple[type[BaseModel], ...]] = {
    "/predict_length": (schemas.PredictRequest, schemas.PredictFlatRequest),
    "/score": (
        schemas.ScoreRequest,
        schemas.StepRequest,
        schemas.TokenScoreRequest,
        schemas.CandidateScoreRequest,
    ),
    "/tokenize": (schemas.TokenizeRequest,),
    "/detokenize": (schemas.DetokenizeRequest,),
    "/feedback": (schemas.FeedbackRequest,),
}
"""The forms that each route's body may have."""
_DESCRIPTIONS = {
    400: "The body is no JSON text in UTF-8.",
    401: "An API key is wanted (where the service has keys), or another one.",
    404: "There is no such model here.",
    413: "The body, the number of rows or a row is larger than the limits in /info.",
    422: "Well-formed, but wrong.",
    429: "The queue is full, or this key asks too often; Retry-After says when to come back.",
    500: "The service failed; its log has the cause under the request id.",
    503: "A model is not ready, or the process is shutting down.",
    504: "The deadline passed.",
}
_HEADERS: dict[str, Any] = {
    "XRequestId": {"description": "The caller's own, or a new one.", "schema": {"type": "string"}, "required": True},
    "XTotalMs": {"description": "Milliseconds in the service.", "schema": {"type": "number"}, "required": True},
    "XQueueMs": {"description": "Milliseconds until the first batch began.", "schema": {"type": "number"}},
    "XInferenceMs": {"description": "Milliseconds in batches.", "schema": {"type": "number"}},
    "ServerTiming": {"description": "The same, for browsers.", "schema": {"type": "string"}, "required": True},
    "XLenvmP50": {"description": "Half of the answers are at most so long.", "schema": {"type": "integer"}},
    "XLenvmP90": {"description": "90 % of the answers are at most so long.", "schema": {"type": "integer"}},
    "XLenvmP95": {"description": "95 % of the answers are at most so long.", "schema": {"type": "integer"}},
    "XLenvmMean": {"description": "The mean length.", "schema": {"type": "number"}},
    "XLenvmRankKey": {"description": "Lower: less is still to come.", "schema": {"type": "number"}},
    "XLenvmPredictionId": {"description": "For /feedback.", "schema": {"type": "string"}},
    "RetryAfter": {"description": "Seconds until a retry makes sense.", "schema": {"type": "integer", "minimum": 1}},
}
_REQUEST_ID: dict[str, Any] = {
    "name": "x-request-id",
    "in": "header",
    "description": "Comes back with the answer and stands in the log. Printable ASCII, or it is replaced.",
    "schema": {"type": "string", "maxLength": 128},
}
_WITH_FORM = "/predict_length"
_HEADER_FORM: dict[str, Any] = {
    "name": HEADER_FORM,
    "in": "header",
    "description": "For gateways: with 1 the answer to one flat input and one model has its numbers as x-lenvm-* "
    "headers too. A number that the prediction lacks (no distribution, other quantiles asked for) has no header.",
    "schema": {"type": "string", "enum": ["1"]},
}
_FORM_HEADERS = [f"x-lenvm-{name}" for name in ("p50", "p90", "p95", "mean", "rank-key", "prediction-id")]


def documented(summary: str, response: type[BaseModel] | UnionType | None, *, errors: Sequence[int]) -> dict[str, Any]:
    """Arguments of a route's decorator: its 200 (None is plain text), and every other status that can occur."""
    responses: dict[int | str, dict[str, Any]] = {}
    if response is not None:
        responses[200] = {"model": response, "description": "Answered."}
    for status in errors:
        responses[status] = {"model": ErrorResponse, "description": _DESCRIPTIONS[status]}
    # The answer is written by the route; FastAPI must not check it again.
    return {"summary": summary, "responses": responses, "response_model": None}


def _error_example(status: int) -> dict[str, Any]:
    kind = next((name for name, entry in ERROR_TABLE.items() if entry.status == status), "invalid_request")
    retryable = ERROR_TABLE[kind].retryable
    wait = 1000 if status in (429, 503) else None
    return {**ERROR_EXAMPLE, "type": kind, "code": kind, "retryable": retryable, "retry_after_ms": wait}


class _RequestSchema(GenerateJsonSchema):
    """What to send: ``null`` is accepted everywhere for "not given", and would only blur every field."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def install_openapi(app: FastAPI) -> None:
    """Make ``/openapi.json`` and ``/docs`` show :func:`document`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _build(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    forms = [form for choice in _BODIES.values() for form in choice]
    _, definitions = models_json_schema(
        [(form, "validation") for form in forms], ref_template=_REF + "{model}", schema_generator=_RequestSchema
    )
    components = made.setdefault("components", {})
    known = components.setdefault("schemas", {})
    clash = known.keys() & definitions["$defs"].keys()
    assert not clash, f"two schemas of one name: {clash}"
    known.update(definitions["$defs"])
    components["schemas"] = {name: _untitled(known[name]) for name in sorted(known)}
    # Guidance's own class comes along with the field that is checked by it; ObjectiveFields describes that one.
    del components["schemas"][Objective.__name__]
    components["headers"] = _HEADERS
    components["parameters"] = {"XRequestId": _REQUEST_ID, "XLenvmHeaders": _HEADER_FORM}
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "Where the service was given --api-keys."},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
    }
    for path, operations in made["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    return made


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Add what FastAPI cannot know: the body, headers, and examples (whose nulls it would drop)."""
    operation["parameters"] = [{"$ref": "#/components/parameters/XRequestId"}]
    if path == _WITH_FORM:
        operation["parameters"].append({"$ref": "#/components/parameters/XLenvmHeaders"})
    if path != "/health/live":
        operation["security"] = [{}, {"bearer": []}, {"header": []}]  # the first: none is needed without keys
        for status in (401, 429):
            operation["responses"].setdefault(str(status), {"description": _DESCRIPTIONS[status]})
    if path in _BODIES:
        forms: list[dict[str, Any]] = [{"$ref": _REF + form.__name__} for form in _BODIES[path]]
        schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
        content = {"application/json": {"schema": schema, "examples": REQUEST_EXAMPLES[path]}}
        operation["requestBody"] = {"required": True, "content": content}
    for status, response in operation["responses"].items():
        names = ["x-request-id", "x-total-ms", "server-timing"]
        names += ["x-queue-ms", "x-inference-ms"] if "504" in operation["responses"] else []
        names += _FORM_HEADERS if path == _WITH_FORM and status == "200" else []
        names += ["retry-after"] if status in ("429", "503") else []
        response["headers"] = {name: {"$ref": f"#/components/headers/{_component(name)}"} for name in names}
        if status != "200":  # always JSON, whatever the route's own content is
            body = {
                "schema": {"$ref": f"{_REF}{ErrorResponse.__name__}"},
                "example": {"error": _error_example(int(status))},
            }
            response["content"] = {"application/json": body}
        elif path in RESPONSE_EXAMPLES:
            response["content"]["application/json"]["schema"].pop("title", None)  # FastAPI's, of a choice of answers
            response["content"]["application/json"]["example"] = RESPONSE_EXAMPLES[path]


def _component(header: str) -> str:
    return "".join(part.capitalize() for part in header.split("-"))


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes from the names of fields: they say nothing more."""
    if isinstance(schema, dict):
        return {
            name: {field: _untitled(inner) for field, inner in value.items()}
            if name == "properties"
            else _untitled(value)
            for name, value in schema.items()
            if name != "title"
        }
    return [_untitled(inner) for inner in schema] if isinstance(schema, list) else schema


def document() -> dict[str, Any]:
    """The document of this release; it depends neither on models nor on settings."""
    from lenvm_service.api.app import create_app
    from lenvm_service.metrics import Metrics
    from lenvm_service.settings import Settings

    return create_app({}, Settings(), Metrics()).openapi()
