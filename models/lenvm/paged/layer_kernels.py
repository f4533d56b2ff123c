"""Triton kernels of a decoder layer over the tokens of a step: products with what stands before and after them.

A step of a few hundred tokens is over in a millisecond: a kernel then takes some microseconds however little it does,
so that norms, activations and residual sums are done where their numbers pass by. RMSNorm is in two places: who writes
the residual stream scales it by the norm's weight and notes each row's sum of squares (one number for each tile of its
columns); who multiplies divides its result by the row's root mean square.

Each kernel may be launched before the one in front of it is done (programmatic dependent launch, on Hopper and later).
It waits for that one before it reads or writes what any kernel makes, and only then lets the next one come: so that
what is there two kernels earlier, and all weights and prefixes, may be fetched into the cache while it waits. Attention
reads the pool, its tables and lengths before it waits: what writes them (``promote_tokens``, the copy from the host)
launches nothing early, and at least two kernels stand between it and the first attention.

Where a kernel's blocks come to lie then hangs on the one in front. The next block goes to the processor that has most
shared memory left (seen on an H200 by each block's processor and times): beside attention, which fills 96 processors of
132, the 72 blocks of the product after it went to the other 36, two to each, and took half as long again, as did those
of the kernel after it, which found them there. A product that asks for more than half of a processor's shared memory
(``Tiling.room``) is on each but once.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "Stream", "Tiling", "add_norm", "carved", "embed", "fetch", "gated_product", "head_numbers", "launch_options",
    "launches_early", "product", "product_onto", "silu_product", "tiling",
]  # fmt: skip


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one in front of it is done."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch that may come early."""
    return {"launch_pdl": True} if launches_early(device) else {}


_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_carved: set[int] = set()


@functools.cache
def _driver() -> Any | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def carved(kernel: Any) -> None:
    """Ask for all shared memory that there is for a kernel that was launched: kernels that want different cuts of a
    processor's memory cannot be on it together, and launching one early is of no use then. A hint, and no more, where
    the driver cannot be asked or refuses. Not for what only passes numbers on (norms, activations): between the
    library's products, which launch nothing early, cache is worth more to these."""
    function = getattr(kernel, "function", None)  # none in Triton's interpreter
    if function is not None and function not in _carved:
        _carved.add(function)
        if (driver := _driver()) is not None:
            driver.cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT, 100)


@triton.jit
def fetch(pointers):
    """Bring the cache lines of these addresses into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64, bitcast=True)], tl.int32, False, 1
    )


class Stream(NamedTuple):
    """The residual stream of ``N`` tokens: itself, itself times the weight of the norm that comes next, and for each
    token the sums of squares of some columns each. ``[N, H]``, ``[N, H]``, float32 ``[parts, N]``."""

    hidden: torch.Tensor
    scaled: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def make(cls, tokens: int, width: int, parts: int, like: torch.Tensor) -> Stream:
        """Room for it."""
        hidden, scaled = (torch.empty(tokens, width, dtype=like.dtype, device=like.device) for _ in range(2))
        return cls(hidden, scaled, torch.empty(parts, tokens, dtype=torch.float32, device=like.device))


class Tiling(NamedTuple):
    """How a product is cut: rows, columns and depth of a tile; warps; loads under way; KiB of shared memory that it
    asks for and leaves alone, to have a processor to itself."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    room: int = 0


# For a few hundred tokens, as a step of guided decoding has: the fastest whole step on Hopper (135M, 512 tokens).
_MANY = 256
_PLAIN = _GATED = Tiling(64, 64, 64, 4, 4)
_ONTO = Tiling(64, 64, 64, 4, 5, room=36)
_ONTO_DEEP = Tiling(64, 64, 64, 4, 4)  # where more columns come in than go out
_HEAD = Tiling(16, 0, 64, 4, 3)  # all columns
_HEAD_SHARE, _HEAD_SHARES = 192, 8  # least width of a share; most shares


def tiling(tokens: int, columns: int, many: Tiling = _PLAIN) -> Tiling:
    """For so many tokens and columns of the result; ``many``: what ``_MANY`` tokens and more take."""
    if tokens < _MANY:
        many = Tiling(64 if tokens > 32 else 32 if tokens > 16 else 16, 64, 64, 4, 4)
    wide = many.columns
    # With few tokens the weights are what takes time: more processors read them faster.
    while wide > 16 and triton.cdiv(columns, wide) * triton.cdiv(tokens, many.rows) < 64:
        wide //= 2
    return many._replace(columns=wide)


