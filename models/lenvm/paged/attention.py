"""One packed, tree-masked forward of any Hugging Face decoder over paged prefixes.

A call carries rows. A row is a cached prefix, a tail of new tokens that extend it, and candidates: possible next
tokens. All tokens of all rows travel through the backbone side by side as one sequence ``[1, tokens]``; only attention
knows the rows. A tail token sees the prefix and the tail up to itself; a candidate sees the prefix, the whole tail and
itself, at the position right after the tail (the tree mask). The backbone finds this function through transformers'
attention interface, and gets the plan as a keyword argument that its layers hand on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lenvm.errors import BackboneError
from lenvm.paged.pool import BlockPool, to_device

__all__ = [
    "ATTENTION",
    "HostPlan",
    "Plan",
    "Row",
    "attend",
    "attend_plan",
    "build_plan",
    "fresh_attention",
    "opaque_attention",
    "packed_forward",
    "suits_fresh_attention",
    "use_paged_attention",
]

ATTENTION = "lenvm_paged"
_SHORT = 32  # new tokens a row up to which a call is a decoding step rather than a prefill


@dataclass(frozen=True)
class Row:
    """One row of a call. ``blocks`` must already cover ``prefix_len + len(tail)`` tokens."""

    blocks: Sequence[int]
    prefix_len: int
    tail: Sequence[int] = ()
    candidates: Sequence[int] = ()


@dataclass(frozen=True)
class _Group:
    """Rows of like width and prefix, padded to one shape: ``B`` rows of ``T`` new tokens over ``S`` cached places."""

    tables: torch.Tensor  # [B, blocks] block ids, padded with block 0
    pad: torch.Tensor  # [B * T] token of each padded place
    tokens: torch.Tensor  # [n] the group's tokens ...
    places: torch.Tensor  # [n] ... and their padded places
    mask: torch.Tensor  # [B, 1, T, S + T]


@dataclass(frozen=True)
class HostPlan:
    """Where the tokens of a plan stand, on the host; all of them are stored."""

    ids: NDArray[np.int64]  # [N]
    positions: NDArray[np.int64]  # [N]
    blocks: NDArray[np.int64]  # [N]
    offsets: NDArray[np.int64]  # [N]
    starts: NDArray[np.int64]  # [B + 1]


@dataclass
class Plan:
    """Where every token of a packed forward stands: ``N`` tokens, ``B`` rows, ``T`` = longest row."""

    pool: BlockPool
    input_ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    write_tokens: torch.Tensor | None  # [W] which tokens are stored ...
    write_blocks: torch.Tensor | None  # [W] ... and where
    write_offsets: torch.Tensor | None  # [W]
    # The step kernel reads these; ``groups`` is empty then.
    tables: torch.Tensor  # [B, blocks]
    prefix_lens: torch.Tensor  # [B]
    starts: torch.Tensor  # [B + 1] first token of each row
    width: int  # T
    groups: list[_Group] = field(default_factory=list)
    fresh: bool = False  # no row has a prefix or candidates, and the GPU has a kernel for that
    host: HostPlan | None = None  # of a fresh plan
    capture: torch.Tensor | None = None  # [C] tokens whose keys and values come back (candidates)
    captured_keys: list[torch.Tensor] = field(default_factory=list)  # per layer [C, kv_heads, head_dim]
    captured_values: list[torch.Tensor] = field(default_factory=list)
    # The graphed sampler promotes inside its own step: it takes every layer's keys and values as they are, [kv_heads,
    # N, head_dim], without a copy.
    capture_all: bool = False
    scratch: Any = None  # StepScratch of the step kernel, made for the first layer


def build_plan(pool: BlockPool, rows: Sequence[Row], *, capture: bool = True) -> Plan:
    """Lay out ``rows`` for one forward; tokens are ordered row by row, tail before candidates."""
    device, size = pool.device, pool.block_size
    tails = np.array([len(row.tail) for row in rows])
    lengths = tails + np.array([len(row.candidates) for row in rows])
    prefixes = np.array([row.prefix_len for row in rows])
    width, total = int(lengths.max()), int(lengths.sum())
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids = np.fromiter(chain.from_iterable(chain(row.tail, row.candidates) for row in rows), np.int64, total)
    row_of = np.repeat(np.arange(len(rows)), lengths)
    local = np.arange(total) - starts[row_of]
    is_tail = local < tails[row_of]
    positions = prefixes[row_of] + np.minimum(local, tails[row_of])

    # Blocks of prefixes and tails; what a prefix has none of is block 0.
    held = np.zeros((len(rows), max(1, pool.blocks_for(int((prefixes + tails).max())))), dtype=np.int64)
    for own, row in zip(held, rows, strict=True):
        own[: min(len(row.blocks), len(own))] = row.blocks[: len(own)]
    deep = max(1, pool.blocks_for(int(prefixes.max())))
    tables = np.where(np.arange(deep) < -(-prefixes[:, None] // size), held[:, :deep], 0)
    written = np.flatnonzero(is_tail)
    blocks = held[row_of[written], positions[written] // size]

    def tensor(array: Any) -> torch.Tensor:
        return to_device(array, device)

    # A decoding step: every new token sees its prefix and itself alone, so the kernel needs no mask.
    step = pool.has_step_kernel and (bool((tails == 0).all()) or width == 1)
    fresh = suits_fresh_attention(pool) and not prefixes.any() and bool((tails == lengths).all())
    groups: list[_Group] = []
    for members in [] if step or fresh else _like_rows(lengths, prefixes, size):
        wide, deep = int(lengths[members].max()), pool.blocks_for(int(prefixes[members].max()))
        place = np.arange(wide)
        filled = place < lengths[members][:, None]
        token = np.where(filled, starts[members][:, None] + place, 0)
        mask = _tree_mask(prefixes[members], tails[members], lengths[members], deep * size)
        groups.append(
            _Group(
                tables=tensor(tables[members, :deep]),
                pad=tensor(token.reshape(-1)),
                tokens=tensor(token[filled]),
                places=tensor(np.flatnonzero(filled)),
                mask=tensor(mask),
            )
        )
    chosen = np.flatnonzero(~is_tail)
    fresh = fresh and not step
    ends = np.append(starts, total)
    return Plan(
        pool=pool,
        input_ids=tensor(ids),
        positions=tensor(positions),
        write_tokens=tensor(written) if len(written) else None,
        write_blocks=tensor(blocks) if len(written) else None,
        write_offsets=tensor(positions[written] % size) if len(written) else None,
        tables=tensor(tables),
        prefix_lens=tensor(prefixes),
        starts=tensor(ends),
        width=width,
        groups=groups,
        fresh=fresh,
        host=HostPlan(ids, positions, blocks, positions % size, ends) if fresh else None,
        capture=tensor(chosen) if capture and len(chosen) else None,
    )


def _like_rows(lengths: Any, prefixes: Any, size: int) -> list[Any]:
    """Indices of rows that may be padded to one shape: one long prompt among decoding rows must not widen them all."""
    wide = np.where(lengths <= _SHORT, 0, np.ceil(np.log2(np.maximum(lengths, 2))))
    deep = np.ceil(np.log2(np.maximum(prefixes / (8 * size), 1)))
    _, group = np.unique(np.stack([wide, deep]), axis=1, return_inverse=True)
    return [np.flatnonzero(group.reshape(-1) == g) for g in range(int(group.max()) + 1)]


def _tree_mask(prefixes: Any, tails: Any, lengths: Any, slots: int) -> Any:
    """``[B, 1, T, slots + T]``: which keys (cached slots, then the row's own new tokens) each new token may see."""
    width = int(lengths.max())
    place = np.arange(width)
    cached = np.broadcast_to((np.arange(slots) < prefixes[:, None])[:, None, :], (len(prefixes), width, slots))
    query, key = place[None, :, None], place[None, None, :]
    tail = tails[:, None, None]
    own = np.where(query < tail, key <= query, (key < tail) | (key == query))
    # A padded place sees itself, so that no row of the softmax is empty.
    own = np.where(query < lengths[:, None, None], own, key == query)
    return np.concatenate([cached, own], axis=2)[:, None]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    plan: Plan,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention interface of transformers: ``query [1, heads, N, D]``, ``key``/``value [1, kv_heads, N, D]``
    -> ``[1, N, heads, D]``. Stores the tail's keys and values in the pool and captures the candidates'."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    return attend_plan(plan, layer, query[0], key[0], value[0], scaling).unsqueeze(0), None


def attend_plan(
    plan: Plan, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``query [heads, N, D]``, ``keys``/``values [kv_heads, N, D]`` -> ``[N, heads, D]``; see :func:`attend`."""
    pool = plan.pool
    if plan.capture_all:
        plan.captured_keys.append(keys)
        plan.captured_values.append(values)
    elif plan.capture is not None:
        plan.captured_keys.append(keys[:, plan.capture].transpose(0, 1))
        plan.captured_values.append(values[:, plan.capture].transpose(0, 1))
    if plan.fresh:
        out = _fresh_attention(query, keys, values, plan, scaling)
    elif plan.groups:
        out = torch.empty(query.shape[1], query.shape[0], query.shape[2], dtype=query.dtype, device=query.device)
        for group in plan.groups:
            out[group.tokens] = _masked_attention(query, keys, values, pool, group, layer, scaling)
    else:
        from lenvm.paged.kernels import StepScratch, step_attention

        if plan.scratch is None:
            plan.scratch = StepScratch.make(len(plan.tables), len(query), len(keys), plan.width, query)
        cache = (pool.keys[layer], pool.values[layer], plan.tables, plan.prefix_lens)
        out = step_attention(query, keys, values, *cache, plan.starts, plan.width, scaling, plan.scratch)
    _store(plan, keys, values, pool.keys[layer], pool.values[layer])
    return out


def _fresh_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: Plan, scaling: float
) -> torch.Tensor:
    """``[heads, N, D]`` and ``[kv_heads, N, D]`` twice -> ``[N, heads, D]``; see :func:`fresh_attention`."""
    q, k, v = (x.transpose(0, 1) for x in (query, keys, values))
    return fresh_attention(q, k, v, plan.starts.int(), plan.width, scaling)


def suits_fresh_attention(pool: BlockPool) -> bool:
    """Whether the GPU has :func:`fresh_attention` for the pool's precision and heads."""
    return (
        pool.device.type == "cuda"
        and pool.dtype in (torch.bfloat16, torch.float16)
        and pool.shape.head_dim % 8 == 0
        and torch.cuda.get_device_capability(pool.device) >= (8, 0)
    )


def fresh_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, width: int, scaling: float
) -> torch.Tensor:
    """Prompts from their first token on: FlashAttention over rows of any lengths, nothing padded, copied or masked.
    ``[N, heads, D]`` and ``[N, kv_heads, D]`` twice, the last axis contiguous; ``starts`` int32 ``[B + 1]``, ``width``
    the longest row."""
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, keys, values, starts, starts, width, width, 0.0, True, False, scale=scaling
    )[0]
    return out


