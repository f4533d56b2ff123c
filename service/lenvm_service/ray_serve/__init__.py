"""The service on Ray Serve: the same application, one copy in each replica's process. See ``docs/ray.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lenvm._extras import require
from lenvm.errors import InvalidRequestError

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["build", "proxy_middlewares"]

_OF_SERVE = {"host": "http_options.host", "port": "http_options.port", "api_workers": "num_replicas"}


def build(args: Mapping[str, Any]) -> Application:
    """What ``import_path: lenvm_service.ray_serve:build`` of a Serve config names.

    ``args``: options of ``lenvm serve``, with underscores; ``model`` is a list, or one with commas. What is secret
    (``secret``, ``redis_url``) is better left to the variables of the nodes: Serve shows ``args`` on its dashboard.

    Raises InvalidRequestError for an option that is unknown or wrong, before any replica is started.
    """
    from lenvm_service.settings import Settings, load_settings

    options = dict(args)
    for name in options:
        if name in _OF_SERVE:
            raise InvalidRequestError(f"{name} is Serve's own here: set {_OF_SERVE[name]}", param=name)
        if name not in Settings.model_fields:
            raise InvalidRequestError(f"there is no option {name}: lenvm serve --help lists them", param=name)
    load_settings(**options)
    require("ray", "ray")
    from ray import serve

    from lenvm_service.ray_serve.replica import LenVM

    application: Application = serve.deployment(serve.ingress()(LenVM)).bind(options)
    return application


def proxy_middlewares() -> list[Any]:
    """What ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=lenvm_service.ray_serve:proxy_middlewares`` names: see
    ``LostReplicaMiddleware``."""
    from starlette.middleware import Middleware

    from lenvm_service.ray_serve.proxy import LostReplicaMiddleware

    return [Middleware(LostReplicaMiddleware)]
