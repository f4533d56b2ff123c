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
def _head_kernel(
    x_ptr, b1_ptr, w_ptr, b2_ptr, out_ptr, N, WIDTH, COUNT,
    PARTS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    real = m < N
    inside = c < COUNT
    acc = tl.zeros([BM, BC], tl.float32)
    for at in range(0, BW, BK):
        k = at + tl.arange(0, BK)
        there = k < WIDTH
        x = tl.load(b1_ptr + k, mask=there, other=0.0)[None, :] + tl.zeros([BM, BK], tl.float32)
        for part in tl.static_range(PARTS):
            from_ptr = x_ptr + m[:, None] * (PARTS * WIDTH) + part * WIDTH + k[None, :]
            x += tl.load(from_ptr, mask=real[:, None] & there[None, :], other=0.0)
        x = x / (1.0 + tl.exp(-x))
        w = tl.load(w_ptr + c[None, :] * WIDTH + k[:, None], mask=inside[None, :] & there[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(b2_ptr + c, mask=inside, other=0.0)[None, :]
    # The value logit stays as it is; the rest are log-probabilities.
    is_bin = (inside & (c > 0))[None, :]
    peak = tl.max(tl.where(is_bin, acc, float("-inf")), 1)[:, None]
    norm = peak + tl.log(tl.sum(tl.where(is_bin, tl.exp(acc - peak), 0.0), 1))[:, None]
    out = tl.where(is_bin, acc - norm, acc)
    tl.store(out_ptr + m[:, None] * COUNT + c[None, :], out, mask=real[:, None] & inside[None, :])


def head_numbers(
    first: torch.Tensor, first_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor
) -> None:
    """The value head from its first product on, all float32: ``first [N, parts x width]`` (summed over the parts),
    ``weight [1 + n, width]`` -> value logits and log-probabilities of bins in ``out [N, 1 + n]``."""
    tokens, (count, width) = len(first), weight.shape
    padded = max(16, triton.next_power_of_2(width))
    _head_kernel[(triton.cdiv(tokens, 16),)](
        first, first_bias, weight, bias, out, tokens, width, count,
        PARTS=first.shape[1] // width, BM=16, BW=padded, BK=min(64, padded),
        BC=max(16, triton.next_power_of_2(count)), num_warps=4,
    )  # fmt: skip
