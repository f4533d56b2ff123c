"""How to train: everything of a run that is neither data nor model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from lenvm.errors import InvalidRequestError
from lenvm.training.kinds import AdapterGradient, AttentionKind, Dtype, Layers, Mode, Order, Supervise

__all__ = ["TrainSettings"]

# What changes how a run is carried out, not what it computes: a run may go on under other values of these.
_CIRCUMSTANCES = frozenset(
    {
        "compile",
        "layers",
        "adapter_gradient",
        "attention",
        "deterministic",
        "checkpoint_every",
        "checkpoint_minutes",
        "log_every",
    }
)


@dataclass(frozen=True)
class TrainSettings:
    """A step sees ``batch_tokens`` tokens in micro-batches of ``micro_tokens``, whatever the number of processes.

    What is trained:
        mode: ``lora`` (adapters and head) or ``full`` (every weight).
        value_weight, alpha: weights of the value loss (Eq. 9) and of the bins. A head without bins is the paper's; with
            ``value_weight = 0`` the distribution alone is trained.
        lam: 1 regresses on the realised return (Monte Carlo); below 1 on lambda-returns, which mix in the model's own
            detached values (lambda of GAE).
        target: the space in which the value part regresses, a name of ``lenvm.training.targets``.
        supervise: ``all`` states s_0 .. s_L, or ``prompt``: s_0 alone.
        boundary_weight: weight of s_0 beside 1 for every later state.
        max_sample_tokens: of longer samples only the beginning is seen, under the same targets; None: all.

    How:
        order: ``shuffled``, or ``grouped``: the answers of one prompt stay together.
        epochs, learning_rate, warmup (share of the steps), warmup_steps (overrides it), weight_decay, clip, beta2
            (of AdamW), seed.
        head_learning_rate: of the head alone; None is ``learning_rate`` (a fresh head under a fine-tuning rate of 2e-5
            learns too slowly in a short run).
        max_minutes: the schedule ends after so many minutes of training, those of interrupted runs included.
        dtype: ``auto`` is float32 on the CPU; on a GPU bfloat16 beside adapters (which are float32 themselves) and
            ``mixed`` for full training: float32 weights, bfloat16 arithmetic.

    Where the time goes (none of these changes what is computed, up to rounding):
        compile: TorchInductor; seconds at the start, twice the speed on a GPU.
        layers: ``plain`` runs transformers' own, ``fused`` ours; ``auto`` is fused where the architecture allows it.
        adapter_gradient: ``dense`` forms the gradient of the merged weight and projects it; ``low`` and ``low_cat``
            never form it (``low_cat`` computes the low-rank halves inside the large products).
        deterministic: kernels that add in one order; a GPU then gives the same loss curve again to the last bit, more
            slowly. (The CPU does so anyway.)
        attention: ``gqa`` lets the kernel share keys and values between heads, ``repeat`` copies them.
        checkpoint_every, checkpoint_minutes: how often the state is saved, in steps and minutes; 0 never.
        log_every: steps a log line.
    """

    mode: Mode = "lora"
    value_weight: float = 1.0
    alpha: float = 0.1
    lam: float = 1.0
    target: str = "return"
    supervise: Supervise = "all"
    boundary_weight: float = 1.0
    max_sample_tokens: int | None = None
    order: Order = "shuffled"
    epochs: int = 2
    batch_tokens: int = 65536
    micro_tokens: int = 32768
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    warmup: float = 0.05
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    beta2: float = 0.95
    lora_rank: int = 16
    lora_scale: float = 2.0
    seed: int = 0
    max_minutes: float | None = None
    dtype: Dtype = "auto"
    compile: bool = False
    layers: Layers = "auto"
    adapter_gradient: AdapterGradient = "dense"
    attention: AttentionKind = "gqa"
    deterministic: bool = False
    checkpoint_every: int = 200
    checkpoint_minutes: float = 5.0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name, kind in (
            ("mode", Mode), ("supervise", Supervise), ("order", Order), ("dtype", Dtype), ("layers", Layers),
            ("adapter_gradient", AdapterGradient), ("attention", AttentionKind),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise InvalidRequestError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}", param=name)
        if self.batch_tokens % self.micro_tokens:
            raise InvalidRequestError("batch_tokens must be a multiple of micro_tokens", param="batch_tokens")
        if self.epochs < 1 or self.learning_rate <= 0 or self.lora_rank < 1 or self.log_every < 1:
            raise InvalidRequestError("epochs, learning_rate, lora_rank and log_every must be positive", param="epochs")
        if not 0.0 <= self.lam <= 1.0:
            raise InvalidRequestError(f"lam must lie between 0 and 1, not {self.lam!r}", param="lam")
        if self.lam < 1.0 and self.max_sample_tokens is not None:
            raise InvalidRequestError(
                "lam below 1 needs the values of whole samples: leave max_sample_tokens out", param="lam"
            )
        if self.value_weight < 0 or self.alpha < 0 or self.value_weight + self.alpha == 0 or self.boundary_weight < 0:
            raise InvalidRequestError(
                "value_weight, alpha and boundary_weight must not be negative, nor value_weight and alpha both 0",
                param="alpha",
            )

    @property
    def accumulate(self) -> int:
        """Micro-batches a step, over all processes."""
        return self.batch_tokens // self.micro_tokens

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Precision of the decoder's arithmetic."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def weight_dtype(self, device: torch.device) -> torch.dtype:
        """Precision in which the decoder's weights are kept (adapters and head are always float32)."""
        if self.dtype == "mixed" or (self.dtype == "auto" and self.mode == "full"):
            return torch.float32
        return self.compute_dtype(device)

    def digest(self, **about: Any) -> str:
        """Hex digest of what decides the result: these settings and whatever JSON-able facts the caller adds."""
        decisive = {name: value for name, value in asdict(self).items() if name not in _CIRCUMSTANCES}
        text = json.dumps({"settings": decisive, **about}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()