def _store(
    plan: Plan, keys: torch.Tensor, values: torch.Tensor, pool_keys: torch.Tensor, pool_values: torch.Tensor
) -> None:
    """Store the tail. After attention: the masked path reads this row's new tokens from ``keys``, not from the pool."""
    tokens, blocks, offsets = plan.write_tokens, plan.write_blocks, plan.write_offsets
    if tokens is None or blocks is None or offsets is None:
        return
    if plan.pool.has_step_kernel and keys.dtype == plan.pool.dtype:
        from lenvm.paged.kernels import store_tokens

        store_tokens(keys, values, pool_keys, pool_values, tokens, blocks, offsets)
        return
    stored = slice(None) if tokens.numel() == keys.shape[1] else tokens
    pool_keys[blocks, :, offsets] = keys.transpose(0, 1)[stored].to(pool_keys.dtype)
    pool_values[blocks, :, offsets] = values.transpose(0, 1)[stored].to(pool_values.dtype)


def _masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pool: BlockPool,
    group: _Group,
    layer: int,
    scaling: float,
) -> torch.Tensor:
    """The readable path, right on every device: gather, pad, one masked softmax. ``[heads, N, D] -> [n, heads, D]``."""
    heads, _, dim = query.shape
    kv_heads, rows, width = keys.shape[0], group.mask.shape[0], group.mask.shape[2]

    def padded(x: torch.Tensor) -> torch.Tensor:  # [h, N, D] -> [B, h, T, D]
        return x[:, group.pad].view(x.shape[0], rows, width, dim).transpose(0, 1)

    q, k, v = padded(query), padded(keys), padded(values)
    if group.mask.shape[-1] > width:

        def prefix(blocks: torch.Tensor) -> torch.Tensor:  # [B, M, h, size, D] -> [B, h, S, D]
            return blocks[group.tables].transpose(1, 2).reshape(rows, kv_heads, -1, dim).to(query.dtype)

        k = torch.cat([prefix(pool.keys[layer]), k], dim=2)
        v = torch.cat([prefix(pool.values[layer]), v], dim=2)
    # The heads that share keys stand side by side as queries: every key is read once for all of them.
    shared = heads // kv_heads
    q = q.reshape(rows, kv_heads, shared * width, dim)
    mask = group.mask.repeat(1, 1, shared, 1) if shared > 1 else group.mask
    if width <= _SHORT:
        out = _short_attention(q, k, v, mask, scaling)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, width, dim).transpose(1, 2).reshape(rows * width, heads, dim)[group.places]


