"""Triton kernel of a decoding step: candidates (or one new token) over a paged prefix. On Hopper a kernel in CUDA
(``hopper``) takes its place for the shapes that it knows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lenvm.paged import hopper
from lenvm.paged.layer_kernels import carved, fetch, launch_options, launches_early

__all__ = ["Rotation", "StepScratch", "promote_tokens", "rotate_and_store", "step_attention", "store_tokens"]

_WARPS, _TILE = 4, 64
_LEAST = 4  # tiles of a share: of less, putting shares together takes longer than it saves
_MOST_SPLITS, _MOST_QUERIES = 8, 64
_PROGRAMS_TIMES_DIM, _PROGRAMS = 192, 1.5  # on each processor: of long prefixes, of short ones


@triton.jit
def _halves(x_ptr, norm_ptr, cos, sin, real, eps, D: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr):
    """Both halves ``[BM, D / 2]`` of heads, normed and rotated where they are to be: a rotation mixes the halves, and
    what is read in halves is read in whole lines."""
    h = tl.arange(0, D // 2)[None, :]
    one, two = tl.load(x_ptr + h, mask=real, other=0.0), tl.load(x_ptr + D // 2 + h, mask=real, other=0.0)
    if ROTATE:
        x, y = one.to(tl.float32), two.to(tl.float32)
        if NORM:
            factor = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / D + eps)[:, None]
            x = x * factor * tl.load(norm_ptr + h).to(tl.float32)
            y = y * factor * tl.load(norm_ptr + D // 2 + h).to(tl.float32)
        one, two = (x * cos - y * sin).to(one.dtype), (y * cos + x * sin).to(two.dtype)
    return one, two


@triton.jit
def _whole(x_ptr, norm_ptr, cos, sin, real, eps, D: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr):
    """Heads ``[BM, D]``, normed and rotated where they are to be; ``sin`` is negative in the first half. What a number
    is mixed with, half a head away, is loaded again."""
    d = tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + d, mask=real, other=0.0)
    if ROTATE:
        other = (d + D // 2) % D
        y = tl.load(x_ptr + other, mask=real, other=0.0).to(tl.float32)
        one = x.to(tl.float32)
        if NORM:
            factor = tl.rsqrt(tl.sum(one * one, 1) / D + eps)[:, None]
            one = one * factor * tl.load(norm_ptr + d).to(tl.float32)
            y = y * factor * tl.load(norm_ptr + other).to(tl.float32)
        x = (one * cos + y * sin).to(x.dtype)
    return x


@triton.jit
def _blocks(table_ptr, index, end, columns, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of each place ``[TILE]`` of tile ``index``; 0 past the table's end."""
    place = tl.arange(0, TILE)
    column = index * (TILE // SIZE) + place // SIZE
    return tl.load(table_ptr + column, mask=(place * 0 + index < end) & (column < columns), other=0)


@triton.jit
def _tile(k_ptr, v_ptr, block, index, end, stride_pb, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Keys and values ``[TILE, D]`` of tile ``index`` of the prefix, which lies in these blocks; anything from ``end``
    on. A tile is whole blocks: what a block holds past the prefix, and block 0 past the table's end, is stale but
    finite, and its weight is 0."""
    place = tl.arange(0, TILE)
    at = (block.to(tl.int64) * stride_pb + place % SIZE * D)[:, None] + tl.arange(0, D)[None, :]
    real = (place * 0 + index < end)[:, None]
    return tl.load(k_ptr + at, mask=real), tl.load(v_ptr + at, mask=real)


@triton.jit
def _together(part_ptr, stat_ptr, here, real, parts, BM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """The shares' sums over one peak. Unrolled, so that all loads are under way together."""
    d = tl.arange(0, D)
    peak = tl.full([BM], float("-inf"), tl.float32)
    for part in tl.static_range(SPLITS):
        seen = here * 0 + part < parts
        peak = tl.maximum(peak, tl.load(stat_ptr + here + part * BM, mask=seen, other=float("-inf")))
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for part in tl.static_range(SPLITS):
        seen = here * 0 + part < parts
        there = here + part * BM
        weight = tl.exp2(tl.load(stat_ptr + there, mask=seen, other=float("-inf")) - peak)
        total += weight
        mean = tl.load(part_ptr + there[:, None] * D + d[None, :], mask=seen[:, None] & real, other=0.0)
        acc += mean.to(tl.float32) * weight[:, None]
    return acc, total


@triton.jit
def _step_kernel(  # noqa: PLR0915
    q_ptr, k_ptr, v_ptr, pool_k_ptr, pool_v_ptr, table_ptr, len_ptr, start_ptr, out_ptr, part_ptr, stat_ptr, count_ptr,
    cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, kept_k_ptr, kept_v_ptr, scale, eps,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_pb, stride_ph, stride_table, stride_on,
    G: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, BM: tl.constexpr, TILES_M: tl.constexpr,
    SPLITS: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, ROTATE: tl.constexpr,
    NORM: tl.constexpr, LINE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program per (row and tile of its queries, key head, share of the prefix): G heads for each token share every
    key and value read. The last program of a row, tile and head that is done puts the shares together."""
    row = tl.program_id(0) // TILES_M
    head = tl.program_id(1)
    part = tl.program_id(2)
    m = (tl.program_id(0) % TILES_M) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    place = tl.arange(0, TILE)
    length = tl.load(len_ptr + row)
    tiles = tl.cdiv(length, TILE)
    share = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    parts = tl.maximum(tl.cdiv(tiles, share), 1)  # those that have something to do
    if part < parts:
        own_table = table_ptr + row * stride_table
        first, end = part * share, tl.minimum(part * share + share, tiles)
        if EARLY:
            # The prefix is there already: it comes into the cache while the products before this are made.
            line = tl.arange(0, TILE * D // LINE) * LINE
            for index in range(first, tl.minimum(end, first + 8)):
                column = index * (TILE // SIZE) + line // D // SIZE
                block = tl.load(own_table + column, mask=column < stride_table, other=0)
                base = block.to(tl.int64) * stride_pb + head * stride_ph + line % (SIZE * D)
                fetch(pool_k_ptr + base)
                fetch(pool_v_ptr + base)
        cos, sin = 1.0, 0.0
        if ROTATE:
            angle = length * (D // 2) + d % (D // 2)
            cos = tl.load(cos_ptr + angle)[None, :]
            sin = (tl.load(sin_ptr + angle) * tl.where(d < D // 2, -1.0, 1.0))[None, :]
        # Read before the wait, and not only fetched: see the rule at the top of ``layer_kernels``.
        own_k, own_v = pool_k_ptr + head * stride_ph, pool_v_ptr + head * stride_ph
        block = _blocks(own_table, first, end, stride_table, SIZE, TILE)
        keys, values = _tile(own_k, own_v, block, first, end, stride_pb, D, SIZE, TILE)
        block = _blocks(own_table, first + 1, end, stride_table, SIZE, TILE)
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        if WIDTH > 0:
            start, count = row * WIDTH, WIDTH
        else:
            start = tl.load(start_ptr + row).to(tl.int32)
            count = tl.load(start_ptr + row + 1).to(tl.int32) - start
        token = start + m // G
        real = (m // G < count)[:, None]
        q_head = head * G + m % G
        q_at = q_ptr + q_head[:, None] * stride_qh + token[:, None] * stride_qn
        query = _whole(q_at, q_norm_ptr, cos, sin, real, eps, D, ROTATE, NORM)
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        if part == parts - 1:
            # The tree mask's diagonal: each of the row's tokens sees itself and none of the others. It falls to the
            # last share, which has the fewest tiles.
            k_at = k_ptr + head * stride_kh + token[:, None] * stride_kn
            own = _whole(k_at, k_norm_ptr, cos, sin, real, eps, D, ROTATE, NORM)
            v_at = v_ptr + head * stride_vh + token[:, None] * stride_vn + d[None, :]
            v_own = tl.load(v_at, mask=real, other=0.0)
            if ROTATE:
                # Candidates are kept: the one that is chosen is not computed again. Once for the heads that share it.
                kept = (token[:, None] * tl.num_programs(1) + head) * D + d[None, :]
                once = real & (m % G == 0)[:, None]
                tl.store(kept_k_ptr + kept, own, mask=once)
                tl.store(kept_v_ptr + kept, v_own, mask=once)
            peak = tl.sum(query.to(tl.float32) * own.to(tl.float32), 1)
            total += 1.0
            acc = v_own.to(tl.float32)
        # Each tile is on its way while the one before is worked on, and its blocks were looked up one before that: the
        # pipeliner would wait for it first. Peaks are of scores as they are: the scale, which is positive, comes in
        # where the exponent is taken.
        for index in range(first, end):
            next_keys, next_values = _tile(own_k, own_v, block, index + 1, end, stride_pb, D, SIZE, TILE)
            block = _blocks(own_table, index + 2, end, stride_table, SIZE, TILE)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
            if length < (index + 1) * TILE:
                # Finite: a row without a key, which nobody reads, must not become NaN.
                scores = tl.where((place < length - index * TILE)[None, :], scores, -1e30)
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            weights = tl.exp2(scores * scale - (new_peak * scale)[:, None])
            shrink = tl.exp2((peak - new_peak) * scale)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
            peak, keys, values = new_peak, next_keys, next_values
        done = parts == 1
        if SPLITS > 1:
            if parts > 1:
                mine = tl.program_id(0) * tl.num_programs(1) + head
                here = mine * SPLITS * BM + tl.arange(0, BM)
                # Each share's mean in the precision of the answer: what is written and read again is a quarter so.
                mean = (acc * (1.0 / total)[:, None]).to(part_ptr.dtype.element_ty)
                tl.store(part_ptr + (here + part * BM)[:, None] * D + d[None, :], mean, mask=real)
                tl.store(stat_ptr + here + part * BM, peak * scale + tl.log2(total))
                # Every thread's stores, before the one thread that counts.
                tl.debug_barrier()
                done = tl.atomic_add(count_ptr + mine, 1, sem="acq_rel") == parts - 1
                if done:
                    tl.store(count_ptr + mine, 0)  # for the next layer
                    acc, total = _together(part_ptr, stat_ptr, here, real, parts, BM, D, SPLITS)
        if done:
            tl.store(
                out_ptr + token[:, None] * stride_on + q_head[:, None] * D + d[None, :],
                (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty),
                mask=real,
            )


@dataclass(frozen=True)
class StepScratch:
    """What the shares of a prefix are put together in; one for all layers of a forward, one after another, and for
    forwards that follow each other.

    ``parts [programs x splits x BM, D]`` of the queries' precision (each share's mean), ``stats [programs x splits x
    BM]`` float32 (the binary logarithm of its sum), ``counts [programs]`` int32, 0 between layers. Programs: rows x
    tiles of queries x key heads.
    """

    splits: int
    parts: torch.Tensor
    stats: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def make(
        cls, rows: int, heads: int, kv_heads: int, width: int, query: torch.Tensor, *, long: bool = True
    ) -> StepScratch:
        """For so many rows of up to ``width`` tokens, and queries like ``query [..., D]``. ``long``: of some
        prefixes of many hundreds of tokens, of which shares are made."""
        dim, device = query.shape[-1], query.device
        block, tiles = _query_tiles(width * heads // kv_heads)
        programs = rows * tiles * kv_heads
        # As many programs as run together, and no more: shares cost something to put together.
        most, room = _MOST_SPLITS, _PROGRAMS_TIMES_DIM / dim
        if not long:
            most, room = most // 2, min(room, _PROGRAMS)
        splits = max(1, min(most, round(room * _processors(device) / programs)))
        places = programs * splits * block if splits > 1 else 1
        return cls(
            splits,
            torch.empty(places, dim, dtype=query.dtype, device=device),
            torch.empty(places, dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
        )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _query_tiles(queries: int) -> tuple[int, int]:
    """Size of a tile of a row's queries, and how many there are."""
    block = min(_MOST_QUERIES, max(16, triton.next_power_of_2(queries)))
    return block, triton.cdiv(queries, block)


@dataclass(frozen=True)
class Rotation:
    """What makes queries and keys of a layer's raw products: rotary embedding and, for Qwen3, the norms of heads.

    ``cos``/``sin [context, D / 2]`` float32; a token stands at its row's prefix length. ``kept_keys``/``kept_values
    [N, kv_heads, D]`` are filled with what the tokens' keys and values are.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    kept_keys: torch.Tensor
    kept_values: torch.Tensor


def step_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor,
    tables: torch.Tensor,
    prefix_lens: torch.Tensor,
    starts: torch.Tensor | None,
    width: int,
    scaling: float,
    scratch: StepScratch | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Attention of a step: each token sees its row's prefix and itself.

    Args:
        query, keys, values: ``[heads, N, D]``, ``[kv_heads, N, D]`` twice; before the rotation where one is given.
        pool_keys, pool_values: ``[blocks, kv_heads, size, D]``.
        tables, prefix_lens: ``[B, blocks]``, ``[B]``.
        starts: row b owns tokens ``starts[b] .. starts[b + 1]``, at most ``width``; None: exactly ``width`` each.
        scratch: shared by layers and forwards that follow one another.

    Returns:
        ``[N, heads, D]``.
    """
    if starts is None and rotation is not None:
        given = hopper.Given(query, keys, values, pool_keys, pool_values, tables, prefix_lens, width, rotation)
        if hopper.suits(given):
            return hopper.step_attention(given, scaling)
    heads, tokens, dim = query.shape
    kv_heads, rows, size = keys.shape[0], tables.shape[0], pool_keys.shape[2]
    if scratch is None:
        scratch = StepScratch.make(rows, heads, kv_heads, width, query)
    block, tiles = _query_tiles(width * heads // kv_heads)
    out = torch.empty((tokens, heads, dim), dtype=query.dtype, device=query.device)
    cos = sin = q_norm = k_norm = kept_keys = kept_values = None
    if rotation is not None:
        cos, sin, q_norm, k_norm = rotation.cos, rotation.sin, rotation.q_norm, rotation.k_norm
        kept_keys, kept_values = rotation.kept_keys, rotation.kept_values
    # Only among kernels that wait for each other: what comes before is then known to be done.
    early = rotation is not None and launches_early(query.device)
    carved(_step_kernel[(rows * tiles, kv_heads, scratch.splits)](
        query, keys, values, pool_keys, pool_values, tables, prefix_lens, starts, out,
        scratch.parts, scratch.stats, scratch.counts, cos, sin, q_norm, k_norm, kept_keys, kept_values,
        scaling * 1.4426950408889634, rotation.eps if rotation is not None else 0.0,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        pool_keys.stride(0), pool_keys.stride(1), tables.stride(0), out.stride(0),
        G=heads // kv_heads, D=dim, SIZE=size, TILE=max(_TILE, size), BM=block, TILES_M=tiles, SPLITS=scratch.splits,
        LEAST=_LEAST, WIDTH=0 if starts is not None else width,
        ROTATE=rotation is not None, NORM=q_norm is not None, LINE=min(dim, 128 // query.element_size()), EARLY=early,
        num_warps=_WARPS, num_stages=1,
        **(launch_options(query.device) if early else {}),
    ))  # fmt: skip
    return out


@triton.jit
def _rotate_kernel(
    x_ptr, position_ptr, block_ptr, offset_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, pool_k_ptr, pool_v_ptr, eps,
    stride_pb, stride_ph,
    HEADS: tl.constexpr, KV: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, D // 2)[None, :]
    angle = tl.load(position_ptr + token) * (D // 2) + h
    cos, sin = tl.load(cos_ptr + angle), tl.load(sin_ptr + angle)
    own = x_ptr + token * (HEADS + 2 * KV) * D
    head = tl.arange(0, BH)[:, None]
    at, real = own + head * D, head < HEADS
    q_1, q_2 = _halves(at, q_norm_ptr, cos, sin, real, eps, D, True, NORM)
    tl.store(at + h, q_1, mask=real)
    tl.store(at + D // 2 + h, q_2, mask=real)
    head = tl.arange(0, BV)[:, None]
    at, real = own + (HEADS + head) * D, head < KV
    k_1, k_2 = _halves(at, k_norm_ptr, cos, sin, real, eps, D, True, NORM)
    tl.store(at + h, k_1, mask=real)
    tl.store(at + D // 2 + h, k_2, mask=real)
    d = tl.arange(0, D)[None, :]
    block = tl.load(block_ptr + token).to(tl.int64)
    to = block * stride_pb + head * stride_ph + tl.load(offset_ptr + token) * D
    # Block 0 is everybody's: what is read there has no weight, but 0 x NaN is NaN, and a padded token may be that.
    real = real & (head * 0 + block > 0)
    tl.store(pool_k_ptr + to + h, k_1, mask=real)
    tl.store(pool_k_ptr + to + D // 2 + h, k_2, mask=real)
    tl.store(pool_v_ptr + to + d, tl.load(own + (HEADS + KV + head) * D + d, mask=real), mask=real)


def rotate_and_store(
    qkv: torch.Tensor,
    heads: int,
    positions: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    eps: float,
) -> None:
    """Rotate the queries and keys of raw products ``qkv [N, heads + 2 kv_heads, D]`` in place (after the norms of
    heads, for Qwen3), and write keys and values to place ``offsets[N]`` of block ``blocks[N]`` (0: nowhere) of the
    pool. ``cos``/``sin [context, D / 2]`` float32."""
    tokens, total, dim = qkv.shape
    kv_heads = (total - heads) // 2
    _rotate_kernel[(tokens,)](
        qkv, positions, blocks, offsets, cos, sin, *norms, pool_keys, pool_values, eps,
        pool_keys.stride(0), pool_keys.stride(1),
        HEADS=heads, KV=kv_heads, BH=triton.next_power_of_2(heads), BV=triton.next_power_of_2(kv_heads), D=dim,
        NORM=norms[0] is not None, EARLY=launches_early(qkv.device), num_warps=2, **launch_options(qkv.device),
    )  # fmt: skip


@triton.jit
def _store_kernel(
    k_ptr, v_ptr, pool_k_ptr, pool_v_ptr, token_ptr, block_ptr, offset_ptr,
    stride_kh, stride_kn, stride_vh, stride_vn, stride_pb, stride_ph,
    HEADS: tl.constexpr, BH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program per row: the keys and values of one token, all heads."""
    row = tl.program_id(0)
    head = tl.arange(0, BH)[:, None]
    d = tl.arange(0, D)[None, :]
    real = head < HEADS
    token = tl.load(token_ptr + row)
    to = tl.load(block_ptr + row).to(tl.int64) * stride_pb + head * stride_ph + tl.load(offset_ptr + row) * D + d
    tl.store(pool_k_ptr + to, tl.load(k_ptr + head * stride_kh + token * stride_kn + d, mask=real), mask=real)
    tl.store(pool_v_ptr + to, tl.load(v_ptr + head * stride_vh + token * stride_vn + d, mask=real), mask=real)


def store_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    pool_keys: torch.Tensor,
    pool_values: torch.Tensor,
    tokens: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Write token ``tokens[w]`` of ``keys``/``values [kv_heads, N, D]`` to place ``offsets[w]`` of block ``blocks[w]``
    of the pool ``[blocks, kv_heads, size, D]``; int64 ``[W]`` each."""
    heads, _, dim = keys.shape
    _store_kernel[(tokens.shape[0],)](
        keys, values, pool_keys, pool_values, tokens, blocks, offsets,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), pool_keys.stride(0), pool_keys.stride(1),
        HEADS=heads, BH=triton.next_power_of_2(heads), D=dim, num_warps=1,
    )  # fmt: skip


@triton.jit
def _promote_kernel(
    from_ptr, pool_k_ptr, pool_v_ptr, stride_pl, stride_pb, stride_ph,
    HEADS: tl.constexpr, BH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program per (row, layer): the keys and values of the row's chosen candidate, all heads."""
    row = from_ptr + tl.program_id(0) * 5
    layer = tl.program_id(1).to(tl.int64)
    stride = tl.load(row + 2)
    if stride > 0:
        h = tl.arange(0, BH)[:, None]
        d = tl.arange(0, D)[None, :]
        real = h < HEADS
        # Every row may come from a tensor of its own.
        kind = tl.pointer_type(pool_k_ptr.dtype.element_ty)
        own = layer * stride + h * D + d
        to = layer * stride_pl + tl.load(row + 3) * stride_pb + h * stride_ph + tl.load(row + 4) * D + d
        tl.store(pool_k_ptr + to, tl.load(tl.load(row).to(kind) + own, mask=real), mask=real)
        tl.store(pool_v_ptr + to, tl.load(tl.load(row + 1).to(kind) + own, mask=real), mask=real)


def promote_tokens(sources: torch.Tensor, pool_keys: torch.Tensor, pool_values: torch.Tensor) -> None:
    """Copy one token's keys and values into the pool ``[layers, blocks, kv_heads, size, D]`` for each row.

    ``sources [rows, 5]`` int64: addresses of the token's keys and values in the first layer, elements from one layer
    to the next (0: nothing to copy), block, offset in the block. In a layer they are ``[kv_heads, D]``, contiguous.
    """
    layers, _, heads, _, dim = pool_keys.shape
    _promote_kernel[(len(sources), layers)](
        sources, pool_keys, pool_values, pool_keys.stride(0), pool_keys.stride(1), pool_keys.stride(2),
        HEADS=heads, BH=triton.next_power_of_2(heads), D=dim, num_warps=4,
    )  # fmt: skip
