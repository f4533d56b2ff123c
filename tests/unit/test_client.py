"""Both clients, one suite: over MockTransport, and over a real socket on the loopback interface."""

from __future__ import annotations

import ast
import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import lenvm_client
from lenvm_client import (
    AsyncClient,
    BadAnswerError,
    CandidateInput,
    CandidateScores,
    Client,
    CompletionInput,
    FeedbackItem,
    InvalidRequestError,
    MockRequest,
    MockTransport,
    NotReadyError,
    OverloadedError,
    RowError,
    ServiceTimeoutError,
    ServiceUnreachableError,
    TokenScores,
    UnauthorizedError,
)


class Facade:
    """One way to call either client; waits are recorded, not slept."""

    def __init__(self, kind: type[Client] | type[AsyncClient], runner: asyncio.Runner | None, **options: Any) -> None:
        self.client = kind(**options)
        self.runner = runner
        self.waits: list[float] = []
        if isinstance(self.client, Client):
            self.client._sleep = self.waits.append
        else:

            async def sleep(seconds: float) -> None:
                self.waits.append(seconds)

            self.client._sleep = sleep  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self.runner.run(result) if self.runner is not None else result

        return call


Make = Callable[..., Facade]


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    runner = asyncio.Runner() if request.param is AsyncClient else None
    made: list[Facade] = []

    def build(routes: Any = None, **options: Any) -> Facade:
        if routes is not None or not options.keys() & {"transport", "base_url"}:
            options["transport"] = routes if isinstance(routes, MockTransport) else MockTransport(routes)
        made.append(Facade(request.param, runner, **options))
        return made[-1]

    yield build
    for facade in made:
        facade.close()
    if runner is not None:
        runner.close()


def test_the_shortest_call(make: Make) -> None:
    answer = make().predict_length("Why?")
    assert answer.prediction.horizon == 100.0
    assert answer.prediction.quantiles == {"0.5": 100, "0.9": 100, "0.95": 100}


def test_every_call_has_a_canned_answer(make: Make) -> None:
    client = make()
    rows = [CandidateInput(token_ids=[1, 2], candidates=[3, 4], objective={"kind": "scale", "factor": 2.0})]
    several = client.predict_length(
        ["a", {"messages": [{"role": "user", "content": "b"}]}], quantiles=[0.25], max_tokens=50
    )
    assert [row.p_exceeds_max_tokens for row in several] == [1.0, 1.0]
    assert client.score("Why?", completion="No.").scores[0].tokens == ("N", "o", ".")
    mixed = client.score([CompletionInput(prompt="p", completion="xy"), *rows]).scores
    assert [type(row) for row in mixed] == [TokenScores, CandidateScores]
    (first,) = client.score_candidates(rows)
    assert (first.log_weights, first.objective["kind"]) == ((0.0, 0.0), "tilt")
    (again,) = client.score_candidates([CandidateInput(session=first.session, append=[3], candidates=[5])])
    (whole,) = client.score_candidates([CandidateInput(token_ids=[1, 2, 3], candidates=[5])])
    assert again.session == whole.session != first.session
    assert client.score_candidates([]) == []
    (same,) = client.score_candidates([{"token_ids": [1, 2, 3], "candidates": [5]}])  # as plain data
    assert same == whole
    with pytest.raises(InvalidRequestError, match="row 0 is no CandidateInput"):
        client.score_candidates([{"tokens": [1]}])
    ids = client.tokenize("né").token_ids
    assert client.detokenize(ids).text == "né"
    assert client.tokenize(messages=[{"role": "user", "content": "n"}]).token_ids == (110,)
    assert client.feedback(FeedbackItem(prediction_id="s", generated_tokens=1, finish_reason="stop")).accepted == 1
    assert client.models().data[0].id == "mock"
    assert client.info().models[0].eos_ids == (2,)
    assert client.live() is True
    assert client.ready() is True


