"""What the resilience benchmark drives: ``lenvm serve`` processes, prompts, and open-loop load with its outcomes."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests/support: the redis-server that may be killed, the line that may lie

from tests.support.redis_server import free_port  # noqa: E402

SECRET = ("--secret", "benchmark-secret-0123")
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


class Replica:
    """``lenvm serve`` with one torch thread."""

    def __init__(self, folder: Path, *arguments: str, model: str = "smollm2-135m-instruct", port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"serve-{self.port}.log"
        command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", str(self.port), "--model", model]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LENVM_LOG_LEVEL": "warning"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen([*command, *arguments], stdout=output, stderr=output, env=environment)

    def ready(self, key: str = "") -> Replica:
        """Wait until it takes work."""
        while True:
            try:
                headers = {"x-api-key": key} if key else {}
                if httpx2.get(f"{self.url}/health/ready", timeout=5, headers=headers).status_code == 200:
                    return self
            except httpx2.HTTPError:
                pass
            if self.process.poll() is not None:
                raise SystemExit(f"lenvm serve ended:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx2.get(f"{self.url}/metrics", timeout=30).text
        families = text_string_to_metric_families(text)
        return sum(
            one.value
            for family in families
            for one in family.samples
            if one.name == name and labels.items() <= one.labels.items()
        )

    def rss_mib(self) -> float:
        """Resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(120)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


def prompts(data: Path, *, seed: int = 0, tokens: tuple[int, int] = (20, 60)) -> list[str]:
    """Real prompts of about so many tokens (four characters each), shuffled."""
    found = []
    for path in sorted((data / "prompts").glob("*_test.jsonl.gz")):
        with gzip.open(path, "rt") as lines:
            found += [json.loads(line)["prompt"] for line in lines]
    kept = [text for text in found if 4 * tokens[0] <= len(text) <= 4 * tokens[1]]
    random.Random(seed).shuffle(kept)
    return kept


def alike(texts: list[str], tokens: int) -> Iterator[list[int]]:
    """Prompts of just so many token ids, each different from its first token on: their latencies differ by what happens
    to them alone."""
    from lenvm.backbones import load_tokenizer, resolve_backbone

    tokenizer = load_tokenizer(resolve_backbone("smollm2-135m-instruct", progress=False))
    for text in unique(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
        if len(ids) == tokens:
            yield ids


def unique(texts: list[str]) -> Iterator[str]:
    """The prompts again and again, each different from its first characters on: nothing is cached."""
    at = 0
    while True:
        yield f"{at} {texts[at % len(texts)]}"
        at += 1


@dataclass
class Outcome:
    """What became of requests: latencies in seconds by status, and what broke."""

    latencies: dict[str, list[float]] = field(default_factory=dict)
    outside: list[float] = field(default_factory=list)  # of those answered, the part beside queue and forward
    missing_retry_after: int = 0
    sent: int = 0
    seconds: float = 0.0

    def add(self, name: str, seconds: float) -> None:
        self.latencies.setdefault(name, []).append(seconds)

    def count(self, name: str) -> int:
        return len(self.latencies.get(name, []))

    @property
    def broken(self) -> int:
        """Requests without an answer of HTTP."""
        return sum(len(times) for name, times in self.latencies.items() if not name.isdecimal())

    @property
    def counts(self) -> Counter[str]:
        return Counter({name: len(times) for name, times in self.latencies.items()})

    def ms(self, name: str, share: float) -> float | None:
        """A quantile of the latencies of one status, in milliseconds."""
        times = self.latencies.get(name)
        return quantile_ms(times, share) if times else None


def quantile_ms(seconds: list[float], share: float) -> float:
    """A quantile of some times, in milliseconds."""
    return 1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


class _Caller:
    """HTTP/1.1 over kept connections, and nothing else: the service is measured, not a client's conveniences."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.host, self.port = host, int(port)
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, content: dict[str, Any], outcome: Outcome) -> None:
        body = json.dumps(content).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        since = time.perf_counter()
        try:
            async with asyncio.timeout(60):
                link = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
                link[1].write(head + body)
                headers = (await link[0].readuntil(b"\r\n\r\n")).lower()
                size = int(headers.partition(b"content-length:")[2].partition(b"\r\n")[0])
                await link[0].readexactly(size)
        except (OSError, EOFError, TimeoutError) as error:
            outcome.add(type(error).__name__, time.perf_counter() - since)
            return
        took, status = time.perf_counter() - since, headers[9:12].decode()
        outcome.add(status, took)
        if status == "200":
            outcome.outside.append(took - (_number(headers, b"x-queue-ms") + _number(headers, b"x-inference-ms")) / 1e3)
        outcome.missing_retry_after += status == "429" and b"retry-after:" not in headers
        if b"connection: close" in headers:
            link[1].close()
        else:
            self.idle.append(link)

    def close(self) -> None:
        for _, writer in self.idle:
            writer.close()


def _number(headers: bytes, name: bytes) -> float:
    return float(headers.partition(name + b": ")[2].partition(b"\r\n")[0])


def _body(prompt: str | list[int], fields: dict[str, Any]) -> dict[str, Any]:
    return {"prompt" if isinstance(prompt, str) else "token_ids": prompt, **fields}


async def open_loop(
    url: str, texts: Iterator[Any], *, rate: float, seconds: float, evenly: bool = False, **fields: Any
) -> Outcome:
    """Poisson arrivals at ``rate`` a second (``evenly``: one every ``1 / rate``), whatever comes back."""
    outcome, dice, caller = Outcome(), random.Random(1), _Caller(url)
    begin = time.perf_counter()
    at = begin
    tasks = []
    while at < begin + seconds:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(caller.post("/predict_length", _body(next(texts), fields), outcome)))
        outcome.sent += 1
        at += 1 / rate if evenly else dice.expovariate(rate)
    outcome.seconds = time.perf_counter() - begin
    await asyncio.gather(*tasks)
    caller.close()
    return outcome


async def closed_loop(url: str, texts: Iterator[Any], *, workers: int, seconds: float, **fields: Any) -> Outcome:
    """So many callers, each of whom waits for its answer."""
    outcome = Outcome()
    begin = time.perf_counter()

    async def call() -> None:
        caller = _Caller(url)
        while time.perf_counter() - begin < seconds:
            outcome.sent += 1
            await caller.post("/predict_length", _body(next(texts), fields), outcome)
        caller.close()

    await asyncio.gather(*(call() for _ in range(workers)))
    outcome.seconds = time.perf_counter() - begin
    return outcome


def slope_per_minute(samples: list[tuple[float, float]]) -> float:
    """Least-squares slope of (seconds, value) samples, a minute."""
    times, values = zip(*samples, strict=True)
    middle, level = statistics.mean(times), statistics.mean(values)
    spread = sum((t - middle) ** 2 for t in times)
    return 60 * sum((t - middle) * (v - level) for t, v in samples) / spread


def auc(lower: list[float], higher: list[float]) -> float:
    """Probability that a value of ``higher`` exceeds one of ``lower`` (ties count half)."""
    wins = sum((high > low) + 0.5 * (high == low) for high in higher for low in lower)
    return wins / (len(lower) * len(higher))
