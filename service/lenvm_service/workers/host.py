"""The engines' process among API workers: starts and watches them, and answers what they ask."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lenvm_service.engine import Engine
from lenvm_service.garbage import settle_garbage
from lenvm_service.logs import fields
from lenvm_service.metrics import Metrics
from lenvm_service.server import loading_problem
from lenvm_service.settings import Settings
from lenvm_service.tracing import Tracing
from lenvm_service.workers.board import Board
from lenvm_service.workers.channel import Channel, error_fields, job_of, result_fields

__all__ = ["WorkerHost"]

logger = logging.getLogger(__name__)

_TICK_S = 0.05
_RESTART_S = 1.0  # between two starts of a worker that ends by itself
_OVERDUE_S = 10.0  # beyond the drain: a worker that has not ended by then is killed
# What a worker is told: never the secret, nor the password of Redis.
_TOLD = (
    "max_body_bytes", "max_batch_rows", "max_candidates", "max_queue_tokens", "max_queue_s", "default_deadline_ms",
    "drain_grace_s", "drain_timeout_s", "read_timeout_s", "log_format", "log_level", "api_keys", "otel_endpoint",
)  # fmt: skip


class _Worker:
    """One API worker and its channel."""

    def __init__(self, host: WorkerHost) -> None:
        self.host, self.serving, self.inflight = host, False, 0
        self.started = time.monotonic()
        self.channel = Channel(self._receive, self._lost)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        with theirs:
            passed = host.listener.fileno(), theirs.fileno(), host.board.fileno()
            command = [sys.executable, "-m", "lenvm_service.workers.remote", *map(str, passed)]
            # A session of its own: Ctrl-C goes to us, and we pass it on once.
            self.process = subprocess.Popen(command, pass_fds=passed, start_new_session=True, stdin=subprocess.DEVNULL)

    async def connect(self) -> None:
        """Tell it what it needs to start."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self.channel, sock=self._socket)
        self.channel.send(self.host.greeting)

    def _receive(self, message: dict[str, Any]) -> None:
        if "ask" in message:
            number = message["ask"]
            task = self._tasks[number] = asyncio.ensure_future(self._answer(number, message))
            task.add_done_callback(lambda _: self._tasks.pop(number, None))
        elif "cancel" in message:
            task_or_none = self._tasks.get(message["cancel"])
            if task_or_none is not None:
                task_or_none.cancel()
        elif "observed" in message:
            for observed in message["observed"]:
                self.host.metrics.observe_request(*observed)
            self.inflight = message["inflight"]
        elif "serving" in message:
            self.serving = True
            self.channel.send({"engines": self.host.told})

    async def _answer(self, number: int, question: dict[str, Any]) -> None:
        try:
            found = await self.host.answer(question)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            told = error_fields(error)
            if told["code"] == "internal":
                logger.error("a question of a worker failed", exc_info=error)
            found = {"error": told}
        self.channel.send({"answer": number, **found})

    def _lost(self) -> None:
        self.serving, self.inflight = False, 0
        for task in list(self._tasks.values()):
            task.cancel()


