"""A Redis in every bad state under constant load, what two replicas share through it, and a replica that dies."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from _load import CACHE_TOKENS, SECRET, Bench, Outcome, Replica, alike, closed_loop, open_loop, quantile_ms, unique

from lenvm_client import Client, LenVMClientError, PredictInput, RowError
from tests.support.redis_server import Line, RedisServer

__all__ = ["failover", "redis", "sharing"]

LOOKUP_MS = 50.0
UTILISATION = 0.5  # of what one caller who waits for its answers gets
REQUESTS = 260  # under each fault: the third-largest latency is the p99
BETWEEN_BASELINES = 3  # faults
PROMPT_TOKENS = 33  # the least that has a block to share, and one token that is computed
MEMORY = ("--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru")


def redis(bench: Bench) -> dict[str, Any]:
    """Every fault under constant load: misses on one replica, and on another what the first has stored.

    Prompts are of one length and come at even intervals, so that no queue forms: what a fault adds to the tail is not
    lost in that of the arrivals. A replica without Redis gets the same load before the faults, between them and after.
    """
    plain = Replica(bench.folder, "--cache-tokens", str(CACHE_TOKENS)).ready()
    prompts = alike(bench.long, PROMPT_TOKENS)
    asyncio.run(closed_loop(plain.url, prompts, workers=1, seconds=bench.seconds(10)))
    alone = asyncio.run(closed_loop(plain.url, prompts, workers=1, seconds=bench.seconds(20)))
    rate = UTILISATION * alone.count("200") / alone.seconds

    def load(replica: Replica) -> Outcome:
        seconds = bench.count(REQUESTS) / rate
        return asyncio.run(open_loop(replica.url, prompts, rate=rate, seconds=seconds, evenly=True))

    faults = _Faults(bench)
    runs: dict[str, tuple[Outcome, dict[str, Any]]] = {}
    baselines = [load(plain)]
    for at, name in enumerate(faults.named, 1):
        runs[name] = faults.under(name, load)
        print(name, {**_times(runs[name][0]), **runs[name][1]}, flush=True)
        if at % BETWEEN_BASELINES == 0:
            baselines.append(load(plain))
            print("without Redis", _times(baselines[-1]), flush=True)
    plain.stop()
    faults.close()
    of_each = [_times(run) for run in baselines]
    # The median of the runs: one that something else on the machine slowed down must not hide what Redis adds.
    without = {name: statistics.median(times[name] for times in of_each) for name in of_each[0]}
    found: dict[str, Any] = {
        "baseline": {**without, "of_each": of_each, "requests": sum(run.sent for run in baselines)},
        "offered_per_s": rate,
        "prompt_tokens": PROMPT_TOKENS,
        "lookup_ms": LOOKUP_MS,
    }
    for name, (run, outcome) in runs.items():
        times = _times(run)
        added = {f"added_{key}": times[key] - without[key] for key in times}
        found[name] = {"requests": run.sent, **times, **added, **outcome}
    return found


def _times(run: Outcome) -> dict[str, float]:
    """Quantiles in milliseconds. ``outside``: neither in the queue nor in the forward, which is where lookups are."""
    latencies, outside = run.latencies.get("200", []), run.outside
    return {
        "p50_ms": quantile_ms(latencies, 0.5),
        "p99_ms": quantile_ms(latencies, 0.99),
        "outside_p50_ms": quantile_ms(outside, 0.5),
        "outside_p99_ms": quantile_ms(outside, 0.99),
    }


class _Faults:
    """A Redis of the form that the documentation asks for, two replicas on it, and what may happen to it."""

    def __init__(self, bench: Bench) -> None:
        self.server = server = RedisServer(bench.folder / "redis", *MEMORY).start()
        self.line = line = _LineProcess(server.port)
        arguments = ("--redis-url", line.url, "--redis-lookup-ms", str(LOOKUP_MS), *SECRET)
        arguments += ("--cache-tokens", str(CACHE_TOKENS))
        self.writer, self.reader = (Replica(bench.folder, *arguments).ready() for _ in range(2))
        self.pairs, tamperer = _Pairs(self.writer, self.reader, unique(bench.long)), _Tamperer(server)
        self.named: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "none": (lambda: None, lambda: None),
            "killed": (server.kill, server.start),
            "paused": (server.pause, server.resume),
            "slowed": (lambda: line.set("delay_s", 0.2), lambda: line.set("delay_s", 0.0)),
            "full": (lambda: _full(server, True), lambda: _full(server, False)),
            "wrong_password": (lambda: _password(server, "x"), lambda: _password(server, "")),
            "garbage": (lambda: line.set("garbage", b"$9\r\nnonsense"), lambda: line.set("garbage", None)),
            "tampered": (tamperer.start, tamperer.stop),
            "flushed": (lambda: server.client().flushall(), lambda: None),
        }

    def under(self, name: str, load: Callable[[Replica], Outcome]) -> tuple[Outcome, dict[str, Any]]:
        """The load on the writing replica under a fault, and what became of hits and answers."""
        harm, heal = self.named[name]
        pairs, reader = self.pairs, self.reader
        pairs.hit_rate(3)
        failed, wrong = pairs.failed, pairs.wrong
        refused = reader.metric("lenvm_shared_refused_values_total")
        harm()
        run = load(self.writer)
        during = pairs.hit_rate(2)
        heal()
        healed = time.monotonic()
        recovery = None
        while recovery is None and time.monotonic() < healed + 30:
            if pairs.hit_rate(1) == 1.0:
                recovery = time.monotonic() - healed
        return run, {
            "failed": run.sent - run.count("200") + pairs.failed - failed,
            "hit_rate_during": during,
            "recovery_s": recovery,
            "refused_values": reader.metric("lenvm_shared_refused_values_total") - refused,
            "wrong_answers": pairs.wrong - wrong,
        }

    def close(self) -> None:
        """End it all."""
        for replica in (self.writer, self.reader):
            replica.stop()
        self.line.close()
        self.server.kill()


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


def _full(server: RedisServer, full: bool) -> None:
    client = server.client()
    client.config_set("maxmemory-policy", "noeviction" if full else MEMORY[3])
    client.config_set("maxmemory", 1 if full else MEMORY[1])


def _password(server: RedisServer, password: str) -> None:
    client = server.client(password=None if password else "x")
    client.config_set("requirepass", password)
    if password:
        client.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")


class _LineProcess:
    """A line to Redis in a process of its own: megabytes a second would hold up the load generator's interpreter."""

    def __init__(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve_line, args=(port, theirs), daemon=True)
        self._process.start()
        self.url: str = self._ours.recv()

    def set(self, name: str, value: Any) -> None:
        """Change the line, and return when that is done."""
        self._ours.send((name, value))
        self._ours.recv()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()


def _serve_line(port: int, link: Any) -> None:
    line = Line(port)
    link.send(line.url)
    while True:
        setattr(line, *link.recv())
        link.send(True)


class _Tamperer:
    """Changes a byte of every value as soon as it is stored, until it is stopped."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self._stop, self._listening = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin; returns when nothing more is missed."""
        self._stop.clear()
        self._listening.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._listening.wait(30)

    def stop(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        client = self.server.client()
        client.config_set("notify-keyspace-events", "E$")
        with client.pubsub(ignore_subscribe_messages=True) as events:
            events.subscribe("__keyevent@0__:set")
            events.get_message(timeout=5)  # that it is subscribed
            self._listening.set()
            while not self._stop.is_set():
                event = events.get_message(timeout=0.1)
                if event is not None and event["data"].startswith((b"lenvm:b:", b"lenvm:s:")):
                    client.setrange(event["data"], 200, b"x")
        client.config_set("notify-keyspace-events", "")
