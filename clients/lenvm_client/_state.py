"""What a guided decoder remembers, by the content of prefixes, and a row within one step."""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from lenvm_client._steps import GuidedRow, RowReport
from lenvm_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from lenvm_client._text import View

__all__ = ["Lineage", "Live", "Mark", "Recent", "Record", "Tally", "digests", "hashed", "objective_key"]

K = TypeVar("K")
V = TypeVar("V")
Lineage: TypeAlias = tuple[bytes, str]  # digest of a prefix, objective


class Recent(Generic[K, V]):
    """A dict that forgets what was not used for longest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key]

    def put(self, key: K, value: V) -> None:
        self._items[key] = value
        self._items.move_to_end(key)
        while len(self._items) > self._size:
            self._items.popitem(last=False)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def drop(self, key: K) -> None:
        self._items.pop(key, None)


@dataclass(frozen=True)
class Tally:
    report: RowReport = field(default_factory=RowReport)
    given_up: bool = False  # the service will never take this row again (e.g. its context is full)


_NO_TALLY = Tally()


@dataclass(frozen=True)
class Record:
    """What a prefix's children need to know: its tally, what each choice costs, and whether an EOS is a forced stop."""

    tally: Tally
    costs: Mapping[int, float]
    forced: bool


@dataclass(eq=False, slots=True)
class Mark:
    """What a guided row leaves to the row that goes on from it by one token: its length and last token, its hash and
    digest, and the session of its prefix."""

    length: int
    last: int
    hash: Any
    digest: bytes
    session: str


@dataclass(eq=False, slots=True)
class Live:
    """A row that is still going, within one step."""

    at: int
    row: GuidedRow
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    before: Mark | None = None  # of its parent, where the row names that
    hash: Any = None  # of the prefix; None: ``parent`` to ``lineage`` are not known yet
    parent: bytes = b""
    digest: bytes = b""
    lineage: Lineage = (b"", "")
    mark: Mark | None = None  # its own, once it was answered
    tally: Tally = _NO_TALLY  # known once the step has caught up
    weights: tuple[float, ...] | None = None
    view: View | None = None  # as it is asked about, once it was
    digests: Sequence[bytes] = ()  # of the prefix that is asked about, shortest first
    prompt: bytes = b""  # digest of the prompt, where a scale is to be resolved or was
    used: bytes | None = None  # the prefix whose session was sent
    boundary: bool = False  # asked for the prompt, only to resolve a scale
    resent: bool = False
    retries: int = 0
    wait_s: float = 0.0  # what its last error asked for


def digests(prefix: Sequence[int], reach: int = 1) -> list[bytes]:
    """Of the prefix without its last ``reach`` tokens (fewer where it is shorter), without one less, and so on to the
    whole: keys that do not keep the tokens themselves."""
    return hashed(prefix, reach)[0]


def hashed(prefix: Sequence[int], reach: int = 1) -> tuple[list[bytes], Any]:
    """``digests``, and the hash, which may go on."""
    try:
        content = array("q", prefix).tobytes()
    except (TypeError, OverflowError) as error:
        raise InvalidRequestError(f"a prefix must be a sequence of token ids: {error}", param="prefix") from error
    at = max(0, len(content) - 8 * reach)
    digest = hashlib.blake2b(content[:at], digest_size=16)
    out = [digest.digest()]
    for start in range(at, len(content), 8):
        digest.update(content[start : start + 8])
        out.append(digest.digest())
    return out, digest


def objective_key(objective: Mapping[str, Any] | None) -> str:
    if objective is None:
        return ""
    try:
        # Every row of every step asks for the same thing. With types: True equals 1.
        return _known_key(tuple((name, type(value), value) for name, value in objective.items()))
    except TypeError:  # a value that cannot be hashed
        return _key(objective)


def _key(objective: Mapping[str, Any]) -> str:
    return json.dumps(dict(objective), sort_keys=True, default=repr)


@functools.lru_cache(maxsize=1024)
def _known_key(items: tuple[tuple[str, type, Any], ...]) -> str:
    return _key({name: value for name, _, value in items})
