"""The server process: binding, loading, the two probes, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest

from lenvm.errors import ArtifactError, InvalidRequestError
from lenvm_service.cli import main
from lenvm_service.cli import serve as serve_command
from lenvm_service.http_protocol import _OneWrite
from lenvm_service.server import Drain, bind, find_models

ROOT = Path(__file__).resolve().parents[2]


# -- the drain ---------------------------------------------------------------------------------------------------------


def test_a_drain_shows_itself_for_the_grace_and_waits_for_work() -> None:
    drain = Drain(grace_s=0.5, timeout_s=30)
    assert not drain.finished(1e9, in_flight=0)
    drain.signal(100.0)
    assert not drain.finished(100.4, in_flight=0)
    assert drain.finished(100.5, in_flight=0)
    assert not drain.finished(129.9, in_flight=1)
    assert not drain.overdue(129.9)
    assert drain.overdue(130.0)
    assert drain.finished(130.0, in_flight=1)


def test_a_second_signal_ends_the_drain_at_once() -> None:
    drain = Drain(grace_s=5, timeout_s=1)
    assert drain.timeout_s == 5  # the grace is never cut short by the time-out
    drain.signal(100.0)
    assert not drain.overdue(100.1)
    drain.signal(100.1)
    assert drain.overdue(100.1)
    assert drain.finished(100.1, in_flight=3)


# -- before anything is served -----------------------------------------------------------------------------------------


def test_bind() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):  # listens at once
            pass
        assert taken.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on
        with pytest.raises(InvalidRequestError, match=rf"port {port} on 127\.0\.0\.1 is in use: .* --port"):
            bind("127.0.0.1", port)
    for host in ("no such host", "256.1.1.1.", "\udcff"):
        with pytest.raises(InvalidRequestError, match="unknown host"):
            bind(host, 0)
    with pytest.raises(InvalidRequestError, match=r"cannot listen on 192\.0\.2\.1"):  # of no machine
        bind("192.0.2.1", 0)


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: port \d+ on 127\.0\.0\.1 is in use: [^\n]+\n", captured.err)


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, problem in ((tmp_path / "nothing", "no checkpoint"), (tmp_path, "is no LenVM checkpoint")):
        assert main(["serve", "--port", "0", "--model", str(model)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"error: [^\n]*{problem}[^\n]*\n", captured.err)


def test_models_are_found_by_name_folder_and_alias(tiny_checkpoint: Path) -> None:
    shipped = "smollm2-135m-instruct"
    found = find_models([f"small={tiny_checkpoint}", str(tiny_checkpoint), shipped])
    assert list(found) == ["small", "tiny", shipped]
    assert found["small"] == found["tiny"] == tiny_checkpoint
    with pytest.raises(ArtifactError, match=r"two models are called tiny: .*ALIAS="):
        find_models([str(tiny_checkpoint), f"tiny={tiny_checkpoint}"])


def test_an_engine_that_is_still_loading_does_not_hold_the_process_up(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    serve_command._leave_busy_engines(0)
    assert left == []
    end = threading.Event()
    loading = threading.Thread(target=end.wait, name="lenvm-model", daemon=True)
    loading.start()
    serve_command._leave_busy_engines(0)
    end.set()
    loading.join()
    assert left == [0]


# -- a real process over a fake engine ---------------------------------------------------------------------------------


class Process:
    """The server in a process of its own; ``url`` is known once it listens."""

    def __init__(self, checkpoint: Path, *flags: str, **environment: str) -> None:
        script = str(ROOT / "tests" / "support" / "serve_fake.py")
        self.process = subprocess.Popen(
            [sys.executable, script, str(checkpoint), "port=0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.log: list[str] = []
        self._listening = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            found = re.search(r"listening.*(http://[0-9.:]+)", line)
            if found:
                self.url = found[1]
                self._listening.set()

    def listening(self) -> str:
        assert self._listening.wait(60), self.log
        return self.url

    def ready(self) -> str:
        """The line on stdout that says so."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, *signals: signal.Signals) -> int:
        for sent in signals:
            self.process.send_signal(sent)
        status = self.process.wait(60)
        self._reader.join(10)
        return status


@pytest.fixture
def start(tiny_checkpoint: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*flags: str, **environment: str) -> Process:
        started.append(Process(tiny_checkpoint, *flags, **environment))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.wait(10)
        for stream in (server.process.stdout, server.process.stderr):
            assert stream is not None
            server._reader.join(10)
            stream.close()


