"""What a running service owes its callers when things break: a stop under load or halfway, a raising engine."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lenvm.backbones import load_backbone, load_tokenizer
from lenvm_client import (
    CandidateInput,
    CandidateScores,
    Client,
    DrainingError,
    InternalServerError,
    LenVMClientError,
    RowError,
    ServiceUnreachableError,
)
from lenvm_client.drivers.hf import generate
from tests.integration.conftest import ServiceProcess, free_port, start_service


def test_sigterm_under_load_fails_no_request_in_flight(own_service: ServiceProcess) -> None:
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def ask(worker: int) -> None:
        with Client(own_service.url, timeout=60, max_retries=0) as client:
            for at in range(10_000):
                if stop.is_set():
                    return
                try:
                    client.predict_length(f"Worker {worker} asks question {at}: why?")
                    outcomes["answered"] += 1
                except DrainingError:
                    outcomes["draining"] += 1
                    return
                except ServiceUnreachableError as error:
                    # Refused is a new request after the end; anything else was in flight.
                    outcomes["gone" if "refused" in str(error).lower() else f"broken: {error}"] += 1
                    return

    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(ask, worker) for worker in range(8)]
        try:
            _until(lambda: outcomes["answered"] >= 16)
            status = own_service.stop()
        finally:
            stop.set()  # or the pool would wait for ever
        for task in tasks:
            task.result(30)
    assert status == 0, own_service.log.read_text()
    assert set(outcomes) <= {"answered", "draining", "gone"}, outcomes
    assert outcomes["draining"] > 0
    assert "Traceback" not in own_service.log.read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see how far the start has come")
def test_sigterm_while_torch_is_imported_is_no_failure(real_backbone_dir: Path, tmp_path: Path) -> None:
    starting = start_service(tmp_path, wait=False)
    maps = Path(f"/proc/{starting.process.pid}/maps")
    _until(lambda: "libtorch" in maps.read_text())
    assert starting.stop() == 0


class StoppingScorer:
    """A client whose service is stopped after some calls."""

    def __init__(self, service: ServiceProcess, client: Client, calls: int) -> None:
        self.service, self.client, self.left = service, client, calls

    def score_candidates(self, rows: Any) -> list[CandidateScores | RowError]:
        if self.left == 0:
            assert self.service.stop() == 0
        self.left -= 1
        return self.client.score_candidates(rows)


@pytest.fixture(scope="module")
def backbone(real_backbone_dir: Path) -> tuple[Any, Any]:
    return load_backbone(real_backbone_dir), load_tokenizer(real_backbone_dir)


@pytest.mark.parametrize("on_error", ["passthrough", "raise"])
def test_a_service_that_stops_in_the_middle_of_a_guided_generation(
    own_service: ServiceProcess, backbone: tuple[Any, Any], on_error: Any
) -> None:
    model, tokenizer = backbone
    inputs = tokenizer("The three longest rivers of Europe are", return_tensors="pt")
    with Client(own_service.url, timeout=30, max_retries=0) as client:

        def run() -> Any:
            return generate(
                model,
                StoppingScorer(own_service, client, 6),
                inputs,
                objectives=[{"kind": "at_least", "target": 60}],
                max_new_tokens=20,
                seeds=[1],
                on_error=on_error,
            )

        if on_error == "raise":
            with pytest.raises(LenVMClientError):
                run()
            return
        sequences, report = run()
    assert sequences.shape[1] == inputs["input_ids"].shape[1] + 20
    assert (report.guided_steps, report.fallbacks) == (6, 14)
    assert report.errors


@pytest.fixture
def in_process(tiny_backbone: Path, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A real server on a real port in this process, so that its engine can be made to fail."""
    import torch
    import uvicorn

    from lenvm.config import GeneratorRef, HeadConfig
    from lenvm.distribution import LengthBins
    from lenvm.modeling import LengthValueModel
    from lenvm_service.api import create_app
    from lenvm_service.engine import Engine
    from lenvm_service.metrics import Metrics
    from lenvm_service.settings import load_settings

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LengthValueModel.create(
            tiny_backbone,
            name="tiny",
            head=HeadConfig(16, LengthBins(cap=64)),
            gamma=0.99,
            generator=GeneratorRef("tiny", 0.7, 1.0, 64),
        ).save_pretrained(tmp_path / "tiny")
    settings, metrics = load_settings(), Metrics()
    engine = Engine.load("tiny", tmp_path / "tiny", settings, metrics)
    engine.start()
    port = free_port()
    app = create_app({"tiny": engine}, settings, metrics)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    with Client(url, timeout=5, max_retries=0) as client:
        _until(lambda: _ready(client))
    yield url, engine
    server.should_exit = True
    thread.join(20)
    engine.close()


def _ready(client: Client) -> bool:
    try:
        return client.ready()
    except LenVMClientError:
        return False


