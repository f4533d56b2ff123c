"""An API worker: the application over engines that live in another process.

``python -m lenvm_service.workers.remote LISTENER CHANNEL BOARD``: file descriptors of the listening socket, of the
socket that leads to the engines' process, which tells the settings and the models first, and of the memory in which it
tells what waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lenvm.backbones import load_tokenizer
from lenvm.config import LenVMConfig
from lenvm_service.api import create_app
from lenvm_service.engine.jobs import Job, Reply, new_tokens
from lenvm_service.engine.queueing import BatcherOptions, Reservation
from lenvm_service.errors import NotReadyError
from lenvm_service.garbage import settle_garbage
from lenvm_service.logs import configure_logging
from lenvm_service.server import Server, http_config
from lenvm_service.settings import Settings
from lenvm_service.tracing import Tracing, make_tracing
from lenvm_service.workers.board import Board
from lenvm_service.workers.channel import Channel, RemoteError, job_fields, result_of

__all__ = ["Host", "RemoteEngine", "RemoteMetrics", "main"]


class Host:
    """The engines' process, as a worker sees it: questions with numbers, and what it tells by itself."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.channel = Channel(self._receive, self._lost)
        self.started: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.engines: dict[str, RemoteEngine] = {}
        self.gone = False
        self.tracing: Tracing | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def ask(self, **question: Any) -> dict[str, Any]:
        """The answer. A cancelled question is taken back.

        Raises RemoteError for what the host raised, NotReadyError where it has gone.
        """
        if self.gone:
            raise NotReadyError("the engines' process has gone: try again", retry_after_s=1.0)
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.channel.send({"ask": number, **question})
        try:
            found: dict[str, Any] = await waiting
        except asyncio.CancelledError:
            self.channel.send({"cancel": number})
            raise
        finally:
            self._waiting.pop(number, None)
        if "error" in found:
            raise RemoteError(found["error"])
        return found

    def _receive(self, message: dict[str, Any]) -> None:
        if "answer" in message:
            waiting = self._waiting.get(message["answer"])
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        elif "engines" in message:
            for told in message["engines"]:
                self.engines[told["name"]].told(told)
        elif not self.started.done():
            self.started.set_result(message)

    def _lost(self) -> None:
        self.gone = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(NotReadyError("the engines' process has gone: try again", retry_after_s=1.0))
        if not self.started.done():
            self.started.set_exception(ConnectionError("the engines' process has gone"))


class RemoteEngine:
    """Implements ``EngineLike`` by asking. Configuration and tokenizer are this process's own. ``at``: its place on the
    board; ``limits``: of its queue."""

    def __init__(self, name: str, folder: Path, host: Host, at: int, limits: BatcherOptions) -> None:
        self.name, self.config, self._host = name, LenVMConfig.load(folder), host
        self._at, self._limits = at, limits
        self.state, self.alive, self.failure = "loading", True, None
        self.model_sha, self.vocab_size = "", 0
        self.tokenizer: Any = None
        self._described: dict[str, Any] = {"name": name, "state": "loading"}

    def told(self, told: dict[str, Any]) -> None:
        """What the host says of it."""
        if self.tokenizer is None and told["tokenizer"] is not None:
            self.tokenizer = load_tokenizer(Path(told["tokenizer"]))
        self.state, self.alive = told["state"], told["alive"]
        self.model_sha, self.vocab_size = told["model_sha"], told["vocab_size"]
        self._described = told["described"]

    @property
    def ready(self) -> bool:
        """Takes work."""
        return self.state == "ready" and self.alive and not self._host.gone

    def start(self) -> None:
        """The host has done that."""

    def close(self) -> None:
        """The host does that."""

    def describe(self) -> dict[str, Any]:
        """The model's entry of ``/info``."""
        return self._described

    def reserve(self, tokens: int, *, deadline: float | None = None) -> Reservation:
        """See ``Engine.reserve``; but nothing is kept: the engine's process judges once more what is let in here.

        Under overload nearly everything is refused: that costs its process nothing, and the caller no way to it.
        """
        self._check_room(tokens, deadline)
        return Reservation(0, lambda tokens: None)

    def _check_room(self, tokens: int, deadline: float | None) -> None:
        self._host.board.read(self._at).check(tokens, deadline, self._limits)

    async def submit(
        self,
        jobs: Sequence[Job],
        *,
        deadline: float | None = None,
        priority: int = 0,
        reservation: Reservation | None = None,
    ) -> Reply:
        """See ``Engine.submit``; both processes read the same monotonic clock."""
        # Once more, now that the tokens are counted: what the host would refuse need not go there.
        if (tokens := sum(map(new_tokens, jobs))) <= self._limits.max_queue_tokens:
            self._check_room(tokens, deadline)
        told = [job_fields(job) for job in jobs]
        trace = {} if self._host.tracing is None else {"trace": self._host.tracing.carrier()}
        found = await self._host.ask(engine=self.name, jobs=told, deadline=deadline, priority=priority, **trace)
        return Reply([result_of(one) for one in found["results"]], found["queue_ms"], found["inference_ms"])

    async def feedback(
        self,
        prediction_id: str | None,
        token_ids: Sequence[int] | None,
        generated_tokens: int,
        finish_reason: str,
        tenant: str = "",
    ) -> None:
        """See ``Engine.feedback``."""
        item = [prediction_id, token_ids, generated_tokens, finish_reason, tenant]
        await self._host.ask(engine=self.name, feedback=item)


