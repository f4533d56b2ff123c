"""What the service owes its callers when things break: overload, a Redis in every bad state, a killed replica, a poison
row, a stop under load, curious tenants, hostile requests and bytes.

Real parts on this machine: ``lenvm serve`` with the shipped model and one torch thread, a real redis-server; the load
generator has the other core.

    python benchmarks/resilience.py --data ../shared/data --report reports/resilience.json
    python benchmarks/resilience.py --data ../shared/data --only overload,redis --quick
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from _engine import merge
from _load import ROOT, Replica, alike, auc, closed_loop, open_loop, prompts, slope_per_minute, unique

from lenvm_client import Client, DrainingError, LenVMClientError, PredictInput, RowError, ServiceUnreachableError
from tests.support.redis_server import Line, RedisServer

SECRET = ("--secret", "benchmark-secret-0123")
LOOKUP_MS = 50.0
DEADLINE_MS = 2000
API_WORKERS = 2
CACHE_TOKENS = 12_288  # little more than one context, the least that the service takes


class Bench:
    """One run. ``quick``: everything at a twentieth of its length, to see that it works."""

    def __init__(self, data: Path, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.texts = prompts(data)
        self.long = prompts(data, tokens=(60, 200))

    def seconds(self, wanted: float) -> float:
        return max(3.0, wanted / 20) if self.quick else wanted

    def count(self, wanted: int) -> int:
        return max(8, wanted // 20) if self.quick else wanted

    # -- overload ------------------------------------------------------------------------------------------------------

    def overload(self) -> dict[str, Any]:
        """Ten times the capacity, every request different, two seconds each to be answered in."""
        # A small pool, which is full before anything is measured: memory must not grow from there on. Refusals are made
        # beside the engine's process, whose interpreter they would keep busy.
        arguments = ("--cache-tokens", str(CACHE_TOKENS), "--api-workers", str(API_WORKERS))
        replica = Replica(self.folder, *arguments).ready()
        texts = unique(self.texts)
        asyncio.run(closed_loop(replica.url, texts, workers=8, seconds=self.seconds(30)))
        # The peak is the best of several numbers of callers that wait for their answers, under the same deadline.
        peaks = {}
        for workers in (1, 2, 4, 8):
            loop = closed_loop(replica.url, texts, workers=workers, seconds=self.seconds(20), deadline_ms=DEADLINE_MS)
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
            open_loop(replica.url, texts, rate=10 * capacity, seconds=self.seconds(120), deadline_ms=DEADLINE_MS)
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

    # -- Redis ---------------------------------------------------------------------------------------------------------

    def redis(self) -> dict[str, Any]:
        """Every fault under constant load: misses on one replica, and on another what the first has stored.

        Prompts are of one length and come at even intervals, so that no queue forms: what a fault adds to the tail is
        not lost in that of the arrivals.
        """
        plain = Replica(self.folder).ready()
        texts = alike(self.long)
        asyncio.run(closed_loop(plain.url, texts, workers=1, seconds=self.seconds(10)))
        capacity = asyncio.run(closed_loop(plain.url, texts, workers=1, seconds=self.seconds(20)))
        rate = 0.4 * capacity.count("200") / capacity.seconds
        load = {"rate": rate, "seconds": self.seconds(60), "evenly": True}
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
        server = RedisServer(self.folder / "redis").start()
        line = Line(server.port)
        arguments = ("--redis-url", line.url, "--redis-lookup-ms", str(LOOKUP_MS), *SECRET)
        arguments += ("--cache-tokens", str(CACHE_TOKENS))
        writer, reader = Replica(self.folder, *arguments).ready(), Replica(self.folder, *arguments).ready()
        pairs, tamperer = _Pairs(writer, reader, unique(self.long)), _Tamperer(server)
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

    def sharing(self) -> dict[str, Any]:
        """A long system prompt, every user message different, requests in turn to two replicas."""
        server = RedisServer(self.folder / "redis-sharing").start()
        arguments = ("--redis-url", server.url, "--redis-lookup-ms", "200", *SECRET)
        replicas = [Replica(self.folder, *arguments).ready() for _ in range(2)]
        system = " ".join(self.long)[:2400]
        cached = shared = total = 0
        with Client(replicas[0].url, timeout=120) as one, Client(replicas[1].url, timeout=120) as two:
            for at in range(self.count(100)):
                messages = [{"role": "system", "content": system}, {"role": "user", "content": self.texts[at]}]
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
            "requests": self.count(100),
            "hit_rate": cached / total,
            "fetched_tokens": shared,
        }

    # -- a replica that dies -------------------------------------------------------------------------------------------

    def failover(self) -> dict[str, Any]:
        """Greedy guided generation; its replica is killed after a third, and the other one goes on."""
        import torch

        from lenvm.backbones import encode_chat, load_backbone, load_tokenizer, resolve_backbone
        from lenvm_client.drivers.hf import generate

        server = RedisServer(self.folder / "redis-failover").start()
        arguments = ("--redis-url", server.url, *SECRET)
        first, second = (Replica(self.folder, *arguments).ready() for _ in range(2))
        line = Line(first.port)
        folder = resolve_backbone("smollm2-135m-instruct", progress=False)
        backbone, tokenizer = load_backbone(folder), load_tokenizer(folder)
        texts = self.texts[: self.count(40) // 8]
        url = f"http://127.0.0.1:{line.port}"

        def run(text: str, die_at: int | None) -> list[int]:
            steps = 0

            class Counting(Client):
                def score_candidates(self, rows: Any) -> Any:
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
            first = Replica(self.folder, *arguments, port=first.port).ready()
        outcomes = ("session", "hit", "partial", "miss", "skipped", "timeout", "error", "open")
        known = {name: second.metric("lenvm_shared_lookups_total", outcome=name) for name in outcomes}
        for replica in (first, second):
            replica.stop()
        line.close()
        server.kill()
        return {"generations": len(same), "identical": all(same), "lookups_of_the_second": known}

    # -- one bad row, one bad moment -----------------------------------------------------------------------------------

    def poison(self) -> dict[str, Any]:
        """An engine whose scorer raises on one row of 64, and then one whose scorer crashes once."""
        import torch

        from lenvm_service.engine import Engine, EngineOptions, PredictJob, Prefix

        torch.set_num_threads(1)
        engine = Engine("m", "smollm2-135m-instruct", EngineOptions())
        engine.start()
        while engine.state == "loading":
            time.sleep(0.05)
        tokenizer = engine.tokenizer
        rows = [PredictJob(Prefix(tokenizer.encode(text))) for text in self.texts[:64]]
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

    def drain(self) -> dict[str, Any]:
        """SIGTERM under the load of eight callers, several times."""
        outcomes: dict[str, int] = {}
        statuses = []
        for _ in range(2 if self.quick else 5):
            replica = Replica(self.folder).ready()
            texts = unique(self.texts)
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
                time.sleep(self.seconds(5))
                statuses.append(replica.stop())
                stop.set()
                for one in tasks:
                    one.result(60)
        return {"failed": outcomes.get("failed", 0), "outcomes": outcomes, "exit_statuses": statuses}

    # -- tenants -------------------------------------------------------------------------------------------------------

    def tenants(self) -> dict[str, Any]:
        """Can a tenant tell by timing whether another one has sent a prompt? 200 prompts that it has, 200 that it has
        not; and the same within one tenant, where it can."""
        from lenvm_service.keys import new_key

        (one, first), (two, second) = new_key("a", "team-a"), new_key("b", "team-b")
        keys = self.folder / "keys.toml"
        keys.write_text(first + second)
        server = RedisServer(self.folder / "redis-tenants").start()
        replica = Replica(self.folder, "--api-keys", str(keys), "--redis-url", server.url, *SECRET).ready(one)
        count = self.count(400) // 2
        texts = unique(self.texts)
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

    # -- hostile requests and bytes ------------------------------------------------------------------------------------

    def schemathesis(self) -> dict[str, Any]:
        """The contract test at 5,000 cases."""
        environment = {
            **os.environ,
            "LENVM_CASES": str(self.count(5000)),
            "LENVM_CASES_FILE": str(self.folder / "cases"),
        }
        command = [sys.executable, "-m", "pytest", "-q", "tests/integration/test_schemathesis.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout[-300:], flush=True)
        counted = self.folder / "cases"
        return {
            "cases": int(counted.read_text()) if counted.exists() else 0,
            "failures": 0 if done.returncode == 0 else 1,
        }

    def fuzz(self) -> dict[str, Any]:
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
        seeds = [(codec, codec.pack_block(root, key, block), codec.pack_session(root, key, record)) for codec in codecs]
        end = time.monotonic() + self.seconds(600)
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

    # -- restore against recompute -------------------------------------------------------------------------------------

    def break_even(self) -> dict[str, Any]:
        """Milliseconds to compute a prefix, and to fetch and load it, by its length."""
        from _restore import draw, measure

        names = ("135m",) if self.quick else ("135m", "1.5b")
        found = {name: measure(name, self.folder, quick=self.quick) for name in names}
        if not self.quick:
            draw(found, ROOT / "docs" / "figures" / "restore.svg")
        return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--only", help="parts with commas, of " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="a twentieth of everything; no report")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    parts = given.only.split(",") if given.only else list(PARTS)
    unknown = set(parts) - set(PARTS)
    if unknown or (given.quick and given.report):
        parser.error(f"unknown part {unknown}" if unknown else "--quick makes no report")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(given.data, Path(folder), given.quick)
            since = time.monotonic()
            found = getattr(bench, part)()
        print(f"== {part} ({time.monotonic() - since:.0f} s)", found, sep="\n", flush=True)
        merge(given.report, {part: found}, "cpu")


if __name__ == "__main__":
    main()