def post(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/predict_length", json={"prompt": "a", **body}, timeout=60)


def test_alive_while_loading_then_ready_then_gone(start: Callable[..., Process]) -> None:
    server = start("log_format=json", FAKE_LOADING_SECONDS="1.5")
    url = server.listening()
    assert httpx2.get(f"{url}/health/live").status_code == 200
    waiting = httpx2.get(f"{url}/health/ready")
    assert (waiting.status_code, waiting.json()["error"]["type"]) == (503, "not_ready")
    assert post(url).json()["error"]["type"] == "not_ready"
    assert server.ready() == f"lenvm is ready at {url} (models: fake)\n"
    assert httpx2.get(f"{url}/health/ready").json()["status"] == "ready"
    assert post(url).status_code == 200
    assert server.end(signal.SIGTERM) == 0
    assert not [line for line in server.log if "Traceback" in line]
    assert len([line for line in server.log if '"message": "request"' in line]) == 5


def test_a_model_that_cannot_be_loaded_ends_the_process(start: Callable[..., Process]) -> None:
    server = start(FAKE_LOADING_FAILS="yes")
    assert server.end() == 1
    errors = [line for line in server.log if line.startswith("error: ")]
    assert errors == ["error: model fake cannot be loaded: the weights are damaged: fetch them again"]
    assert server.ready() == ""
    assert not [line for line in server.log if "Traceback" in line]


def test_sigterm_under_load_fails_no_request(start: Callable[..., Process]) -> None:
    server = start("drain_grace_s=1", FAKE_SECONDS="0.3")
    server.ready()
    url = server.listening()
    outcomes: list[int | str] = []
    running = threading.Barrier(9)

    def caller() -> None:
        with httpx2.Client(base_url=url, timeout=60) as client:
            running.wait()
            while True:
                try:
                    answer = client.post("/predict_length", json={"prompt": "a"})
                except httpx2.ConnectError:
                    outcomes.append("refused")  # the listener is closed: nothing was in flight
                    return
                outcomes.append(answer.status_code)
                if answer.status_code == 200:
                    continue
                assert answer.status_code == 503
                assert answer.json()["error"]["type"] == "draining"
                assert answer.headers["connection"] == "close"

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(caller) for _ in range(8)]
        running.wait()
        time.sleep(0.75)
        status = server.end(signal.SIGTERM)
        for done in callers:
            done.result(60)
    assert status == 0
    assert outcomes.count(200) >= 8
    assert 503 in outcomes
    assert set(outcomes) <= {200, 503, "refused"}
    assert not [line for line in server.log if "Traceback" in line]


def test_who_was_let_in_before_the_end_may_be_slow_to_ask(start: Callable[..., Process]) -> None:
    server = start("drain_grace_s=0", FAKE_SECONDS="0.1")
    server.ready()
    address = (url := httpx2.URL(server.listening())).host, url.port
    body = b'{"prompt": "a"}'
    request = b"POST /predict_length HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)

    def told(raw: socket.socket) -> bytes:
        answer = b""
        while chunk := raw.recv(65536):
            answer += chunk
        return answer

    with socket.create_connection(address, timeout=30) as late, socket.create_connection(address, timeout=30) as half:
        half.sendall(request[:10])
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(address, timeout=30).close()
                time.sleep(0.02)
        time.sleep(0.7)  # twice what connections in use are given
        late.sendall(request)
        half.sendall(request[10:])
        for answer in told(late), told(half):
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"draining"' in answer
    assert server.end() == 0


@pytest.mark.parametrize("how", ["time-out", "second signal"])
def test_what_takes_too_long_is_answered_and_the_exit_is_clean(start: Callable[..., Process], how: str) -> None:
    timeout = "0.4" if how == "time-out" else "60"
    server = start("drain_grace_s=0", f"drain_timeout_s={timeout}", FAKE_SECONDS="60")
    server.ready()
    url = server.listening()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, url)
        while "lenvm_requests_in_flight 2.0" not in httpx2.get(f"{url}/metrics").text:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGINT)
        if how == "second signal":
            while httpx2.get(f"{url}/health/ready").json()["error"]["type"] != "draining":
                time.sleep(0.02)
            server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        answer = waiting.result(10)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "draining")
    assert not [line for line in server.log if "Traceback" in line]


def test_an_answer_leaves_in_one_write_and_a_stream_at_once() -> None:
    class Transport:
        def __init__(self) -> None:
            self.sent: list[bytes] = []

        def write(self, data: bytes) -> None:
            self.sent.append(data)

        def close(self) -> None:
            self.sent.append(b"closed")

        def get_extra_info(self, name: str) -> str:
            return name

    head = b"HTTP/1.1 200 OK\r\nx-a: 1\r\n\r\n"

    async def run() -> None:
        below = Transport()
        transport = _OneWrite(cast("asyncio.Transport", below), asyncio.get_running_loop())
        transport.write(head)
        transport.write(b"body")
        transport.write(b"HTTP/1.1 looks like one")
        await asyncio.sleep(0)
        assert below.sent == [head + b"body", b"HTTP/1.1 looks like one"]
        below.sent.clear()
        transport.write(head)
        assert not below.sent
        await asyncio.sleep(0)  # an event stream, whose first event is yet to come
        assert below.sent == [head]
        transport.write(b"event")
        transport.write(head)
        transport.write(large := b"x" * (1 << 17))
        transport.write(head)
        transport.close()
        await asyncio.sleep(0)
        assert below.sent == [head, b"event", head, large, head, b"closed"]
        assert transport.get_extra_info("peername") == "peername"

    asyncio.run(run())


