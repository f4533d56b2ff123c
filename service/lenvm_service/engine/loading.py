"""From a checkpoint folder to an engine core, by torch or by ONNX Runtime; each is imported only where it is used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lenvm.backbones import load_eos_ids
from lenvm.config import LenVMConfig, find_checkpoint
from lenvm.errors import InvalidRequestError
from lenvm.export import backend_of
from lenvm.scoring import Scorer
from lenvm_service.engine.core import EngineCore
from lenvm_service.prefix_cache.redis_tier import TierOptions

__all__ = ["EngineOptions", "Loaded", "load_core"]

_BLOCK = 32  # tokens


@dataclass(frozen=True)
class EngineOptions:
    """Where and how large.

    ``backend``: auto, torch or onnx; ``dtype`` is for torch, an export has its own.
    ``batch_tokens``: new tokens a batch (None: 4,096 on the CPU, 16,384 on a GPU). ``cache_tokens``: tokens of prefix
    states held (None: what a quarter of the memory holds, shared by ``models`` models). ``secret``: key of the session
    handles, and of what is shared, 16 to 64 bytes (None: a fresh one for the handles, none for what is shared).
    ``tier``: where prefix states are shared (None: nowhere).
    """

    backend: str = "auto"
    device: str = "cpu"
    dtype: str = "float32"
    batch_tokens: int | None = None
    batch_wait_s: float = 0.002
    max_queue_tokens: int = 262_144
    max_queue_s: float = 30.0
    cache_tokens: int | None = None
    models: int = 1
    stall_s: float = 60.0
    secret: bytes | None = None
    tier: TierOptions | None = None


@dataclass(frozen=True)
class Loaded:
    """A model ready for work. ``new_scorer``: one with an empty pool, for after a failure; ``dtype``: as shown;
    ``tokenizer_dir``: where its tokenizer lies."""

    core: EngineCore
    new_scorer: Callable[[], Scorer]
    dtype: str
    tokenizer_dir: Path


def load_core(source: str | Path, options: EngineOptions, *, on_progress: Callable[[], None] = lambda: None) -> Loaded:
    """A checkpoint or an export, loaded for serving.

    ``on_progress`` is called now and then during a forward: a long prompt is work, not a stall, and on a CPU it takes
    minutes.

    Raises ArtifactError, BackboneError, or InvalidRequestError for a cache that does not hold one full context.
    """
    folder = find_checkpoint(source)
    load = _load_onnx if backend_of(folder, options.backend) == "onnx" else _load_torch
    return load(folder, options, on_progress)


def _load_torch(folder: Path, options: EngineOptions, on_progress: Callable[[], None]) -> Loaded:
    import torch

    from lenvm.modeling import LengthValueModel
    from lenvm.paged import PoolShape
    from lenvm.scoring import TorchScorer

    model = LengthValueModel.from_pretrained(folder, device=options.device, dtype=getattr(torch, options.dtype))
    for layer in getattr(model.decoder, "layers", ()):
        layer.register_forward_hook(lambda *_: on_progress())
    token_bytes = PoolShape.of(model.decoder.config).token_bytes(model.dtype)
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else _free_memory()
    tokens = _cache_tokens(options, model.context, token_bytes, free, most=None if on_gpu else 1 << 18)

    def new_scorer() -> Scorer:
        return TorchScorer(model, pool_tokens=tokens, block_size=_BLOCK)

    core = _core(model.config, model.tokenizer, model.backbone_dir, new_scorer(), options)
    return Loaded(core, new_scorer, options.dtype, model.backbone_dir)


def _load_onnx(folder: Path, options: EngineOptions, on_progress: Callable[[], None]) -> Loaded:
    from lenvm.scoring import OnnxModel, OnnxScorer

    model = OnnxModel(folder, device=options.device)
    # How much of a GPU's memory is free, ONNX Runtime does not say: there, too, at most what a CPU would take.
    tokens = _cache_tokens(options, model.context, model.info.token_bytes, _free_memory(), most=1 << 18)

    def new_scorer() -> Scorer:
        return OnnxScorer(model, pool_tokens=tokens, on_forward=on_progress)

    core = _core(model.config, model.tokenizer, folder, new_scorer(), options)
    return Loaded(core, new_scorer, model.info.variant, folder)


def _core(config: LenVMConfig, tokenizer: object, folder: Path, scorer: Scorer, options: EngineOptions) -> EngineCore:
    return EngineCore(
        config,
        tokenizer,
        scorer,
        eos_ids=load_eos_ids(folder),
        secret=options.secret or os.urandom(32),
        shared_secret=options.secret or b"",
    )


def _cache_tokens(options: EngineOptions, context: int, token_bytes: int, free: int, *, most: int | None) -> int:
    """Tokens of keys and values for one of ``options.models`` models: what a quarter of the free memory holds, shared
    by all, at least two contexts."""
    tokens = options.cache_tokens
    if tokens is None:
        tokens = free // 4 // options.models // token_bytes
        tokens = max(2 * context, tokens if most is None else min(most, tokens))
    least = context + 2 * _BLOCK
    if tokens < least:
        raise InvalidRequestError(
            f"--cache-tokens {tokens} is too small: one full context of this model takes {least}", param="cache_tokens"
        )
    return tokens


def _free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where there is one."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, max(0, limit - used))
    return free