def test_what_is_sent(make: Make) -> None:
    transport = MockTransport()
    client = make(transport, model="m", api_key="secret", headers={"x-tenant": "t"}, base_url="http://host/prefix/")
    client.predict_length("a", request_id="mine", deadline_ms=100, priority=2, generator="b")
    client.info()
    sent, plain = transport.requests
    assert (sent.method, sent.path, plain.path) == ("POST", "/prefix/predict_length", "/prefix/info")
    assert sent.body == {"prompt": "a", "model": "m", "deadline_ms": 100, "priority": 2, "generator": "b"}
    expected = {"authorization": "Bearer secret", "x-tenant": "t", "x-request-id": "mine"}
    assert {name: sent.headers[name] for name in expected} == expected
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["user-agent"] == f"lenvm-client/{lenvm_client.__version__}"
    assert plain.body is None
    assert "x-request-id" not in plain.headers


def test_request_ids_come_back(make: Make) -> None:
    client = make({"/score": OverloadedError("full")}, max_retries=0)
    assert client.predict_length("a", request_id="mine").request_id == "mine"
    assert client.predict_length("a").request_id == "mock-2"
    with pytest.raises(OverloadedError) as caught:
        client.score("a", completion="b", request_id="other")
    assert caught.value.request_id == "other"


def test_retries_until_it_goes_through(make: Make) -> None:
    good = httpx2.Response(200, json={"model": "m", "token_ids": [1]})
    html = httpx2.Response(502, html="<html><body>Bad Gateway</body></html>")
    transport = MockTransport({"/tokenize": [httpx2.ConnectError("refused"), html, good]})
    client = make(transport)
    assert client.tokenize("a").token_ids == (1,)
    assert len(transport.requests) == 3
    assert len(client.waits) == 2
    assert len({request.headers.get("x-request-id") for request in transport.requests}) == 1


def test_retry_after_is_honoured(make: Make) -> None:
    busy = OverloadedError("full", retry_after_s=4.0)
    client = make({"/tokenize": [busy, {"model": "m", "token_ids": []}]})
    client.tokenize("a")
    assert len(client.waits) == 1
    assert 4.0 <= client.waits[0] <= 4.25


@pytest.mark.parametrize(
    ("raised", "expected", "sends"),
    [
        (httpx2.ConnectError("refused"), ServiceUnreachableError, 3),
        (httpx2.ReadError("reset"), ServiceUnreachableError, 3),
        (httpx2.RemoteProtocolError("server disconnected"), ServiceUnreachableError, 3),
        (httpx2.ReadTimeout("slow"), ServiceTimeoutError, 1),
        (httpx2.ConnectTimeout("slow"), ServiceTimeoutError, 1),
        (httpx2.PoolTimeout(""), ServiceTimeoutError, 1),
        (httpx2.UnsupportedProtocol("ftp"), ServiceUnreachableError, 1),
        (httpx2.DecodingError("not gzip"), BadAnswerError, 1),
        (httpx2.Response(502, html="<p>no</p>"), ServiceUnreachableError, 3),
        (httpx2.Response(200, html="<p>hello</p>"), BadAnswerError, 1),
        (InvalidRequestError("wrong"), InvalidRequestError, 1),
        (UnauthorizedError("who?"), UnauthorizedError, 1),
    ],
)
def test_every_failure_is_typed(make: Make, raised: Any, expected: type[Exception], sends: int) -> None:
    transport = MockTransport({"/predict_length": raised})
    client = make(transport)
    with pytest.raises(expected) as caught:
        client.predict_length("a")
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)
    assert len(transport.requests) == sends
    if isinstance(raised, httpx2.HTTPError):
        assert caught.value.__cause__ is raised


def test_retrying_time_outs_is_a_choice(make: Make) -> None:
    transport = MockTransport({"/tokenize": httpx2.ReadTimeout("slow")})
    with pytest.raises(ServiceTimeoutError):
        make(transport, retry_timeouts=True, max_retries=3).tokenize("a")
    assert len(transport.requests) == 4


