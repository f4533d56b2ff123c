"""A decoder's layers over the candidates of a step: five kernels a layer for a small model, nothing compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn.functional import embedding, linear

from lenvm.fused import FusedWeights, Weights
from lenvm.modeling import ValueHead
from lenvm.paged import BlockPool
from lenvm.paged.attention import fresh_attention

if TYPE_CHECKING:
    from lenvm.paged.kernels import StepScratch

__all__ = ["SHORT", "StepHead", "StepLayers"]

Attend: TypeAlias = Callable[[int, Weights, torch.Tensor], torch.Tensor]  # layer, its weights, raw products -> mixed

# Multiplications of one half of a gated product up to which our own kernels beat the library's.
_SMALL = 2 << 30
SHORT = 1024  # tokens of a prefix that fewer programs read faster than more, which must put their shares together
_PLAIN_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles do not hang on how long the sequence is


class StepLayers:
    """Last hidden states of candidates, each at the position after its row's prefix.

    Args:
        fused: the weights of ``decoder``.
        context: positions are below this.
    """

    def __init__(self, decoder: Any, fused: FusedWeights, context: int) -> None:
        self.fused = fused
        places = torch.arange(context, device=fused.embedding.device)[None]
        like = torch.zeros(1, dtype=torch.float32, device=fused.embedding.device)
        cos, sin = decoder.rotary_emb(like, position_ids=places)
        half = fused.spec.head_dim // 2
        self.cos, self.sin = cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()

    @staticmethod
    def suits(decoder: Any, fused: FusedWeights | None) -> bool:
        """Whether this decoder can be run so."""
        rotary: Any = getattr(decoder, "rotary_emb", None)
        return (
            fused is not None
            and getattr(rotary, "rope_type", None) in _PLAIN_ROTATIONS
            and 2 * rotary.inv_freq.numel() == fused.spec.head_dim
        )

    def __call__(
        self,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        pool: BlockPool,
        kept: torch.Tensor,
        *,
        long: bool = True,
        scratch: StepScratch | None = None,
    ) -> torch.Tensor:
        """``ids [rows x width]`` after prefixes of ``lengths [rows]`` tokens in blocks ``tables [rows, blocks]`` ->
        ``[rows x width, hidden]``; of an id that is none, anything. Fills ``kept [2, layers, rows x width, kv_heads,
        head_dim]`` with the candidates' keys and values. ``long``: some prefix is longer than ``SHORT``. ``scratch``:
        of a caller that keeps one (:meth:`scratch`); no two calls that may run at the same time have the same."""
        from lenvm.paged.kernels import Rotation, step_attention

        spec, tokens, rows = self.fused.spec, len(ids), len(lengths)
        heads, kv_heads, dim, width = spec.heads, spec.kv_heads, spec.head_dim, tokens // rows
        if scratch is None:
            scratch = self.scratch(rows, width, pool, long=long)

        def attend(layer: int, w: Weights, qkv: torch.Tensor) -> torch.Tensor:
            query, keys, values = qkv.view(tokens, -1, dim).transpose(0, 1).split([heads, kv_heads, kv_heads])
            rotation = Rotation(self.cos, self.sin, w["q_norm"], w["k_norm"], spec.eps, kept[0, layer], kept[1, layer])
            return step_attention(
                query, keys, values, pool.keys[layer], pool.values[layer], tables, lengths, None, width,
                spec.scaling, scratch, rotation,
            ).view(tokens, -1)  # fmt: skip

        gate_up = self.fused.stacks["gate_up"]
        small = tokens * gate_up.shape[1] * gate_up.shape[2] <= _SMALL
        return self._small(ids, attend) if small else self._large(ids, attend)

    def scratch(self, rows: int, width: int, pool: BlockPool, *, long: bool) -> StepScratch:
        """What the shares of prefixes are put together in. Kept between steps it need not be zeroed for each."""
        from lenvm.paged.kernels import StepScratch

        spec = self.fused.spec
        return StepScratch.make(rows, spec.heads, spec.kv_heads, width, pool.keys[0], long=long)

    def _small(self, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """By our own products: five kernels a layer."""
        from lenvm.paged.layer_kernels import Stream, add_norm, embed, gated_product, product, product_onto

        table, layers, eps = self.fused.embedding, self.fused.layers, self.fused.spec.eps
        norms = [*(w["input_norm"] for w in layers), self.fused.norm]
        stream = Stream.make(len(ids), table.shape[1], 1, table)
        embed(ids, table, norms[0], stream)
        for layer, w in enumerate(layers):
            mixed = attend(layer, w, product(stream, w["qkv"], w["qkv_bias"], eps))
            stream = product_onto(stream, mixed, w["o"], w["post_norm"])
            stream = product_onto(stream, gated_product(stream, w["gate_up"], eps), w["down"], norms[layer + 1])
        return add_norm(stream.hidden, None, self.fused.norm, eps)

    def _large(self, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """By the library's products, which are faster where there is much to multiply."""
        from lenvm.paged.layer_kernels import add_norm, silu_product

        eps, table = self.fused.spec.eps, self.fused.embedding
        hidden = embedding(ids.clamp(0, len(table) - 1), table)
        delta: torch.Tensor | None = None
        for layer, w in enumerate(self.fused.layers):
            mixed = attend(layer, w, linear(add_norm(hidden, delta, w["input_norm"], eps), w["qkv"], w["qkv_bias"]))
            hidden.addmm_(mixed, w["o"].t())
            delta = linear(silu_product(linear(add_norm(hidden, None, w["post_norm"], eps), w["gate_up"])), w["down"])
        return add_norm(hidden, delta, self.fused.norm, eps)

    def prompts(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        starts: torch.Tensor,
        width: int,
        pool: BlockPool,
    ) -> torch.Tensor:
        """Last hidden states ``[N, hidden]`` of whole prompts side by side: integers ``[N]`` each, keys and
        values going to ``offsets`` of ``blocks``; int32 ``starts [rows + 1]``, ``width`` the longest row."""
        from lenvm.paged.kernels import rotate_and_store
        from lenvm.paged.layer_kernels import add_norm, silu_product

        spec = self.fused.spec
        hidden = embedding(ids, self.fused.embedding)
        delta: torch.Tensor | None = None
        for layer, w in enumerate(self.fused.layers):
            qkv = linear(add_norm(hidden, delta, w["input_norm"], spec.eps), w["qkv"], w["qkv_bias"])
            qkv = qkv.view(len(hidden), -1, spec.head_dim)
            rotate_and_store(
                qkv, spec.heads, positions, blocks, offsets, pool.keys[layer], pool.values[layer], self.cos, self.sin,
                (w["q_norm"], w["k_norm"]), spec.eps,
            )  # fmt: skip
            query, keys, values = qkv.split([spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
            mixed = fresh_attention(query, keys, values, starts, width, spec.scaling)
            hidden.addmm_(mixed.view(len(hidden), -1), w["o"].t())
            both = linear(add_norm(hidden, None, w["post_norm"], spec.eps), w["gate_up"])
            delta = linear(silu_product(both), w["down"])
        return add_norm(hidden, delta, self.fused.norm, spec.eps)


class StepHead:
    """The value head over states: from ``[N, hidden]`` value logits and log-probabilities into ``[N, 1 + n]``. With
    ``utilities [n]`` of bins also each token's expected utility into ``means [N]``.

    bfloat16 states take the first product on the matrix units, as exact as in float32: a float32 weight is the sum of
    three bfloat16 ones.
    """

    def __init__(self, head: ValueHead, dtype: torch.dtype) -> None:
        self.head = head
        self.width = head.output.out_features  # of what comes out
        self.fused = head.input is not None and head.output.out_features > 1 and not head.gives_value
        first = head.input if head.input is not None else head.output
        rest, self.parts = first.weight.detach(), []
        if dtype == torch.bfloat16 and rest.is_cuda:
            for _ in range(3):
                self.parts.append(rest.bfloat16())
                rest = rest - self.parts[-1].float()
            self.weight = torch.cat(self.parts).t()

    def __call__(
        self,
        hidden: torch.Tensor,
        out: torch.Tensor,
        utilities: torch.Tensor | None = None,
        means: torch.Tensor | None = None,
    ) -> None:
        first = self.head.input
        if first is None or not self.fused:
            found = self.head(hidden)
            out[:, 0] = found.logits
            if found.bin_logprobs is not None:
                out[:, 1:] = found.bin_logprobs
                if utilities is not None and means is not None:
                    means.copy_((found.bin_logprobs.exp() * utilities).sum(-1))
            return
        from lenvm.paged.layer_kernels import head_numbers

        if self.parts:
            product = torch.mm(hidden, self.weight, out_dtype=torch.float32)
        else:
            product = linear(hidden.float(), first.weight)
        head_numbers(product, first.bias, self.head.output.weight, self.head.output.bias, out, utilities, means)
