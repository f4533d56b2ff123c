"""The client's own transport: what goes out, how answers of every form are read, which connections are used again."""

from __future__ import annotations

import builtins
import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httptools
import httpx2
import pytest

from lenvm_client import Client, InvalidRequestError, ServiceTimeoutError, ServiceUnreachableError
from lenvm_client._transport import MEANWHILE, Direct, direct

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"


class Server:
    """Answers each request with what ``script`` holds for it: pieces, of which None closes the connection and a number
    waits for so many seconds."""

    def __init__(self) -> None:
        self.script: list[list[bytes | float | None]] = []
        self.requests: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/path?a=b"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):  # the client may hang up
            while data := connection.recv(1 << 16):
                self.requests.append(data)
                for piece in self.script.pop(0):
                    if piece is None:
                        return
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        connection.sendall(piece)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def client() -> Iterator[httpx2.Client]:
    with httpx2.Client(transport=Direct(httptools), timeout=5.0) as made:
        yield made


def side_by_side(count: int, work: Callable[[], Any]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def idle(client: httpx2.Client) -> int:
    transport: Any = client._transport
    return len(transport._idle)


def test_a_request_leaves_in_one_write_and_its_connection_is_used_again(server: Server, client: httpx2.Client) -> None:
    server.script = [[OK], [OK]]
    for _ in range(2):
        answer = client.post(server.url, content=b"body", headers={"x-a": "1"})
        assert (answer.status_code, answer.content, answer.http_version) == (200, b"hi", "HTTP/1.1")
    assert server.connections == 1
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /path?a=b HTTP/1.1\r\n")
    assert b"content-length: 4" in head.lower()
    assert b"x-a: 1" in head.lower()
    assert body == b"body"


FORMS: list[Any] = [
    ([b"HTTP/1.1 200 OK\r\ncontent-le", 0.02, b"ngth: 2\r\n\r\n", 0.02, b"h", 0.02, b"i"], 200, b"hi", True),
    ([b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n"], 200, b"hi!", True),
    ([b"HTTP/1.1 100 Continue\r\nx-b: 1\r\n\r\n" + OK], 200, b"hi", True),
    ([b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.02, OK], 200, b"hi", True),
    ([b"HTTP/1.1 429 Too Many\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno"], 429, b"no", False),
    ([b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi, and more"], 200, b"hi", False),
    ([OK + b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil"], 200, b"hi", False),
    ([OK + b"no HTTP"], 200, b"hi", False),
    ([b"HTTP/1.0 200 OK\r\n\r\nto the end", None], 200, b"to the end", False),
    ([b"HTTP/1.1 204 No Content\r\n\r\n"], 204, b"", True),
]
BROKEN: list[list[Any]] = [
    [None],
    [b"HTTP/1.1 200 OK\r\ncontent-len", None],
    [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi", None],
    [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", None],
    [b"SSH-2.0-OpenSSH\r\n"],
    [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n??"],
]


@pytest.mark.parametrize(("pieces", "status", "body", "kept"), FORMS)
def test_answers_of_every_form(
    server: Server, client: httpx2.Client, pieces: list[Any], status: int, body: bytes, kept: bool
) -> None:
    server.script = [pieces]
    answer = client.post(server.url, content=b"")
    assert (answer.status_code, answer.content) == (status, body)
    assert "x-b" not in answer.headers
    assert idle(client) == kept


@pytest.mark.parametrize("pieces", BROKEN)
def test_what_is_no_whole_answer_is_an_error(server: Server, client: httpx2.Client, pieces: list[Any]) -> None:
    server.script = [pieces, [OK]]
    with pytest.raises(httpx2.RemoteProtocolError):
        client.post(server.url, content=b"")
    assert idle(client) == 0
    assert client.post(server.url, content=b"").content == b"hi"


def test_a_connection_that_the_server_closed_is_not_used_again(server: Server, client: httpx2.Client) -> None:
    server.script = [[OK, None], [OK]]
    client.post(server.url, content=b"")
    assert idle(client) == 1  # it looked well
    time.sleep(0.02)
    assert client.post(server.url, content=b"").content == b"hi"
    assert server.connections == 2


def test_bytes_that_nobody_asked_for_are_no_answer(server: Server, client: httpx2.Client) -> None:
    server.script = [[OK, 0.02, OK.replace(b"hi", b"no")], [OK]]
    client.post(server.url, content=b"")
    time.sleep(0.06)
    assert client.post(server.url, content=b"").content == b"hi"
    assert server.connections == 2


def test_a_refusal_before_the_request_is_whole_is_read(client: httpx2.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
                connection.shutdown(socket.SHUT_WR)
                time.sleep(0.2)

        threading.Thread(target=refuse, daemon=True).start()
        answer = client.post(f"http://127.0.0.1:{listener.getsockname()[1]}/", content=b"x" * (30 << 20))
    assert (answer.status_code, answer.content) == (413, b"no")
    assert idle(client) == 0


def test_each_piece_of_a_long_request_has_the_time_to_itself(client: httpx2.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        size = 24 << 20

        def read_slowly() -> None:
            connection, _ = listener.accept()
            with connection:
                got, begun = 0, time.monotonic()
                while got < size:
                    got += len(connection.recv(1 << 20))
                    time.sleep(max(0.0, begun + 0.8 * got / size - time.monotonic()))
                connection.sendall(OK)

        threading.Thread(target=read_slowly, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        assert client.post(url, content=b"x" * size, timeout=httpx2.Timeout(5.0, write=0.4)).content == b"hi"


def test_header_fields_have_an_end(server: Server, client: httpx2.Client) -> None:
    server.script = [[b"HTTP/1.1 200 OK\r\n"] + [b"x-%d: " % at + b"y" * 60_000 + b"\r\n" for at in range(9)]]
    with pytest.raises(httpx2.RemoteProtocolError, match="too large"):
        client.post(server.url, content=b"")


def test_idle_connections_do_not_stay(server: Server, client: httpx2.Client) -> None:
    server.script = [[0.05, OK] for _ in range(5)]
    side_by_side(4, lambda: client.post(server.url, content=b""))
    assert idle(client) > 1
    transport: Any = client._transport
    for connection in transport._idle:
        connection.since -= 6.0
    client.post(server.url, content=b"")
    assert idle(client) == 1


def test_a_connection_in_use_goes_with_its_answer_once_the_client_is_closed(server: Server) -> None:
    server.script = [[OK[:-2], 0.05, OK[-2:]]]
    transport = Direct(httptools)
    answer = transport.handle_request(httpx2.Request("POST", server.url, content=b""))
    transport.close()
    assert answer.read() == b"hi"
    answer.close()
    assert not transport._idle
    transport.close()


@pytest.mark.parametrize("name", ["x foo", "x:y", "", "content-length", "Transfer-Encoding"])
def test_headers_that_would_break_a_request_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="header"), Client() as client:
        client.info(headers={name: "1"})


def test_limits(server: Server, client: httpx2.Client) -> None:
    server.script = [
        [b"HTTP/1.1 200 OK\r\n", 0.5, b"\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", 0.5, b"hi"],
    ]
    for _ in range(2):
        with pytest.raises(httpx2.ReadTimeout):
            client.post(server.url, content=b"", timeout=0.1)
    assert idle(client) == 0
    with pytest.raises(httpx2.ConnectError):
        client.post("http://127.0.0.1:1/", content=b"")
    transport: Any = client._transport
    held = [transport._room.acquire() for _ in range(100)]  # as if so many were under way: none of the above is
    assert len(held) == 100
    with pytest.raises(httpx2.PoolTimeout):
        client.post(server.url, content=b"", timeout=0.05)


def test_an_answer_that_is_not_read_costs_its_connection_and_no_place(server: Server, client: httpx2.Client) -> None:
    server.script = [[b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi"], [OK]]
    with client.stream("POST", server.url, content=b""):
        pass
    assert idle(client) == 0
    assert client.post(server.url, content=b"").content == b"hi"


def test_meanwhile_comes_after_the_request_and_before_its_answer(server: Server, client: httpx2.Client) -> None:
    server.script = [[0.1, OK]]
    seen: list[int] = []
    begun = time.monotonic()

    def meanwhile() -> None:
        while not server.requests:
            time.sleep(0.001)
        seen.append(len(server.requests))
        assert time.monotonic() - begun < 0.1

    answer = client.post(server.url, content=b"", extensions={MEANWHILE: meanwhile})
    assert (answer.content, seen) == (b"hi", [1])


def test_without_a_limit_a_request_waits_for_a_place(server: Server) -> None:
    server.script = [[0.1, OK], [OK]]
    transport = Direct(httptools)
    transport._room = threading.BoundedSemaphore(1)
    with httpx2.Client(transport=transport, timeout=None) as client:
        found: list[bytes] = []
        side_by_side(2, lambda: found.append(client.post(server.url, content=b"").content))
    assert found == [b"hi"] * 2
    assert server.connections == 1


def test_connections_of_many_threads(server: Server, client: httpx2.Client) -> None:
    server.script = [[0.05, OK] for _ in range(40)]
    found: list[bytes] = []
    side_by_side(8, lambda: found.extend(client.post(server.url, content=b"").content for _ in range(5)))
    assert found == [b"hi"] * 40
    assert 1 < server.connections <= 8


def test_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(direct(httpx2.URL("http://127.0.0.1:8000")), Direct)
    assert direct(httpx2.URL("https://127.0.0.1:8000")) is None
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert direct(httpx2.URL("http://127.0.0.1:8000")) is None
    monkeypatch.delenv("http_proxy")
    load: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "httptools":
            raise ImportError(name)
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert direct(httpx2.URL("http://127.0.0.1:8000")) is None


def test_errors_are_the_client_s(server: Server) -> None:
    server.script = [[None], [0.5, OK]]
    with Client(server.url, max_retries=0, timeout=0.1) as client:
        with pytest.raises(ServiceUnreachableError, match="hung up"):
            client.info()
        with pytest.raises(ServiceTimeoutError):
            client.info()


def told(server: Server, transport: Direct, *, read: float = 5.0, late: bool = False) -> Any:
    """An exchange past the library."""
    url = httpx2.URL(server.url)
    limits = {"connect": 5.0, "read": read, "write": 5.0, "pool": 0.5}
    origin = url.raw_host.decode(), url.port or 80
    data = b"POST /path HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    return transport.exchange(origin, data, limits, None, lambda: late)


class TestExchange:
    """What goes past the library is read as what goes through it."""

    @pytest.fixture
    def transport(self) -> Iterator[Direct]:
        made = Direct(httptools)
        yield made
        made.close()

    @pytest.mark.parametrize(("pieces", "status", "body", "kept"), FORMS)
    def test_answers_of_every_form(
        self, server: Server, transport: Direct, pieces: list[Any], status: int, body: bytes, kept: bool
    ) -> None:
        server.script = [pieces]
        found = told(server, transport)
        assert (found[0], found[2]) == (status, body)
        assert b"x-b" not in dict(found[1])
        assert (len(transport._idle) == 1) == kept

    @pytest.mark.parametrize("pieces", BROKEN)
    def test_what_is_no_whole_answer_is_an_error(self, server: Server, transport: Direct, pieces: list[Any]) -> None:
        server.script = [pieces, [OK]]
        with pytest.raises(httpx2.RemoteProtocolError):
            told(server, transport)
        assert not transport._idle
        assert told(server, transport)[2] == b"hi"

    def test_header_fields_have_an_end(self, server: Server, transport: Direct) -> None:
        server.script = [[b"HTTP/1.1 200 OK\r\n" + b"x-y: z\r\n" * 40_000 + b"\r\n"]]
        with pytest.raises(httpx2.RemoteProtocolError, match="too large"):
            told(server, transport)

    def test_time_runs_out(self, server: Server, transport: Direct) -> None:
        server.script = [[b"HTTP/1.1 200 OK\r\n", 0.3, b"\r\n"], [b"HTTP/1.1 200 OK\r\n", 0.05, b"\r\n"], [OK]]
        with pytest.raises(httpx2.ReadTimeout):
            told(server, transport, read=0.05)
        assert told(server, transport, late=True) is None
        assert not transport._idle  # what was not read to its end is not used again
        assert told(server, transport)[0] == 200

    def test_no_place_is_lost(self, server: Server, transport: Direct) -> None:
        server.script = [[None], *([OK] for _ in range(120))]
        with pytest.raises(httpx2.RemoteProtocolError):
            told(server, transport)
        for _ in range(120):  # more than there are places
            assert told(server, transport)[2] == b"hi"
        assert server.connections == 2


class TestPastTheLibrary:
    """Of a ``Client``: which calls go past the library, and what it would have done."""

    ANSWER = b'{"version": "1", "models": [], "limits": {}}'

    def answer(self, *fields: bytes, body: bytes = ANSWER) -> bytes:
        head = b"".join(field + b"\r\n" for field in (b"content-length: %d" % len(body), *fields))
        return b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body

    def test_the_same_header_fields(self, server: Server) -> None:
        server.script = [[self.answer()] for _ in range(2)]
        with Client(server.url.partition("/path")[0], api_key="k", headers={"x-mine": "1"}) as client:
            client.info()
            client.info(request_id="r")  # through the library
        past, through = (
            dict(line.split(b": ", 1) for line in request.lower().split(b"\r\n\r\n")[0].split(b"\r\n")[1:])
            for request in server.requests
        )
        assert through.pop(b"x-request-id") == b"r"
        assert past.pop(b"accept-encoding") == b"identity"
        through.pop(b"accept-encoding")
        assert past == through
        assert server.requests[0].startswith(b"GET /info HTTP/1.1\r\n")

    def test_cookies_are_kept(self, server: Server) -> None:
        server.script = [[self.answer(b"set-cookie: route=7")], [self.answer()]]
        with Client(server.url.partition("/path")[0]) as client:
            client.info()
            client.info()
        assert b"cookie: route=7" in server.requests[1].lower()

    def test_an_answer_that_comes_compressed_all_the_same(self, server: Server) -> None:
        server.script = [[self.answer(b"content-encoding: gzip", body=gzip.compress(self.ANSWER))]]
        with Client(server.url.partition("/path")[0]) as client:
            assert client.info().version == "1"

    def test_a_closed_client_says_so(self, server: Server) -> None:
        client = Client(server.url.partition("/path")[0])
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.info()

    def test_credentials_in_the_url_are_sent(self, server: Server) -> None:
        server.script = [[self.answer()]]
        with Client(server.url.partition("/path")[0].replace("http://", "http://user:pw@")) as client:
            client.info()
        assert b"authorization: basic dxnlcjpwdw==" in server.requests[0].lower()
