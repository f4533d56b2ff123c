"""API keys: the file, its changes, and what a request must bring."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lenvm.errors import InvalidRequestError
from lenvm_service.api import create_app
from lenvm_service.cli import main
from lenvm_service.errors import OverloadedError, UnauthorizedError
from lenvm_service.keys import KeyRing, new_key
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.fake_engine import FakeEngine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def table(key: str, key_id: str = "one", tenant: str = "team", extra: str = "") -> str:
    sha = hashlib.sha256(key.encode()).hexdigest()
    return f'[[key]]\nid = "{key_id}"\ntenant = "{tenant}"\nsha256 = "{sha}"\n{extra}\n'


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(table("first") + table("second", "two", "others"))
    return path


def test_whose_key_it_is(path: Path) -> None:
    ring = KeyRing(path)
    assert ring.check(bearer("first")).tenant == "team"
    assert ring.check([(b"x-api-key", b"second")]).id == "two"
    for headers in ([], bearer(""), [(b"authorization", b"Basic first")], bearer("x" * 600)):
        with pytest.raises(UnauthorizedError, match="is wanted"):
            ring.check(headers)
    with pytest.raises(UnauthorizedError, match="not known") as caught:
        ring.check(bearer("first "[:4]))
    assert "firs" not in str(caught.value)


def test_a_key_is_added_and_withdrawn_without_a_restart(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    ring = KeyRing(path, clock=clock)
    path.write_text(table("third", "three"))
    os.utime(path, ns=(1, 1))
    assert ring.check(bearer("first"))  # not looked at yet
    clock.now += 1.5
    assert ring.check(bearer("third")).id == "three"
    with pytest.raises(UnauthorizedError):
        ring.check(bearer("first"))
    for broken in ("[[key", ""):
        path.write_text(broken)
        os.utime(path, ns=(len(broken) + 2,) * 2)
        clock.now += 1.5
        assert ring.check(bearer("third"))
    path.unlink()
    clock.now += 1.5
    assert ring.check(bearer("third"))
    assert caplog.text.count("stay as they were") == 3


def test_a_key_that_asks_too_often(path: Path) -> None:
    path.write_text(table("first", extra="requests_per_s = 2") + table("second", "two"))
    clock = Clock()
    ring = KeyRing(path, clock=clock)
    for _ in range(2):
        ring.check(bearer("first"))
    with pytest.raises(OverloadedError) as caught:
        ring.check(bearer("first"))
    assert caught.value.retry_after_s == pytest.approx(0.5)
    ring.check(bearer("second"))
    clock.now += 0.5
    ring.check(bearer("first"))
    with pytest.raises(OverloadedError):
        ring.check(bearer("first"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no"),
        ("key = 3", "holds no"),
        ("[[key", "no TOML"),
        ("[[key]]\nid = 'a'", "tenant must be"),
        (table("x") + table("y"), "there twice"),
        (table("x").replace('sha256 = "', 'sha256 = "F'), "sha256 must be"),
        (table("x", extra="requests_per_s = 0"), "requests_per_s must be"),
        (table("x", extra="requests_per_s = true"), "requests_per_s must be"),
        (table("x", extra="colour = 1"), "the fields are"),
        (table("x", tenant="a b"), "tenant must be"),
    ],
)
def test_a_file_that_is_wrong(path: Path, text: str, problem: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=problem):
        KeyRing(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot read"):
        KeyRing(tmp_path / "none")


def test_the_command_makes_what_the_file_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "team", "--id", "team-1", "--requests-per-s", "5"]) == 0
    shown = capsys.readouterr()
    path = tmp_path / "keys.toml"
    path.write_text(shown.out)
    key = shown.err.split()[-1]
    found = KeyRing(path).check(bearer(key))
    assert (found.id, found.tenant, found.requests_per_s) == ("team-1", "team", 5)
    assert key not in shown.out
    assert main(["key", "no good"]) == 1
    assert new_key("a", "b")[0] != new_key("a", "b")[0]


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("fake")


@pytest.fixture
def client(engine: FakeEngine, path: Path) -> TestClient:
    return TestClient(create_app({"fake": engine}, Settings(api_keys=path), Metrics()))


def test_every_route_but_liveness_wants_a_key(client: TestClient) -> None:
    assert client.get("/health/live").status_code == 200
    paths = list(client.get("/openapi.json", headers={"x-api-key": "first"}).json()["paths"])
    assert len(paths) > 8
    for route in [*paths, "/docs", "/openapi.json", "/nowhere"]:
        if route == "/health/live":
            continue
        for method in ("get", "post"):
            answer = client.request(method, route)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthorized"), route
            assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/info", headers={"authorization": "Bearer first"}).status_code == 200


def test_work_is_done_for_the_tenant_of_the_key(client: TestClient, engine: FakeEngine) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"session": "known-session", "append": [1]}]
    assert client.post("/predict_length", json={"inputs": rows}, headers={"x-api-key": "second"}).status_code == 200
    row = {"token_ids": [1], "candidates": [2]}
    assert client.post("/score", json=row, headers={"x-api-key": "first"}).status_code == 200
    assert [[job.prefix.tenant for job in jobs] for jobs, _, _ in engine.calls] == [["others"] * 2, ["team"]]  # type: ignore[union-attr]


def test_a_key_that_asks_too_often_hears_when_to_come_back(path: Path, engine: FakeEngine) -> None:
    path.write_text(table("first", extra="requests_per_s = 0.01"))
    client = TestClient(create_app({"fake": engine}, Settings(api_keys=path), Metrics()))
    headers = {"x-api-key": "first"}
    assert client.get("/info", headers=headers).status_code == 200
    answer = client.get("/info", headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) > 90


def test_room_is_asked_for_before_anything_is_tokenised(engine: FakeEngine) -> None:
    client = TestClient(create_app({"fake": engine}, Settings(), Metrics()))
    rows = [{"prompt": "x" * 400}, {"token_ids": [1] * 30}, {"messages": [{"role": "user", "content": "y" * 80}]}, 7]
    assert client.post("/predict_length", json={"inputs": rows}).status_code == 200
    assert engine.reserved == [101 + 30 + 21 + 1]
    assert engine.released == engine.reserved
    engine.tokenizer = None  # what is refused needs none
    engine.full = OverloadedError("full", retry_after_s=3.0)
    answer = client.post("/predict_length", json={"prompt": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    answer = client.post("/score", json={"token_ids": [1], "candidates": [2]})
    assert answer.status_code == 429