def _until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_a_raising_engine_answers_everyone_and_comes_back(
    in_process: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Callers get ``internal`` at once, readiness turns false and true again, the next request is served."""
    url, engine = in_process
    score, entered, gate, recovered = engine.core.scorer.score, threading.Event(), threading.Event(), threading.Event()
    broken = [True]

    def raising(*given: Any) -> Any:
        if broken:
            entered.set()
            assert gate.wait(30)
            broken.clear()
            raise RuntimeError("CUDA error: an illegal memory access")
        assert recovered.wait(30)  # the check: it lasts until the test has looked at readiness
        return score(*given)

    monkeypatch.setattr(engine.core.scorer, "score", raising)
    errors: list[tuple[str, float]] = []

    def ask(at: int) -> None:
        with Client(url, timeout=30, max_retries=0) as client:
            try:
                client.predict_length({"token_ids": [5 + at, 6, 7]})
            except InternalServerError as error:
                errors.append((str(error), time.monotonic()))

    with ThreadPoolExecutor(8) as pool, Client(url, timeout=30, max_retries=0) as client:
        first = pool.submit(ask, 0)
        assert entered.wait(30)
        raised = time.monotonic()
        gate.set()
        first.result(30)
        assert len(errors) == 1
        assert errors[0][1] - raised < 10.0  # at once, on however busy a machine: nothing but the failure is waited for
        assert "CUDA" not in errors[0][0]
        assert not client.ready()
        assert client.live()
        waiting = [pool.submit(ask, at) for at in range(1, 5)]  # they wait for the engine, and lose nothing
        recovered.set()
        _until(lambda: client.ready())
        for task in waiting:
            task.result(30)
        assert len(errors) == 1
        assert client.predict_length({"token_ids": [5, 6, 7]}).prediction.value < 0


def test_a_caller_that_goes_away_takes_nothing_along(in_process: tuple[str, Any]) -> None:
    url, _ = in_process
    rows = [CandidateInput(token_ids=[5, 6, at], candidates=[7, 8]) for at in range(9, 73)]
    with Client(url, timeout=0.001, max_retries=0) as hasty, pytest.raises(LenVMClientError):
        hasty.score_candidates(rows)
    with Client(url, timeout=30) as client:
        assert all(isinstance(row, CandidateScores) for row in client.score_candidates(rows))


def test_a_storm_of_callers_that_go_leaves_nothing_behind(in_process: tuple[str, Any]) -> None:
    """Two hundred requests whose callers hang up, some before they have sent all of it, and some that stay."""
    url, engine = in_process
    host, port = url.removeprefix("http://").split(":")
    body = b'{"inputs": [' + b", ".join(b'{"token_ids": [%d, 6, 7]}' % (3 + at) for at in range(40)) + b"]}"
    head = b"POST /predict_length HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)

    def leave(at: int) -> None:
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            raw.sendall((head + body)[: None if at % 3 else len(head) + at])

    with ThreadPoolExecutor(16) as pool, Client(url, timeout=60) as client:
        storm = [pool.submit(leave, at) for at in range(200)]
        for at in range(20):
            assert client.predict_length({"token_ids": [9, at + 3]}).prediction.value < 0
        for one in storm:
            one.result(60)
    _until(lambda: _metric(url, "lenvm_requests_in_flight") == 1)  # the one that asks
    _until(lambda: _metric(url, "lenvm_queue_tokens") == 0)
    assert engine.batcher._reserved_tokens == 0
    assert engine.ready


def test_a_burst_is_answered_or_told_when_to_come_back(
    in_process: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, engine = in_process
    gate, score = threading.Event(), engine.core.scorer.score
    monkeypatch.setattr(engine.core.scorer, "score", lambda *given: (gate.wait(60), score(*given))[1])
    monkeypatch.setattr(engine.batcher, "options", dataclasses.replace(engine.batcher.options, max_queue_tokens=400))

    def ask(at: int) -> tuple[int, str | None]:
        answer = httpx2.post(f"{url}/predict_length", json={"token_ids": [3 + at % 100] * 20}, timeout=60)
        return answer.status_code, answer.headers.get("retry-after")

    with ThreadPoolExecutor(100) as pool:
        burst = [pool.submit(ask, at) for at in range(100)]
        _until(lambda: sum(one.done() for one in burst) >= 50)  # refusals come while the engine is busy
        gate.set()
        found = [one.result(60) for one in burst]
    outcomes = Counter(status for status, _ in found)
    assert set(outcomes) == {200, 429}, outcomes
    assert outcomes[200] >= 20
    assert all(int(after or 0) >= 1 for status, after in found if status == 429)
    assert engine.batcher._reserved_tokens == engine.batcher._queued_tokens == 0


def _metric(url: str, name: str) -> float:
    text = httpx2.get(f"{url}/metrics", timeout=30).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.partition("{")[0].split(" ")[0] == name)
