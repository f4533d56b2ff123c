"""A poison row, curious tenants, hostile requests and hostile bytes."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any

import httpx2
from _load import ROOT, SECRET, Bench, Replica, auc, unique

from tests.support.redis_server import RedisServer

__all__ = ["fuzz", "poison", "schemathesis", "tenants"]


def poison(bench: Bench) -> dict[str, Any]:
    """An engine whose scorer raises on one row of 64, and then one whose scorer crashes once."""
    import torch

    from lenvm_service.engine import Engine, EngineOptions, PredictJob, Prefix

    torch.set_num_threads(1)
    engine = Engine("m", "smollm2-135m-instruct", EngineOptions())
    engine.start()
    while engine.state == "loading":
        time.sleep(0.05)
    tokenizer = engine.tokenizer
    rows = [PredictJob(Prefix(tokenizer.encode(text))) for text in bench.texts[:64]]
    score, bad, ready_false = engine.core.scorer.score, list(rows[13].prefix.token_ids), []

    def poisoned(batch: Any) -> Any:
        ready_false.append(engine.ready)
        if any(list(row.append) == bad for row in batch):
            raise RuntimeError("injected: this row breaks the forward")
        return score(batch)

    engine.core.scorer.score = poisoned  # type: ignore[method-assign]
    results = asyncio.run(engine.submit(rows)).results
    engine.core.scorer.score = score  # type: ignore[method-assign]
    while not engine.ready:
        time.sleep(0.001)
    crashed: list[float] = []

    def crash(batch: Any) -> Any:
        if not crashed:
            crashed.append(time.monotonic())
            raise RuntimeError("injected: the device is gone for a moment")
        return score(batch)

    engine.core.scorer.score = crash  # type: ignore[method-assign]
    task = threading.Thread(target=lambda: asyncio.run(engine.submit(rows[:1])))
    task.start()
    while engine.ready:  # the callers are told after it: without this a test of readiness could come too early
        time.sleep(0.0005)
    seen_not_ready = bool(crashed)
    while not engine.ready:
        time.sleep(0.0005)
    back = time.monotonic() - crashed[0]
    task.join()
    engine.close()
    return {
        "ok": sum(isinstance(result, dict) for result in results),
        "errors": [type(result).__name__ for result in results if not isinstance(result, dict)],
        "back_s": back,
        "readiness_false_in_between": seen_not_ready,
    }


def tenants(bench: Bench) -> dict[str, Any]:
    """Can a tenant tell by timing whether another one has sent a prompt? 200 prompts that it has, 200 that it has
    not; and the same within one tenant, where it can."""
    from lenvm_service.keys import new_key

    (one, first), (two, second) = new_key("a", "team-a"), new_key("b", "team-b")
    keys = bench.folder / "keys.toml"
    keys.write_text(first + second)
    server = RedisServer(bench.folder / "redis-tenants").start()
    replica = Replica(bench.folder, "--api-keys", str(keys), "--redis-url", server.url, *SECRET).ready(one)
    count = bench.count(400) // 2
    texts = unique(bench.texts)
    known = [next(texts) for _ in range(2 * count)]
    dice = random.Random(2)

    def times(key: str, asked: list[str]) -> list[float]:
        found = []
        with httpx2.Client(timeout=60, headers={"x-api-key": key}) as client:
            for text in asked:
                since = time.perf_counter()
                answer = client.post(f"{replica.url}/predict_length", json={"prompt": text})
                found.append(time.perf_counter() - since)
                assert answer.status_code == 200
        return found

    times(two, [next(texts) for _ in range(5)])  # warm
    times(one, known)
    time.sleep(2)
    client = server.client()
    stored = {name: bytes(name) for name in client.keys("lenvm:*")}  # type: ignore[union-attr]

    def measure(key: str, seen: list[str]) -> float:
        fresh = [next(texts) for _ in range(count)]
        mixed = [(text, True) for text in seen] + [(text, False) for text in fresh]
        dice.shuffle(mixed)
        took = times(key, [text for text, _ in mixed])
        hits = [t for t, (_, was_seen) in zip(took, mixed, strict=True) if was_seen]
        misses = [t for t, (_, was_seen) in zip(took, mixed, strict=True) if not was_seen]
        return auc(hits, misses)

    within = measure(one, known[:count])
    across = measure(two, known[count:])
    replica.stop()
    server.kill()
    return {
        "requests": 2 * count,
        "auc": max(across, 1 - across),
        "auc_positive_control": within,
        "keys_of_the_first_tenant": len(stored),
    }


def schemathesis(bench: Bench) -> dict[str, Any]:
    """The contract test at 5,000 cases."""
    environment = {
        **os.environ,
        "LENVM_CASES": str(bench.count(5000)),
        "LENVM_CASES_FILE": str(bench.folder / "cases"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "tests/integration/test_schemathesis.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-300:], flush=True)
    counted = bench.folder / "cases"
    return {
        "cases": int(counted.read_text()) if counted.exists() else 0,
        "failures": 0 if done.returncode == 0 else 1,
    }


def fuzz(bench: Bench) -> dict[str, Any]:
    """Ten minutes of changed, cut, joined and random bytes against the codec: refused, or what was packed."""
    import numpy as np

    from lenvm.scoring import BlockLayout
    from lenvm_service.prefix_cache import Codec, CodecError, SessionRecord

    layout = BlockLayout("torch", "float32", (2, 3, 1, 8, 8))
    dice = np.random.default_rng(3)
    forms = [(secret, payload) for secret in (b"", b"s" * 16) for payload in ("exact", "int8")]
    codecs = [Codec(layout, num_bins=4, secret=secret, payload=payload) for secret, payload in forms]
    root, key = bytes(32), bytes(range(32))
    block = dice.standard_normal(layout.shape).astype(np.float32).reshape(-1).view(np.uint8)
    record = SessionRecord(dice.integers(0, 9, 40).astype("<u4").tobytes(), -1.0, np.zeros(4))
    seeds = [
        (codec, bytes(codec.pack_block(root, key, block)), codec.pack_session(root, key, record)) for codec in codecs
    ]
    end = time.monotonic() + bench.seconds(600)
    cases = refused = crashes = forged = 0
    while time.monotonic() < end:
        for _ in range(500):
            codec, *values = seeds[dice.integers(len(seeds))]
            value = bytearray(values[dice.integers(2)])
            how = dice.integers(5)
            if how == 0:
                for _ in range(dice.integers(1, 9)):
                    value[dice.integers(len(value))] ^= int(dice.integers(1, 256))
            elif how == 1:
                del value[dice.integers(len(value)) :]
            elif how == 2:
                at = dice.integers(len(value))
                value[at:at] = dice.bytes(int(dice.integers(1, 40)))
            elif how == 3:
                value = bytearray(dice.bytes(int(dice.integers(0, 400))))
            else:
                other = seeds[dice.integers(len(seeds))][1 + dice.integers(2)]
                at = dice.integers(len(value))
                value[at:] = other[at:]
            for unpack in (codec.unpack_block, codec.unpack_session):
                cases += 1
                try:
                    unpack(root, key, bytes(value))
                    forged += bytes(value) not in [v for _, *vs in seeds for v in vs]
                except CodecError:
                    refused += 1
                except Exception as error:
                    crashes += 1
                    print("crash:", repr(error), flush=True)
    return {"cases": cases, "refused": refused, "crashes": crashes, "changed_and_accepted": forged}
