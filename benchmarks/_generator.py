"""A load generator in a process of its own: Poisson arrivals over HTTP/1.1 kept-alive connections, whatever comes back.

    python benchmarks/_generator.py --port 8000 --path /predict_length --rate 800 --seconds 10 --seed 3 < bodies
    python benchmarks/_generator.py --answer 8001

The first form reads request bodies from stdin, one a line, and prints JSON: latencies in milliseconds by status, from
the moment that a request was due (so a generator that is late is seen), and how late it sent. The second one is a
server that answers every request at once: it shows what the generator itself can do. Standard library only, so that it
starts in no time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import random
import sys
import time
from collections import deque
from pathlib import Path

with contextlib.suppress(ImportError):
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


class _Link(asyncio.Protocol):
    """A connection with at most one request on it."""

    def __init__(self, load: Load) -> None:
        self.load, self.received, self.due, self.busy = load, b"", 0.0, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def send(self, request: bytes, due: float) -> None:
        self.received, self.due, self.busy = b"", due, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(_END)
        if end < 0:
            return
        head = self.received[:end].lower()
        size = int(head.partition(_LENGTH)[2].partition(b"\r")[0])
        if len(self.received) < end + len(_END) + size:
            return
        self.busy = False
        closing = b"connection: close" in head
        self.load.answered(head[9:12].decode(), self.due, None if closing else self)
        if closing:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self.busy = False
            self.load.answered("reset", self.due, None)
        self.load.lost(self)


class Load:
    """One run's connections and outcomes."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: deque[_Link] = deque()  # all of them take turns: each may lead to another worker
        self.latencies: dict[str, list[float]] = {}
        self.late: list[float] = []
        self.open = 0

    def answered(self, status: str, due: float, link: _Link | None) -> None:
        self.open -= 1
        self.latencies.setdefault(status, []).append(1e3 * (time.monotonic() - due))
        if link is not None:
            self.idle.append(link)

    def lost(self, link: _Link) -> None:
        with contextlib.suppress(ValueError):
            self.idle.remove(link)

    async def connect(self) -> _Link:
        _, link = await asyncio.get_running_loop().create_connection(lambda: _Link(self), "127.0.0.1", self.port)
        return link

    async def send(self, request: bytes, due: float) -> None:
        try:
            link = self.idle.popleft() if self.idle else await self.connect()
        except OSError:
            self.answered("refused", due, None)
            return
        link.send(request, due)

    async def run(self, requests: list[bytes], *, rate: float, start: float, seconds: float, seed: int) -> None:
        """Send ``requests`` in turn from ``start`` (time.monotonic) on, and wait for the last answer."""
        self.idle += [await self.connect() for _ in range(16)]
        dice, due, at = random.Random(seed), start, 0
        tasks: set[asyncio.Task[None]] = set()
        while due < start + seconds:
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            elif at % 64 == 0:
                await asyncio.sleep(0)  # late: answers are read all the same
            request = requests[at % len(requests)]
            self.open += 1
            if self.idle:
                self.idle.popleft().send(request, due)
            else:
                task = asyncio.create_task(self.send(request, due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            self.late.append(1e3 * (time.monotonic() - due))
            at += 1
            due += dice.expovariate(rate)
        end = time.monotonic() + 60
        while self.open and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if self.open:
            self.latencies["unanswered"] = [60e3] * self.open


class _Instant(asyncio.Protocol):
    """Answers each request as soon as it is whole."""

    answer = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 600\r\n\r\n"' + b"x" * 598 + b'"'

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(_END)) >= 0:
            size = int(self.received[:end].lower().partition(_LENGTH)[2].partition(b"\r")[0] or 0)
            if len(self.received) < end + len(_END) + size:
                return
            self.received = self.received[end + len(_END) + size :]
            self.transport.write(self.answer)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Instant, "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--answer", type=int, help="be the server that answers at once, on this port")
    parser.add_argument("--port", type=int)
    parser.add_argument("--path", default="/predict_length")
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--start", type=float, help="of time.monotonic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="latencies go here")
    options = parser.parse_args()
    if options.answer:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(options.answer))
        return
    head = f"POST {options.path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: "
    requests = [
        head.encode() + str(len(body)).encode() + _END + body for body in sys.stdin.buffer.read().splitlines() if body
    ]
    gc.freeze()  # the bodies are not to be looked through again and again
    load = Load(options.port)
    start = time.monotonic() + 0.2 if options.start is None else options.start
    asyncio.run(load.run(requests, rate=options.rate, start=start, seconds=options.seconds, seed=options.seed))
    # Not a pipe: some systems lose what is longer than one holds.
    options.out.write_text(json.dumps({"latencies_ms": load.latencies, "late_ms": load.late}))


if __name__ == "__main__":
    main()
