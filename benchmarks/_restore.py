"""Restore against recompute: how long a prefix takes to compute, and how long to fetch, check and load.

Needs neither a Redis nor anything of the service's HTTP side: where there is no redis-server, values come from this
process's memory, and what a network would add is computed from an assumed one and named so. Figures of a report, and
what follows from its curves, are made again by ``python benchmarks/_restore.py reports/resilience.json``.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _engine import load

from lenvm.scoring import ScoreRow, TorchScorer
from lenvm_service.prefix_cache import ChainRoot, Codec

__all__ = ["break_even", "draw"]

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (32, 64, 128, 256, 512, 1024, 2048)
LONGEST_ON_CPU = {"1.5b": 512}  # minutes otherwise
# A data centre's: what a network adds where none was measured.
NETWORK_BYTES_PER_S, ROUND_TRIP_S = 1.25e9, 0.0002


def break_even(folder: Path, *, device: str = "cpu", quick: bool = False, models: str = "135m,1.5b") -> dict[str, Any]:
    """Curves of each model. ``quick``: the small model and short prefixes, to see that it works."""
    names = models.split(",")[:1] if quick else models.split(",")
    found: dict[str, Any] = {name: _measure(name, folder, device, quick) for name in names}
    assumed = {"gbit_per_s": 8e-9 * NETWORK_BYTES_PER_S, "round_trip_ms": 1e3 * ROUND_TRIP_S}
    return {**found, "threads": torch.get_num_threads(), "assumed_network": assumed}


@dataclass
class _Setup:
    """A model's scorer and what its blocks are packed with."""

    scorer: TorchScorer
    codec: Codec
    root: ChainRoot
    device: str

    def timed(self, work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
        """Median milliseconds, and the last state that ``work`` gave; the others are closed, outside of the time."""
        times: list[float] = []
        made = None
        for _ in range(repeats):
            if made is not None:
                made.close()
            since = self._now()
            made = work()
            times.append(1e3 * (self._now() - since))
        return statistics.median(times), made

    def restored(self, keys: list[bytes], values: Callable[[], list[bytes]]) -> float:
        """Median milliseconds of a restore; the first one may still allocate, and is thrown away."""
        self.restore(keys, values()).close()
        taken, state = self.timed(lambda: self.restore(keys, values()), 5)
        state.close()
        return taken

    def restore(self, keys: list[bytes], values: list[bytes]) -> Any:
        """A state from packed blocks, each checked."""
        payloads = [self.codec.unpack_block(self.root.digest, k, v) for k, v in zip(keys, values, strict=True)]
        return self.scorer.join(self.scorer.load(payloads))

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def _measure(name: str, folder: Path, device: str, quick: bool) -> dict[str, Any]:
    """Medians in milliseconds for each length of the prefix, and from which length on restoring is faster."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load(name, device, dtype)
    longest = 64 if quick else LONGEST_ON_CPU.get(name, TOKENS[-1]) if device == "cpu" else TOKENS[-1]
    lengths = [tokens for tokens in TOKENS if tokens <= longest]
    scorer = TorchScorer(model, pool_tokens=3 * longest)
    root = ChainRoot("benchmark", repr(scorer.layout), scorer.layout.tokens, "", bytes(16))
    setup = _Setup(scorer, Codec(scorer.layout, num_bins=model.config.head.num_bins), root, device)
    ids = torch.randint(100, 1000, (longest,), generator=torch.Generator().manual_seed(1)).tolist()
    blocks = root.extend(ids).blocks
    repeats = 1 if quick or (device == "cpu" and name != "135m") else 3
    curves: dict[str, list[float]] = {"compute_ms": [], "memory_ms": [], "network_ms": []}
    with _redis(folder / f"redis-{name}") as fetch:
        for tokens in lengths:

            def compute(tokens: int = tokens) -> Any:
                return scorer.score([ScoreRow(append=ids[:tokens])])[0].state

            if device != "cpu" or tokens == lengths[0]:
                compute().close()  # the first may still allocate, and on a GPU compile
            taken, state = setup.timed(compute, repeats)
            curves["compute_ms"].append(taken)
            keys = [block.key for block in blocks[: tokens // scorer.layout.tokens]]
            dumped = scorer.dump(scorer.blocks(state))
            state.close()
            del state
            values = [bytes(setup.codec.pack_block(root.digest, *pair)) for pair in zip(keys, dumped, strict=True)]
            held = setup.restored(keys, lambda values=values: values)
            curves["memory_ms"].append(held)
            sent = sum(map(len, values)) / NETWORK_BYTES_PER_S + 2 * ROUND_TRIP_S
            curves["network_ms"].append(held + 1e3 * sent)
            if fetch is not None:
                fetch.store(keys, values)
                curves.setdefault("redis_ms", []).append(setup.restored(keys, lambda keys=keys: fetch.values(keys)))
    found = {"tokens": lengths, **curves, "block_bytes": setup.codec.block_bytes}
    return {**found, **faster(found), "dtype": str(dtype).removeprefix("torch.")}


def faster(curves: dict[str, Any]) -> dict[str, list[int]]:
    """At which of the lengths restoring beats computing, each way: long prefixes where computing is slow, short ones
    where it is a GPU's launches and little else."""
    rows = list(zip(curves["tokens"], curves["compute_ms"], strict=True))
    return {
        f"{way}_is_faster_at_tokens": [
            tokens for (tokens, computed), taken in zip(rows, curves[f"{way}_ms"], strict=True) if taken < computed
        ]
        for way in ("memory", "network", "redis")
        if f"{way}_ms" in curves
    }


class _Redis:
    """A redis-server over loopback, asked as the service asks: which blocks are there, and then for them."""

    def __init__(self, client: Any) -> None:
        from lenvm_service.prefix_cache.redis_tier import block_name

        self.client, self.name = client, block_name

    def store(self, keys: list[bytes], values: list[bytes]) -> None:
        """Put values there."""
        for key, value in zip(keys, values, strict=True):
            self.client.set(self.name(key), value)

    def values(self, keys: list[bytes]) -> list[bytes]:
        """Two pipelined questions."""
        for question in ("strlen", "get"):
            pipe = self.client.pipeline(transaction=False)
            for key in keys:
                getattr(pipe, question)(self.name(key))
            found: list[bytes] = pipe.execute()
        return found


@contextmanager
def _redis(folder: Path) -> Iterator[_Redis | None]:
    """None where no redis-server is installed."""
    if shutil.which("redis-server") is None:
        yield None
        return
    sys.path.insert(0, str(ROOT))
    from lenvm_service.prefix_cache.connect import connect
    from tests.support.redis_server import RedisServer

    server = RedisServer(folder).start()
    client = connect(server.url, timeout_s=60, connections=2)
    try:
        yield _Redis(client)
    finally:
        client.close()
        server.kill()


def draw(found: dict[str, Any], path: Path) -> Path:
    """Every way against the prefix's length, a panel for each model. Needs matplotlib."""
    from lenvm.evaluation.figures.style import COLOURS, GREY, new_figure, plain_ticks, save, styled

    models = {name: curves for name, curves in found.items() if isinstance(curves, dict) and "tokens" in curves}
    gbit = found["assumed_network"]["gbit_per_s"]
    ways = (
        ("compute", "compute_ms", COLOURS[1], "-"),
        ("fetch from Redis (loopback)", "redis_ms", COLOURS[0], "-"),
        (f"fetch at {gbit:.0f} Gbit/s (computed)", "network_ms", COLOURS[0], "--"),
        ("load from the host's memory", "memory_ms", GREY, ":"),
    )
    with styled():
        figure, axes_of = new_figure(1, len(models), width=3.8 * len(models), height=3.4)
        for axes, (name, curves) in zip(axes_of, models.items(), strict=True):
            for label, key, colour, line in ways:
                if key in curves:
                    axes.plot(curves["tokens"], curves[key], line, marker="o", ms=3, color=colour, label=label)
            title = f"{name}, {curves['dtype']}"
            axes.set(xscale="log", yscale="log", xlabel="tokens of the prefix", ylabel="milliseconds", title=title)
            plain_ticks(axes.xaxis, curves["tokens"])
            axes.legend()
        return save(figure, path)


def figure_path(device: str) -> Path:
    """Where the figure of a device goes."""
    return ROOT / "docs" / "figures" / ("restore.svg" if device == "cpu" else "restore_gpu.svg")


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for part, device in (("break_even", "cpu"), ("break_even_cuda", "cuda")):
        if part in report["metrics"]:
            found = report["metrics"][part]
            for name, curves in found.items():
                if isinstance(curves, dict) and "tokens" in curves:
                    kept = {key: value for key, value in curves.items() if "_is_faster_" not in key}
                    found[name] = {**kept, **faster(curves)}
            print(draw(found, figure_path(device)))
    Path(sys.argv[1]).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
