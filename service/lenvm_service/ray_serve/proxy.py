"""In Serve's proxies: an answer for callers whose replica died."""

from __future__ import annotations

from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lenvm_service.api.errors import error_object
from lenvm_service.api.middleware import accepted_request_id
from lenvm_service.errors import NotReadyError

__all__ = ["LostReplicaMiddleware"]

_REQUEST_ID = b"x-request-id"


class LostReplicaMiddleware:
    """Where a replica dies with a request in hand, Serve's proxy gives no answer, and its server a bare 500: nothing
    tells that the request may be sent again. From here it is the contract's 503 ``not_ready``, which clients retry.

    It is not sent again from here: it may be what the replica died of.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; answer it where nobody has."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = accepted_request_id(scope)
        others = [(name, value) for name, value in scope["headers"] if name != _REQUEST_ID]
        scope["headers"] = [*others, (_REQUEST_ID, request_id.encode())]
        begun = False

        async def send_once(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                # The application and Serve's own middleware both name the request.
                headers = [(name, value) for name, value in message["headers"] if name.lower() != _REQUEST_ID]
                message = {**message, "headers": [*headers, (_REQUEST_ID, request_id.encode())]}
            await send(message)

        await self.app(scope, receive, send_once)
        if not begun:
            await _refuse(send, request_id)


async def _refuse(send: Send, request_id: str) -> None:
    error = NotReadyError("the replica that worked on this has gone: send it again", retry_after_s=0.0)
    body = to_json({"error": error_object(error, request_id=request_id)})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (_REQUEST_ID, request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
