"""Causal attention over packed sequences, through transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["PACKED_ATTENTION"]

PACKED_ATTENTION = "lenvm_packed"


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    bounds: torch.Tensor,
    longest: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``query [1, heads, N, D]``, ``key``/``value [1, kv_heads, N, D]`` -> ``[1, N, heads, D]``.

    Sequence i is places ``bounds[i] .. bounds[i + 1]``, at most ``longest`` of them. FlashAttention's variable-length
    kernel on CUDA; a block-diagonal mask elsewhere.
    """
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cuda":
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k, v.contiguous(), bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
        )[0]
        return out.unsqueeze(0), None
    place = torch.arange(query.shape[2], device=query.device)
    owner = torch.searchsorted(bounds.long(), place, right=True)
    mask = (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    return out.transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, attend_packed)
