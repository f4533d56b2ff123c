"""Where the processor time of one /predict_length goes: layer by layer, on the CPU, without a model.

    python benchmarks/http_profile.py --report reports/engine.json

Each layer is a server of its own under the same open-loop load of 128 token ids a request, every request different, and
what counts is the processor time of its processes a request (user and system, from /proc): a server that answers at
once; uvicorn with the smallest application; the application over an engine of no work; the real engine, with its queue
and thread, over a scorer of no work; and the same with API workers, where the host's share is what bounds the rate.

Then a step of guided decoding, ``--rows`` rows of ``--candidates`` candidates over the same scorer of no work: what
guidance adds to it in this process (of which ``meanwhile_ms`` pass while a GPU would be at work), and how long the call
takes over loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from _engine import merge
from _instant import InstantEngine
from _load import ROOT
from http_path import GENERATOR, Bodies, offered

from lenvm.backbones import load_tokenizer, resolve_backbone
from lenvm.scoring import StepScores
from lenvm_client import CandidateScorer, Client, GuidedDecoder, GuidedRow, WeightedRow
from lenvm_service.engine import EngineOptions
from lenvm_service.local import JobScorer
from tests.support.redis_server import free_port

INSTANT = str(Path(__file__).with_name("_instant.py"))
LAYERS = {
    "answered at once": [str(GENERATOR), "--answer", "PORT"],
    "uvicorn, no application": [INSTANT, "bare", "PORT"],
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


@contextlib.contextmanager
def serving(command: list[str], options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """A ready server: its port and its process."""
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
        yield port, server.pid
    finally:
        server.terminate()
        server.wait()


def measure(command: list[str], bodies: Bodies, options: argparse.Namespace) -> dict[str, Any]:
    """One layer."""
    with serving(command, options) as (port, pid):
        number = int(1.2 * options.rate * options.seconds) + 20
        offered(port, options.rate, 1.0, [bodies.made(number // 4, text=False)])
        workers = children(pid)
        before = cpu_s(pid), sum(map(cpu_s, workers))
        row = offered(port, options.rate, options.seconds, [bodies.made(number, text=False)])
        after = cpu_s(pid), sum(map(cpu_s, workers))
    answered = row["statuses"].get("200", 0)
    row["host_us"], row["workers_us"] = (1e6 * (b - a) / answered for a, b in zip(before, after, strict=True))
    return row


class Decoding:
    """The steps of a generation: random rows that grow by their first candidate."""

    def __init__(self, options: argparse.Namespace, eos_id: int) -> None:
        dice = random.Random(5)
        self.prefixes = [[dice.randrange(20, 49_000) for _ in range(448)] for _ in range(options.rows)]
        others = [dice.sample(range(20, 49_000), options.candidates - 1) for _ in range(options.rows)]
        self.candidates = [[*tokens, eos_id] for tokens in others]
        self.logprobs = [[-9.0 * dice.random() for _ in range(options.candidates)] for _ in range(options.rows)]

    def milliseconds(self, scorer: CandidateScorer, eos_id: int, steps: int, *, guided: bool) -> list[float]:
        """Of each step but the first ones; both ways do the same but for the guidance."""
        decoder = GuidedDecoder(scorer, [eos_id], on_error="raise")
        objective = {"kind": "equal_to", "target": 400} if guided else None
        times = []
        answers: list[WeightedRow | None] = [None] * len(self.prefixes)
        for generated in range(steps):
            rows = [
                GuidedRow(
                    prefix=prefix, candidates=ids, logprobs=logs, generated=generated, objective=objective, after=after
                )
                for prefix, ids, logs, after in zip(self.prefixes, self.candidates, self.logprobs, answers, strict=True)
            ]
            since = time.perf_counter()
            answers = [*decoder.step(rows)]
            times.append(1e3 * (time.perf_counter() - since))
            self.prefixes = [[*prefix, ids[0]] for prefix, ids in zip(self.prefixes, self.candidates, strict=True)]
        return times[8:]


def guided_step(options: argparse.Namespace) -> dict[str, Any]:
    """What guidance adds to a step, the model's time left out."""
    engine = InstantEngine("instant", "", EngineOptions())
    engine._load()
    scorer: Any = engine.core.scorer
    eos_id, instant, hidden = engine.eos_ids[0], scorer.step, []

    def step(*given: Any, **options: Any) -> StepScores:
        *others, meanwhile = given

        def timed(found: StepScores) -> None:
            since = time.perf_counter()
            meanwhile(found)
            hidden.append(1e3 * (time.perf_counter() - since))

        return instant(*others, timed, **options)

    scorer.step = step
    local = JobScorer(lambda jobs: engine.core.run(jobs))
    found: dict[str, Any] = {"rows": options.rows, "candidates": options.candidates}
    with serving(LAYERS["engine, no model"], options) as (port, _), Client(f"http://127.0.0.1:{port}") as client:
        ways: dict[str, list[float]] = {"unguided": [], "in_process": [], "loopback": []}
        for _ in range(3):
            for name, scorer in (("unguided", local), ("in_process", local), ("loopback", client)):
                decoding = Decoding(options, eos_id)
                ways[name] += decoding.milliseconds(scorer, eos_id, options.steps, guided=name != "unguided")
    medians = {name: statistics.median(times) for name, times in ways.items()}
    found |= {f"{name}_ms": value for name, value in medians.items()}
    found |= {f"added_ms_{name}": medians[name] - medians["unguided"] for name in ("in_process", "loopback")}
    found["meanwhile_ms"] = statistics.median(hidden)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--api-workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--steps", type=int, default=120)
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
    step = found["step"] = guided_step(options)
    print(
        f"a step of {options.rows} rows x {options.candidates}: guidance adds {step['added_ms_in_process']:.2f} ms "
        f"({step['meanwhile_ms']:.2f} of them while a GPU is at work), {step['added_ms_loopback']:.2f} over loopback"
    )
    merge(options.report, {"http_profile": found}, "cpu")


if __name__ == "__main__":
    main()