def test_bytes_that_are_no_http_and_bodies_that_never_end(start: Callable[..., Process]) -> None:
    server = start("max_body_bytes=65536")
    server.ready()
    address = ("127.0.0.1", int(server.listening().rpartition(":")[2]))

    def talk(*parts: bytes) -> bytes:
        with socket.create_connection(address, timeout=30) as raw:
            for part in parts:
                raw.sendall(part)
            answer = b""
            while chunk := raw.recv(65536):
                answer += chunk
                if b"request_id" in answer and b"}}" in answer:
                    break
            return answer

    for garbage in (b"garbage\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"GET /" + b"a" * 100_000):
        answer = talk(garbage)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"application/json" in answer
        assert b'"code":"http_invalid"' in answer
    head = b"POST /score HTTP/1.1\r\nhost: x\r\n"
    answer = talk(
        head + b"transfer-encoding: chunked\r\n\r\n", b"8000\r\n" + b" " * 0x8000 + b"\r\n", b"8001\r\n" + b" " * 0x8001
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    answer = talk(head + b"content-length: 70000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    # An answer that has begun, or nobody there to hear it: neither may end up as a traceback.
    with socket.create_connection(address, timeout=30) as raw:
        raw.sendall(head + b"transfer-encoding: chunked\r\n\r\n4\r\n{}  \r\nzzz\r\n")
    with socket.create_connection(address, timeout=30) as raw:
        raw.sendall(head + b"content-length: 100\r\n\r\n{")
    upgrade = b"host: x\r\nconnection: upgrade\r\nupgrade: h2c\r\nx-request-id: request_id}}\r\n\r\n"
    answer = talk(b"GET /health/live HTTP/1.1\r\n" + upgrade)
    assert answer.startswith(b"HTTP/1.1 200 ")
    body = b'{"prompt":"a"}'
    with socket.create_connection(address, timeout=30) as raw:
        for _ in range(2):  # on one connection
            raw.sendall(b"POST /predict_length HTTP/1.1\r\ncontent-length: %d\r\n" % len(body) + upgrade + body)
            answer = b""
            while b'"timings_ms"' not in answer:
                piece = raw.recv(65536)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200 ")
    assert post(server.url).status_code == 200
    assert server.end(signal.SIGTERM) == 0
    assert not [line for line in server.log if "Traceback" in line or "h2c" in line.lower()]


def test_who_sends_too_slowly_is_cut_off_and_nobody_else(start: Callable[..., Process]) -> None:
    server = start("read_timeout_s=1.5")
    server.ready()
    url = server.listening()
    address = ("127.0.0.1", int(url.rpartition(":")[2]))

    def drip(*parts: bytes, more: bytes = b"x") -> bytes:
        """Each part, then a byte every tenth of a second, which does not help."""
        with socket.create_connection(address, timeout=30) as raw:
            for part in parts:
                raw.sendall(part)
            raw.settimeout(0.1)
            answer = b""
            while True:
                try:
                    piece = raw.recv(65536)
                except TimeoutError:
                    with contextlib.suppress(OSError):
                        raw.sendall(more)
                    continue
                except OSError:  # reset: our last byte came after the end
                    return answer
                if not piece:
                    return answer
                answer += piece

    slow_head = drip(b"POST /score HTTP/1.1\r\nhost: x\r\nx-a: ")
    assert slow_head.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in slow_head
    assert drip(more=b"").startswith(b"HTTP/1.1 408 ")  # says nothing at all
    assert drip().startswith(b"HTTP/1.1 400 ")  # no method begins with an x
    assert drip(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{") == b""
    # A connection that waits between two requests is none of these.
    with httpx2.Client(base_url=url) as client:
        for _ in range(2):
            assert client.post("/predict_length", json={"prompt": "a"}).status_code == 200
            time.sleep(1.8)
    assert "lenvm_requests_in_flight 1.0" in httpx2.get(f"{url}/metrics").text
    assert server.end(signal.SIGTERM) == 0
    assert not [line for line in server.log if "Traceback" in line]


def test_a_caller_that_goes_is_noticed(start: Callable[..., Process]) -> None:
    server = start(FAKE_SECONDS="60")
    server.ready()
    url = server.listening()

    async def leave() -> None:
        async with httpx2.AsyncClient(base_url=url) as client:
            with pytest.raises(httpx2.ReadTimeout):
                await client.post("/predict_length", json={"prompt": "a"}, timeout=0.5)

    asyncio.run(leave())
    while "lenvm_requests_in_flight 1.0" not in httpx2.get(f"{url}/metrics").text:
        time.sleep(0.02)
    assert server.end(signal.SIGTERM) == 0
    assert [line for line in server.log if "status=499 error_type=client_gone" in line]
    assert not [line for line in server.log if "Traceback" in line or " ERROR " in line]
