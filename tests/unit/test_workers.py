"""API workers: what passes between the processes, and the real server with two of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lenvm.errors import ContextTooLongError, InvalidRequestError, LenVMError
from lenvm.guidance import Objective
from lenvm_service.api.errors import RequestError, error_object
from lenvm_service.engine.jobs import CandidateJob, Job, PredictJob, Prefix, StepJob, TokenScoreJob
from lenvm_service.engine.queueing import Backlog, BatcherOptions
from lenvm_service.errors import InternalError, OverloadedError, PrefixUnknownError
from lenvm_service.workers.board import Board
from lenvm_service.workers.channel import Channel, error_fields, job_fields, job_of, result_fields, result_of
from lenvm_service.workers.remote import Host, RemoteEngine

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join(str(ROOT / part) for part in ("models", "service", "clients"))
TILT = Objective(kind="tilt", lambda_=0.01)
JOBS: list[Job] = [
    PredictJob(Prefix([1, 2, 3], tenant="a"), quantiles=[0.5], max_tokens=7, generated=2),
    PredictJob(Prefix([], session="s-1"), quantiles=[0.5, 0.9]),
    TokenScoreJob([1, 2], [3, 4], eos=True),
    CandidateJob(
        Prefix([5], session="s-2"),
        [1, 2],
        generated=3,
        objective=Objective(kind="tilt", lambda_=0.01, strength=0.5),
        logprobs=[-0.1, float("-inf")],
        eos_ids=[2],
    ),
    StepJob(
        ["s-1", "s-2", "s-3"],
        [[7], [], [8]],
        [[1, 2], [3], [4, 5]],
        [1, 0, 2],
        [TILT, None, TILT],
        logprobs=[[-0.1, -0.2], [-0.3], [-0.4, -0.5]],
        eos_ids=[2],
        tenant="a",
    ),
]


@pytest.mark.parametrize("job", JOBS)
def test_jobs_cross_the_socket(job: Job) -> None:
    assert _crossed(job_fields(job), job_of) == job


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after_s=2.5),
        ContextTooLongError("too long", param="token_ids"),
        PrefixUnknownError("not held", param="session"),
        RequestError("wrong", reason="finer", param="x"),
        InvalidRequestError("objective", param="target"),
        InternalError("it broke"),
    ],
)
def test_errors_look_the_same_on_the_other_side(error: LenVMError) -> None:
    arrived = _crossed(result_fields(error), result_of)
    assert error_object(arrived, request_id="r", at="inputs[1]") == error_object(error, request_id="r", at="inputs[1]")


def test_the_errors_of_a_step_s_rows_cross_with_its_columns() -> None:
    error = PrefixUnknownError("not held", param="session")
    result = {"columns": {"value": [-0.5, None]}, "errors": {1: error}}
    arrived = _crossed(result_fields(result), result_of)
    assert arrived["columns"] == result["columns"]
    assert list(arrived["errors"]) == [1]
    told = [error_object(one, request_id="r", at="columns[1]") for one in (arrived["errors"][1], error)]
    assert told[0] == told[1]


def test_nothing_of_a_foreign_error_is_told() -> None:
    assert "secret" not in json.dumps(error_fields(ValueError("secret")))


def _crossed(told: dict[str, Any], read: Any) -> Any:
    """What a channel's other end reads."""

    async def run() -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        came: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        lost = asyncio.Event()
        sender = Channel(lambda message: None, lambda: None)
        receiver = Channel(came.put_nowait, lost.set)
        for end, made in ((ours, sender), (theirs, receiver)):
            end.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda made=made: made, sock=end)  # type: ignore[misc]
        for filler in range(3):  # frames that arrive together
            sender.send({"filler": "x" * 100_000 * filler})
        sender.send(told)
        for _ in range(3):
            await came.get()
        found = await came.get()
        sender.close()
        await lost.wait()
        receiver.close()
        return found

    return read(asyncio.run(run()))


# -- what waits, told without a word -----------------------------------------------------------------------------------


def test_a_board_is_read_in_another_process() -> None:
    board = Board.create(2)
    told = Backlog(waiting=120.0, in_hand=30.0, tokens_per_s=500.5, batch_s=0.25)
    board.write(1, told)
    assert board.read(0) == Backlog()
    assert board.read(1) == told
    code = "import sys; from lenvm_service.workers.board import Board; print(Board(int(sys.argv[1])).read(1))"
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", code, str(board.fileno())]
    read = subprocess.run(command, pass_fds=[board.fileno()], env=environment, capture_output=True, text=True)
    assert read.stdout.strip() == str(told), read.stderr


