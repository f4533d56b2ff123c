"""The error table: every exception becomes one body, one status, and nothing of what went wrong inside leaks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lenvm.errors import InvalidRequestError, LenVMError

__all__ = [
    "ERROR_TABLE",
    "ErrorKind",
    "RequestError",
    "error_object",
    "error_response",
    "install_error_handlers",
    "invalid",
]

logger = logging.getLogger(__name__)


class ErrorKind(NamedTuple):
    """One line of the table: HTTP status, and whether the same request may succeed later."""

    status: int
    retryable: bool


ERROR_TABLE: Mapping[str, ErrorKind] = {
    "invalid_request": ErrorKind(422, False),  # 400 where the body is no JSON, 404 and 405 where the route is wrong
    "unauthorized": ErrorKind(401, False),
    "model_not_found": ErrorKind(404, False),
    "payload_too_large": ErrorKind(413, False),
    "context_too_long": ErrorKind(422, False),
    "prefix_unknown": ErrorKind(422, False),  # in rows; a status only for a flat input
    "overloaded": ErrorKind(429, True),
    "not_ready": ErrorKind(503, True),
    "draining": ErrorKind(503, True),
    "deadline_exceeded": ErrorKind(504, False),
    "internal": ErrorKind(500, True),
}
_INTERNAL = "the service failed on this; its log has the cause under this request id"
_RETRY_AFTER_S = 1.0  # where a retry makes sense and nobody knows better
_LONGEST_MESSAGE, _LONGEST_PARAM = 300, 200  # both may quote the request
_OBJECTIVE_FIELDS = frozenset(
    {"kind", "target", "lambda", "beta", "factor", "tolerance", "method", "strength", "space", "min_eos_prob"}
)
_OF_STATUS = {401: "unauthorized", 413: "payload_too_large", 429: "overloaded", 503: "not_ready"}
_REASONS = {404: "not_found", 405: "method_not_allowed"}
_HINTS = {
    404: "there is nothing at this path; /docs lists what there is",
    405: "this path takes other methods; the Allow header lists them",
}


class RequestError(InvalidRequestError):
    """A request that is wrong in a way that the HTTP layer found. ``reason``: machine-readable, finer than the type."""

    def __init__(self, message: str, *, reason: str, param: str | None = None, status: int = 422) -> None:
        super().__init__(message, param=param)
        self.reason = reason
        self.status = status


def invalid(error: ValidationError) -> RequestError:
    """The first problem that pydantic found. Its message never quotes the input."""
    first = error.errors(include_url=False, include_input=False, include_context=True)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    inner = first.get("ctx", {}).get("param")  # of an objective, whose fields guidance checks itself
    param = f"{param}.{inner}".lstrip(".") if inner else param
    message = first["msg"] if inner or not param else f"{param}: {first['msg']}"
    return RequestError(message, reason=first["type"], param=param or None)


def error_object(error: Exception, *, request_id: str, at: str = "") -> dict[str, Any]:
    """The ``error`` object of the wire. ``at``: the row that it belongs to, like ``inputs[3]``."""
    kind = error.code if isinstance(error, LenVMError) and error.code in ERROR_TABLE else "internal"
    retryable = ERROR_TABLE[kind].retryable
    wait = getattr(error, "retry_after_s", None)
    if wait is None and retryable and kind != "internal":
        wait = _RETRY_AFTER_S
    message = _INTERNAL if kind == "internal" else " ".join(str(error).split())
    return {
        "type": kind,
        "message": message if len(message) <= _LONGEST_MESSAGE else message[: _LONGEST_MESSAGE - 1] + "…",
        "code": getattr(error, "reason", kind),
        "param": _path(at, getattr(error, "param", None)),
        "request_id": request_id,
        "retryable": retryable,
        "retry_after_ms": None if wait is None else max(1, math.ceil(wait * 1000)),
    }


def _path(at: str, param: str | None) -> str | None:
    if param in _OBJECTIVE_FIELDS:  # guidance names its own fields, not where the objective stands
        param = f"objective.{param}"
    if param and at:
        param = f"{at}{param if param.startswith('[') else f'.{param}'}"
    return (param or at)[:_LONGEST_PARAM] or None


def error_response(error: Exception, request: Request) -> Response:
    """The answer to a request that failed; what it was is noted for the access line and the metrics."""
    context = request.state.context
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        status, body = error.status_code, _of_http_exception(error, context.request_id)
        headers.update(error.headers or {})
    else:
        body = error_object(error, request_id=context.request_id)
        status = getattr(error, "status", ERROR_TABLE[body["type"]].status)
    if body["type"] == "internal":
        logger.error("request failed", exc_info=error)
    if status in (429, 503) and body["retry_after_ms"] is not None:
        headers["retry-after"] = str(math.ceil(body["retry_after_ms"] / 1000))
    if status == 401:
        headers["www-authenticate"] = getattr(error, "challenge", "Bearer")
    context.error_type = body["type"]
    return Response(to_json({"error": body}), status_code=status, headers=headers, media_type="application/json")


def _of_http_exception(error: HTTPException, request_id: str) -> dict[str, Any]:
    """Starlette's own refusals (no such path, wrong method) in our words."""
    status = error.status_code
    kind = _OF_STATUS.get(status, "internal" if status >= 500 else "invalid_request")
    body = error_object(LenVMError(), request_id=request_id)
    if kind != "internal":
        message = _HINTS.get(status, str(error.detail))[:_LONGEST_MESSAGE]
        retryable = ERROR_TABLE[kind].retryable
        body |= {"type": kind, "message": message, "code": _REASONS.get(status, kind), "retryable": retryable}
    return body


def install_error_handlers(app: FastAPI) -> None:
    """Every typed error, and every refusal of the framework, through :func:`error_response`.

    What nobody foresaw is caught by the middleware, which answers through the same function.
    """

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(error, request)

    for kind in (LenVMError, HTTPException):
        app.add_exception_handler(kind, handle)
