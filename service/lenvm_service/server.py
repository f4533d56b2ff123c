"""``lenvm serve``: bind, load in the background, answer, and drain when told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import uvicorn

from lenvm.errors import ArtifactError, InvalidRequestError, LenVMError
from lenvm_service.garbage import let_garbage_be, settle_garbage
from lenvm_service.http_protocol import HttpProtocol
from lenvm_service.logs import configure_logging, fields
from lenvm_service.settings import Settings, model_spec

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lenvm_service.api.ports import EngineLike
    from lenvm_service.api.service import Service
    from lenvm_service.engine import Engine
    from lenvm_service.metrics import Metrics
    from lenvm_service.tracing import Tracing

__all__ = [
    "Drain",
    "EngineLoader",
    "Parts",
    "Server",
    "bind",
    "find_models",
    "http_config",
    "loading_problem",
    "make_parts",
    "serve",
    "share_interpreter",
]

logger = logging.getLogger(__name__)

EngineLoader: TypeAlias = "Callable[[str, Path, Settings, Metrics], EngineLike]"

_BACKLOG = 2048
_KEEP_ALIVE_S = 65  # longer than the minute that load balancers keep idle connections, so that they close first
_LINGER_S = 0.3  # after the last listener is closed: connections that were in use still get their answer
_PATIENCE_S = 5.0  # and so do those that were just accepted, however slow their clients are to send what they want
_SWITCH_S = 0.0005
_M_ARENA_MAX = -8  # of glibc's malloc.h
_ABANDON_S = 2  # for requests that were told to end, to do so


class Drain:
    """From the first signal to the end. ``grace_s``: how long at least ``draining`` is shown, so that load balancers
    see it; ``timeout_s``: how long requests in flight may take."""

    def __init__(self, grace_s: float, timeout_s: float) -> None:
        self.grace_s = grace_s
        self.timeout_s = max(timeout_s, grace_s)
        self.since: float | None = None
        self._at_once = False

    def signal(self, now: float) -> None:
        """A signal came; the second one means at once. ``now``: of time.monotonic."""
        if self.since is None:
            self.since = now
        else:
            self._at_once = True

    def finished(self, now: float, in_flight: int) -> bool:
        """The process may end: nothing is in flight any more and the grace is over, or it is overdue."""
        if self.since is None:
            return False
        return self.overdue(now) or (in_flight == 0 and now - self.since >= self.grace_s)

    def overdue(self, now: float) -> bool:
        """Requests still in flight must end now."""
        return self.since is not None and (self._at_once or now - self.since >= self.timeout_s)


class Server(uvicorn.Server):
    """uvicorn with our signals: the first one drains, the second one ends at once, and both exit with status 0."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self.service = service
        self.url = url
        self.drain = Drain(service.settings.drain_grace_s, service.settings.drain_timeout_s)
        self.failure: str | None = None
        self._loaded: set[str] = set()
        self._announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. Not recorded as uvicorn does, which would raise it again at the end and spoil the exit status."""
        self.drain.signal(time.monotonic())
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: has a model loaded or failed, has the drain come to its end?"""
        self._watch_loading()
        now = time.monotonic()
        if self.drain.finished(now, len(self.service.requests)):
            self.should_exit = True
        return await super().on_tick(counter)

    def _watch_loading(self) -> None:
        for name, engine in self.service.engines.items():
            if engine.ready:
                self._loaded.add(name)
            elif engine.state == "failed" and name not in self._loaded and self.failure is None:
                # Later failures are for the liveness probe to tell: who restarts us decides.
                self.failure = loading_problem(name, engine.failure)
                self.service.draining = self.should_exit = True
        if not self._announced and not self.service.draining and len(self._loaded) == len(self.service.engines):
            self._announced = True
            settle_garbage()
            with contextlib.suppress(OSError):  # nobody reads our stdout: that is no reason to stop
                print(f"lenvm is ready at {self.url} (models: {', '.join(self.service.engines)})", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners, answer what was accepted before that, and only then cut connections."""
        logger.info("shutting down", extra=fields(in_flight=len(self.service.requests)))
        await self._close_listeners(sockets or [])
        overdue = self.drain.overdue(time.monotonic())
        if not overdue and self.failure is None:
            end = time.monotonic() + _LINGER_S
            while time.monotonic() < end or (self._busy() and not self.drain.overdue(time.monotonic())):
                await asyncio.sleep(0.02)
        if self.service.requests:
            logger.warning("requests cut short", extra=fields(requests=len(self.service.requests)))
        self.service.abandon()
        await super().shutdown(sockets)

    def _busy(self) -> bool:
        connections = cast("set[HttpProtocol]", self.server_state.connections)
        return bool(self.service.requests) or any(each.owes_answer(_PATIENCE_S) for each in connections)

    async def _close_listeners(self, sockets: list[socket.socket]) -> None:
        """Take in what the kernel has accepted already, which closing would reset, and close at once after it."""
        taken: list[socket.socket] = []
        for listener in sockets:
            with contextlib.suppress(OSError):  # BlockingIOError: nothing waits any more
                while True:
                    taken.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for connection in taken:
            connection.setblocking(False)
            with contextlib.suppress(OSError):  # gone again
                await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def loading_problem(name: str, failure: Exception | None) -> str:
    """What a person is told of a model that failed to load."""
    if isinstance(failure, LenVMError):
        reason = str(failure)
    else:
        reason = "the log has the cause" if failure is None else f"{type(failure).__name__}: {failure}"
    return f"model {name} cannot be loaded: {reason}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises InvalidRequestError where that cannot be: port in use, no such address, not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InvalidRequestError(f"unknown host {host!r}: give an address of this machine", param="host") from None
    # With the protocol named: asyncio switches Nagle's algorithm off only where it sees TCP, and 40 ms hang on that.
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for old connections
        made.bind(address)
        made.listen(_BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} on {host} is in use: choose another with --port, or 0 for any free one"
        else:
            problem = f"cannot listen on {host} port {port} ({error.strerror}): choose another --host or --port"
        raise InvalidRequestError(problem, param="port") from None
    return made


def find_models(specs: list[str]) -> dict[str, Path]:
    """Name in requests -> checkpoint folder, the default model first. Nothing is loaded yet.

    Raises ArtifactError for a folder that is missing or is no checkpoint, and for two models of one name.
    """
    from lenvm.config import LenVMConfig, find_checkpoint

    found: dict[str, Path] = {}
    for text in specs:
        alias, source = model_spec(text)
        folder = find_checkpoint(source)
        name = alias or LenVMConfig.load(folder).name
        if name in found:
            raise ArtifactError(f"two models are called {name}: give one an alias, --model ALIAS={source}")
        found[name] = folder
    return found


def serve(settings: Settings, *, load: EngineLoader | None = None) -> int:
    """Serve until a signal; the exit status. ``load`` makes an engine that is not started (default: the real one).

    What keeps it from starting is one line on stderr and status 1.
    """
    from lenvm_service.cli._output import one_line, print_error

    configure_logging(settings.log_format, settings.log_level)
    share_interpreter()
    share_heap()
    # The port first: importing torch and looking at models takes seconds, and a taken port is known at once.
    try:
        with bind(settings.host, settings.port) as listener:
            failure = _serve(settings, listener, load)
    except LenVMError as error:
        failure = str(error)
    if failure is not None:
        print_error(one_line(failure))
        return 1
    return 0


class Parts(NamedTuple):
    """What a process serves with: engines by name, the default model first, not started yet; their checkpoints;
    metrics; and traces, if there are any."""

    engines: dict[str, EngineLike]
    folders: dict[str, Path]
    metrics: Metrics
    tracing: Tracing | None

    def close(self) -> None:
        """End the engines, but for one that is still loading: it cannot be told to stop, and its thread must not hold
        us up."""
        for engine in self.engines.values():
            if engine.state != "loading":
                engine.close()
        if self.tracing is not None:
            self.tracing.close()


def make_parts(settings: Settings, *, load: EngineLoader | None = None) -> Parts:
    """The parts that the settings name; ``load``: see ``serve``.

    Raises LenVMError for models that cannot be found and devices that are not there.
    """
    folders = find_models(settings.model)
    if load is None:
        from lenvm.export import backend_of
        from lenvm_service.cli._session import check_device

        if "torch" in [backend_of(folder, settings.backend) for folder in folders.values()]:
            check_device(settings.device)
    from lenvm_service.metrics import Metrics
    from lenvm_service.tracing import make_tracing

    tracing = make_tracing(settings)
    if load is None:
        from lenvm_service.engine import Engine

        load = partial(Engine.load, tracing=tracing)
        _quiet_transformers()
    metrics = Metrics()
    engines = {name: load(name, folder, settings, metrics) for name, folder in folders.items()}
    return Parts(engines, folders, metrics, tracing)


def share_interpreter() -> None:
    """The event loop shares the interpreter with the engines: by default it may wait 5 ms for its turn."""
    sys.setswitchinterval(_SWITCH_S)


def share_heap() -> None:
    """One heap of the C library for all threads, before there are any. By default glibc gives threads heaps of their
    own, and what is freed in one is of no use to the others: resident memory grows for hours, with nothing leaking. The
    engine's thread makes nearly all allocations, so that nobody waits for a lock. ``MALLOC_ARENA_MAX`` overrides it."""
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _serve(settings: Settings, listener: socket.socket, load: EngineLoader | None) -> str | None:
    parts = make_parts(settings, load=load)
    from lenvm_service.api import create_app

    url, thresholds = _url(settings.host, listener), gc.get_threshold()
    logger.info("listening; models load in the background", extra=fields(url=url, models=",".join(parts.engines)))
    try:
        for engine in parts.engines.values():
            engine.start()
        if settings.api_workers > 1:
            from lenvm_service.workers.host import WorkerHost

            real = cast("Mapping[str, Engine]", parts.engines)  # a fake one has no tokenizer that workers could read
            failure = WorkerHost(settings, listener, url, real, parts.folders, parts.metrics, parts.tracing).run()
        else:
            app = create_app(parts.engines, settings, parts.metrics, parts.tracing)
            server = Server(http_config(app, settings), app.state.service, url)
            server.run(sockets=[listener])
            failure = server.failure
    finally:
        let_garbage_be()  # libraries clean up behind themselves on the way out
        gc.set_threshold(*thresholds)
        parts.close()
    logger.info("stopped")
    return failure


def http_config(app: FastAPI, settings: Settings, *, backlog: int = _BACKLOG) -> uvicorn.Config:
    """How uvicorn serves the application. ``backlog``: connections that may wait, and that are taken at one go."""
    return uvicorn.Config(
        app,
        http=type("HttpProtocol", (HttpProtocol,), {"read_timeout_s": settings.read_timeout_s}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=backlog,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_ABANDON_S,
    )


def _quiet_transformers() -> None:
    """Its errors through our log; its warnings (a prompt longer than the context) we answer ourselves."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_default_handler()
    theirs.enable_propagation()


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