def test_a_worker_refuses_by_itself(tiny_checkpoint: Path) -> None:
    async def run() -> None:
        host = Host(Board.create(1))  # its channel leads nowhere: whoever asks waits for ever
        engine = RemoteEngine("m", tiny_checkpoint, host, 0, BatcherOptions(max_queue_s=10, max_queue_tokens=5000))
        now = time.monotonic()
        engine.reserve(10_000, deadline=now + 0.001)  # nothing waits
        host.board.write(0, Backlog(waiting=1000, in_hand=100, tokens_per_s=200.0, batch_s=0.5))
        engine.reserve(10, deadline=now + 60)
        engine.reserve(10)
        with pytest.raises(OverloadedError, match="too many for the deadline") as caught:
            engine.reserve(10, deadline=now + 5.5)
        assert caught.value.retry_after_s == pytest.approx(2.5)
        with pytest.raises(OverloadedError):
            engine.reserve(4001)
        host.board.write(0, Backlog(waiting=2500, in_hand=100, tokens_per_s=200.0, batch_s=0.5))
        with pytest.raises(OverloadedError):  # 13 s
            engine.reserve(10)
        # What was estimated too low is counted before it goes anywhere.
        host.board.write(0, Backlog(waiting=1000, in_hand=100, tokens_per_s=200.0, batch_s=0.5))
        engine.reserve(10, deadline=now + 7)
        with pytest.raises(OverloadedError):
            async with asyncio.timeout(30):
                await engine.submit([PredictJob(Prefix([1] * 300))], deadline=now + 7)

    asyncio.run(run())


# -- the real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``lenvm serve`` with the tiny model and two workers."""
    environment = {
        **os.environ,
        "PYTHONPATH": PYTHONPATH,
    }
    command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", "0", "--model", str(tiny_checkpoint)]
    log = (tmp_path_factory.mktemp("workers") / "log").open("w")
    process = subprocess.Popen(
        [*command, "--api-workers", "2"], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("lenvm is ready at "), line
        yield process, line.split()[4]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        log.close()


def test_all_routes_and_one_set_of_metrics(served: tuple[subprocess.Popen[str], str]) -> None:
    _, url = served

    def predict(at: int) -> int:
        return httpx2.post(f"{url}/predict_length", json={"token_ids": [1, 2, 3 + at]}, timeout=60).status_code

    with ThreadPoolExecutor(8) as pool:  # a connection each: both workers get some
        assert set(pool.map(predict, range(40))) == {200}
    first = httpx2.post(f"{url}/predict_length", json={"token_ids": [4, 5, 6]}, timeout=60).json()["predictions"][0]
    row = {"session": first["session"], "append": [7], "candidates": [1, 2], "generated": 1}
    for _ in range(4):  # a session of one worker is every worker's
        scored = httpx2.post(f"{url}/score", json={"inputs": [row]}, timeout=60).json()["scores"][0]
        assert len(scored["values"]) == 2
    bad = httpx2.post(
        f"{url}/predict_length", json={"inputs": [{"session": "no"}, {"prompt": "hi"}]}, timeout=60
    ).json()
    assert bad["predictions"][0]["error"]["type"] == "prefix_unknown"
    assert bad["predictions"][1]["horizon"] > 0
    item = {"prediction_id": first["prediction_id"], "generated_tokens": 5, "finish_reason": "stop"}
    assert httpx2.post(f"{url}/feedback", json={"items": [item]}, timeout=60).json()["accepted"] == 1
    item["prediction_id"] = "unknown"
    told = httpx2.post(f"{url}/feedback", json={"items": [item]}, timeout=60).json()
    assert told["results"][0]["error"]["type"] == "prefix_unknown"
    assert httpx2.get(f"{url}/info", timeout=60).json()["models"][0]["state"] == "ready"
    wanted = 'lenvm_requests_total{error_type="none",route="/predict_length",status="200"} 42.0'
    end = time.monotonic() + 60  # workers tell of their requests ten times a second
    while wanted not in httpx2.get(f"{url}/metrics", timeout=60).text:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_worker_that_dies_is_replaced_and_sigterm_ends_all(served: tuple[subprocess.Popen[str], str]) -> None:
    process, url = served
    before = _workers(process.pid)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    end = time.monotonic() + 60
    while len(found := _workers(process.pid)) < 2 or before[0] in found:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert httpx2.get(f"{url}/health/ready", timeout=60).status_code in (200, 503)  # 503: the new one
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


def _workers(parent: int) -> list[int]:
    """Children that are alive."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, listed) if Path(f"/proc/{pid}/cmdline").read_bytes()]