def _short_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Plain softmax attention: for a few queries over a long prefix two batched products beat the fused CPU kernel."""
    scores = (q @ k.transpose(2, 3)).float() * scaling
    weights = scores.masked_fill_(~mask, float("-inf")).softmax(dim=-1)
    return weights.to(v.dtype) @ v


AttentionInterface.register(ATTENTION, attend)


def opaque_attention() -> None:
    """Keep a compiler out of :func:`attend` (not done at import: this loads the compiler, which takes seconds)."""
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attend))


def use_paged_attention(model: Any) -> None:
    """Route a Hugging Face decoder's attention through :func:`attend`.

    Raises:
        BackboneError: the architecture does not use transformers' attention interface, or uses sliding windows.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise BackboneError(
            f"backbone {config.model_type!r} has {sorted(kinds)} layers: only full causal attention can be paged"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise BackboneError(f"backbone {config.model_type!r} does not use transformers' attention interface")
    model.set_attn_implementation(ATTENTION)


def packed_forward(decoder: Any, plan: Plan) -> torch.Tensor:
    """Run the decoder (no language-model head) over the plan; last hidden states ``[N, hidden]``."""
    output = decoder(
        input_ids=plan.input_ids.unsqueeze(0), position_ids=plan.positions.unsqueeze(0), use_cache=False, plan=plan
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden
