"""The page behind the service's own gate: only the routes that it needs, bounded bodies, and nothing from elsewhere."""

from __future__ import annotations

import os
import re
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lenvm_service.api.service import Service
from lenvm_service.errors import PayloadTooLargeError
from lenvm_service.ui import UI_PATH
from lenvm_service.ui.handlers import Handlers
from lenvm_service.ui.style import CSS, MONO, SANS

__all__ = ["Gate", "mount"]

# Gradio has many more: uploads, files, proxies, an API, editors. What the page does not need is not there.
_GET = re.compile(
    r"/(|config|theme\.css|(assets|static)/[\w./@+-]+"
    r"|gradio_api/(startup-events|theme\.css|queue/data|heartbeat/\w+))"
)
_POST = re.compile(r"/gradio_api/(queue/join|cancel|reset)")
_MAX_BODY_BYTES = 256 * 1024
# The page is one that nobody frames, and that loads from and talks to this service alone.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


# The page names a manifest and, by saying nothing, an icon at the root of the host, where they are not.
_MANIFEST = b'<link rel="manifest" href="/manifest.json" />'
_ICON = (
    b"<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E"
    b"%3Cpath d='M2 14V9h3v5zM6.5 14V3h3v11zM11 14V6h3v8z' fill='%230072b2'/%3E%3C/svg%3E\">"
)


class Gate:
    """ASGI middleware around ``/ui``. ``start``: begins the page's queue, on the event loop; called once."""

    def __init__(self, app: ASGIApp, *, start: Any) -> None:
        self.app = app
        self._start = start
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises HTTPException for what is not the page's, PayloadTooLargeError."""
        path: str = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith(f"{UI_PATH}/"):
            await self.app(scope, receive, send)
            return
        _check(scope, path.removeprefix(UI_PATH))
        if not self._started:
            self._started = True
            self._start()
        length = 0

        async def bounded() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > _MAX_BODY_BYTES:
                raise PayloadTooLargeError(f"the playground takes bodies of {_MAX_BODY_BYTES} bytes at most")
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        if path == f"{UI_PATH}/":
            plain = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
            await self.app({**scope, "headers": plain}, bounded, _Replaced(guarded))
        else:
            await self.app(scope, bounded, guarded)


class _Replaced:
    """Sends a response whose body has an icon in place of the manifest."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message = {}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = bytes(self._body).replace(_MANIFEST, _ICON)
        headers = [pair for pair in self._start.get("headers", ()) if pair[0] != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self._send({**self._start, "headers": [*headers, length]})
        await self._send({"type": "http.response.body", "body": body})


def _check(scope: Scope, path: str) -> None:
    allowed = {"GET": _GET, "POST": _POST}.get(scope["method"])
    if allowed is None:
        raise HTTPException(405, headers={"allow": "GET, POST"})
    if not allowed.fullmatch(path) or ".." in path:
        raise HTTPException(404)
    # A browser that knows the key sends it along with whatever another site makes it post here.
    site = Request(scope).headers.get("sec-fetch-site", "none")
    if scope["method"] == "POST" and site not in ("same-origin", "none"):
        raise HTTPException(403, "the playground takes requests from its own page alone")


def mount(app: FastAPI, service: Service) -> None:
    """Build the page and put it into ``app``."""
    # Read when gradio is imported, and by what it imports.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr

    from lenvm_service.ui.blocks import build_page

    page = build_page(Handlers(service))
    theme = gr.themes.Base(font=SANS, font_mono=MONO)

    @app.get(UI_PATH, include_in_schema=False)
    async def playground() -> Response:
        return RedirectResponse("ui/")  # relative: a proxy may serve us below a path of its own

    gr.mount_gradio_app(
        app, page, UI_PATH, footer_links=[], run_history=False, show_error=False, ssr_mode=False, mcp_server=False,
        enable_monitoring=False, pwa=False, max_file_size=1, theme=theme, css=CSS,
    )  # fmt: skip
    inner = app.routes[-1].app  # type: ignore[attr-defined]

    def start() -> None:
        # What gradio does in the lifespan, which the service runs without.
        page.run_startup_events()
        inner.startup_events_triggered = True

    app.add_middleware(Gate, start=start)
