"""HTTP/1.1 as uvicorn and httptools speak it, with our own limits, time-outs and refusals."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, cast

import httptools
from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HttpProtocol"]

_HEADER_BYTES = 64 * 1024
_JOINED_BYTES = 64 * 1024  # of a body: above, a copy costs more than a write
_BODY_FIELDS = (b"content-length", b"transfer-encoding")


class _OneWrite:
    """A transport on which the header fields of an answer leave together with its body, or with its first piece: a
    write is a system call, and may wake the client for nothing that it can use. They wait for one turn of the loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop, self._head = transport, loop, b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Of header fields or a body, as uvicorn gives them."""
        if not self._head and isinstance(data, bytes) and data.startswith(b"HTTP/") and data.endswith(b"\r\n\r\n"):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        head, self._head = self._head, b""
        if head and len(data) < _JOINED_BYTES:
            data, head = head + data, b""
        if head:
            self._transport.write(head)
        self._transport.write(data)

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)

    def close(self) -> None:
        """After what was written."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with the one error body for what is no HTTP at all, and limits to how long a client may take
    to send a request, and to the header fields in it."""

    read_timeout_s = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client: it has that long for its first request."""
        super().connection_made(cast("asyncio.Transport", _OneWrite(transport, self.loop)))
        self._since = self.loop.time()  # the last request began, or the connection
        self._arriving = self._in_head = False  # a request; and its header fields are not whole yet
        self._head_bytes = 0
        self._resumed = False  # the parser is being told of a request that was read already
        self._reading: asyncio.TimerHandle | None = self.loop.call_later(self.read_timeout_s, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Bytes came: the clock runs until the request is whole, however often some more come."""
        in_body = self._arriving and not self._in_head
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self.send_400_response(str(error))
        if self.transport.is_closing():
            return
        if not self._arriving:
            self._stop_reading()
            return
        if self._in_head and not in_body:
            self._head_bytes += len(data)
            if self._head_bytes > _HEADER_BYTES:
                self.send_400_response("the header fields are too large")
                return
        if self._reading is None:
            self._reading = self.loop.call_later(self.read_timeout_s, self._too_slow)

    def owes_answer(self, patience_s: float) -> bool:
        """A request that nobody serves yet may be on its way: its head has begun to arrive, or the connection is new;
        but neither longer ago than that."""
        waits = self._in_head or self.cycle is None
        return waits and not self.transport.is_closing() and self.loop.time() - self._since < patience_s

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_reading()
        super().connection_lost(exc)

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                # The parser takes what follows an offer of another protocol (Java's client makes one with its first
                # request) for that protocol. We stay with this one: a new parser reads the body.
                sizes = [b"%s: %s\r\n" % field for field in self.headers if field[0] in _BODY_FIELDS]
                self._resumed = True
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(sizes))
                self._resumed = False
                data = data[stopped.args[0] :]

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._resumed:
            self._since = self.loop.time()
            self._arriving = self._in_head = True
            self._head_bytes = 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Of a request."""
        if not self._resumed:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a request."""
        if not self._resumed:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on it is being served."""
        if self._resumed:
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _HEADER_BYTES:
            raise ValueError("the header fields are too large")  # to the parser, which refuses the request
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self.parser.should_upgrade():
            return  # its body is still to come
        self._arriving = False
        super().on_message_complete()

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _too_slow(self) -> None:
        self._reading = None
        if self._arriving and not self._in_head:
            self.transport.close()  # the request is being served already: it sees that its client has gone
        elif not self.transport.is_closing():
            self._refuse(408, "the request took too long to arrive", "request_timeout")

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP request, and close."""
        self._refuse(400, "this is no valid HTTP request", "http_invalid")

    def _refuse(self, status: int, message: str, reason: str) -> None:
        from lenvm_service.api.errors import RequestError, error_object
        from lenvm_service.api.middleware import new_request_id

        request_id = new_request_id()
        error = RequestError(message, reason=reason)
        body = to_json({"error": error_object(error, request_id=request_id)})
        headers = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # While another request is being served, what is written now would be taken for its answer.
            its_own = self._arriving and not self._in_head and not self.pipeline and not cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
            if not its_own:
                self.transport.close()
                return
        self.transport.write(headers.encode() + body)
        self.transport.close()
