"""Triton kernels of what stands between the products of a decoder layer.

A step of a few hundred tokens is over in a millisecond: a norm or an activation of the compiler's, made for any shape,
then takes as long as a product. These read and write each number once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_norm", "head_numbers", "silu_product"]


@triton.jit
def _add_norm_kernel(x_ptr, delta_ptr, norm_ptr, out_ptr, K, eps, ADD: tl.constexpr, BK: tl.constexpr):
    """One program per token."""
    k = tl.arange(0, BK)
    at = tl.program_id(0).to(tl.int64) * K + k
    real = k < K
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    if ADD:
        # Rounded as a residual stream in this precision is: the norm reads what the next layer will read.
        total = (x + tl.load(delta_ptr + at, mask=real, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at, total, mask=real)
        x = total.to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 0) / K + eps)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, x * tl.load(norm_ptr + k, mask=real), mask=real)


def add_norm(hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``hidden += delta`` in place, and its RMSNorm: ``[N, H] -> [N, H]``."""
    out = torch.empty_like(hidden)
    tokens, width = hidden.shape
    _add_norm_kernel[(tokens,)](
        hidden, delta, weight, out, width, eps,
        ADD=delta is not None, BK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _silu_kernel(x_ptr, out_ptr, INNER, BN: tl.constexpr):
    """One program per (tile of the inner width, token)."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    real = n < INNER
    gate = tl.load(x_ptr + row * 2 * INNER + n, mask=real, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * INNER + INNER + n, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * INNER + n, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=real)


def silu_product(both: torch.Tensor) -> torch.Tensor:
    """``[N, 2 I]``, gate before up -> ``silu(gate) * up``, ``[N, I]``."""
    tokens, inner = both.shape[0], both.shape[1] // 2
    out = torch.empty(tokens, inner, dtype=both.dtype, device=both.device)
    bn = min(2048, triton.next_power_of_2(inner))
    _silu_kernel[(triton.cdiv(inner, bn), tokens)](both, out, inner, BN=bn, num_warps=4)
    return out


@triton.jit
def _head_silu_kernel(x_ptr, bias_ptr, out_ptr, WIDTH, PARTS: tl.constexpr, BK: tl.constexpr):
    """One program per token."""
    row = tl.program_id(0)
    k = tl.arange(0, BK)
    real = k < WIDTH
    x = tl.load(bias_ptr + k, mask=real, other=0.0)
    for part in tl.static_range(PARTS):
        x += tl.load(x_ptr + (row * PARTS + part) * WIDTH + k, mask=real, other=0.0)
    tl.store(out_ptr + row * WIDTH + k, x / (1.0 + tl.exp(-x)), mask=real)


@triton.jit
def _head_out_kernel(x_ptr, bias_ptr, out_ptr, COUNT, BC: tl.constexpr):
    """One program per token."""
    at = tl.program_id(0) * COUNT
    c = tl.arange(0, BC)
    real = c < COUNT
    x = tl.load(x_ptr + at + c, mask=real, other=0.0) + tl.load(bias_ptr + c, mask=real, other=0.0)
    # The value logit stays as it is; the rest become log-probabilities.
    bins = tl.where(real & (c > 0), x, float("-inf"))
    peak = tl.max(bins, 0)
    norm = peak + tl.log(tl.sum(tl.exp(bins - peak), 0))
    tl.store(out_ptr + at + c, tl.where(c > 0, x - norm, x).to(out_ptr.dtype.element_ty), mask=real)


def head_numbers(
    first: torch.Tensor, first_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor
) -> None:
    """The value head from its first product on, in float32: ``first [N, parts x width]`` (summed over the parts),
    ``weight [1 + n, width]`` -> value logits and log-probabilities of bins in ``out [N, 1 + n]``, of any precision."""
    tokens, (count, width) = len(first), weight.shape
    hidden = torch.empty(tokens, width, dtype=torch.float32, device=first.device)
    parts, padded = first.shape[1] // width, triton.next_power_of_2(width)
    _head_silu_kernel[(tokens,)](first, first_bias, hidden, width, PARTS=parts, BK=padded, num_warps=4)
    scores = hidden @ weight.t()
    _head_out_kernel[(tokens,)](scores, bias, out, count, BC=triton.next_power_of_2(count), num_warps=1)
