"""A service for tests: answers like the real one, without a model, a port or a wait."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx2

from lenvm_client.errors import (
    DeadlineExceededError,
    DrainingError,
    InternalServerError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    ServiceError,
    UnauthorizedError,
)

__all__ = ["MockRequest", "MockTransport"]

_STATUS: dict[type[ServiceError], int] = {
    UnauthorizedError: 401,
    ModelNotFoundError: 404,
    PayloadTooLargeError: 413,
    OverloadedError: 429,
    InternalServerError: 500,
    NotReadyError: 503,
    DrainingError: 503,
    DeadlineExceededError: 504,
}
_MODEL = "mock"
_GAMMA = 0.997
_HORIZON = 100.0
_VALUE = -(1 - _GAMMA**_HORIZON)


@dataclass(frozen=True)
class MockRequest:
    """A request that the transport got; ``body`` is its JSON, None where it has none. Header names are lower case."""

    method: str
    path: str
    body: Any
    headers: Mapping[str, str]


Answer: TypeAlias = Mapping[str, Any] | Exception | httpx2.Response
Handler: TypeAlias = Callable[[MockRequest], Answer | None]
Route: TypeAlias = Handler | Answer | list[Answer]


class MockTransport(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
    """``Client(transport=MockTransport())`` or ``AsyncClient(...)``: no service needed.

    Every route has a canned answer of the wire contract (every prefix is 100 tokens from its end; log-weights are zero;
    a token is a byte). ``routes`` replaces those of a path: by a JSON answer, an exception (a ``ServiceError`` becomes
    its HTTP error, any other is raised as a failed transport), an ``httpx2.Response``, a list of these (one a request,
    the last for ever), or a function of the request that returns one of them, or None for the canned answer.
    A function in place of the mapping gets every path. ``requests`` holds what came in.
    """

    def __init__(self, routes: Mapping[str, Route] | Handler | None = None) -> None:
        self.requests: list[MockRequest] = []
        self._routes: dict[str, Route] = {}
        self._default: Handler | None = None
        if callable(routes):
            self._default = routes
        else:
            self._routes = {
                path: list(route) if isinstance(route, list) else route for path, route in (routes or {}).items()
            }

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """For ``Client``."""
        return self._handle(request, request.read())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """For ``AsyncClient``."""
        return self._handle(request, await request.aread())

    def _handle(self, request: httpx2.Request, content: bytes) -> httpx2.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        got = MockRequest(request.method, request.url.path, json.loads(content) if content else None, headers)
        self.requests.append(got)
        request_id = headers.get("x-request-id", f"mock-{len(self.requests)}")
        route = self._routes.get(got.path, self._default)
        if isinstance(route, list):
            route = route.pop(0) if len(route) > 1 else route[0]
        answer = route(got) if callable(route) else route
        if answer is None:
            answer = _canned(got)
        if isinstance(answer, httpx2.Response):
            # A copy: the client closes what it read, and the answer may be wanted again.
            return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)
        if isinstance(answer, ServiceError):
            return _error_response(answer, request_id)
        if isinstance(answer, Exception):
            raise answer
        return httpx2.Response(200, json=dict(answer), headers={"x-request-id": request_id})


def _error_response(error: ServiceError, request_id: str) -> httpx2.Response:
    after = error.retry_after_s
    body = {
        "type": error.type,
        "message": error.message,
        "code": error.code,
        "param": error.param,
        "request_id": request_id,
        "retryable": error.retryable,
        "retry_after_ms": None if after is None else after * 1000.0,
    }
    headers = {"x-request-id": request_id}
    if after is not None:
        headers["retry-after"] = str(after)
    status = error.status or next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 422)
    return httpx2.Response(status, json={"error": body}, headers=headers)


def _canned(request: MockRequest) -> Answer:
    """What the real service would answer, had it a model for which every prefix is 100 tokens from its end."""
    # By the end of the path: base_url may have one of its own.
    body = request.body if isinstance(request.body, dict) else {}
    rows = body.get("inputs", [body])
    head = {"model": body.get("model") or _MODEL, "model_sha": "0" * 64, "gamma": _GAMMA, "cap": 2048}
    tail = {"warnings": [], "timings_ms": {"queue": 0.0, "inference": 0.0, "total": 0.0}}
    if request.path.endswith("/predict_length"):
        levels, limit = body.get("quantiles") or [0.5, 0.9, 0.95], body.get("max_tokens")
        found = {**head, "predictions": [_prediction(at, row, levels, limit) for at, row in enumerate(rows)], **tail}
        if body.get("models"):
            results = [{**found, "index": at, "model": model} for at, model in enumerate(body["models"])]
            return {"results": results, "timings_ms": tail["timings_ms"]}
        return found
    if request.path.endswith("/score") and "columns" in body:
        return {**head, "columns": _columns(body["columns"]), "errors": [], **tail}
    if request.path.endswith("/score"):
        scores = [(_candidates if "candidates" in row else _completion)(at, row) for at, row in enumerate(rows)]
        return {**head, "scores": scores, **tail}
    if request.path.endswith("/tokenize"):
        return {"model": head["model"], "token_ids": _tokens(body)}
    if request.path.endswith("/detokenize"):
        return {"model": head["model"], "text": bytes(i % 256 for i in body["token_ids"]).decode("utf-8", "replace")}
    if request.path.endswith("/feedback"):
        return {
            "accepted": len(body["items"]),
            "results": [{"index": at, "accepted": True} for at in range(len(body["items"]))],
        }
    if request.path.endswith("/v1/models"):
        card = {"id": _MODEL, "object": "model", "created": 0, "owned_by": "lenvm"}
        return {"object": "list", "data": [card]}
    if request.path.endswith("/info"):
        model = {**head, "name": _MODEL, "eos_ids": [2], "stop_ids": [], "num_bins": 64, "state": "ready"}
        return {"version": "mock", "models": [model], "limits": {"max_batch_rows": 512, "max_candidates": 1024}}
    if request.path.endswith(("/health/live", "/health/ready")):
        return {"status": request.path.rpartition("/")[2]}
    return ModelNotFoundError(f"no route {request.path}", status=404)


def _tokens(row: Mapping[str, Any]) -> list[int]:
    if row.get("token_ids") is not None:
        return list(row["token_ids"])
    text = row.get("prompt") or "".join(str(message.get("content")) for message in row.get("messages") or [])
    return list(text.encode())


def _session(row: Mapping[str, Any]) -> str:
    """The same for the same prefix, however it is split into calls."""
    known = row.get("session") or "s-mock-0"
    digest = int(known[7:], 16) if known.startswith("s-mock-") else zlib.crc32(known.encode())
    for token in row.get("append", []) if row.get("session") else _tokens(row):
        digest = zlib.crc32(str(token).encode(), digest)
    return f"s-mock-{digest:08x}"


def _prediction(index: int, row: Mapping[str, Any], levels: list[float], limit: int | None) -> dict[str, Any]:
    session = _session(row)
    return {
        "index": index,
        "prompt_tokens": len(_tokens(row)),
        "cached_tokens": 0,
        "value": _VALUE,
        "horizon": _HORIZON,
        "mean": _HORIZON,
        "quantiles": {f"{level:.12g}": int(_HORIZON) for level in levels},
        "p_exceeds_max_tokens": None if limit is None else float(limit - row.get("generated", 0) < _HORIZON),
        "rank_key": _HORIZON,
        "saturated": False,
        "session": session,
        "prediction_id": session,
    }


def _completion(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    ids = row.get("completion_ids") or list((row.get("completion") or "").encode())
    return {
        "index": index,
        "prompt_tokens": len(_tokens(row)),
        "token_ids": ids,
        "tokens": [chr(i) for i in ids],
        "values": [_VALUE] * (len(ids) + 1),
        "horizons": [_HORIZON] * (len(ids) + 1),
        "length_shifts": [(1 - _GAMMA) * (1 + _VALUE)] * len(ids),
    }


def _columns(columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    count, objective = len(columns["session"]), columns.get("objective")
    wanted = objective if isinstance(objective, list) else [objective] * count
    appended = columns.get("append") or [[]] * count
    rows = [
        _candidates(at, {"session": session, "append": new, "candidates": ids, "objective": its})
        for at, (session, new, ids, its) in enumerate(
            zip(columns["session"], appended, columns["candidates"], wanted, strict=True)
        )
    ]
    names = ("prefix_tokens", "cached_tokens", "value", "horizon", "log_weights", "session", "objective")
    return {name: [row[name] for row in rows] for name in names}


def _candidates(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    count, objective = len(row["candidates"]), row.get("objective")
    shown = 0 if row.get("return_values") is False else count
    tilt = {"kind": "tilt", "lambda": 0.0} if (objective or {}).get("kind") == "scale" else None
    return {
        "index": index,
        "prefix_tokens": len(_tokens(row)) or len(row.get("append", ())),
        "cached_tokens": 0,
        "value": _VALUE,
        "horizon": _HORIZON,
        "values": [_VALUE] * shown,
        "horizons": [_HORIZON] * shown,
        "log_weights": None if objective is None else [0.0] * count,
        "session": _session(row),
        "objective": tilt,
    }
