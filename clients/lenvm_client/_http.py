"""What both clients share at the HTTP library: settings, requests, answers, and its errors as ours."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Generator, Mapping
from typing import Any, TypeAlias, TypeVar

import httpx2

from lenvm_client._wire import Call, Reply, RetryPolicy, Send, Wait, exchange
from lenvm_client.errors import (
    BadAnswerError,
    InvalidRequestError,
    LenVMClientError,
    ServiceTimeoutError,
    ServiceUnreachableError,
)

__all__ = ["Base", "Headers", "Timeout", "reply_of", "settings", "too_slow", "transport_error"]

T = TypeVar("T")
Timeout: TypeAlias = float | httpx2.Timeout | None
Headers: TypeAlias = Mapping[str, str]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")  # RFC 9110, 5.1
_FRAMING = frozenset(("content-length", "transfer-encoding"))  # where a request ends is for us to say
_NEVER_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.UnsupportedProtocol,
    httpx2.LocalProtocolError,
)


class Base:
    """Settings, and all that needs no input or output."""

    _http: Any

    def __init__(
        self, model: str | None, timeout: Timeout, total_timeout: float | None, max_retries: int, retry_timeouts: bool
    ) -> None:
        if max_retries < 0:
            raise InvalidRequestError(f"max_retries must be at least 0, got {max_retries}", param="max_retries")
        if total_timeout is not None and not _is_time(total_timeout):
            message = f"total_timeout must be seconds above 0, or None, got {total_timeout!r}"
            raise InvalidRequestError(message, param="total_timeout")
        self.model = model
        self.timeout = _checked(timeout)
        self.policy = RetryPolicy(max_retries=max_retries, retry_timeouts=retry_timeouts, total_s=total_timeout)
        self._urls: dict[str, httpx2.URL] = {}
        self._columns = True  # until a service turns out not to know them
        # Seams of the tests.
        self._clock = time.monotonic
        self._draw = random.random

    def _exchange(self, call: Call[T], policy: RetryPolicy | None = None) -> Generator[Send | Wait, Reply | None, T]:
        return exchange(call, policy or self.policy, clock=self._clock, draw=self._draw)

    def _url(self, path: str) -> httpx2.URL:
        # Put together once: the library reads a text anew for each request, twice.
        if path not in self._urls:
            self._urls[path] = self._http.build_request("GET", path).url
        return self._urls[path]

    def _request(
        self, call: Call[Any], send: Send, request_id: str | None, timeout: Timeout, given: Headers | None
    ) -> dict[str, Any]:
        """Arguments of the HTTP library."""
        headers = _checked_headers(given)
        if call.content is not None:
            headers["content-type"] = "application/json"
        if request_id is not None:
            headers["x-request-id"] = _header_value(request_id, "request_id")
        return {
            "method": call.method,
            "url": self._url(call.path),
            "content": call.content,
            "headers": headers,
            "timeout": httpx2.Timeout(**self._limits(send, timeout)),
        }

    def _limits(self, send: Send, timeout: Timeout) -> dict[str, float | None]:
        """Seconds of each phase of an attempt: none may outlast what is left of the total time."""
        phases: dict[str, float | None] = (self.timeout if timeout is None else _checked(timeout)).as_dict()
        if send.left_s is not None:
            left = max(send.left_s, 1e-3)
            phases = {name: left if value is None else min(value, left) for name, value in phases.items()}
        return phases


def settings(base_url: str, api_key: str | None, headers: Headers | None) -> dict[str, Any]:
    import lenvm_client

    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise InvalidRequestError(f"base_url is not a URL: {error}", param="base_url") from error
    if url.scheme not in ("http", "https") or not url.host:
        message = f"base_url must look like http://127.0.0.1:8000, not {base_url!r}"
        raise InvalidRequestError(message, param="base_url")
    sent = {"user-agent": f"lenvm-client/{lenvm_client.__version__}", "accept": "application/json"}
    if api_key is not None:
        sent["authorization"] = f"Bearer {_header_value(api_key, 'api_key')}"
    return {"base_url": url, "headers": sent | _checked_headers(headers)}


def _checked_headers(headers: Headers | None) -> dict[str, str]:
    checked = {
        _header_value(name, "the name of a header").lower(): _header_value(value, f"headers[{name!r}]")
        for name, value in (headers or {}).items()
    }
    for name in checked:
        if name in _FRAMING or not _TOKEN.fullmatch(name):
            raise InvalidRequestError(f"{name!r} cannot be set as a header of a request", param="headers")
    return checked


def _header_value(value: str, name: str) -> str:
    # Checked here, because the HTTP library would quote the key in its message.
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or value != value.strip():
        raise InvalidRequestError(f"{name} must be printable ASCII without spaces around it", param=name)
    return value


def _checked(timeout: Timeout) -> httpx2.Timeout:
    try:
        checked = httpx2.Timeout(timeout)
        phases = [value for value in checked.as_dict().values() if value is not None]
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"timeout must be seconds or an httpx2.Timeout: {error}", param="timeout") from error
    if not all(map(_is_time, phases)):
        raise InvalidRequestError(f"timeout must be seconds above 0, got {timeout!r}", param="timeout")
    return checked


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def reply_of(response: httpx2.Response, content: bytes) -> Reply:
    """The answer as the wire layer reads it."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, content)


def too_slow() -> ServiceTimeoutError:
    """The total time is over in the middle of an answer."""
    return ServiceTimeoutError("no whole answer within total_timeout: raise it, or send fewer inputs")


def transport_error(error: Exception) -> LenVMClientError:
    """What the HTTP library raised, as one of ours."""
    said = str(error) or type(error).__name__
    if isinstance(error, httpx2.TimeoutException):
        ours: LenVMClientError = ServiceTimeoutError(
            f"no answer in time ({type(error).__name__}): raise timeout, or send fewer inputs"
        )
    elif isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        ours = ServiceUnreachableError(f"cannot be sent: {said}", retryable=False)
    elif isinstance(error, httpx2.TransportError):
        ours = ServiceUnreachableError(f"the service cannot be reached ({said}): is it running?")
    else:
        ours = BadAnswerError(f"the answer cannot be read: {said}")
    ours.__cause__ = error
    ours.sent = not isinstance(error, _NEVER_SENT)
    return ours
