"""Around every request: its id, its clock, the count of those in flight, the access line, and the last resort."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lenvm_service.api.errors import error_response
from lenvm_service.api.service import Service
from lenvm_service.errors import DrainingError
from lenvm_service.logs import fields, request_id_var

__all__ = [
    "CLIENT_GONE",
    "MODEL_ROUTES",
    "RequestContext",
    "RequestMiddleware",
    "accepted_request_id",
    "new_request_id",
]

access = logging.getLogger("lenvm_service.access")

CLIENT_GONE = 499
"""Logged and counted for a caller that went away; never sent."""
MODEL_ROUTES = frozenset({"/predict_length", "/score"})
"""Those that a model answers: timed, and called without the framework's layers around them."""
_OPEN = frozenset({"/health/live"})  # what asks whether to restart us has no key
_LONGEST_ID = 128
_PAGE = "/ui"


@dataclass
class RequestContext:
    """What is known of one request while it is served; ``started`` is of time.monotonic."""

    request_id: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    error_type: str = "none"
    tenant: str = ""
    key_id: str | None = None
    model: str | None = None
    rows: int | None = None
    queue_ms: float = 0.0
    inference_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Milliseconds since the request arrived."""
        return (time.monotonic() - self.started) * 1000


def accepted_request_id(scope: Scope) -> str:
    """The caller's x-request-id if it is printable ASCII of at most 128 characters, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text: str = value.decode("latin-1")
            if 0 < len(text) <= _LONGEST_ID and text.isascii() and text.isprintable():
                return text
            break
    return new_request_id()


def new_request_id() -> str:
    """An id for a request that brought none."""
    return uuid.uuid4().hex


class RequestMiddleware:
    """Pure ASGI, so that disconnects and cancellation pass through.

    Args:
        routes: the paths that the app knows.
        direct: routes of POSTs, by their paths, whose endpoints are called from here: they take the bare request, and
            the framework's layers between would be a good part of what such a request costs.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: frozenset[str], direct: Mapping[str, Route]) -> None:
        self.app = app
        self.service = service
        self.routes = routes
        self.direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; nothing that it raises leaves here but a cancellation from outside."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = RequestContext(accepted_request_id(scope))
        scope.setdefault("state", {})["context"] = context
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # of an application that is mounted below others
        page = self._is_page(path)
        route = _PAGE if page else path if path in self.routes else "unmatched"
        token = request_id_var.set(context.request_id)
        task = asyncio.current_task()
        assert task is not None
        (self.service.pages if page else self.service.requests).add(task)
        if not page:
            self.service.metrics.inflight.inc()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *self._headers(context, route)]}
            await send(message)

        # Probes, scrapes and the playground's page would drown the rest.
        tracing = self.service.tracing if scope["method"] == "POST" and not page else None
        try:
            with contextlib.nullcontext() if tracing is None else tracing.request(scope, route, context):
                await self._serve(scope, receive, send_with_headers, context, task, path)
        finally:
            self.service.requests.discard(task)
            self.service.pages.discard(task)
            if not page:
                self.service.metrics.inflight.dec()
            self._record(scope, context, route)
            request_id_var.reset(token)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, context: RequestContext, task: asyncio.Task[object], path: str
    ) -> None:
        try:
            if self.service.keys is not None and path not in _OPEN:
                page = self._is_page(path)
                # A page is many requests; those that make the service work are POSTs.
                counted = not page or scope["method"] == "POST"
                key = self.service.keys.check(scope["headers"], browser=page, counted=counted)
                context.tenant, context.key_id = key.tenant, key.id
            route = self.direct.get(path) if scope["method"] == "POST" else None
            if route is None:
                await self.app(scope, receive, send)
                return
            scope["route"], scope["endpoint"] = route, route.endpoint
            answer: Response = await route.endpoint(Request(scope, receive, send))
            await answer(scope, receive, send)
            return
        except ClientDisconnect:
            context.status, context.error_type = CLIENT_GONE, "client_gone"
            return
        except asyncio.CancelledError:
            if not self.service.abandoned:
                raise
            task.uncancel()
            error: Exception = DrainingError("this process shut down before the answer was there: send it again")
        except Exception as unforeseen:
            error = unforeseen
        response = error_response(error, Request(scope))
        # It holds this frame, and with it the request, until a garbage collection.
        error.__traceback__ = None
        if context.status == 0:
            await response(scope, receive, send)
        elif self._is_page(path) and self.service.abandoned:
            await send({"type": "http.response.body", "body": b""})  # the end of a stream that has none of its own
        # Else the answer has begun, and its end will be missing: the caller sees that.

    def _is_page(self, path: str) -> bool:
        return self.service.settings.ui and (path == _PAGE or path.startswith(f"{_PAGE}/"))

    def _headers(self, context: RequestContext, route: str) -> list[tuple[bytes, bytes]]:
        total = context.total_ms
        timing = f"total;dur={total:.3f}"
        headers = [(b"x-request-id", context.request_id.encode()), (b"x-total-ms", f"{total:.3f}".encode())]
        if route in MODEL_ROUTES:
            queue, inference = f"{context.queue_ms:.3f}", f"{context.inference_ms:.3f}"
            headers += [(b"x-queue-ms", queue.encode()), (b"x-inference-ms", inference.encode())]
            timing = f"queue;dur={queue}, inference;dur={inference}, {timing}"
        headers.append((b"server-timing", timing.encode()))
        if self.service.draining:
            headers.append((b"connection", b"close"))  # the caller's next request goes to another replica
        return headers

    def _record(self, scope: Scope, context: RequestContext, route: str) -> None:
        seconds = context.total_ms / 1000
        status = context.status or CLIENT_GONE  # cancelled from outside before there was an answer
        if route != _PAGE:  # how long a tab was open is no latency
            self.service.metrics.observe_request(route, status, context.error_type, seconds)
        access.info(
            "request",
            extra=fields(
                request_id=context.request_id,
                method=scope["method"] if scope["method"].isalpha() else "?",
                route=route,
                status=status,
                error_type=context.error_type,
                ms=round(seconds * 1000, 3),
                **({"rows": context.rows} if context.rows is not None else {}),
                **({"model": context.model} if context.model is not None else {}),
                **({"key": context.key_id} if context.key_id is not None else {}),
            ),
        )