def test_no_phase_may_outlast_the_total_time(make: Make) -> None:
    seen: list[dict[str, float | None]] = []

    class Spy(MockTransport):
        def _handle(self, request: httpx2.Request, content: bytes) -> httpx2.Response:
            seen.append(dict(request.extensions["timeout"]))
            return super()._handle(request, content)

    client = make(transport=Spy(), timeout=30.0, total_timeout=10.0)
    client.tokenize("a")
    client.tokenize("a", timeout=2.0)
    client.tokenize("a", timeout=httpx2.Timeout(None, connect=1.0))
    assert all(9.0 < value <= 10.0 for value in seen[0].values() if value is not None)
    assert set(seen[1].values()) == {2.0}
    assert seen[2]["connect"] == 1.0
    assert 9.0 < (seen[2]["read"] or 0.0) <= 10.0
    unbounded = make(transport=Spy(), timeout=httpx2.Timeout(None), total_timeout=None)
    unbounded.tokenize("a")
    assert set(seen[3].values()) == {None}


class Drip(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body without an end, of which each piece comes soon enough for the time-out of a read."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(1000):
            self.tick()
            yield b" "

    async def __aiter__(self) -> Any:
        for _ in range(1000):
            await asyncio.sleep(0.01)
            yield b" "

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("retry_timeouts", [False, True])
def test_a_server_that_drips_is_bounded_by_the_total_time(make: Make, retry_timeouts: bool) -> None:
    now = [0.0]

    def tick() -> None:
        now[0] += 1.0

    streams: list[Drip] = []

    class Dripping(httpx2.BaseTransport, httpx2.AsyncBaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            streams.append(Drip(tick))
            return httpx2.Response(200, stream=streams[-1])

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            return self.handle_request(request)

    options = {"timeout": 30.0, "retry_timeouts": retry_timeouts, "transport": Dripping()}
    client = make(total_timeout=0.05 if make().runner else 10.0, **options)  # a real clock, or one that ticks
    if client.runner is None:
        client.client._clock = lambda: now[0]
    with pytest.raises(ServiceTimeoutError, match="total_timeout"):
        client.tokenize("a")
    assert [stream.closed for stream in streams] == [True]
    if client.runner is None:
        assert now[0] == 11.0


@pytest.mark.parametrize(
    ("raised", "sends"),
    [
        (httpx2.ConnectError("refused"), 3),
        (httpx2.Response(503), 3),
        (OverloadedError("full"), 3),
        (httpx2.ReadError("reset"), 1),
        (httpx2.RemoteProtocolError("server disconnected"), 1),
        (httpx2.Response(502), 1),
    ],
)
def test_feedback_is_not_said_twice(make: Make, raised: Any, sends: int) -> None:
    transport = MockTransport({"/feedback": raised})
    with pytest.raises((ServiceUnreachableError, OverloadedError)):
        make(transport).feedback(FeedbackItem(prediction_id="s", generated_tokens=1, finish_reason="stop"))
    assert len(transport.requests) == sends


def test_health_says_no_where_waiting_may_help(make: Make) -> None:
    for answer in (
        NotReadyError("loading"),
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.Response(503),
    ):
        transport = MockTransport({"/health/ready": answer, "/health/live": answer})
        client = make(transport)
        assert client.ready() is False
        assert client.live() is False
        assert len(transport.requests) == 2  # asked once each
    for wrong in (httpx2.Response(404), httpx2.Response(200, text="hello"), UnauthorizedError("who?")):
        with pytest.raises((BadAnswerError, UnauthorizedError)):
            make({"/health/ready": wrong}).ready()


def test_row_errors_stay_in_their_row(make: Make) -> None:
    error = {
        "type": "context_too_long",
        "message": "long",
        "code": "context_too_long",
        "param": None,
        "request_id": "r",
    }

    def handler(request: MockRequest) -> dict[str, Any] | None:
        if request.path != "/score":
            return None
        good = {"index": 0, "values": [0.0], "horizons": [0.0], "log_weights": [0.5], "session": "s"}
        return {"model": "m", "scores": [good, {"index": 1, "error": {**error, "retryable": False}}]}

    client = make(handler)
    rows = [CandidateInput(token_ids=[1], candidates=[2]), CandidateInput(token_ids=[1] * 9, candidates=[2])]
    good, bad = client.score_candidates(rows)
    assert good.log_weights == (0.5,)
    assert isinstance(bad, RowError)
    assert bad.type == "context_too_long"
    with pytest.raises(BadAnswerError, match="do not match"):
        client.score_candidates(rows[:1])
    assert client.predict_length("a").prediction.horizon == 100.0  # None: the canned answer


@pytest.mark.parametrize("options", [{"base_url": "localhost:8000"}, {"base_url": "ftp://x"}, {"base_url": "http://"}])
def test_a_wrong_base_url_is_said_at_once(make: Make, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="base_url"):
        make(**options)


def test_other_wrong_settings(make: Make) -> None:
    with pytest.raises(InvalidRequestError, match="api_key") as caught:
        make(api_key="secret\n")
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match="request_id"):
        make().tokenize("a", request_id="é")
    with pytest.raises(InvalidRequestError, match="max_retries"):
        make(max_retries=-1)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "3", True, httpx2.Timeout(1.0, read=-1.0)])
