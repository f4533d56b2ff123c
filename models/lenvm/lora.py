"""Low-rank adapters (Hu et al., 2021): trained beside frozen weights, merged into them at load.

Files use PEFT's names, so an adapter trained with PEFT loads here and the other way round.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lenvm.config import ADAPTER_FILE
from lenvm.errors import ArtifactError

__all__ = ["LoRALinear", "inject", "merge", "save_adapter"]

_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """``W x + scale * B A x`` with ``W`` frozen; ``A`` and ``B`` stay in float32 and are cast to the input's dtype."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in] -> [..., out]``."""
        low = torch.nn.functional.linear(x, self.lora_A.to(x.dtype))
        delta = torch.nn.functional.linear(low, self.lora_B.to(x.dtype))
        result: torch.Tensor = self.base(x) + self.scale * delta
        return result


def inject(decoder: nn.Module, *, rank: int, scale: float) -> list[nn.Parameter]:
    """Freeze ``decoder`` and put an adapter on every linear layer; returns the trainable parameters."""
    decoder.requires_grad_(False)
    targets = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    parameters: list[nn.Parameter] = []
    for name, module in targets:
        parent, _, leaf = name.rpartition(".")
        adapted = LoRALinear(module, rank, scale)
        setattr(decoder.get_submodule(parent), leaf, adapted)
        parameters += [adapted.lora_A, adapted.lora_B]
    return parameters


def save_adapter(decoder: nn.Module, folder: Path, *, base_model: str) -> None:
    """Write ``adapter_model.safetensors`` (bfloat16) and ``adapter_config.json``."""
    tensors: dict[str, torch.Tensor] = {}
    targets: set[str] = set()
    rank, scale = 0, 1.0
    for name, module in decoder.named_modules():
        if isinstance(module, LoRALinear):
            for part in ("lora_A", "lora_B"):
                weight = getattr(module, part).detach()
                tensors[f"{_PREFIX}{name}.{part}.weight"] = weight.to("cpu", torch.bfloat16).contiguous()
            rank, scale = module.lora_A.shape[0], module.scale
            targets.add(name.rpartition(".")[2])
    save_file(tensors, folder / ADAPTER_FILE)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(targets),
        "task_type": "FEATURE_EXTRACTION",
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def merge(decoder: nn.Module, folder: Path, scale: float) -> None:
    """Add ``scale * B A`` of the adapter in ``folder`` to the decoder's weights, in float32.

    Raises:
        ArtifactError: the adapter is damaged or names a layer that this backbone does not have.
    """
    try:
        tensors = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / ADAPTER_FILE} cannot be read ({error}): fetch the checkpoint again") from None
    for key in sorted(key for key in tensors if ".lora_A." in key):
        layer = key.removeprefix(_PREFIX).removeprefix("model.").partition(".lora_A.")[0]
        try:
            weight = decoder.get_submodule(layer).weight
        except AttributeError:
            raise ArtifactError(f"the adapter names {layer}, which this backbone does not have") from None
        partner = key.replace(".lora_A.", ".lora_B.")
        if partner not in tensors:
            raise ArtifactError(f"{folder / ADAPTER_FILE} lacks {partner}: fetch the checkpoint again")
        low, high = tensors[key].float(), tensors[partner].float()
        delta = scale * (high @ low)
        if not isinstance(weight, torch.Tensor) or weight.shape != delta.shape:
            raise ArtifactError(f"the adapter does not fit layer {layer} of this backbone")
        weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))
