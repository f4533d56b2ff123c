"""A transport of ``httpx2`` for calls that a decoding loop waits for, where ``httptools`` is installed.

The library's own parser is written in Python: of a step's call over loopback it is a good part. Here a request leaves
in one write, and the C parser of uvicorn reads the answer. Proxies and TLS are for the library's own.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.request import getproxies

import httpx2

__all__ = ["MEANWHILE", "Direct", "direct", "request_head"]

MEANWHILE = "lenvm_meanwhile"
"""Extension of a request: called once it was written, while its answer is awaited."""

# As httpx2 has them by default.
_MOST_CONNECTIONS = 100
_MOST_IDLE = 20
_IDLE_S = 5.0
_HEAD_BYTES = 128 * 1024
_PIECE = 1 << 18


def direct(url: httpx2.URL) -> Direct | None:
    """The transport for a service at ``url``; None: the library's own is to be taken."""
    if url.scheme != "http" or any(name in getproxies() for name in ("http", "all")):
        return None
    try:
        import httptools
    except ImportError:
        return None
    return Direct(httptools)


class Direct(httpx2.BaseTransport):
    """HTTP/1.1 without TLS or proxies; connections are kept. Thread-safe. ``parsers``: the module ``httptools``."""

    def __init__(self, parsers: Any) -> None:
        self._parsers = parsers
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._idle: deque[_Connection] = deque()
        self._closed = False

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send, and read up to the end of the header fields. Raises the library's transport errors."""
        limits = request.extensions.get("timeout", {})
        if not self._room.acquire(timeout=limits.get("pool")):
            raise httpx2.PoolTimeout("no connection was free", request=request)
        connection = None
        try:
            url = request.url
            connection = self._take((url.raw_host.decode("ascii"), url.port or 80), limits, request)
            broken = connection.send(_head(request) + request.read(), limits, request)
            meanwhile = request.extensions.get(MEANWHILE)
            if meanwhile is not None:
                meanwhile()
            answer = _Answer(self._parsers, connection, request)
            try:
                answer.read_head()
            except httpx2.TransportError:
                if broken is not None:
                    raise broken from None
                raise
            answer.usable = broken is None
        except BaseException:
            if connection is not None:
                connection.close()
            self._room.release()
            raise
        return httpx2.Response(
            answer.status, headers=answer.headers, stream=_Body(self, answer), extensions={"http_version": b"HTTP/1.1"}
        )

    def exchange(
        self,
        origin: tuple[str, int],
        data: bytes,
        limits: Mapping[str, Any],
        meanwhile: Callable[[], None] | None,
        late: Callable[[], bool],
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        """A whole request out, a whole answer in: status, header fields, body. Nothing of the library is between.

        ``late`` is asked after each piece: True ends it with None. Raises the library's transport errors."""
        if not self._room.acquire(timeout=limits.get("pool")):
            raise httpx2.PoolTimeout("no connection was free")
        connection = None
        try:
            connection = self._take(origin, limits, None)
            broken = connection.send(data, limits, None)
            if meanwhile is not None:
                meanwhile()
            answer = _Answer(self._parsers, connection, None)
            try:
                while not answer.whole:
                    answer.read_some()
                    if late():
                        connection.close()
                        self._room.release()
                        return None
            except httpx2.TransportError:
                if broken is not None:
                    raise broken from None
                raise
            answer.usable = broken is None
        except BaseException:
            if connection is not None:
                connection.close()
            self._room.release()
            raise
        self.finished(answer)
        return answer.status, answer.headers, answer.taken()

    def _take(self, origin: tuple[str, int], limits: Mapping[str, Any], request: httpx2.Request | None) -> _Connection:
        """An idle connection that is still open, or a new one."""
        now = time.monotonic()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                break
            if connection.origin == origin and now - connection.since < _IDLE_S and connection.is_open():
                return connection
            connection.close()
        return _Connection(origin, limits, request)

    def finished(self, answer: _Answer) -> None:
        """A body was read or left: its connection is kept where the next request can have it."""
        connection, now = answer.connection, time.monotonic()
        if answer.reusable and answer.usable and len(self._idle) < _MOST_IDLE and not self._closed:
            connection.since = now
            self._idle.append(connection)
            if self._closed:  # by another thread, just now
                self.close()
        else:
            connection.close()
        self._room.release()
        # What has lain there for longer than that is not used again, and the server may have closed it.
        with contextlib.suppress(IndexError):  # another thread was faster
            while now - self._idle[0].since > _IDLE_S:
                self._idle.popleft().close()

    def close(self) -> None:
        """Close idle connections, and those in use once they are not."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


def request_head(request: httpx2.Request) -> bytes:
    """The request line and the header fields, without the end of these and what they say of the content."""
    said = (b"content-length", b"content-type")
    lines = [b"%s: %s\r\n" % field for field in request.headers.raw if field[0].lower() not in said]
    return b"%s %s HTTP/1.1\r\n%s" % (request.method.encode("ascii"), request.url.raw_path, b"".join(lines))


def _head(request: httpx2.Request) -> bytes:
    lines = [b"%s: %s\r\n" % field for field in request.headers.raw]
    return b"%s %s HTTP/1.1\r\n%s\r\n" % (request.method.encode("ascii"), request.url.raw_path, b"".join(lines))


class _Connection:
    """A socket, with its errors as the library's."""

    def __init__(self, origin: tuple[str, int], limits: Mapping[str, Any], request: httpx2.Request | None) -> None:
        self.origin, self.since = origin, 0.0
        try:
            self._socket = socket.create_connection(origin, limits.get("connect"))
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(str(error), request=request) from error
        except OSError as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        with contextlib.suppress(OSError):  # it saves time alone; a connection that is broken already shows at once
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit = limits.get("connect")

    def is_open(self) -> bool:
        """Nothing came since the last answer, not even the end."""
        try:
            poll = select.poll()
        except AttributeError:  # Windows
            return not select.select([self._socket], [], [], 0)[0]
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def send(self, data: bytes, limits: Mapping[str, Any], request: httpx2.Request | None) -> httpx2.WriteError | None:
        """Send all of it, each piece within the time. What broke it is given back: a server that refuses a request
        before it is whole has perhaps said why."""
        self._wait_for(limits.get("write"))
        rest, broken = memoryview(data), None
        try:
            while rest:
                rest = rest[self._socket.send(rest) :]
        except TimeoutError as error:
            raise httpx2.WriteTimeout(str(error), request=request) from error
        except OSError as error:
            broken = httpx2.WriteError(str(error), request=request)
        self._wait_for(limits.get("read"))
        return broken

    def _wait_for(self, limit: float | None) -> None:
        if limit != self._limit:  # a system call
            self._socket.settimeout(limit)
            self._limit = limit

    def receive(self, request: httpx2.Request | None) -> bytes:
        """Some bytes; none at the end."""
        try:
            return self._socket.recv(_PIECE)
        except TimeoutError as error:
            raise httpx2.ReadTimeout(str(error), request=request) from error
        except OSError as error:
            raise httpx2.ReadError(str(error), request=request) from error

    def close(self) -> None:
        self._socket.close()


class _Answer:
    """What the parser makes of the bytes that come."""

    def __init__(self, parsers: Any, connection: _Connection, request: httpx2.Request | None) -> None:
        self.connection, self._request, self._parsers = connection, request, parsers
        self.status, self.headers, self._parts = 0, list[tuple[bytes, bytes]](), list[bytes]()
        self._headed = self._whole = self._further = self.reusable = False
        self.usable = True  # the request went out as a whole
        self._head_bytes = 0
        self._parser = parsers.HttpResponseParser(self)

    # -- called by the parser ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer: the first one, or the one after an interim answer (1xx), or one that nobody asked for."""
        self._further = self._whole
        if self._further:
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the header, or of the trailer."""
        if not self._headed:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The header fields are whole."""
        if not self._further:
            self.status, self._headed = self._parser.get_status_code(), True

    def on_body(self, part: bytes) -> None:
        """Some of the body."""
        if not self._further:
            self._parts.append(part)

    def on_message_complete(self) -> None:
        """The end of an answer."""
        if self._further:
            return
        if self.status < 200:
            self.headers, self._headed = [], False
            return
        self._whole, self.reusable = True, self._parser.should_keep_alive()

    # -- called by the transport ---------------------------------------------------------------------------------------

    def read_head(self) -> None:
        """Until the header fields are whole."""
        while not self._headed:
            self.read_some()

    def read_some(self) -> None:
        """A piece of the header fields or of the body, or both."""
        if not self._headed and self._head_bytes > _HEAD_BYTES:
            raise httpx2.RemoteProtocolError("the answer's header fields are too large", request=self._request)
        count = self._feed()
        if not self._headed:
            self._head_bytes += count

    @property
    def whole(self) -> bool:
        """Nothing more comes."""
        return self._whole

    def taken(self) -> bytes:
        """What has come of the body since."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def body(self) -> Iterator[bytes]:
        """The pieces as they come."""
        while True:
            parts, self._parts = self._parts, []
            yield from parts
            if self._whole:
                return
            self._feed()

    def _feed(self) -> int:
        data = self.connection.receive(self._request)
        if not data:
            # Without a length a body ends where its connection does.
            names = {name.lower() for name, _ in self.headers}
            if not self._headed or names & {b"content-length", b"transfer-encoding"}:
                raise httpx2.RemoteProtocolError(
                    "the server hung up before its answer was whole", request=self._request
                )
            self._whole = True
            return 0
        try:
            self._parser.feed_data(data)
        except (self._parsers.HttpParserError, self._parsers.HttpParserUpgrade) as error:
            self.reusable = False
            if not self._whole:  # or something came after it
                raise httpx2.RemoteProtocolError(f"the answer is no HTTP ({error})", request=self._request) from error
        return len(data)


class _Body(httpx2.SyncByteStream):
    """The pieces of a body; closed, its connection goes back."""

    def __init__(self, transport: Direct, answer: _Answer) -> None:
        self._transport, self._answer, self._open = transport, answer, True

    def __iter__(self) -> Iterator[bytes]:
        return self._answer.body()

    def close(self) -> None:
        if self._open:
            self._open = False
            self._transport.finished(self._answer)
