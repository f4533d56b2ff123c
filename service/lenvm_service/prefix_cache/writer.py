"""Write-behind: what the engine leaves here goes to Redis when there is time, or nowhere."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenvm_service.prefix_cache.redis_tier import RedisTier

__all__ = ["Writer"]

logger = logging.getLogger(__name__)

_BATCH_BYTES = 8 << 20
_BATCH_ITEMS = 256
_PAUSE_S = 1.0  # after Redis refused to store: it is full
_BUCKETS = 4  # of a quota's window


@dataclass(frozen=True)
class _Item:
    name: str
    nbytes: int
    tenant: str
    pack: Callable[[], bytes | memoryview]


class Writer:
    """A bounded queue and the thread that empties it. Whatever does not fit, or fails, is dropped and counted."""

    def __init__(self, tier: RedisTier) -> None:
        self._tier = tier
        self._queue: deque[_Item] = deque()
        self._bytes = 0
        self._condition = threading.Condition()
        self._stopping = False
        self._paused_until = 0.0
        self._thread = threading.Thread(target=self._main, name=f"redis-writer-{tier.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Send what waits, for at most that long."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def has_room(self, nbytes: int) -> bool:
        """True where so many bytes fit, and Redis stores."""
        return self._bytes + nbytes <= self._tier.options.queue_bytes and time.monotonic() >= self._paused_until

    def put(self, name: str, nbytes: int, tenant: str, pack: Callable[[], bytes | memoryview]) -> None:
        """Leave a value; ``pack`` is called on the writer's thread."""
        with self._condition:
            if self._stopping or not self.has_room(nbytes):
                self._tier.observer.dropped("queue", 1)
                return
            self._queue.append(_Item(name, nbytes, tenant, pack))
            self._bytes += nbytes
            self._condition.notify()

    def _main(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._stopping:
                    self._condition.wait()
                if not self._queue:
                    return
                batch = self._take()
            try:
                self._write(batch)
            except Exception as error:
                self._refused(error, len(batch))
            with self._condition:
                self._bytes -= sum(item.nbytes for item in batch)

    def _take(self) -> list[_Item]:
        batch: list[_Item] = []
        nbytes = 0
        while self._queue and len(batch) < _BATCH_ITEMS and (not batch or nbytes < _BATCH_BYTES):
            batch.append(self._queue.popleft())
            nbytes += batch[-1].nbytes
        return batch

    def _refused(self, error: Exception, count: int) -> None:
        from redis.exceptions import ResponseError

        self._tier.observer.dropped("error", count)
        if isinstance(error, ResponseError):
            # Full, or read-only: it still answers lookups, and asking it again at once is of no use.
            self._paused_until = time.monotonic() + _PAUSE_S
            logger.warning("%s: Redis does not store: %s", self._tier.name, type(error).__name__)
        else:
            self._tier.write_failed(error)

    def _write(self, batch: list[_Item]) -> None:
        tier = self._tier
        client = tier.client
        if tier.is_open or client is None:
            tier.observer.dropped("breaker", len(batch))
            return
        ttl = max(1, round(tier.options.ttl_s))
        by_name = {item.name: item for item in batch}
        pipe = client.pipeline(transaction=False)
        for name in by_name:
            # What another replica has written need not travel again.
            pipe.expire(name, ttl) if tier.options.refreshes else pipe.exists(name)
        there = pipe.execute()
        items = [item for item, known in zip(by_name.values(), there, strict=True) if not known]
        items = self._within_quota(client, items)
        if not items:
            return
        values = [item.pack() for item in items]
        pipe = client.pipeline(transaction=False)
        for item, value in zip(items, values, strict=True):
            pipe.set(item.name, value, ex=ttl)
        pipe.execute()
        tier.observer.written(sum(map(len, values)))

    def _within_quota(self, client: Any, items: list[_Item]) -> list[_Item]:
        """What the tenants may still store. A tenant's bytes are counted in Redis, in windows of a quarter of the time
        to live: what was written in the last five is never less than what lives."""
        quota = self._tier.options.quota_bytes
        if quota is None or not items:
            return items
        width = max(1.0, self._tier.options.ttl_s / _BUCKETS)
        now = int(time.time() / width)
        kept: list[_Item] = []
        for tenant in {item.tenant for item in items}:
            mine = [item for item in items if item.tenant == tenant]
            base = f"lenvm:q:{hashlib.sha256(tenant.encode()).hexdigest()[:32]}"
            pipe = client.pipeline(transaction=False)
            for bucket in range(now - _BUCKETS, now + 1):
                pipe.get(f"{base}:{bucket}")
            used = sum(int(count or 0) for count in pipe.execute())
            allowed = []
            for item in mine:
                if used + item.nbytes <= quota:
                    used += item.nbytes
                    allowed.append(item)
            self._tier.observer.dropped("quota", len(mine) - len(allowed))
            if allowed:
                pipe = client.pipeline(transaction=False)
                pipe.incrby(f"{base}:{now}", sum(item.nbytes for item in allowed))
                pipe.expire(f"{base}:{now}", int((_BUCKETS + 2) * width))
                pipe.execute()
            kept += allowed
        return kept
