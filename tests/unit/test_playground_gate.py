"""Between a browser and the playground: keys, the routes that the page needs, and bounds. No Gradio here."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

import lenvm_service.ui
from lenvm_service.api import create_app
from lenvm_service.cli import main
from lenvm_service.keys import KeyRing
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from lenvm_service.ui.mount import Gate
from tests.support.fake_engine import FakeEngine

PAGE = '<html><head><link rel="manifest" href="/manifest.json" /></head>page</html>'


def basic(key: str, user: str = "anybody") -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


class FakePage:
    """Stands for Gradio's application, and says what came through."""

    def __init__(self) -> None:
        self.starts = 0
        self.endless = asyncio.Event()

    def mount(self, app: FastAPI, _: Any) -> None:
        inner = [
            Route("/", lambda _: HTMLResponse(PAGE)),
            Route("/gradio_api/heartbeat/{id}", self._stream),
            Route("/{path:path}", self._echo, methods=["GET", "POST", "PUT"]),
        ]
        app.routes.append(Mount("/ui", routes=inner))
        app.add_middleware(Gate, start=self._start)

    def _start(self) -> None:
        self.starts += 1

    async def _echo(self, request: Request) -> Response:
        body = await request.body()
        return JSONResponse({"bytes": len(body), "tenant": request.state.context.tenant})

    async def _stream(self, request: Request) -> Response:
        async def parts() -> AsyncIterator[str]:
            yield "data: ALIVE\n\n"
            await self.endless.wait()

        return StreamingResponse(parts(), media_type="text/event-stream")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> FakePage:
    page = FakePage()
    monkeypatch.setattr(lenvm_service.ui, "mount_playground", page.mount)
    return page


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    tables = [
        f'[[key]]\nid = "{key}"\ntenant = "{key}-team"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{more}'
        for key, more in (("first", ""), ("rare", "requests_per_s = 1\n"))
    ]
    path.write_text("".join(tables))
    return path


def client_of(**settings: Any) -> TestClient:
    return TestClient(create_app({"fake": FakeEngine()}, Settings(ui=True, **settings), Metrics()))


def test_without_the_flag_there_is_nothing(page: FakePage) -> None:
    client = TestClient(create_app({"fake": FakeEngine()}, Settings(), Metrics()))
    assert client.get("/ui/").status_code == 404


def test_without_the_extra_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["serve", "--ui", "--port", "0"]) == 1
    assert capsys.readouterr().err == "error: gradio not installed: run pip install 'lenvm[ui]'\n"


@pytest.mark.parametrize(
    "path",
    ["", "config", "theme.css", "assets/index-DphvyggB.js", "static/js/iframeResizer.contentWindow.min.js",
     "gradio_api/startup-events", "gradio_api/queue/data?session_hash=abc"],
)  # fmt: skip
def test_what_the_page_needs_is_there(page: FakePage, path: str) -> None:
    client = client_of()
    found = client.get(f"/ui/{path}")
    assert found.status_code == 200, found.text
    assert "default-src 'self'" in found.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in found.headers["content-security-policy"]
    assert found.headers["x-request-id"]
    assert client.get(f"/ui/{path}").status_code == 200
    assert page.starts == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "gradio_api/upload"), ("GET", "gradio_api/file=/etc/passwd"), ("GET", "gradio_api/file/x"),
        ("GET", "gradio_api/proxy=http://other"), ("POST", "gradio_api/run/predict"), ("POST", "gradio_api/call/x"),
        ("GET", "gradio_api/info"), ("GET", "monitoring"), ("POST", "login"), ("POST", "gradio_api/vibe-edit"),
        ("GET", "gradio_api/openapi.json"), ("GET", "assets/../config.json"), ("GET", "gradio_api/queue/join"),
        ("POST", "config"), ("POST", ""), ("GET", "gradio_api/runs"), ("GET", "gradio_api/custom_component/a/b/c/d"),
    ],
)  # fmt: skip
def test_what_it_does_not_need_is_not(page: FakePage, method: str, path: str) -> None:
    found = client_of().request(method, f"/ui/{path}")
    assert found.status_code in (404, 422)
    assert found.json()["error"]["type"] == "invalid_request"
    assert client_of().request("PUT", "/ui/config").status_code == 405


