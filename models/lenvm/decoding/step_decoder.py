"""A decoder as a captured step runs it: two compiled pieces a layer, with the paged attention kernel between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import embedding, linear, silu

from lenvm.fused import FusedWeights, Weights, can_fuse, norm, rotate
from lenvm.lora import LoRALinear
from lenvm.paged.attention import Plan, attend_plan, opaque_attention

__all__ = ["StepDecoder"]


class StepDecoder:
    """``(ids [N], positions [N], plan) -> last hidden states [N, hidden]``.

    ``dynamic``: compiled once for any N, and not anew for each.
    """

    def __init__(self, decoder: Any, *, compiled: bool, dynamic: bool = False) -> None:
        self.decoder, self.compiled = decoder, compiled
        self.fused: FusedWeights | None = None
        # Adapters that are not merged are not in the weights.
        if can_fuse(decoder) and not any(isinstance(module, LoRALinear) for module in decoder.modules()):
            self.fused = _fused(decoder)
        self._before = torch.compile(_before, dynamic=dynamic) if compiled else _before
        self._after = torch.compile(_after, dynamic=dynamic) if compiled else _after
        self._last = torch.compile(_last, dynamic=dynamic) if compiled else _last

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While a step is recorded. Layers that we cannot fuse are compiled as transformers has them, and only now:
        prompts, whose shapes vary, must not meet compiled layers."""
        if self.fused is not None or not self.compiled:
            yield
            return
        opaque_attention()
        for layer in self.decoder.layers:
            layer.compile(dynamic=False)
        try:
            yield
        finally:
            for layer in self.decoder.layers:
                layer._compiled_call_impl = None

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, plan: Plan) -> torch.Tensor:
        if self.fused is None:
            output = self.decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False, plan=plan)
            states: torch.Tensor = output.last_hidden_state[0]
            return states
        fused = self.fused
        hidden = embedding(ids, fused.embedding)
        cos, sin = self.decoder.rotary_emb(hidden[None], position_ids=positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        delta = torch.zeros_like(hidden)
        spec = fused.spec
        shape = (spec.heads, spec.kv_heads, spec.head_dim)
        for index, weights in enumerate(fused.layers):
            hidden, query, key, value = self._before(hidden, delta, cos, sin, weights, shape, spec.eps)
            mixed = attend_plan(
                plan, index, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), spec.scaling
            )
            hidden, delta = self._after(hidden, mixed, weights, spec.eps)
        last: torch.Tensor = self._last(hidden, delta, fused.norm, spec.eps)
        return last


_FUSED: WeakKeyDictionary[Any, FusedWeights] = WeakKeyDictionary()


def _fused(decoder: Any) -> FusedWeights:
    """The decoder's fused weights, made once; anew where its modules have moved to other storage since."""
    held = _FUSED.get(decoder)
    if held is None or held.stacks["qkv"].data_ptr() != decoder.layers[0].self_attn.q_proj.weight.data_ptr():
        # Ordinary tensors, though the sampler runs in inference mode: the weights stay usable outside of it.
        with torch.inference_mode(False), torch.no_grad():
            held = _FUSED[decoder] = FusedWeights(decoder)
    return held


def _before(
    hidden: torch.Tensor,
    delta: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    w: Weights,
    shape: tuple[int, int, int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What stands before attention: ``[N, hidden]`` twice -> their sum, queries, keys and values ``[N, heads, D]``."""
    heads, kv_heads, dim = shape
    hidden = hidden + delta
    qkv = linear(norm(hidden, w["input_norm"], eps), w["qkv"], w["qkv_bias"])
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    query, key, value = (part.view(hidden.shape[0], -1, dim) for part in qkv.split(sizes, dim=-1))
    if w["q_norm"] is not None:
        query, key = norm(query, w["q_norm"], eps), norm(key, w["k_norm"], eps)
    return hidden, rotate(query, cos, sin), rotate(key, cos, sin), value


def _after(hidden: torch.Tensor, mixed: torch.Tensor, w: Weights, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands after it: residual stream and attention ``[N, heads, D]`` -> the stream and what is still to be
    added."""
    hidden = hidden + linear(mixed.reshape(mixed.shape[0], -1), w["o"])
    gate, up = linear(norm(hidden, w["post_norm"], eps), w["gate_up"]).chunk(2, dim=-1)
    return hidden, linear(silu(gate) * up, w["down"])


def _last(hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return norm(hidden + delta, weight, eps)