def test_times_that_are_none(make: Make, bad: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout must be seconds") as caught:
        make(timeout=bad)
    assert caught.value.param == "timeout"
    with pytest.raises(InvalidRequestError, match="timeout must be seconds"):
        make().tokenize("a", timeout=bad)
    with pytest.raises(InvalidRequestError, match="total_timeout must be") as caught:
        make(total_timeout=bad)
    assert caught.value.param == "total_timeout"


@pytest.mark.parametrize("headers", [{"x": "€"}, {"x": "a\nb"}, {"é": "x"}, {"x": 3}])
def test_headers_that_cannot_be_sent(make: Make, headers: Any) -> None:
    with pytest.raises(InvalidRequestError, match="header"):
        make(headers=headers)


def test_context_managers_close() -> None:
    with Client(transport=MockTransport()) as client:
        client.tokenize("a")
    assert client._http.is_closed

    async def run() -> AsyncClient:
        async with AsyncClient(transport=MockTransport()) as client:
            await client.tokenize("a")
        return client

    assert asyncio.run(run())._http.is_closed


@pytest.fixture
def raw_server() -> Iterator[Callable[[list[bytes]], str]]:
    """A server that answers each connection with the given bytes and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def start(answers: list[bytes]) -> str:
        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(30)
                    connection.recv(65536)
                    connection.sendall(answer)
            listener.close()

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    listener.close()


def test_over_a_real_socket(make: Make, raw_server: Callable[[list[bytes]], str]) -> None:
    body = b'{"model": "m", "token_ids": [7]}'
    good = b"HTTP/1.1 200 OK\r\nx-request-id: r5\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )
    cut = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"
    url = raw_server([b"", cut, good])
    client = make(base_url=url)
    answer = client.tokenize("a")
    assert (answer.token_ids, answer.request_id) == ((7,), "r5")
    assert len(client.waits) == 2


def test_nobody_listens(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = make(base_url=f"http://127.0.0.1:{port}", max_retries=1)
    with pytest.raises(ServiceUnreachableError, match="is it running"):
        client.tokenize("a")
    assert client.ready() is False
    assert len(client.waits) == 1


def test_a_users_script_type_checks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lenvm_client import Client, Prediction\n"
        "client = Client()\n"
        'values: tuple[float, ...] = client.score("a", completion="b").completion.values\n'
        'weights: tuple[float, ...] | None = client.score({"candidates": [1]}).candidates.log_weights\n'
        'indices: list[int] = [row.index for row in client.score([{"prompt": "a", "completion": "b"}])]\n'
        'prediction: Prediction = client.predict_length("a").prediction\n'
    )
    root = Path(__file__).resolve().parents[2]
    options = ["--strict", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(script)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(str(lenvm_client.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == lenvm_client._LAZY
    assert lenvm_client.__all__ == sorted(lenvm_client.__all__)
    assert set(lenvm_client._LAZY) <= set(lenvm_client.__all__)


def test_importing_the_package_imports_no_http_library() -> None:
    code = "import sys, lenvm_client; print(sorted({'httpx2', 'torch', 'numpy', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
