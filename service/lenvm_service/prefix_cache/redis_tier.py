"""L2: blocks and sessions in Redis, shared by replicas. Redis slow, full, wrong or gone is a miss, never an error.

Three kinds of threads, so that neither the event loop nor the engine ever waits for Redis: lookups run on a few
threads under a time budget; one writer sends what the engine leaves in a bounded queue; one supervisor opens the
connection, measures it, and closes the breaker again when Redis is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from lenvm_service.prefix_cache.chain import Chain, ChainBlock
from lenvm_service.prefix_cache.codec import Codec, CodecError, SessionRecord
from lenvm_service.prefix_cache.connect import connect
from lenvm_service.prefix_cache.costs import TransferCosts
from lenvm_service.prefix_cache.writer import Writer

__all__ = ["Found", "RedisTier", "TierObserver", "TierOptions", "Want"]

logger = logging.getLogger(__name__)

_LOOKUP_THREADS = 4
_FAILURES = 3  # in a row that open the breaker
_PROBE_EVERY_S = 0.5  # while it is open
_PROBE_BYTES = 1 << 20
_FIRST_TRY_S = 10.0
_BUDGET_SHARE = 0.7  # of the lookup budget that a fetch may be expected to take


@dataclass(frozen=True)
class TierOptions:
    """``lookup_s``: longest wait of a request for Redis; ``ttl_s``: how long values live after their last use;
    ``queue_bytes``: what may wait to be written; ``held_bytes``: fetched and not yet taken by the engine;
    ``quota_bytes``: of one tenant (None: no limit); ``payload``: "exact" or "int8"."""

    url: str = field(repr=False)
    lookup_s: float = 0.05
    ttl_s: float = 3600.0
    queue_bytes: int = 256 << 20
    held_bytes: int = 256 << 20
    quota_bytes: int | None = None
    payload: str = "exact"
    secret: bytes = field(default=b"", repr=False)

    @property
    def refreshes(self) -> bool:
        """Does use prolong a value's life? Not under a quota, which counts on a value's end."""
        return self.quota_bytes is None


class TierObserver(Protocol):
    """What the tier tells the metrics."""

    def looked_up(self, outcome: str, seconds: float) -> None: ...
    def memo(self) -> None: ...
    def written(self, nbytes: int) -> None: ...
    def dropped(self, reason: str, count: int) -> None: ...
    def corrupt(self) -> None: ...
    def breaker(self, is_open: bool) -> None: ...
    def break_even(self, tokens: float) -> None: ...


@dataclass(frozen=True)
class Want:
    """A lookup: the blocks that follow what is held here, in order, and the whole prefix's chain where its numbers
    alone would do."""

    chain: Chain
    first: int
    memo: bool

    @property
    def blocks(self) -> tuple[ChainBlock, ...]:
        """The blocks in question."""
        return self.chain.blocks[self.first : self.chain.usable]


@dataclass(frozen=True)
class Found:
    """What there was: the bytes of a run of the wanted blocks, or the numbers of the whole prefix."""

    payloads: Sequence[NDArray[np.uint8]] = ()
    record: SessionRecord | None = None


class RedisTier:
    """The shared tier of one model. ``find`` and ``session`` belong to an event loop, ``offer_*`` to any thread."""

    def __init__(self, codec: Codec, options: TierOptions, observer: TierObserver, *, name: str = "model") -> None:
        self.codec, self.options, self.name = codec, options, name
        self.costs = TransferCosts(codec.layout.tokens, codec.block_bytes)
        self._observer = observer
        self._client: Any = None
        self._is_open = True  # the breaker: no Redis before the supervisor has found one
        self._failures = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._tried = threading.Event()
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix=f"lenvm-lookup-{name}")
        self._supervisor = threading.Thread(target=self._supervise, name=f"redis-{name}", daemon=True)
        self._writer = Writer(self)
        self._held = 0
        # Requests of one moment share what was fetched: a long system prompt comes once, not once a request.
        self._arrived: WeakValueDictionary[bytes, NDArray[np.uint8]] = WeakValueDictionary()
        observer.breaker(True)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect in the background. Returns when that was tried once: a replica that is ready shares, if it can."""
        self._supervisor.start()
        self._writer.start()
        self._tried.wait(_FIRST_TRY_S)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what still waits, as far as that goes within the time, and let go of the connections."""
        self._writer.close(timeout_s)
        self._stopping.set()
        self._wake.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()

    @property
    def is_open(self) -> bool:
        """True while Redis is left alone."""
        return self._is_open

    @property
    def client(self) -> Any:
        """The client; None before the first connection."""
        return self._client

    @property
    def observer(self) -> TierObserver:
        """Where counts go."""
        return self._observer

    # -- lookups -------------------------------------------------------------------------------------------------------

    async def session(self, handle: str, root: bytes, budget_s: float | None = None) -> SessionRecord | None:
        """The record of a session that this replica does not hold."""
        if self._is_open:
            self._observer.looked_up("open", 0.0)
            return None
        record: SessionRecord | None = await self._bounded(lambda: self._session(handle, root), budget_s)
        return record

    async def find(self, wants: Sequence[Want], budget_s: float | None = None) -> list[Found]:
        """What Redis has of each, aligned; nothing where it is not asked, not in time, or not right."""
        nothing = [Found() for _ in wants]
        if not any(want.blocks or want.memo for want in wants):
            return nothing
        if self._is_open:
            self._observer.looked_up("open", 0.0)
            return nothing
        return await self._bounded(lambda: self._find(wants), budget_s) or nothing

    async def _bounded(self, work: Callable[[], Any], budget_s: float | None) -> Any:
        budget = self.options.lookup_s if budget_s is None else min(budget_s, self.options.lookup_s)
        since = time.monotonic()
        outcome = "error"
        try:
            async with asyncio.timeout(budget):
                found, outcome = await asyncio.get_running_loop().run_in_executor(self._threads, work)
            self._succeeded()
            return found
        except TimeoutError:
            outcome = "timeout"
            if budget >= self.options.lookup_s:  # else it was the caller who had no time
                self._failed()
        except asyncio.CancelledError:
            outcome = "gone"
            raise
        except RuntimeError:  # the executor was shut down: we are closing
            outcome = "open"
        except Exception as error:
            self._failed(error)
        finally:
            self._observer.looked_up(outcome, time.monotonic() - since)
        return None

    def _session(self, handle: str, root: bytes) -> tuple[SessionRecord | None, str]:
        key = handle.encode()
        value = self._client.get(session_name(key))
        record = (
            None
            if value is None
            else self._checked(session_name(key), partial(self.codec.unpack_session, root, key, value))
        )
        return record, "miss" if record is None else "session"

    def _find(self, wants: Sequence[Want]) -> tuple[list[Found], str]:
        """One pipelined question which of the keys are there, and one for the blocks that are worth it."""
        keys = list(dict.fromkeys(block.key for want in wants for block in want.blocks))
        memos = list(dict.fromkeys(want.chain.handle for want in wants if want.memo))
        since = time.perf_counter()
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.strlen(block_name(key))
        for handle in memos:
            pipe.get(session_name(handle.encode()))
        answers = pipe.execute()
        self.costs.probed(time.perf_counter() - since)
        sizes = dict(zip(keys, answers[: len(keys)], strict=True))
        values = dict(zip(memos, answers[len(keys) :], strict=True))
        records = [self._memo(want, values) for want in wants]
        runs = [self._run(want, sizes) if record is None else [] for want, record in zip(wants, records, strict=True)]
        roots = {key: want.chain.root.digest for want, run in zip(wants, runs, strict=True) for key in run}
        payloads = self._fetch(roots) if roots else {}
        found = []
        for record, run in zip(records, runs, strict=True):
            blocks: list[NDArray[np.uint8]] = []
            for key in run:
                if (payload := payloads.get(key)) is None:
                    break
                blocks.append(payload)
            found.append(Found(blocks, record))
        wanted = sum(len(want.blocks) for want in wants)
        got = sum(len(one.payloads) for one in found)
        if any(record is not None for record in records) or got == wanted > 0:
            return found, "hit"
        return found, "partial" if got else "skipped" if any(sizes.values()) else "miss"

    def _memo(self, want: Want, values: dict[str, bytes | None]) -> SessionRecord | None:
        value = values.get(want.chain.handle) if want.memo else None
        if value is None:
            return None
        key, root = want.chain.handle.encode(), want.chain.root.digest
        record: SessionRecord | None = self._checked(
            session_name(key), partial(self.codec.unpack_session, root, key, value)
        )
        if record is None or record.tokens != want.chain.packed:
            return None
        self._observer.memo()
        return record

    def _run(self, want: Want, sizes: dict[bytes, int]) -> list[bytes]:
        """Keys of the blocks to fetch: the run that is there, where that is cheaper than to compute it and in time."""
        run: list[bytes] = []
        for block in want.blocks:
            if block.key not in self._arrived and sizes[block.key] != self.codec.block_bytes:
                break
            run.append(block.key)
        most = len(run)
        while most and self.costs.fetch_s(most) > _BUDGET_SHARE * self.options.lookup_s:
            most -= 1
        return run[:most] if self.costs.worth(most) else []

    def _fetch(self, roots: dict[bytes, bytes]) -> dict[bytes, NDArray[np.uint8]]:
        """Blocks by key, those that are right; ``roots``: the root digest that each key belongs to."""
        found: dict[bytes, NDArray[np.uint8]] = {}
        missing: list[bytes] = []
        for key in roots:
            arrived = self._arrived.get(key)
            if arrived is None:
                missing.append(key)
            else:
                found[key] = arrived
        if not missing or self._held + len(missing) * self.codec.block_bytes > self.options.held_bytes:
            return found
        since = time.perf_counter()
        pipe = self._client.pipeline(transaction=False)
        for key in missing:
            if self.options.refreshes:
                pipe.getex(block_name(key), ex=max(1, round(self.options.ttl_s)))
            else:
                pipe.get(block_name(key))
        values = pipe.execute()
        nbytes = 0
        for key, value in zip(missing, values, strict=True):
            if value is None:
                continue
            nbytes += len(value)
            payload = self._checked(block_name(key), partial(self.codec.unpack_block, roots[key], key, value))
            if payload is not None:
                found[key] = self._arrived[key] = payload
        self.costs.fetched(nbytes, time.perf_counter() - since - (self.costs.round_trip_s or 0.0))
        self._observer.break_even(self.costs.break_even_tokens)
        return found

    def _checked(self, name: str, unpack: Callable[[], Any]) -> Any:
        """What ``unpack`` gives; a value that it refuses is taken away, or the writer would take it for stored."""
        try:
            return unpack()
        except CodecError as error:
            self._observer.corrupt()
            logger.warning("%s: a value in Redis was refused: %s", self.name, error)
            with contextlib.suppress(Exception):
                self._client.unlink(name)
            return None

    def took(self, nbytes: int) -> None:
        """Fetched bytes wait for the engine (positive), or were taken (negative)."""
        with self._lock:
            self._held += nbytes

    # -- writing -------------------------------------------------------------------------------------------------------

    @property
    def takes_blocks(self) -> bool:
        """True where a block that is offered now would be written, and ever fetched."""
        costs = self.costs
        return not self._is_open and self._writer.has_room(costs.block_bytes) and costs.break_even_tokens < 1e9

    def offer_block(self, chain: Chain, block: ChainBlock, payload: NDArray[np.uint8]) -> None:
        """A block that was computed here."""
        root, key = chain.root, block.key
        self._writer.put(
            block_name(key),
            payload.nbytes,
            root.tenant,
            lambda: self.codec.pack_block(root.digest, key, payload),
        )

    def offer_session(self, chain: Chain, logit: float, bin_logprobs: NDArray[np.float64] | None) -> None:
        """A session's record."""
        if self._is_open:
            return
        root, key = chain.root, chain.handle.encode()
        self._writer.put(
            session_name(key),
            4 * chain.length + 8 * self.codec.num_bins + 256,
            root.tenant,
            lambda: self.codec.pack_session(root.digest, key, SessionRecord(chain.packed, logit, bin_logprobs)),
        )

    # -- breaker and supervisor ----------------------------------------------------------------------------------------

    def _succeeded(self) -> None:
        self._failures = 0

    def _failed(self, error: Exception | None = None) -> None:
        with self._lock:
            self._failures += 1
            if self._is_open or self._failures < _FAILURES:
                return
            self._is_open = True
        reason = "no answer in time" if error is None else type(error).__name__
        logger.warning("%s: Redis is left alone for now: %s", self.name, reason)
        self._observer.breaker(True)
        self._wake.set()

    def write_failed(self, error: Exception) -> None:
        """The writer lost its connection."""
        self._failed(error)

    def _supervise(self) -> None:
        said = False
        while not self._stopping.is_set():
            if not self._is_open:
                self._wake.wait(_PROBE_EVERY_S)
                self._wake.clear()
                continue
            try:
                self._reconnect()
            except Exception as error:
                if not said:
                    logger.warning("%s: Redis cannot be used: %s", self.name, type(error).__name__)
                said = True
                self._tried.set()
                self._stopping.wait(_PROBE_EVERY_S)
                continue
            said = False
            self._failures = 0
            self._is_open = False
            self._tried.set()
            self._observer.breaker(False)
            self._observer.break_even(self.costs.break_even_tokens)
            logger.info("%s: prefix states are shared through Redis", self.name)

    def _reconnect(self) -> None:
        """Ask, and measure: a small question and a large one. Raises what redis-py raises, and RuntimeError for an
        answer that Redis would not give."""
        options = self.options
        if self._client is None:
            self._client = connect(options.url, timeout_s=options.lookup_s, connections=_LOOKUP_THREADS + 3)
        client = self._client
        trips = []
        for _ in range(3):
            since = time.perf_counter()
            if client.get("lenvm:none") is not None:
                raise RuntimeError("what answers is no Redis")
            trips.append(time.perf_counter() - since)
        self.costs.forget_transfer()
        self.costs.probed(min(trips))
        name = f"lenvm:probe:{os.urandom(8).hex()}"
        speed = 0.0
        with contextlib.suppress(Exception):  # a full Redis takes no probe, and can still be read
            client.set(name, bytes(_PROBE_BYTES), px=10_000)
            since = time.perf_counter()
            client.get(name)
            speed = _PROBE_BYTES / max(1e-6, time.perf_counter() - since - min(trips))
            client.delete(name)
        # Where that could not be measured: an assumption on the safe side, until the first fetch.
        self.costs.fetched(_PROBE_BYTES, _PROBE_BYTES / (speed or 100e6))


def block_name(key: bytes) -> str:
    """Where a block lives."""
    return f"lenvm:b:{key.hex()}"


def session_name(key: bytes) -> str:
    """Where a session lives."""
    return f"lenvm:s:{key.decode()}"
