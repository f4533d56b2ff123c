"""What the engine's benchmarks share: models, ceilings of the device, and their common report."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lenvm.config import BackboneRef, GeneratorRef, HeadConfig, LenVMConfig
from lenvm.distribution import LengthBins
from lenvm.modeling import LengthValueModel, ValueHead
from lenvm.paged import PoolShape, use_paged_attention
from lenvm.reports import commit, device_name, write_report

MODELS = ("135m", "1.5b", "tiny")
_SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    # Qwen2.5-1.5B's; random weights, since speed does not hang on them.
    "1.5b": (
        "qwen2",
        {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        },
    ),
    "tiny": (
        "llama",
        {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip


def load(name: str, device: str, dtype: torch.dtype) -> LengthValueModel:
    """``135m`` is the shipped checkpoint; the others have their architecture and random weights."""
    if name == "135m":
        return LengthValueModel.from_pretrained("smollm2-135m-instruct", device=device, dtype=dtype)
    from transformers import AutoConfig, AutoModel

    kind, shape = _SHAPES[name]
    with torch.device(device):
        decoder = AutoModel.from_config(AutoConfig.for_model(kind, **shape), dtype=dtype).eval()
    use_paged_attention(decoder)
    head = HeadConfig(shape["hidden_size"], LengthBins(cap=2048))
    about = LenVMConfig(name, BackboneRef(name, "", ""), head, 0.997, GeneratorRef(name, 0.7, 1.0, 2048))
    made = ValueHead(shape["hidden_size"], head).to(device).eval()
    return LengthValueModel(decoder, made, about, Path())


@dataclass(frozen=True)
class Ceilings:
    """Measured on this device: bytes a second that a copy reads and writes, FLOP/s of a large product."""

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> Ceilings:
        """The best of several tries of each."""
        on_gpu = device.startswith("cuda")
        size = 1 << 30 if on_gpu else 1 << 26
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192 if on_gpu else 1024
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        copy = min(timed(lambda: target.copy_(source), 10, device))
        product = min(timed(lambda: a @ b, 10, device))
        return cls(2 * size / (copy / 1e3), 2 * side**3 / (product / 1e3))

    def floor_ms(self, model: LengthValueModel, *, rows: int, tokens: int, prefix: int) -> float:
        """No step of ``tokens`` new tokens in ``rows`` rows over prefixes of ``prefix`` tokens is faster: weights
        outside the embedding and keys and values are read once, and every product is computed."""
        decoder, config = model.decoder, model.decoder.config
        weights = sum(p.numel() for name, p in decoder.named_parameters() if "embed_tokens" not in name)
        stored = rows * prefix * PoolShape.of(config).token_bytes(model.dtype)
        heads = config.num_attention_heads * decoder.layers[0].self_attn.head_dim
        flops = 2.0 * weights * tokens + 4.0 * heads * config.num_hidden_layers * tokens * prefix
        return 1e3 * max((weights * model.dtype.itemsize + stored) / self.bandwidth, flops / self.flops)


def timed(step: Callable[[], Any], repeats: int, device: str, between: Callable[[], Any] = lambda: None) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, after three that are thrown away. ``between`` is called after each,
    and not timed."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 3):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
        between()
    return times[3:]


def spread(times: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "ms_quartiles": [low, high]}


def merge(path: Path | None, found: Mapping[str, Any], device: str) -> None:
    """Put ``found`` beside what other benchmarks wrote into the report; each part names its own command, commit, date
    and device."""
    if path is None:
        return
    others: dict[str, Any] = {}
    if path.exists():
        others = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    command = shlex.join(["python", *sys.argv])
    today = datetime.now(UTC).date().isoformat()
    made = {"command": command, "device": device_name(device), "commit": commit(), "date": today}
    metrics = {**others, **{name: {**part, **made} for name, part in found.items()}}
    write_report(path, command=command, metrics=metrics, device=device_name(device))
