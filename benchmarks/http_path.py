"""What HTTP costs: /predict_length under open-loop Poisson load, the engine alone, and a /score step over loopback.

    python benchmarks/http_path.py --device cuda --dtype bfloat16 --report reports/engine.json

*Load*: prompts of ``--tokens`` token ids, all different (nothing is cached), at several offered rates, from
``--generators`` processes; latencies count from the moment a request was due. Each number of ``--api-workers`` gets a
``lenvm serve`` of its own. The generators' own ceiling is measured against a server that answers at once, and one rate
again with texts, which the service tokenises. *Engine only*: the same prompts through the scorer, in batches, and
through the engine with its queue and thread, without HTTP. *Step*: ``--rows`` rows x ``--candidates`` candidates, each
going on from its session, in this process and over loopback in turn. (The name: ``http`` is a module of Python's own.)
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine import Ceilings, merge, spread, timed
from _load import Replica

from lenvm.backbones import encode_chat
from lenvm.modeling import LengthValueModel
from lenvm.scoring import ScoreRow, TorchScorer
from lenvm_client import CandidateInput, CandidateScorer, Client
from lenvm_service.engine import EngineOptions, PredictJob, Prefix
from lenvm_service.engine.engine import Engine
from lenvm_service.garbage import settle_garbage
from lenvm_service.local import LocalScorer
from tests.support.redis_server import free_port

GENERATOR = Path(__file__).with_name("_generator.py")
CALM_MS = 1000.0  # a p99 above this is saturation: higher rates are left out


class Bodies:
    """Request bodies, all different: token ids, or texts of as many tokens."""

    def __init__(self, tokenizer: Any, tokens: int) -> None:
        self.rng, self.tokens, self.vocabulary = np.random.default_rng(0), tokens, len(tokenizer)
        words = [word for word in tokenizer.get_vocab() if word.startswith("Ġ") and word[1:].isalpha()]
        self.words = [" " + word[1:] for word in words if word[1:].isascii()] or ["a", "b"]
        self.count = max(1, tokens + 1 - len(encode_chat(tokenizer, " a")))

    def ids(self) -> list[int]:
        """A prompt as token ids."""
        return self.rng.integers(3, self.vocabulary, self.tokens).tolist()

    def made(self, number: int, *, text: bool) -> bytes:
        """So many bodies, one a line."""
        if not text:
            return b"\n".join(json.dumps({"token_ids": self.ids()}).encode() for _ in range(number))
        picked = self.rng.integers(0, len(self.words), (number, self.count))
        prompts = ("".join(self.words[at] for at in row) for row in picked)
        return b"\n".join(json.dumps({"prompt": prompt}).encode() for prompt in prompts)


def offered(port: int, rate: float, seconds: float, parts: list[bytes]) -> dict[str, Any]:
    """One open-loop run from as many processes as ``parts``; latencies in milliseconds."""
    start = time.monotonic() + 1.5 + 0.2 * len(parts)  # all of them have read their bodies by then
    command = [sys.executable, str(GENERATOR), "--port", str(port), "--rate", str(rate / len(parts))]
    command += ["--seconds", str(seconds), "--start", str(start)]
    folder = Path(tempfile.mkdtemp())
    outs = [folder / str(seed) for seed in range(len(parts))]
    made = [
        subprocess.Popen([*command, "--seed", str(seed), "--out", str(out)], stdin=subprocess.PIPE)
        for seed, out in enumerate(outs)
    ]
    for process, bodies in zip(made, parts, strict=True):
        assert process.stdin is not None
        process.stdin.write(bodies)
        process.stdin.close()
    times: dict[str, list[float]] = {}
    late: list[float] = []
    for process, out in zip(made, outs, strict=True):
        if process.wait():
            raise SystemExit("a load generator has failed")
        found = json.loads(out.read_text())
        late += found["late_ms"]
        for status, values in found["latencies_ms"].items():
            times.setdefault(status, []).extend(values)
    shutil.rmtree(folder)
    good = times.get("200", [])
    return {
        "offered_per_s": rate,
        "sent_per_s": len(late) / seconds,
        "answered_per_s": len(good) / seconds,
        "p50_ms": _quantile(good, 0.5),
        "p99_ms": _quantile(good, 0.99),
        "generator_late_p99_ms": _quantile(late, 0.99),
        "statuses": {status: len(values) for status, values in times.items()},
    }


def _quantile(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def _shown(name: str, row: dict[str, Any]) -> None:
    if row["p99_ms"] is None:
        print(f"{name:34} {row['offered_per_s']:6.0f}/s  no answer: {row['statuses']}", flush=True)
        return
    others = {status: count for status, count in row["statuses"].items() if status != "200"}
    print(
        f"{name:34} {row['offered_per_s']:6.0f}/s  answered {row['answered_per_s']:6.0f}/s  p50 {row['p50_ms']:6.1f} ms"
        f"  p99 {row['p99_ms']:7.1f} ms  {others or ''}",
        flush=True,
    )


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace, tokenizer: Any) -> None:
        self.options, self.bodies = options, Bodies(tokenizer, options.tokens)

    def parts(self, rate: float, seconds: float, *, text: bool = False) -> list[bytes]:
        """Each generator's bodies."""
        number = math.ceil(1.2 * rate * seconds / self.options.generators) + 20
        return [self.bodies.made(number, text=text) for _ in range(self.options.generators)]

    def ceiling(self) -> dict[str, Any]:
        """What the generators can do."""
        port, rate = free_port(), 2 * max(self.options.rates)
        server = subprocess.Popen([sys.executable, str(GENERATOR), "--answer", str(port)])
        time.sleep(1)
        try:
            row = offered(port, rate, min(4.0, self.options.seconds), self.parts(rate, 1))
        finally:
            server.terminate()
            server.wait()
        _shown("generators, answered at once", row)
        return row

    def served(self, workers: int, local: LocalScorer, folder: Path) -> dict[str, Any]:
        """One ``lenvm serve``: the rates, texts, and the step."""
        options = self.options
        flags = ["--device", options.device, "--dtype", options.dtype]
        if options.cache_tokens:
            flags += ["--cache-tokens", str(options.cache_tokens)]
        if workers > 1:
            flags += ["--api-workers", str(workers)]
        replica = Replica(folder, *flags, model=options.model).ready()
        name = f"{workers} API worker{'s' * (workers > 1)}"
        try:
            found: dict[str, Any] = {"api_workers": workers, "step": step(local, replica.url, options)}
            first, rates = min(options.rates), []
            offered(replica.port, first, options.warm_seconds, self.parts(first, options.warm_seconds))
            for rate in options.rates:
                row = offered(replica.port, rate, options.seconds, self.parts(rate, options.seconds))
                rates.append(row)
                _shown(name, row)
                if row["p99_ms"] is None or row["p99_ms"] > CALM_MS:
                    break
            last = rates[-1]["p99_ms"]
            if last is not None and last <= CALM_MS:  # texts are more work than ids
                parts = self.parts(options.rate, options.seconds, text=True)
                found["texts"] = offered(replica.port, options.rate, options.seconds, parts)
                _shown(f"{name}, texts", found["texts"])
            return {**found, "rates": rates}
        finally:
            replica.stop()

    def engine_only(self, ceilings: Ceilings) -> dict[str, Any]:
        """Prompts a second without HTTP: through the scorer, and through the engine."""
        options = self.options
        found = scorer_rate(options, self.bodies, ceilings)
        queued = engine_rate(options, [self.bodies.ids() for _ in range(8 * options.in_flight)])
        found["engine_requests_per_s"] = queued
        print(
            f"scorer {found['scorer_requests_per_s']:,.0f} requests/s ({found['floor_ratio']:.1f} x the floor), "
            f"engine {queued:,.0f} requests/s",
            flush=True,
        )
        return found


