"""Causal attention over packed sequences: a function, and the same behind transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

__all__ = ["PACKED_ATTENTION", "attend"]

PACKED_ATTENTION = "lenvm_packed"


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float,
    *,
    repeat: bool = False,
) -> torch.Tensor:
    """``query [N, heads, D]``, ``key``/``value [N, kv_heads, D]`` -> ``[N, heads, D]``.

    Sequence i is places ``bounds[i] .. bounds[i + 1]``, at most ``longest`` of them. FlashAttention's variable-length
    kernel on CUDA, which shares keys and values between heads by itself (``repeat`` copies them instead); a
    block-diagonal mask elsewhere.
    """
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cuda":
        if repeat and groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if query.dtype == torch.float32:
            exact: torch.Tensor = _attend_float32(query, key, value, bounds, longest, scaling)
            return exact
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scaling
        )[0]
        return out
    place = torch.arange(query.shape[0], device=query.device)
    owner = torch.searchsorted(bounds.long(), place, right=True)
    mask = (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=groups > 1)
    return out[0].transpose(0, 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # TorchInductor fails on this operator
def _attend_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    """:func:`attend` in float32 on CUDA, where FlashAttention does not go: the memory-efficient kernel."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    causal = 1
    out: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        query[None], key[None], value[None], None, bounds, bounds, longest, longest, 0.0, causal, True, scale=scaling
    )[0]
    return out[0]


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
    repeat: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """:func:`attend` as transformers calls it: ``query [1, heads, N, D]`` -> ``[1, N, heads, D]``."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, bounds, longest, scaling, repeat=repeat).unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, attend_packed)
