"""The application: routes, error handlers and middleware around the engines."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI
from starlette.routing import Route

from lenvm import __version__
from lenvm_service.api.errors import install_error_handlers
from lenvm_service.api.middleware import MODEL_ROUTES, RequestMiddleware
from lenvm_service.api.openapi import DESCRIPTION, install_openapi
from lenvm_service.api.ports import EngineLike, MetricsLike
from lenvm_service.api.routes import router
from lenvm_service.api.service import Service
from lenvm_service.settings import Settings
from lenvm_service.tracing import Tracing

__all__ = ["create_app"]


def create_app(
    engines: Mapping[str, EngineLike], settings: Settings, metrics: MetricsLike, tracing: Tracing | None = None
) -> FastAPI:
    """The service over these engines; the first is the default model. Starting and closing them is the caller's.

    ``app.state.service`` is the shared state; ``draining`` on it makes the process refuse new work.
    """
    app = FastAPI(
        title="LenVM service",
        version=__version__,
        description=DESCRIPTION,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours: ``lenvm_service.tracing``, /metrics
        redirect_slashes=False,  # a redirect would lose the body of a POST; a wrong path is a 404 that says so
    )
    app.include_router(router)
    app.state.service = service = Service(engines, settings, metrics, tracing)
    install_error_handlers(app)
    install_openapi(app)
    if settings.ui:
        from lenvm_service.ui import mount_playground

        mount_playground(app, service)
    paths = frozenset(
        path for route in [*app.routes, *router.routes] if (path := getattr(route, "path", None)) is not None
    )
    direct = {route.path: route for route in router.routes if isinstance(route, Route) and route.path in MODEL_ROUTES}
    app.add_middleware(RequestMiddleware, service=service, routes=paths, direct=direct)
    return app
