"""What a graph needs of a value model, as NumPy arrays: merged and fused weights, rotary tables, head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.errors import BackboneError
from lenvm.fused import NORMS, LayerSpec, can_fuse
from lenvm.modeling import LengthValueModel

__all__ = ["PRODUCTS", "Array", "GraphWeights", "read_weights"]

Array: TypeAlias = NDArray[np.float32]

# Apart, unlike in ``lenvm.fused``: one product for several has to be split again, which costs more than it saves.
PRODUCTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
# Rotary frequencies of other kinds depend on how long the sequence is: a table cannot hold them.
_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class GraphWeights:
    """A decoder and its head. Products are ``[in, out]``, float32.

    Attributes:
        layers: of each layer the ``PRODUCTS``, the norms of ``lenvm.fused.NORMS``, and ``q_bias``, ``k_bias``,
            ``v_bias``; None where it has none.
        embedding: ``[vocabulary, hidden]``; ``norm``: ``[hidden]``, the last one.
        cos, sin: ``[context, head_dim / 2]``.
        head_input, head_output: (weight ``[in, out]``, bias); ``head_input`` None for a head of one layer.
        gives_value: the head's first number is V, not its logit.
    """

    spec: LayerSpec
    layers: list[Mapping[str, Array | None]]
    embedding: Array
    norm: Array
    cos: Array
    sin: Array
    head_input: tuple[Array, Array] | None
    head_output: tuple[Array, Array]
    gives_value: bool

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        return len(self.cos)


def read_weights(model: LengthValueModel) -> GraphWeights:
    """The weights of a loaded checkpoint (its adapter is merged).

    Raises:
        BackboneError: the architecture is none that a graph can be written for.
    """
    decoder = model.decoder
    if not can_fuse(decoder):
        raise BackboneError(
            f"backbone {decoder.config.model_type!r} cannot be exported: only plain Llama, Qwen2 and Qwen3 decoders can"
        )
    cos, sin = _rotary(decoder, model.context)
    head = model.head
    return GraphWeights(
        spec=LayerSpec.of(decoder),
        layers=[_layer(layer) for layer in decoder.layers],
        embedding=_array(decoder.embed_tokens.weight),
        norm=_array(decoder.norm.weight),
        cos=cos,
        sin=sin,
        head_input=None if head.input is None else _linear(head.input),
        head_output=_linear(head.output),
        gives_value=head.gives_value,
    )


def _layer(layer: Any) -> dict[str, Array | None]:
    found: dict[str, Array | None] = {}
    for kind, path in PRODUCTS.items():
        module = layer.get_submodule(path)
        found[kind] = np.ascontiguousarray(_array(module.weight).T)
        if kind in ("q", "k", "v"):
            found[f"{kind}_bias"] = None if module.bias is None else _array(module.bias)
    present = dict(layer.named_modules())
    for name, path in NORMS.items():
        found[name] = _array(present[path].weight) if path in present else None
    return found


def _rotary(decoder: Any, context: int) -> tuple[Array, Array]:
    """Cosines and sines ``[context, head_dim / 2]`` by the decoder's own rule, attention scaling included."""
    rope = getattr(decoder.config, "rope_parameters", None) or getattr(decoder.config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROTARY:
        raise BackboneError(f"rotary embeddings of type {kind!r} cannot be exported: only {', '.join(_ROTARY)} can")
    positions = torch.arange(context, device=decoder.embed_tokens.weight.device)[None]
    with torch.no_grad():
        cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1, device=positions.device), positions)
    half = cos.shape[-1] // 2  # the second half repeats the first
    return np.ascontiguousarray(_array(cos[0])[:, :half]), np.ascontiguousarray(_array(sin[0])[:, :half])


def _linear(module: torch.nn.Linear) -> tuple[Array, Array]:
    return np.ascontiguousarray(_array(module.weight).T), _array(module.bias)


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy()
    return array
