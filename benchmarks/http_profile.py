"""Where the processor time of one /predict_length goes: layer by layer, on the CPU, without a model.

    python benchmarks/http_profile.py --report reports/engine.json

Each layer is a server of its own under the same open-loop load of 128 token ids a request, every request different, and
what counts is the processor time of its processes a request (user and system, from /proc): a server that answers at
once; uvicorn with the smallest application; the application over an engine of no work; the real engine, with its queue
and thread, over a scorer of no work; and the same with API workers, where the host's share is what bounds the rate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
from _engine import merge
from _load import ROOT
from http_path import GENERATOR, Bodies, offered

from lenvm.backbones import load_tokenizer, resolve_backbone
from tests.support.redis_server import free_port

INSTANT = str(Path(__file__).with_name("_instant.py"))
LAYERS = {
    "answered at once": [str(GENERATOR), "--answer", "PORT"],
    "uvicorn, no application": [INSTANT, "bare-h11-asyncio", "PORT"],
    "application, no engine": [INSTANT, "app", "PORT"],
    "engine, no model": [INSTANT, "engine", "PORT"],
    "engine, no model, API workers": [INSTANT, "engine", "PORT", "WORKERS"],
}


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Its workers."""
    return [int(part) for part in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure(command: list[str], bodies: Bodies, options: argparse.Namespace) -> dict[str, Any]:
    """One layer."""
    port = free_port()
    filled = [{"PORT": str(port), "WORKERS": str(options.api_workers)}.get(part, part) for part in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LENVM_LOG_LEVEL": "warning"}
    server = subprocess.Popen([sys.executable, *filled], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        ready = False
        while not ready:
            time.sleep(0.2)
            try:
                ready = httpx2.get(f"http://127.0.0.1:{port}/health/ready", timeout=5).status_code == 200
            except httpx2.HTTPError:
                if server.poll() is not None:
                    raise SystemExit("the server ended") from None
        time.sleep(1)
        number = int(1.2 * options.rate * options.seconds) + 20
        offered(port, options.rate, 1.0, [bodies.made(number // 4, text=False)])
        workers = children(server.pid)
        before = cpu_s(server.pid), sum(map(cpu_s, workers))
        row = offered(port, options.rate, options.seconds, [bodies.made(number, text=False)])
        after = cpu_s(server.pid), sum(map(cpu_s, workers))
    finally:
        server.terminate()
        server.wait()
    answered = row["statuses"].get("200", 0)
    row["host_us"], row["workers_us"] = (1e6 * (b - a) / answered for a, b in zip(before, after, strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--api-workers", type=int, default=2)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    bodies = Bodies(load_tokenizer(resolve_backbone("smollm2-135m-instruct")), options.tokens)
    found: dict[str, Any] = {"rate_per_s": options.rate, "tokens": options.tokens, "api_workers": options.api_workers}
    found["layers"] = {}
    for name, command in LAYERS.items():
        row = found["layers"][name] = measure(command, bodies, options)
        print(
            f"{name:32} host {row['host_us']:6.0f} us, workers {row['workers_us']:6.0f} us a request; "
            f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms",
            flush=True,
        )
    merge(options.report, {"http_profile": found}, "cpu")


if __name__ == "__main__":
    main()