class _Inflight:
    """Counts; the host is told."""

    def __init__(self) -> None:
        self.count = 0

    def inc(self) -> None:
        """One more."""
        self.count += 1

    def dec(self) -> None:
        """One less."""
        self.count -= 1


class RemoteMetrics:
    """Implements ``MetricsLike``: the one registry is the host's, which is told of requests ten times a second."""

    def __init__(self, host: Host) -> None:
        self.inflight = _Inflight()
        self._host, self._told = host, 0
        self._observed: list[tuple[str, int, str, float]] = []

    def observe_request(self, route: str, status: int, error_type: str, seconds: float) -> None:
        """One answered request."""
        self._observed.append((route, status, error_type, seconds))

    async def exposition(self) -> bytes:
        """The metrics of all workers and engines in Prometheus' text format."""
        self.tell()
        text: str = (await self._host.ask(metrics=True))["text"]
        return text.encode()

    def tell(self) -> None:
        """Tell the host what has happened since."""
        if self._observed or self.inflight.count != self._told:
            self._host.channel.send({"observed": self._observed, "inflight": self.inflight.count})
            self._observed, self._told = [], self.inflight.count


class _Shared(socket.socket):
    """The listener of all workers. The host has made it listen; asking for less here would shorten the queue of all."""

    def listen(self, backlog: int = 0, /) -> None:
        """Done already."""


class WorkerServer(Server):
    """The server of a worker: models are the host's to watch, and the process ends with the host's."""

    def __init__(self, *arguments: Any, host: Host, metrics: RemoteMetrics) -> None:
        super().__init__(*arguments)
        self._host, self._metrics, self._settled = host, metrics, False

    def _watch_loading(self) -> None:
        self._metrics.tell()
        if self._host.gone:
            self.service.draining = self.should_exit = True
        if not self._settled and all(engine.ready for engine in self._host.engines.values()):
            self._settled = True
            settle_garbage()


async def _serve(listener: socket.socket, link: socket.socket, board: Board) -> None:
    host = Host(board)
    await asyncio.get_running_loop().create_unix_connection(lambda: host.channel, sock=link)
    told = await host.started
    settings = Settings.model_construct(**{**told["settings"], "api_keys": _path(told["settings"]["api_keys"])})
    configure_logging(settings.log_format, settings.log_level)
    limits = BatcherOptions(max_queue_tokens=settings.max_queue_tokens, max_queue_s=settings.max_queue_s)
    host.engines = {
        name: RemoteEngine(name, Path(folder), host, at, limits)
        for at, (name, folder) in enumerate(told["models"].items())
    }
    metrics = RemoteMetrics(host)
    host.tracing = make_tracing(settings)
    app = create_app(host.engines, settings, metrics, host.tracing)
    # One connection at a time: asyncio would take all that wait, and leave none to workers that have nothing to do.
    config = http_config(app, settings, backlog=1)
    server = WorkerServer(config, app.state.service, told["url"], host=host, metrics=metrics)
    host.channel.send({"serving": True})
    await server.serve(sockets=[listener])
    metrics.tell()
    host.channel.close()
    if host.tracing is not None:
        host.tracing.close()


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def main() -> None:
    """Serve until a signal, or until the engines' process has gone."""
    listener, link = _Shared(fileno=int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    board = Board(int(sys.argv[3]))
    for each in (listener, link):
        each.setblocking(False)
    with contextlib.suppress(ConnectionError):
        asyncio.run(_serve(listener, link, board))
    gc.unfreeze()  # libraries clean up behind themselves on the way out


if __name__ == "__main__":
    main()
