"""Restore against recompute: how long a prefix takes to compute, and how long to fetch from Redis and load."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _engine import load
from _load import ROOT  # noqa: F401  its import lets tests/support be found

from lenvm.scoring import ScoreRow, TorchScorer
from lenvm_service.prefix_cache import ChainRoot, Codec
from lenvm_service.prefix_cache.connect import connect
from lenvm_service.prefix_cache.redis_tier import block_name
from tests.support.redis_server import RedisServer

__all__ = ["draw", "measure"]

TOKENS = (32, 64, 128, 256, 512, 1024, 2048)


def measure(name: str, folder: Path, *, device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Medians in milliseconds for each prefix length, and the length from which on fetching is faster."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load(name, device, dtype)
    scorer = TorchScorer(model, pool_tokens=3 * TOKENS[-1])
    root = ChainRoot("benchmark", repr(scorer.layout), scorer.layout.tokens, "", bytes(16))
    codec = Codec(scorer.layout, num_bins=model.config.head.num_bins)
    server = RedisServer(folder / f"redis-{name}").start()
    client = connect(server.url, timeout_s=60, connections=2)
    lengths = [tokens for tokens in TOKENS if tokens < model.context and (not quick or tokens <= 64)]
    if name != "135m" and device == "cpu":
        lengths = [tokens for tokens in lengths if tokens <= 512]  # minutes otherwise
    repeats = 1 if quick or name != "135m" else 3
    ids = torch.randint(100, 1000, (lengths[-1],), generator=torch.Generator().manual_seed(1)).tolist()
    chain = root.extend(ids)
    compute, restore = [], []
    for tokens in lengths:
        state, taken = None, []
        for _ in range(repeats):
            since = _now(device)
            (score,) = scorer.score([ScoreRow(append=ids[:tokens])])
            taken.append(_now(device) - since)
            state = score.state
        compute.append(1e3 * statistics.median(taken))
        blocks = chain.blocks[: tokens // scorer.layout.tokens]
        for block, payload in zip(blocks, scorer.dump(scorer.blocks(state)), strict=True):
            client.set(block_name(block.key), codec.pack_block(root.digest, block.key, payload))
        state.close()
        del state, score
        taken = []
        for _ in range(max(3, repeats)):
            since = _now(device)
            pipe = client.pipeline(transaction=False)
            for block in blocks:
                pipe.strlen(block_name(block.key))
            pipe.execute()
            pipe = client.pipeline(transaction=False)
            for block in blocks:
                pipe.get(block_name(block.key))
            values = pipe.execute()
            payloads = [codec.unpack_block(root.digest, b.key, v) for b, v in zip(blocks, values, strict=True)]
            joined = scorer.join(scorer.load(payloads))
            taken.append(_now(device) - since)
            joined.close()
        restore.append(1e3 * statistics.median(taken))
    client.close()
    server.kill()
    faster = [tokens for tokens, a, b in zip(lengths, restore, compute, strict=True) if a < b]
    return {
        "tokens": lengths,
        "compute_ms": compute,
        "restore_ms": restore,
        "block_bytes": codec.block_bytes,
        "restore_is_faster_from_tokens": faster[0] if faster else None,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def draw(found: dict[str, dict[str, Any]], path: Path) -> Path:
    """Both ways against the prefix's length, a panel for each model."""
    from lenvm.evaluation.figures.style import COLOURS, new_figure, plain_ticks, save, styled

    with styled():
        figure, panels = new_figure(1, len(found), width=3.6 * len(found), height=3.2)
        for axes, (name, curve) in zip(panels, found.items(), strict=True):
            for label, key, colour in (
                ("compute", "compute_ms", COLOURS[1]),
                ("fetch and load", "restore_ms", COLOURS[0]),
            ):
                axes.plot(curve["tokens"], curve[f"{key}_ms"], marker="o", color=colour, label=label)
            axes.set(xscale="log", yscale="log", xlabel="tokens of the prefix", ylabel="milliseconds", title=name)
            plain_ticks(axes.xaxis, curve["tokens"])
            axes.legend()
        return save(figure, path)