def test_bodies_are_bounded(page: FakePage) -> None:
    client = client_of()
    assert client.post("/ui/gradio_api/queue/join", content=b"x" * 200_000).json()["bytes"] == 200_000
    assert client.post("/ui/gradio_api/queue/join", content=b"x" * 300_000).status_code == 413


def test_other_sites_cannot_post(page: FakePage) -> None:
    client = client_of()
    for site, status in (("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)):
        headers = {"sec-fetch-site": site}
        assert client.post("/ui/gradio_api/queue/join", headers=headers).status_code == status
    assert client.get("/ui/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link to it


def test_the_page_asks_for_nothing_at_the_root_of_the_host(page: FakePage) -> None:
    found = client_of().get("/ui/")
    assert "manifest" not in found.text
    assert '<link rel="icon" href="data:image/svg+xml,' in found.text
    assert found.text.endswith("page</html>")
    assert int(found.headers["content-length"]) == len(found.content)


def test_with_keys_the_browser_is_told_to_ask_for_one(page: FakePage, keys: Path) -> None:
    client = client_of(api_keys=keys)
    for path in ("/ui/", "/ui/assets/x.js", "/ui", "/ui/nothing"):
        refused = client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic realm=")
    for wrong in (basic("second"), basic("", "first"), {"authorization": "Basic !!!"}, {"authorization": "Basic"}):
        assert client.get("/ui/", headers=wrong).status_code == 401
    assert client.post("/ui/gradio_api/queue/join").status_code == 401
    found = client.post("/ui/gradio_api/queue/join", headers=basic("first"))
    assert found.json() == {"bytes": 0, "tenant": "first-team"}
    assert client.get("/ui/", headers={"authorization": "Bearer first"}).status_code == 200
    assert page.starts == 1


def test_the_basic_scheme_is_for_the_page_alone(page: FakePage, keys: Path) -> None:
    client = client_of(api_keys=keys)
    for path in ("/info", "/docs", "/uid", "/metrics"):
        refused = client.get(path, headers=basic("first"))
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
    off = TestClient(create_app({"fake": FakeEngine()}, Settings(api_keys=keys), Metrics()))
    assert off.get("/ui/", headers=basic("first")).headers["www-authenticate"] == "Bearer"


def test_a_keys_rate_counts_work_and_not_the_parts_of_a_page(page: FakePage, keys: Path) -> None:
    client = client_of(api_keys=keys)
    for _ in range(5):
        assert client.get("/ui/", headers=basic("rare")).status_code == 200
    assert client.post("/ui/gradio_api/queue/join", headers=basic("rare")).status_code == 200
    assert client.post("/ui/gradio_api/queue/join", headers=basic("rare")).status_code == 429


def test_a_password_may_hold_colons_and_be_long(tmp_path: Path, keys: Path) -> None:
    keys.write_text(keys.read_text().replace(hashlib.sha256(b"first").hexdigest(), hashlib.sha256(b"a:b").hexdigest()))
    headers = [(b"authorization", basic("a:b")["authorization"].encode())]
    assert KeyRing(keys).check(headers, browser=True).id == "first"


def test_an_open_tab_is_no_request_in_flight(page: FakePage) -> None:
    """A drain must not wait for it; at the end its stream is closed properly."""
    app = create_app({"fake": FakeEngine()}, Settings(ui=True), Metrics())
    service = app.state.service
    sent: list[Any] = []

    async def scenario() -> None:
        first = asyncio.Event()
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if message.get("body"):
                first.set()

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": "/ui/gradio_api/heartbeat/abc", "raw_path": b"/ui/gradio_api/heartbeat/abc", "query_string": b"",
            "root_path": "", "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        task = asyncio.create_task(app(scope, receive, send))
        async with asyncio.timeout(60):
            await first.wait()
            assert not service.requests
            assert len(service.pages) == 1
            service.abandon()
            await task
        assert not service.pages

    asyncio.run(scenario())
    assert sent[-1] == {"type": "http.response.body", "body": b""}
    registry = service.metrics.registry
    assert registry.get_sample_value("lenvm_requests_in_flight") == 0
    assert not [
        sample
        for metric in registry.collect()
        for sample in metric.samples
        if sample.labels.get("route") in ("/ui", "unmatched")
    ]