class WorkerHost:
    """Runs ``settings.api_workers`` workers on one listening socket until a signal, or until a model cannot be loaded.

    Args:
        folders: checkpoint of each model.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        url: str,
        engines: Mapping[str, Engine],
        folders: Mapping[str, Path],
        metrics: Metrics,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings, self.listener, self.url = settings, listener, url
        self.engines, self.metrics, self.tracing = dict(engines), metrics, tracing
        self.board = Board.create(len(self.engines))
        for at, engine in enumerate(self.engines.values()):
            engine.batcher.tell_backlog(partial(self.board.write, at))
            engine.answers_at_once = False  # workers hear of a device that hangs by this loop, which must not hang too
        self.told: list[dict[str, Any]] = self._tell()
        self.greeting: dict[str, Any] = {
            "settings": {name: getattr(settings, name) for name in _TOLD},
            "models": dict(folders),
            "url": url,
        }
        self.workers: list[_Worker] = []
        self.failure: str | None = None
        self._signals = 0
        self._signalled = 0.0
        self._loaded: set[str] = set()
        self._announced = False

    def run(self) -> str | None:
        """Serve; what kept it from that, else None."""
        with asyncio.Runner(loop_factory=_fast_loop) as runner:
            runner.run(self._run())
        return self.failure

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What a worker asked. Raises what the engine raises."""
        if "metrics" in question:
            self.metrics.inflight.set(sum(worker.inflight for worker in self.workers))
            return {"text": (await self.metrics.exposition()).decode()}
        engine = self.engines[question["engine"]]
        if "feedback" in question:
            engine.feedback(*question["feedback"])
            return {}
        jobs = [job_of(told) for told in question["jobs"]]
        carrier = question.get("trace", {})
        with contextlib.nullcontext() if self.tracing is None else self.tracing.attached(carrier):
            reply = await engine.submit(jobs, deadline=question["deadline"], priority=question["priority"])
        results = [result_fields(result) for result in reply.results]
        return {"results": results, "queue_ms": reply.queue_ms, "inference_ms": reply.inference_ms}

    # -- life ----------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)
        try:
            for _ in range(self.settings.api_workers):
                await self._start()
            while self.workers:
                await asyncio.sleep(_TICK_S)
                await self._tick()
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.process.wait()

    async def _start(self) -> None:
        worker = _Worker(self)
        self.workers.append(worker)
        await worker.connect()

    def _signal(self) -> None:
        self._signals += 1
        self._signalled = self._signalled or time.monotonic()
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)

    async def _tick(self) -> None:
        self._watch_engines()
        late = self.settings.drain_timeout_s + self.settings.drain_grace_s + _OVERDUE_S
        if self._signals and time.monotonic() - self._signalled > late:
            for worker in self.workers:
                worker.process.kill()
        for worker in list(self.workers):
            status = worker.process.poll()
            if status is None:
                continue
            self.workers.remove(worker)
            worker.channel.close()
            if not self._signals:
                logger.error("an API worker ended with status %d: another one starts", status)
                await asyncio.sleep(max(0.0, worker.started + _RESTART_S - time.monotonic()))
                if not self._signals:
                    await self._start()

    def _watch_engines(self) -> None:
        told = self._tell()
        if told != self.told:
            self.told = told
            for worker in self.workers:
                if worker.serving:  # the others are told as soon as they are
                    worker.channel.send({"engines": told})
        for name, engine in self.engines.items():
            if engine.ready:
                self._loaded.add(name)
            elif engine.state == "failed" and name not in self._loaded and self.failure is None:
                self.failure = loading_problem(name, engine.failure)
                self._signal()
                self._signal()
        serving = all(worker.serving for worker in self.workers)
        if not self._announced and not self._signals and serving and len(self._loaded) == len(self.engines):
            self._announced = True
            settle_garbage()
            logger.info("ready", extra=fields(url=self.url, api_workers=len(self.workers)))
            with contextlib.suppress(OSError):  # nobody reads our stdout: that is no reason to stop
                print(f"lenvm is ready at {self.url} (models: {', '.join(self.engines)})", flush=True)

    def _tell(self) -> list[dict[str, Any]]:
        """What workers know of the engines."""
        return [
            {
                "name": name,
                "state": engine.state,
                "alive": engine.alive,
                "model_sha": engine.model_sha if engine.loaded else "",
                "vocab_size": engine.vocab_size if engine.loaded else 0,
                "tokenizer": str(engine.tokenizer_dir) if engine.loaded else None,
                "described": engine.describe(),
            }
            for name, engine in self.engines.items()
        ]


def _fast_loop() -> asyncio.AbstractEventLoop:
    """An event loop of uvloop, or asyncio's own where that is not to be had (Windows)."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
