"""One replica: the engines start, and end, with its process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from lenvm_service.ray_serve.metrics import MetricsBridge
from lenvm_service.settings import load_settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lenvm_service.api.service import Service

__all__ = ["LenVM", "drained"]

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_ABANDON_S = 2.0  # for requests that were told to end, to do so


class LenVM:
    """The deployment. A replica is only sent requests once its models are loaded; ``options``: see ``build``."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._settings = load_settings(**options)
        self._service: Service | None = None

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Load the models, and give Serve the application. Raises why a model cannot be loaded: Serve shows that as
        the status of the deployment, and tries again."""
        from lenvm_service.api import create_app
        from lenvm_service.garbage import settle_garbage
        from lenvm_service.logs import configure_logging
        from lenvm_service.server import make_parts, share_interpreter

        configure_logging(self._settings.log_format, self._settings.log_level)
        share_interpreter()
        parts = make_parts(self._settings)
        engines = parts.engines
        for engine in engines.values():
            engine.start()
        try:
            while not all(engine.ready for engine in engines.values()):
                for name, engine in engines.items():
                    if engine.state == "failed":
                        raise RuntimeError(f"model {name} cannot be loaded: {engine.failure}") from engine.failure
                await asyncio.sleep(_POLL_S)
        except BaseException:
            parts.close()
            raise
        settle_garbage()
        app = create_app(engines, self._settings, parts.metrics, parts.tracing)
        service: Service = app.state.service
        bridge = MetricsBridge(parts.metrics.registry)
        bridge.start()

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await drained(service, self._settings.drain_timeout_s)
            bridge.close()
            await asyncio.to_thread(parts.close)  # what waits for Redis is written, for some seconds

        app.router.lifespan_context = lifespan
        self._service = service
        return app

    async def check_health(self) -> None:
        """Asked by Serve every ``health_check_period_s``; a replica that raises three times is replaced."""
        for name, engine in self._service.engines.items() if self._service else ():
            if not engine.alive:
                raise RuntimeError(f"the engine of model {name} does not respond")


async def drained(service: Service, timeout_s: float) -> None:
    """The drain of ``lenvm serve``, without its signals: new work is refused, work in flight is answered, and what
    takes longer than ``timeout_s`` is told to come again. Serve has stopped to send requests before that."""
    service.draining = True
    end = time.monotonic() + timeout_s
    while service.requests and time.monotonic() < end:
        await asyncio.sleep(_POLL_S)
    if service.requests:
        logger.warning("%d requests are cut short", len(service.requests))
        service.abandon()
        end = time.monotonic() + _ABANDON_S
        while service.requests and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
