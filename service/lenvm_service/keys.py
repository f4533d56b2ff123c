"""API keys: who calls, for which tenant, how often. Only hashes are kept.

A file of TOML, one table a key, as ``lenvm key`` prints it::

    [[key]]
    id = "search-team-1"            # shown in the log; a key can be withdrawn by it
    tenant = "search-team"          # whose prefixes, sessions and quotas
    sha256 = "..."                  # of the key; the key itself is shown once, when it is made
    requests_per_s = 50             # optional

The file is read again when it changes: a key is added or withdrawn without a restart.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.errors import InvalidRequestError
from lenvm_service.errors import OverloadedError, UnauthorizedError

__all__ = ["ApiKey", "KeyRing", "new_key"]

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA = re.compile(r"[0-9a-f]{64}")
_LONGEST_KEY = 512
_BASIC = 'Basic realm="LenVM playground: the API key is the password", charset="UTF-8"'
_FIELDS = frozenset({"id", "tenant", "sha256", "requests_per_s"})


@dataclass(frozen=True)
class ApiKey:
    """One line of the file. ``requests_per_s``: None for no limit."""

    id: str
    tenant: str
    sha256: str
    requests_per_s: float | None = None


@dataclass
class _Bucket:
    """A second's worth of requests, at least one, that fills up again with time."""

    rate: float
    tokens: float
    at: float

    def take(self, now: float) -> float:
        """Seconds to wait for the next request; 0 where it may go."""
        self.tokens = min(max(1.0, self.rate), self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0.0


class KeyRing:
    """The keys of a file. Used on the event loop alone.

    Raises InvalidRequestError, when it is made, for a file that is missing or wrong. A file that becomes wrong later
    changes nothing, and the log says so.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._keys = _read(path)
        self._stamp = _stamp(path)
        self._looked = clock()
        self._buckets: dict[str, _Bucket] = {}

    def check(self, headers: list[tuple[bytes, bytes]], *, browser: bool = False, counted: bool = True) -> ApiKey:
        """Whose request this is: ``Authorization: Bearer KEY`` or ``x-api-key: KEY``.

        ``browser``: the key may be the password of HTTP's Basic scheme too, whatever the user name, and the browser is
        told to ask for it. ``counted``: the request counts towards the key's rate.

        Raises UnauthorizedError, and OverloadedError for a key that asks too often.
        """
        self._look()
        challenge = _BASIC if browser else "Bearer"
        given = _given(headers, browser)
        if given is None:
            raise UnauthorizedError("an API key is wanted: send Authorization: Bearer KEY", challenge=challenge)
        digest = hashlib.sha256(given).hexdigest()
        found = None
        for key in self._keys:  # all of them, in constant time each: how long it takes tells nothing
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None:
            raise UnauthorizedError("this API key is not known here", challenge=challenge)
        if counted and found.requests_per_s is not None:
            now = self._clock()
            bucket = self._buckets.get(found.id)
            if bucket is None or bucket.rate != found.requests_per_s:
                bucket = _Bucket(found.requests_per_s, max(1.0, found.requests_per_s), now)
                self._buckets[found.id] = bucket
            wait = bucket.take(now)
            if wait:
                raise OverloadedError(
                    f"this key may send {found.requests_per_s:g} requests a second: try again in {wait:.2f} s",
                    retry_after_s=wait,
                )
        return found

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self.path)
        except InvalidRequestError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("%d API keys are valid now", len(self._keys))


def new_key(key_id: str, tenant: str, requests_per_s: float | None = None) -> tuple[str, str]:
    """A new key, and the table for the file. Raises InvalidRequestError for a name that the file would refuse."""
    text = "lenvm-" + secrets.token_urlsafe(32)
    lines = [
        "[[key]]",
        f'id = "{key_id}"',
        f'tenant = "{tenant}"',
        f'sha256 = "{hashlib.sha256(text.encode()).hexdigest()}"',
    ]
    if requests_per_s is not None:
        lines.append(f"requests_per_s = {requests_per_s:g}")
    table = "\n".join(lines) + "\n"
    _parse(table, "the new key")
    return text, table


def _given(headers: list[tuple[bytes, bytes]], browser: bool) -> bytes | None:
    for name, value in headers:
        if len(value) > _LONGEST_KEY:
            continue
        if name == b"authorization":
            kind, _, key = value.partition(b" ")
            if browser and kind.lower() == b"basic":
                key = _password(key)
            elif kind.lower() != b"bearer":
                continue
            if key.strip():
                return key.strip()
        elif name == b"x-api-key" and value.strip():
            return value.strip()
    return None


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> list[ApiKey]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InvalidRequestError(f"cannot read the API keys in {path} ({reason})", param="api_keys") from None
    return _parse(text, str(path))


def _parse(text: str, where: str) -> list[ApiKey]:
    try:
        tables: Any = tomllib.loads(text).get("key")
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequestError(f"{where} is no TOML: {error}", param="api_keys") from None
    if not isinstance(tables, list) or not tables:
        raise InvalidRequestError(f"{where} holds no [[key]]: make one with lenvm key", param="api_keys")
    keys: list[ApiKey] = []
    for at, table in enumerate(tables):
        problem = _problem(table, {key.id for key in keys})
        if problem:
            raise InvalidRequestError(f"{where}, key {at + 1}: {problem}", param="api_keys")
        keys.append(ApiKey(**table))
    return keys


def _problem(table: Any, known: set[str]) -> str | None:
    if not isinstance(table, dict) or not _FIELDS.issuperset(table):
        return f"the fields are {', '.join(sorted(_FIELDS))}"
    for name in ("id", "tenant"):
        if not isinstance(table.get(name), str) or not _NAME.fullmatch(table[name]):
            return f"{name} must be 1 to 64 letters, digits, dots, dashes or underscores"
    if table["id"] in known:
        return f"the id {table['id']} is there twice"
    if not isinstance(table.get("sha256"), str) or not _SHA.fullmatch(table["sha256"]):
        return "sha256 must be 64 hexadecimal digits, in lower case"
    rate = table.get("requests_per_s")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1e9):
        return "requests_per_s must be a positive number"
    return None
