"""Pauses of a loaded engine whose cache is full: by Python's own count of objects, and by ours of rows.

    python benchmarks/pauses.py --report reports/engine.json

The real engine, queue and sessions over a scorer that sleeps as long as a GPU would compute, under open-loop Poisson
load; every prompt is different, so that each new session pushes out an old one once ``--cache-tokens`` are held. The
first seconds, in which the cache fills, are not counted. The two ways run in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine import load, merge
from _instant import InstantEngine

from lenvm.config import LenVMConfig
from lenvm.scoring import RowScore, ScoreRow, TorchScorer
from lenvm.scoring.torch_state import Held, TorchState
from lenvm_service import garbage
from lenvm_service.engine import EngineOptions, PredictJob, Prefix
from lenvm_service.server import share_interpreter

WAYS = ("python's count", "rows")


class SleepingScorer(TorchScorer):
    """Real states in a real pool; the numbers are made up, and the model's time is slept."""

    def score(self, rows: Sequence[ScoreRow], meanwhile: Callable[[], None] | None = None) -> list[RowScore]:
        """Whole prompts."""
        due = time.perf_counter() + 0.003 + 0.00009 * len(rows)
        if meanwhile is not None:
            meanwhile()
        pool, width = self.pool, self.bins.size if self.bins else 0
        held = [Held(pool, pool.fork([], 0, len(row.append))) for row in rows]
        time.sleep(max(0.0, due - time.perf_counter()))
        found = []
        for row, own, numbers in zip(rows, held, np.full((len(rows), 1 + width), -4.0), strict=True):
            kept = numbers.copy()
            state = TorchState(own, len(row.append), float(kept[0]), kept[1:])
            found.append(RowScore(state, kept[:1], kept[None, 1:], np.empty(0), np.empty((0, width)), 0))
        return found


class SleepingEngine(InstantEngine):
    """The real engine over it."""

    cache_tokens = 0

    def _scorer(self, config: LenVMConfig, vocab_size: int) -> Any:
        return SleepingScorer(load("tiny", "cpu", torch.float32), pool_tokens=self.cache_tokens)


def measure(options: argparse.Namespace, way: str) -> dict[str, Any]:
    """One way, in this process."""
    SleepingEngine.cache_tokens = options.cache_tokens
    engine = SleepingEngine("engine", "", EngineOptions())
    engine.start()
    while engine.state == "loading":
        time.sleep(0.05)
    garbage.settle_garbage()
    share_interpreter()
    garbage._Young.ours = way == "rows"
    pauses: list[tuple[float, float]] = []
    began = 0.0

    def watch(phase: str, _: Any) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            pauses.append((began, time.perf_counter() - began))

    gc.callbacks.append(watch)
    times: list[tuple[float, float]] = []
    size = engine.core.scorer.vocab_size

    async def one(due: float, prompt: list[int]) -> None:
        await engine.submit([PredictJob(Prefix(prompt))])
        times.append((due, time.perf_counter() - due))

    async def run() -> float:
        dice, tasks, number = random.Random(1), set[asyncio.Task[None]](), 0
        tails = [dice.choices(range(3, size), k=125) for _ in range(512)]
        first = due = time.perf_counter() + 0.1
        while due < first + options.fill_seconds + options.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            number += 1
            head = [3 + number % 100, 3 + number // 100 % 100, 3 + number // 10_000 % 100]
            task = asyncio.create_task(one(due, [*head, *tails[number % 512]]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += dice.expovariate(options.rate)
        await asyncio.gather(*tasks)
        return first + options.fill_seconds

    since = asyncio.run(run())
    ordered = sorted(1e3 * taken for due, taken in times if due >= since)
    stops = [1e3 * taken for start, taken in pauses if start >= since]
    return {
        "requests": len(ordered),
        "p50_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[int(0.99 * len(ordered))],
        "longest_pause_ms": max(stops, default=0.0),
        "pauses": len(stops),
        "evicted": engine.core.sessions.evicted,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=2000.0, help="requests a second, of 128 tokens")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--fill-seconds", type=float, default=3.0)
    parser.add_argument("--cache-tokens", type=int, default=300_000)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options, options.way)), flush=True)
        os._exit(0)  # the engine's thread
    found: dict[str, Any] = {"rate": options.rate, "cache_tokens": options.cache_tokens}
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = found[way] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{way:15} p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms, longest pause "
            f"{row['longest_pause_ms']:.1f} ms ({row['pauses']} of them)",
            flush=True,
        )
    merge(options.report, {"pauses": found}, "cpu")


if __name__ == "__main__":
    main()
