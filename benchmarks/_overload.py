"""Ten times the load that the service can carry, and a stop in the middle of one that it can."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from _load import CACHE_TOKENS, Bench, Replica, closed_loop, open_loop, slope_per_minute, unique

from lenvm_client import Client, DrainingError, ServiceUnreachableError

__all__ = ["drain", "overload"]

DEADLINE_MS = 2000
API_WORKERS = 2


def overload(bench: Bench) -> dict[str, Any]:
    """Ten times the capacity, every request different, two seconds each to be answered in."""
    # A small pool, which is full before anything is measured: memory must not grow from there on. Refusals are made
    # beside the engine's process, whose interpreter they would keep busy.
    arguments = ("--cache-tokens", str(CACHE_TOKENS), "--api-workers", str(API_WORKERS))
    replica = Replica(bench.folder, *arguments).ready()
    texts = unique(bench.texts)
    asyncio.run(closed_loop(replica.url, texts, workers=8, seconds=bench.seconds(30)))
    # The peak is the best of several numbers of callers that wait for their answers, under the same deadline.
    peaks = {}
    for workers in (1, 2, 4, 8):
        loop = closed_loop(replica.url, texts, workers=workers, seconds=bench.seconds(20), deadline_ms=DEADLINE_MS)
        peak = asyncio.run(loop)
        peaks[workers] = peak.count("200") / peak.seconds
    capacity = max(peaks.values())
    memory: list[tuple[float, float]] = []
    stop = threading.Event()

    def watch() -> None:
        begin = time.monotonic()
        while not stop.wait(1.0):
            memory.append((time.monotonic() - begin, replica.rss_mib()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = asyncio.run(
        open_loop(replica.url, texts, rate=10 * capacity, seconds=bench.seconds(120), deadline_ms=DEADLINE_MS)
    )
    stop.set()
    watcher.join()
    status = replica.stop()
    settled = memory[len(memory) // 3 :]  # buffers and the pool have reached their size by then
    return {
        "peak_per_s": capacity,
        "peak_by_callers": peaks,
        "offered_per_s": found.sent / found.seconds,
        "goodput_per_s": found.count("200") / found.seconds,
        "goodput_ratio": found.count("200") / found.seconds / capacity,
        "answered_p99_ms": found.ms("200", 0.99),
        "refusal_p50_ms": found.ms("429", 0.5),
        "refusal_p99_ms": found.ms("429", 0.99),
        "refused_without_retry_after": found.missing_retry_after,
        "resets": found.broken,
        "statuses": dict(found.counts),
        "cache_tokens": CACHE_TOKENS,
        "api_workers": API_WORKERS,
        "rss_mib": [settled[0][1], settled[-1][1]],
        "rss_slope_mib_per_minute": slope_per_minute(settled),
        "exit_status": status,
    }


def drain(bench: Bench) -> dict[str, Any]:
    """SIGTERM under the load of eight callers, several times."""
    outcomes: dict[str, int] = {}
    statuses = []
    for _ in range(2 if bench.quick else 5):
        replica = Replica(bench.folder).ready()
        texts = unique(bench.texts)
        lock, stop = threading.Lock(), threading.Event()

        def ask(replica: Replica, texts: Any, lock: Any, stop: Any) -> None:
            with Client(replica.url, timeout=60, max_retries=0) as client:
                while not stop.is_set():
                    try:
                        with lock:
                            text = next(texts)
                        client.predict_length(text)
                        name = "answered"
                    except DrainingError:
                        name = "draining"
                    except ServiceUnreachableError as error:
                        # Refused is a new request after the end; anything else was in flight.
                        name = "after the end" if "refused" in str(error).lower() else "failed"
                    with lock:
                        outcomes[name] = outcomes.get(name, 0) + 1
                    if name != "answered":
                        return

        with ThreadPoolExecutor(8) as pool:
            tasks = [pool.submit(ask, replica, texts, lock, stop) for _ in range(8)]
            time.sleep(bench.seconds(5))
            statuses.append(replica.stop())
            stop.set()
            for one in tasks:
                one.result(60)
    return {"failed": outcomes.get("failed", 0), "outcomes": outcomes, "exit_statuses": statuses}
