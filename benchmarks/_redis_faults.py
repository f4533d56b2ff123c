"""A Redis in every bad state under constant load, what two replicas share through it, and a replica that dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from _load import CACHE_TOKENS, SECRET, Bench, Replica, alike, closed_loop, open_loop, unique

from lenvm_client import Client, LenVMClientError, PredictInput, RowError
from tests.support.redis_server import Line, RedisServer

__all__ = ["failover", "redis", "sharing"]

LOOKUP_MS = 50.0


def redis(bench: Bench) -> dict[str, Any]:
    """Every fault under constant load: misses on one replica, and on another what the first has stored.

    Prompts are of one length and come at even intervals, so that no queue forms: what a fault adds to the tail is
    not lost in that of the arrivals.
    """
    plain = Replica(bench.folder).ready()
    texts = alike(bench.long)
    asyncio.run(closed_loop(plain.url, texts, workers=1, seconds=bench.seconds(10)))
    capacity = asyncio.run(closed_loop(plain.url, texts, workers=1, seconds=bench.seconds(20)))
    rate = 0.4 * capacity.count("200") / capacity.seconds
    load = {"rate": rate, "seconds": bench.seconds(60), "evenly": True}
    without = asyncio.run(open_loop(plain.url, texts, **load))
    again = asyncio.run(open_loop(plain.url, texts, **load))
    plain.stop()
    # The lower one: what slowed a minute without Redis down must not hide what Redis adds.
    baseline = min(run.ms("200", 0.99) or 0.0 for run in (without, again))
    found: dict[str, Any] = {
        "baseline_p50_ms": without.ms("200", 0.5),
        "baseline_p99_ms": baseline,
        "baseline_p99_ms_of_each": [run.ms("200", 0.99) for run in (without, again)],
        "offered_per_s": rate,
        "lookup_ms": LOOKUP_MS,
    }
    server = RedisServer(bench.folder / "redis").start()
    line = Line(server.port)
    arguments = ("--redis-url", line.url, "--redis-lookup-ms", str(LOOKUP_MS), *SECRET)
    arguments += ("--cache-tokens", str(CACHE_TOKENS))
    writer, reader = Replica(bench.folder, *arguments).ready(), Replica(bench.folder, *arguments).ready()
    pairs, tamperer = _Pairs(writer, reader, unique(bench.long)), _Tamperer(server)
    faults: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "none": (lambda: None, lambda: None),
        "killed": (server.kill, server.start),
        "paused": (server.pause, server.resume),
        "slowed": (lambda: _set(line, delay_s=0.2), lambda: _set(line, delay_s=0.0)),
        "full": (lambda: _full(server, 1), lambda: _full(server, 0)),
        "wrong_password": (lambda: _password(server, "x"), lambda: _password(server, "")),
        "garbage": (lambda: _set(line, garbage=b"$9\r\nnonsense"), lambda: _set(line, garbage=None)),
        "tampered": (tamperer.start, tamperer.stop),
        "flushed": (lambda: server.client().flushall(), lambda: None),
    }
    for name, (harm, heal) in faults.items():
        pairs.hit_rate(3)
        refused = reader.metric("lenvm_shared_refused_values_total")
        harm()
        under = asyncio.run(open_loop(writer.url, texts, **load))
        during = pairs.hit_rate(2)
        heal()
        healed = time.monotonic()
        recovery = None
        while recovery is None and time.monotonic() < healed + 30:
            if pairs.hit_rate(1) == 1.0:
                recovery = time.monotonic() - healed
        found[name] = {
            "requests": under.sent,
            "failed": under.sent - under.count("200") + pairs.failed,
            "p50_ms": under.ms("200", 0.5),
            "p99_ms": under.ms("200", 0.99),
            "added_p99_ms": (under.ms("200", 0.99) or 0.0) - baseline,
            "hit_rate_during": during,
            "recovery_s": recovery,
            "refused_values": reader.metric("lenvm_shared_refused_values_total") - refused,
            "wrong_answers": pairs.wrong,
        }
        print(name, found[name], flush=True)
    for replica in (writer, reader):
        replica.stop()
    line.close()
    server.kill()
    return found


def sharing(bench: Bench) -> dict[str, Any]:
    """A long system prompt, every user message different, requests in turn to two replicas."""
    server = RedisServer(bench.folder / "redis-sharing").start()
    arguments = ("--redis-url", server.url, "--redis-lookup-ms", "200", *SECRET)
    replicas = [Replica(bench.folder, *arguments).ready() for _ in range(2)]
    system = " ".join(bench.long)[:2400]
    cached = shared = total = 0
    with Client(replicas[0].url, timeout=120) as one, Client(replicas[1].url, timeout=120) as two:
        for at in range(bench.count(100)):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": bench.texts[at]}]
            row = _row((one, two)[at % 2].predict_length(PredictInput(messages=messages)))
            if at == 0:
                common = row.prompt_tokens - row.prompt_tokens % 32 - 64  # the system prompt's full blocks, about
                time.sleep(2)
                continue
            cached += min(common, row.cached_tokens)
            total += common
    shared = sum(replica.metric("lenvm_tokens_total", source="shared") for replica in replicas)
    for replica in replicas:
        replica.stop()
    server.kill()
    return {
        "system_tokens": common,
        "requests": bench.count(100),
        "hit_rate": cached / total,
        "fetched_tokens": shared,
    }


def failover(bench: Bench) -> dict[str, Any]:
    """Greedy guided generation; its replica is killed after a third, and the other one goes on."""
    import torch

    from lenvm.backbones import encode_chat, load_backbone, load_tokenizer, resolve_backbone
    from lenvm_client.drivers.hf import generate

    server = RedisServer(bench.folder / "redis-failover").start()
    arguments = ("--redis-url", server.url, *SECRET)
    first, second = (Replica(bench.folder, *arguments).ready() for _ in range(2))
    line = Line(first.port)
    folder = resolve_backbone("smollm2-135m-instruct", progress=False)
    backbone, tokenizer = load_backbone(folder), load_tokenizer(folder)
    texts = bench.texts[: bench.count(40) // 8]
    url = f"http://127.0.0.1:{line.port}"

    def run(text: str, die_at: int | None) -> list[int]:
        steps = 0

        class Counting(Client):
            def score_candidates(bench, rows: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == die_at:
                    line.target = second.port
                    first.kill()
                return super().score_candidates(rows)

        ids = torch.tensor([encode_chat(tokenizer, text)])
        wish = {"kind": "equal_to", "target": 60}
        with Counting(url, timeout=60, max_retries=5) as client:
            made, report = generate(
                backbone, client, ids, objectives=wish, temperature=0, max_new_tokens=100, on_error="raise"
            )
        assert report is not None
        return made[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    same = []
    for text in texts:
        line.target = first.port
        wanted = run(text, None)
        again = run(text, 20)
        same.append(again == wanted)
        first = Replica(bench.folder, *arguments, port=first.port).ready()
    outcomes = ("session", "hit", "partial", "miss", "skipped", "timeout", "error", "open")
    known = {name: second.metric("lenvm_shared_lookups_total", outcome=name) for name in outcomes}
    for replica in (first, second):
        replica.stop()
    line.close()
    server.kill()
    return {"generations": len(same), "identical": all(same), "lookups_of_the_second": known}


class _Pairs:
    """A prompt to one replica, and a second later, when it is stored, to the other: is it a hit, and is it right?"""

    def __init__(self, writer: Replica, reader: Replica, texts: Any) -> None:
        self.writer, self.reader, self.texts = writer, reader, texts
        self.failed = self.wrong = 0

    def hit_rate(self, count: int) -> float:
        asked = [next(self.texts) for _ in range(count)]
        hits = 0
        with (
            Client(self.writer.url, timeout=60, max_retries=0) as one,
            Client(self.reader.url, timeout=60, max_retries=0) as two,
        ):
            try:
                wanted = [_row(one.predict_length(text)) for text in asked]
                time.sleep(0.7)
                got = [_row(two.predict_length(text)) for text in asked]
            except LenVMClientError:
                self.failed += 1
                return 0.0
        for a, b in zip(wanted, got, strict=True):
            hits += b.cached_tokens > 0
            self.wrong += abs(a.value - b.value) > 1e-4
        return hits / count


def _row(answer: Any) -> Any:
    row = answer.predictions[0]
    if isinstance(row, RowError):
        raise SystemExit(f"a row failed: {row}")
    return row


def _set(line: Line, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(line, name, value)


def _full(server: RedisServer, limit: int) -> None:
    client = server.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", limit)


def _password(server: RedisServer, password: str) -> None:
    client = server.client(password=None if password else "x")
    client.config_set("requirepass", password)
    if password:
        client.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")


class _Tamperer:
    """Changes a byte of every value as soon as it is stored, until it is stopped."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self._stop = threading.Event()

    def start(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        client = self.server.client()
        seen: set[bytes] = set()
        while not self._stop.wait(0.02):
            for name in client.keys("lenvm:[bs]:*"):  # type: ignore[union-attr]
                if name not in seen:
                    seen.add(name)
                    client.setrange(name, 200, b"x")


PARTS = ("overload", "redis", "sharing", "failover", "poison", "drain", "tenants", "schemathesis", "fuzz", "break_even")
