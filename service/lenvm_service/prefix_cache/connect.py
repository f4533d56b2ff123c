"""From a URL to a Redis client: one server, Sentinel, or Cluster."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from lenvm.errors import InvalidRequestError

__all__ = ["check_url", "connect"]

_PLAIN = ("redis", "rediss", "unix")
_FORMS = (
    "redis://[USER:PASSWORD@]HOST:PORT/DB, rediss://..., unix://PATH, "
    "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE[/DB] or redis+cluster://HOST:PORT,HOST:PORT"
)


def check_url(url: str) -> None:
    """Raise InvalidRequestError for a URL that is none; its text is not quoted, since it may hold a password."""
    try:
        parts = urlsplit(url)
        scheme = parts.scheme
        if scheme in _PLAIN:
            ok = bool(parts.path if scheme == "unix" else parts.hostname) and (scheme == "unix" or parts.port != 0)
        elif scheme == "redis+sentinel":
            ok = bool(_hosts(parts.netloc)) and bool(parts.path.strip("/"))
        else:
            ok = scheme == "redis+cluster" and bool(_hosts(parts.netloc))
    except ValueError:  # a port that is none
        ok = False
    if not ok:
        raise InvalidRequestError(f"this is no URL of a Redis: give {_FORMS}", param="redis_url")


def connect(url: str, *, timeout_s: float, connections: int) -> Any:
    """A client that never retries by itself and gives up on a silent server after ``timeout_s``.

    Opens no connection, but for a cluster, whose nodes it asks at once (and raises what redis-py raises).
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    parts = urlsplit(url)
    if parts.scheme in _PLAIN:
        return redis.Redis.from_url(url, max_connections=connections, **options)
    user, password = _credentials(parts.netloc)
    login = {"username": user, "password": password}
    hosts = _hosts(parts.netloc)
    if parts.scheme == "redis+cluster":
        from redis import cluster

        make: Any = cluster  # its classes are only typed in part
        nodes = [make.ClusterNode(host, port) for host, port in hosts]
        return make.RedisCluster(startup_nodes=nodes, max_connections=connections, **login, **options)
    from redis import sentinel as of_redis

    make = of_redis

    service, _, db = parts.path.strip("/").partition("/")
    asking = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    sentinel = make.Sentinel(hosts, sentinel_kwargs=asking)
    return sentinel.master_for(service, db=int(db or 0), max_connections=connections, **login, **options)


def _credentials(netloc: str) -> tuple[str | None, str | None]:
    login = netloc.rpartition("@")[0]
    user, _, password = login.partition(":")
    return unquote(user) or None, unquote(password) or None


def _hosts(netloc: str) -> list[tuple[str, int]]:
    """``host:port`` pairs of a list with commas. Raises ValueError for a port that is none."""
    found = []
    for part in netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{part}")
        if one.hostname:
            found.append((one.hostname, one.port or 6379))
    return found