@triton.jit
def _embed_kernel(id_ptr, table_ptr, norm_ptr, hidden_ptr, scaled_ptr, sum_ptr, V, K, M, BK: tl.constexpr,
                  PARTS: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One program per token."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    real = k < K
    at = tl.minimum(tl.maximum(tl.load(id_ptr + row), 0), V - 1).to(tl.int64)
    x = tl.load(table_ptr + at * K + k, mask=real, other=0.0)
    tl.store(hidden_ptr + row * K + k, x, mask=real)
    x = x.to(tl.float32)
    scaled = x * tl.load(norm_ptr + k, mask=real, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + row * K + k, scaled.to(scaled_ptr.dtype.element_ty), mask=real)
    for part in tl.static_range(PARTS):
        tl.store(sum_ptr + part * M + row, tl.sum(x * x, 0) if part == 0 else 0.0)


def embed(ids: torch.Tensor, table: torch.Tensor, norm: torch.Tensor, stream: Stream) -> None:
    """Fill the stream with the rows ``ids [N]`` of ``table [V, H]``; of an id that is none, with another row."""
    tokens, width = stream.hidden.shape
    carved(_embed_kernel[(tokens,)](
        ids, table, norm, *stream, len(table), width, tokens, BK=triton.next_power_of_2(width), PARTS=len(stream.sums),
        EARLY=launches_early(table.device), num_warps=4, **launch_options(table.device),
    ))  # fmt: skip


@triton.jit
def _product_kernel(
    x_ptr, sum_ptr, w_ptr, bias_ptr, out_ptr, scaled_ptr, norm_ptr, new_sum_ptr, M, eps,
    N: tl.constexpr, K: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr,
    KIND: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_M: tl.constexpr, EARLY: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One program per (tile of columns, tile of tokens). ``KIND``: 0 a plain product, 1 two of them and silu(one) x
    other, 2 added to the residual stream ``out``."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows and columns past the end are read as the first ones and never written: loads need no mask for them.
    m_in = m if EVEN_M else tl.where(m < M, m, 0)
    n_in = n if N % BN == 0 else tl.where(n < N, n, 0)
    real = (m < M)[:, None] & (n < N)[None, :]
    if EARLY:
        if ROOM is not None:
            tl.inline_asm_elementwise(ROOM, "=r,r", [tl.program_id(0)], tl.int32, False, 1)
        # The programs that read the same weights fetch a share of them each.
        line = tl.arange(0, LINES)
        mine = (line % tl.num_programs(1) == tl.program_id(1)) & (line * LINE < K)
        first = w_ptr + n_in[:, None] * K
        fetch(first + tl.where(mine, line * LINE, 0)[None, :])
        if KIND == 1:
            fetch(first + N * K + tl.where(mine, line * LINE, 0)[None, :])
        gdc_wait()
        gdc_launch_dependents()
    at = m_in[:, None] * N + n_in[None, :]
    # What is wanted after the products is on its way while they are made.
    if PARTS > 0:
        part = tl.arange(0, BP)
        squares = tl.load(sum_ptr + part[:, None] * M + m_in[None, :], mask=(part < PARTS)[:, None], other=0.0)
    if KIND == 2:
        before = tl.load(out_ptr + at, mask=real, other=0.0)
        weight = tl.load(norm_ptr + n_in)
    x_at = x_ptr + m_in[:, None] * K + k[None, :]
    w_at = w_ptr + n_in[None, :] * K + k[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    other = tl.zeros([BM, BN], tl.float32)
    for step in range(0, K, BK):
        if K % BK == 0:
            x = tl.load(x_at + step)
            w = tl.load(w_at + step)
        else:
            x = tl.load(x_at + step, mask=(step + k < K)[None, :], other=0.0)
            w = tl.load(w_at + step, mask=(step + k < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if KIND == 1:
            if K % BK == 0:
                w = tl.load(w_at + N * K + step)
            else:
                w = tl.load(w_at + N * K + step, mask=(step + k < K)[:, None], other=0.0)
            other = tl.dot(x, w, other, input_precision="ieee")
    scale = tl.full([BM], 1.0, tl.float32)
    if PARTS > 0:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        acc = acc * scale[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n_in).to(tl.float32)[None, :]
    if KIND == 1:
        acc = acc / (1.0 + tl.exp(-acc)) * (other * scale[:, None])
    if KIND == 2:
        # Rounded as a residual stream in this precision is: the norm reads what the next layer will read.
        total = (acc + before.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, total, mask=real)
        acc = tl.where(real, total.to(tl.float32), 0.0)
        tl.store(new_sum_ptr + tl.program_id(0) * M + m, tl.sum(acc * acc, 1), mask=m < M)
        acc = acc * weight.to(tl.float32)[None, :]
        tl.store(scaled_ptr + at, acc.to(scaled_ptr.dtype.element_ty), mask=real)
    else:
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=real)


@functools.cache
def _shared_memory(device: torch.device, stages: int, tile: int, room: int) -> tuple[int, str | None]:
    """Loads under way of ``tile`` bytes each, as many as this device has memory for, and what makes ``room`` beside
    them: on Hopper, for which it is chosen."""
    if device.type != "cuda":
        return stages, None
    properties: Any = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block_optin
    wanted = room if torch.cuda.get_device_capability(device) == (9, 0) else 0
    stages = max(1, min(stages, (most - wanted) // tile))
    return stages, f"{{ .shared .align 16 .b8 room[{wanted}]; mov.u32 $0, room; }}" if wanted else None


def _multiply(
    x: torch.Tensor,
    sums: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scaled: torch.Tensor | None,
    norm: torch.Tensor | None,
    new_sums: torch.Tensor | None,
    kind: int,
    eps: float,
    cut: Tiling,
) -> None:
    tokens, depth = x.shape
    columns = out.shape[1]
    parts = 0 if sums is None else len(sums)
    line = 128 // x.element_size()
    tile = (cut.rows + cut.columns * (2 if kind == 1 else 1)) * cut.depth * x.element_size()
    stages, room = _shared_memory(x.device, cut.stages, tile, cut.room << 10)
    carved(_product_kernel[(triton.cdiv(columns, cut.columns), triton.cdiv(tokens, cut.rows))](
        x, sums, weight, bias, out, scaled, norm, new_sums, tokens, eps,
        N=columns, K=depth, LINES=triton.next_power_of_2(triton.cdiv(depth, line)), LINE=line,
        PARTS=parts, BP=triton.next_power_of_2(max(1, parts)), KIND=kind, BIAS=bias is not None,
        BM=cut.rows, BN=cut.columns, BK=cut.depth, EVEN_M=tokens % cut.rows == 0, EARLY=launches_early(x.device),
        ROOM=room, num_warps=cut.warps, num_stages=stages, **launch_options(x.device),
    ))  # fmt: skip


def product(
    stream: Stream, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, cut: Tiling | None = None
) -> torch.Tensor:
    """The normed stream times ``weight [O, H]``, and ``bias [O]``: ``[N, O]``."""
    tokens = len(stream.scaled)
    out = torch.empty(tokens, len(weight), dtype=weight.dtype, device=weight.device)
    cut = cut or tiling(tokens, len(weight))
    _multiply(stream.scaled, stream.sums, weight, bias, out, None, None, None, 0, eps, cut)
    return out


def gated_product(stream: Stream, weight: torch.Tensor, eps: float, cut: Tiling | None = None) -> torch.Tensor:
    """``silu(x G') x (x U')`` of the normed stream x and ``weight [2 I, H]``, G before U: ``[N, I]``."""
    tokens = len(stream.scaled)
    inner = len(weight) // 2
    out = torch.empty(tokens, inner, dtype=weight.dtype, device=weight.device)
    cut = cut or tiling(tokens, inner, _GATED)
    _multiply(stream.scaled, stream.sums, weight, None, out, None, None, None, 1, eps, cut)
    return out


def product_onto(
    stream: Stream, x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, cut: Tiling | None = None
) -> Stream:
    """Add ``x [N, I]`` times ``weight [H, I]`` to the stream, in place; ``norm [H]`` is of the norm that comes next."""
    cut = cut or tiling(len(x), len(weight), _ONTO_DEEP if x.shape[1] > len(weight) else _ONTO)
    parts = triton.cdiv(len(weight), cut.columns)
    made = Stream(stream.hidden, stream.scaled, torch.empty(parts, len(x), dtype=torch.float32, device=x.device))
    _multiply(x, None, weight, None, stream.hidden, stream.scaled, norm, made.sums, 2, 0.0, cut)
    return made


@triton.jit
def _add_norm_kernel(x_ptr, delta_ptr, norm_ptr, out_ptr, K, eps, ADD: tl.constexpr, BK: tl.constexpr,
                     EARLY: tl.constexpr):  # fmt: skip
    """One program per token."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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
        hidden, delta, weight, out, width, eps, ADD=delta is not None, BK=triton.next_power_of_2(width),
        EARLY=launches_early(hidden.device), num_warps=4, **launch_options(hidden.device),
    )  # fmt: skip
    return out


@triton.jit
def _silu_kernel(x_ptr, out_ptr, INNER, BN: tl.constexpr, EARLY: tl.constexpr):
    """One program per (tile of the inner width, token)."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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
    _silu_kernel[(triton.cdiv(inner, bn), tokens)](
        both, out, inner, BN=bn, EARLY=launches_early(both.device), num_warps=4, **launch_options(both.device)
    )
    return out


@triton.jit
def _head_kernel(
    x_ptr, first_bias_ptr, w_ptr, part_ptr, M, WIDTH: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr,
    SHARE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program per (tile of tokens, share of the width): by tiles of tokens alone most processors have nothing to
    do."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    acc = tl.zeros([BM, BC], tl.float32)
    for step in range(0, SHARE, BK):
        k = tl.program_id(1) * SHARE + step + tl.arange(0, BK)
        real = (m < M)[:, None] & (k < WIDTH)[None, :]
        x = tl.zeros([BM, BK], tl.float32) + tl.load(first_bias_ptr + k, mask=k < WIDTH, other=0.0)[None, :]
        for part in tl.static_range(PARTS):
            x += tl.load(x_ptr + (m[:, None] * PARTS + part) * WIDTH + k[None, :], mask=real, other=0.0)
        w = tl.load(
            w_ptr + c[None, :] * WIDTH + k[:, None], mask=(c < COUNT)[None, :] & (k < WIDTH)[:, None], other=0.0
        )
        acc = tl.dot(x / (1.0 + tl.exp(-x)), w, acc, input_precision="tf32x3")
    at = (tl.program_id(1) * M + m)[:, None] * BC + c[None, :]
    tl.store(part_ptr + at, acc, mask=(m < M)[:, None] & (c < COUNT)[None, :])


@triton.jit
def _head_end_kernel(part_ptr, bias_ptr, out_ptr, utility_ptr, mean_ptr, M, COUNT: tl.constexpr, SHARES: tl.constexpr,
                     MEANS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One program per tile of tokens: the shares together."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    real = (m < M)[:, None] & (c < COUNT)[None, :]
    acc = tl.zeros([BM, BC], tl.float32) + tl.load(bias_ptr + c, mask=c < COUNT, other=0.0)[None, :]
    for share in tl.static_range(SHARES):
        acc += tl.load(part_ptr + (share * M + m)[:, None] * BC + c[None, :], mask=real, other=0.0)
    # The value logit stays as it is; the rest become log-probabilities.
    bins = tl.where(((c < COUNT) & (c > 0))[None, :], acc, float("-inf"))
    peak = tl.max(bins, 1)
    norm = peak + tl.log(tl.sum(tl.exp(bins - peak[:, None]), 1))
    acc = tl.where((c > 0)[None, :], acc - norm[:, None], acc)
    tl.store(out_ptr + m[:, None] * COUNT + c[None, :], acc, mask=real)
    if MEANS:
        bin = (c > 0) & (c < COUNT)
        utility = tl.load(utility_ptr + c - 1, mask=bin, other=0.0)
        mean = tl.sum(tl.where(bin[None, :], tl.exp(acc), 0.0) * utility[None, :], 1)
        tl.store(mean_ptr + m, mean, mask=m < M)


def head_numbers(
    first: torch.Tensor,
    first_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    utilities: torch.Tensor | None = None,
    means: torch.Tensor | None = None,
) -> None:
    """The value head from its first product on, in float32: ``first [N, parts x width]`` (summed over the parts),
    ``weight [1 + n, width]`` -> value logits and log-probabilities of bins in ``out [N, 1 + n]``; with float32
    ``utilities [n]`` of bins also each token's expected utility, in ``means [N]``."""
    tokens, (count, width) = len(first), weight.shape
    cut, early = _HEAD, launches_early(first.device)
    depth = min(cut.depth, max(16, triton.next_power_of_2(width)))
    share = max(_HEAD_SHARE, triton.cdiv(triton.cdiv(width, _HEAD_SHARES), depth) * depth)
    shares, columns = triton.cdiv(width, share), max(16, triton.next_power_of_2(count))
    parts = torch.empty(shares, tokens, columns, dtype=torch.float32, device=first.device)
    _head_kernel[(triton.cdiv(tokens, cut.rows), shares)](
        first, first_bias, weight, parts, tokens, WIDTH=width, COUNT=count, PARTS=first.shape[1] // width,
        SHARE=share, BM=cut.rows, BK=depth, BC=columns, EARLY=early, num_warps=cut.warps, num_stages=cut.stages,
        **launch_options(first.device),
    )  # fmt: skip
    _head_end_kernel[(triton.cdiv(tokens, 4),)](
        parts, bias, out, utilities, means, tokens, COUNT=count, SHARES=shares,
        MEANS=utilities is not None, BM=4, BC=columns, EARLY=early, num_warps=4,
        **launch_options(first.device),
    )  # fmt: skip