def scorer_rate(options: argparse.Namespace, bodies: Bodies, ceilings: Ceilings) -> dict[str, Any]:
    """Requests a second through the scorer, a full batch a call."""
    dtype = getattr(torch, options.dtype)
    model = LengthValueModel.from_pretrained(options.model, device=options.device, dtype=dtype)
    rows = max(1, options.batch_tokens // options.tokens)
    floor = ceilings.floor_ms(model, rows=0, tokens=rows * options.tokens, prefix=options.tokens // 2)
    scorer = TorchScorer(model, pool_tokens=4 * rows * (options.tokens + 64) + 4096)
    prompts = [bodies.ids() for _ in range(rows)]

    def batch() -> None:
        for answer in scorer.score([ScoreRow(append=prompt) for prompt in prompts]):
            answer.state.close()

    with torch.inference_mode():
        times = timed(batch, options.repeats, options.device)
    found: dict[str, Any] = {**spread(times), "rows": rows, "floor_ms": floor}
    return found | {"floor_ratio": found["ms"] / floor, "scorer_requests_per_s": 1e3 * rows / found["ms"]}


def engine_rate(options: argparse.Namespace, prompts: Sequence[list[int]]) -> float:
    """Requests a second through the engine's queue and thread, with ``--in-flight`` at once; every prompt different."""
    tokens = options.cache_tokens or 8 * options.in_flight * (options.tokens + 32)
    made = EngineOptions(device=options.device, dtype=options.dtype, cache_tokens=max(16_384, tokens), max_queue_s=3600)
    engine = Engine("engine", options.model, made)
    engine.start()
    while engine.state == "loading":
        time.sleep(0.05)
    if engine.failure is not None:
        raise engine.failure
    settle_garbage()  # as the service does

    async def run(seconds: float) -> float:
        begin, answered, at = time.perf_counter(), 0, 0

        async def caller() -> None:
            nonlocal answered, at
            while time.perf_counter() - begin < seconds:
                at += 1
                head = [3 + at % 100, 3 + at // 100 % 100, 3 + at // 10_000 % 100]
                prompt = [*head, *prompts[at % len(prompts)][3:]]
                await engine.submit([PredictJob(Prefix(prompt))])
                answered += 1

        await asyncio.gather(*(caller() for _ in range(options.in_flight)))
        return answered / (time.perf_counter() - begin)

    try:
        asyncio.run(run(options.warm_seconds))
        return asyncio.run(run(options.seconds))
    finally:
        gc.unfreeze()
        engine.close()


class Steps:
    """Guided decoding steps through a scorer: each row goes on with a candidate of the step before."""

    def __init__(self, scorer: CandidateScorer, options: argparse.Namespace, vocabulary: int, seed: int) -> None:
        self.scorer, self.width, self.rng = scorer, options.candidates, np.random.default_rng(seed)
        self.vocabulary = vocabulary
        prefixes = self.rng.integers(3, vocabulary, (options.rows, options.prefix)).tolist()
        self.rows = [self._row(token_ids=prefix) for prefix in prefixes]
        self.generated = 0
        self.step()

    def _row(self, **prefix: Any) -> CandidateInput:
        start = int(self.rng.integers(3, self.vocabulary - self.width))
        ids = list(range(start, start + self.width))
        objective = {"kind": "equal_to", "target": 200}
        # What GuidedDecoder sends: log-weights alone are wanted, and this objective reads no log-probs.
        return CandidateInput(candidates=ids, objective=objective, return_values=False, **prefix)

    def step(self) -> float:
        """Milliseconds of one call; the next one is made ready outside of it."""
        begin = time.perf_counter()
        answers = self.scorer.score_candidates(self.rows)
        taken = 1e3 * (time.perf_counter() - begin)
        self.generated += 1
        chosen = [row.candidates[0] for row in self.rows]
        self.rows = [
            self._row(session=answer.session, append=[token], generated=self.generated)  # type: ignore[union-attr]
            for answer, token in zip(answers, chosen, strict=True)
        ]
        return taken


def step(local: LocalScorer, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same step in this process and over loopback, in turn."""
    with Client(url, timeout=600, total_timeout=None) as client:
        size = local.core.scorer.vocab_size
        ways = {"in_process": Steps(local, options, size, 1), "loopback": Steps(client, options, size, 2)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.steps + 8):
            for name, way in ways.items():
                taken = way.step()
                if turn >= 8:
                    times[name].append(taken)
    found: dict[str, Any] = {name: spread(values) for name, values in times.items()}
    found["added_ms"] = statistics.median(times["loopback"]) - statistics.median(times["in_process"])
    print(
        f"step of {options.rows} x {options.candidates}: in-process {found['in_process']['ms']:.2f} ms, "
        f"loopback {found['loopback']['ms']:.2f} ms: {found['added_ms']:.2f} ms more",
        flush=True,
    )
    return found


def summary(found: dict[str, Any], wanted: float) -> dict[str, Any]:
    """The keys that the report is read by: of the number of workers with the least p99 at the wanted rate, and of the
    one that adds least to a step."""
    at_rate = []
    for run in found["served"]:
        rows = [row for row in run["rates"] if row["offered_per_s"] == wanted and row["p99_ms"] is not None]
        at_rate += [(row["p99_ms"], run, row) for row in rows]
    if not at_rate:
        return {"requests_per_s": None, "p99_ms": None}
    p99, run, row = min(at_rate, key=lambda each: each[0])
    quickest = min(found["served"], key=lambda each: each["step"]["added_ms"])
    return {
        "requests_per_s": row["answered_per_s"],
        "p99_ms": p99,
        "api_workers": run["api_workers"],
        "score_added_ms": quickest["step"]["added_ms"],
        "score_api_workers": quickest["api_workers"],
    }


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a shipped checkpoint or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rates", type=_numbers(float), default=[500.0, 1000.0, 2000.0, 2500.0, 3500.0, 5000.0])
    parser.add_argument("--rate", type=float, default=2500.0, help="the rate that counts, and that texts come at")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-seconds", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="of a batch through the scorer")
    parser.add_argument("--cache-tokens", type=int, help="of the service")
    parser.add_argument("--api-workers", type=_numbers(int), default=[1, 8])
    parser.add_argument("--in-flight", type=int, default=512, help="requests, where the engine alone is measured")
    parser.add_argument("--generators", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    # The step is like the service: one thread of torch on the CPU, as its process has.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    ceilings = Ceilings.measure(options.device, getattr(torch, options.dtype))
    local = LocalScorer(options.model, device=options.device, dtype=options.dtype)
    bench = Bench(options, local.core.tokenizer)
    found: dict[str, Any] = {"generators": options.generators, "generator_ceiling": bench.ceiling()}
    found["engine_only"] = bench.engine_only(ceilings)
    found["engine_requests_per_s"] = found["engine_only"]["engine_requests_per_s"]
    with tempfile.TemporaryDirectory() as scratch:
        found["served"] = [
            bench.served(workers, local, Path(scratch) / str(workers)) for workers in options.api_workers
        ]
    found |= {"tokens": options.tokens, **summary(found, options.rate)}
    for run in found["served"]:
        for row in run["rates"]:
            _shown(f"{run['api_workers']} API workers", row)
    print({name: found.get(name) for name in ("requests_per_s", "p99_ms", "api_workers", "score_added_ms")})
    merge(options.report, {"http": found}, options.device)


if __name__ == "__main__":
    main()
