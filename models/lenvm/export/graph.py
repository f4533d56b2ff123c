"""The value model as an ONNX graph: one packed, tree-masked forward over keys and values that stay where they are.

All new tokens of all rows travel side by side as ``[1, N, hidden]``; only attention knows the rows. Keys and values of
past tokens are rows ("slots") of one tensor a layer. The graph stores those of the new tokens into it and then reads,
for every row, the slots that ``tables`` names. ``present`` may be bound to the same memory as ``past``: nothing but the
new slots is written then.

    input_ids, positions, write_slots  int64 [N]       the new tokens, where they stand, and which slots they get
    tables   int64 [B, C]      slots that each row reads, its own new ones among them, padded with any slot
    mask     bool [B, T, C]    which of them each new token of a row may see; at least one
    pad      int64 [B, T]      the token at each padded place of a row
    places   int64 [N]         the padded place (of B * T) of each token
    wanted   int64 [M]         the tokens whose values are asked for
    past_keys.L, past_values.L      [slots, kv_heads * head_dim]   -> present_keys.L, present_values.L, the same shape
    -> logits float32 [M], bin_logprobs float32 [M, n] (with a length distribution alone)

Every operator has a CPU and a CUDA kernel in ONNX Runtime, ``MatMulIntegerToFloat`` apart, which is for the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lenvm.export.quantize import QuantizedWeight
from lenvm.export.weights import Array, GraphWeights
from lenvm.modeling import VALUE_EPS

__all__ = ["OPSET", "Precision", "build_graph"]

OPSET = 21
_IR_VERSION = 10  # what ONNX Runtime reads since 1.18
_CONTRIB = "com.microsoft"
Precision = Literal["float32", "float16"]
_LOW = {"float32": -1e30, "float16": -6e4}  # stands for minus infinity in a mask


@dataclass
class _Graph:
    """Nodes and weights as they are added; every value has a name."""

    dtype: Any
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """A constant; the same name means the same one."""
        if name not in self.known:
            self.known.add(name)
            self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def floats(self, name: str, array: Array) -> str:
        """A constant in the graph's precision."""
        return self.weight(name, array.astype(self.dtype))

    def ints(self, *values: int) -> str:
        """A constant vector of integers."""
        return self.weight("ints." + ".".join(map(str, values)), np.array(values, dtype=np.int64))

    def add(self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        """A node with one output, which is returned."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def many(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """A node with several outputs."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))


def build_graph(
    weights: GraphWeights,
    *,
    precision: Precision = "float32",
    quantized: Mapping[tuple[int, str], QuantizedWeight] | None = None,
) -> onnx.ModelProto:
    """The graph described above, weights inside.

    Args:
        precision: of the decoder, keys and values included; the head is float32 always.
        quantized: products, by (layer, kind), that run in int8; the others run in ``precision``.
    """
    graph = _Graph(np.dtype(precision))
    kind = TensorProto.FLOAT16 if precision == "float16" else TensorProto.FLOAT
    builder = _Builder(graph, weights, precision, dict(quantized or {}))
    builder.build()
    spec, count = weights.spec, len(weights.layers)
    pool: list[int | str] = ["slots", spec.kv_heads * spec.head_dim]

    def value(name: str, shape: Sequence[int | str], dtype: int = TensorProto.INT64) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    inputs = [value(name, ["tokens"]) for name in ("input_ids", "positions", "write_slots", "places")]
    inputs += [value("tables", ["rows", "keys"]), value("mask", ["rows", "width", "keys"], TensorProto.BOOL)]
    inputs += [value("pad", ["rows", "width"]), value("wanted", ["wanted"])]
    outputs = [value("logits", ["wanted"], TensorProto.FLOAT)]
    bins = weights.head_output[0].shape[1] - 1
    outputs += [value("bin_logprobs", ["wanted", bins], TensorProto.FLOAT)] if bins else []
    for what in ("keys", "values"):
        inputs += [value(f"past_{what}.{layer}", pool, kind) for layer in range(count)]
        outputs += [value(f"present_{what}.{layer}", pool, kind) for layer in range(count)]
    made = helper.make_graph(graph.nodes, "lenvm", inputs, outputs, graph.weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="lenvm")


class _Builder:
    """Adds the decoder and the head to a graph."""

    def __init__(
        self,
        graph: _Graph,
        weights: GraphWeights,
        precision: Precision,
        quantized: dict[tuple[int, str], QuantizedWeight],
    ) -> None:
        self.graph, self.weights, self.precision, self.quantized = graph, weights, precision, quantized
        self.spec = weights.spec
        self.whole: dict[str, str] = {}  # inputs -> the same as whole numbers
        self.widths = [self.spec.heads * self.spec.head_dim] + 2 * [self.spec.kv_heads * self.spec.head_dim]

    def build(self) -> None:
        """All of it."""
        g = self.graph
        g.add("Unsqueeze", ["positions", g.ints(0)], "positions_row")
        g.add("Unsqueeze", ["write_slots", g.ints(1)], "write_indices")
        low = g.floats("mask_low", np.array([_LOW[self.precision]], dtype=np.float32))
        zero = g.floats("mask_zero", np.zeros(1, dtype=np.float32))
        g.add("Where", ["mask", zero, low], "mask_bias_flat")
        g.add("Unsqueeze", ["mask_bias_flat", g.ints(1, 2)], "mask_bias")  # [B, 1, 1, T, C]
        g.add("Shape", ["mask"], "mask_shape")
        for name, at in (("rows", 0), ("width", 1), ("keys", 2)):
            g.add("Slice", ["mask_shape", g.ints(at), g.ints(at + 1)], name)
        self._shapes()
        residual = self._embed()
        normed = self._norm(residual, "0.input_norm", self.weights.layers[0]["input_norm"])
        for layer in range(len(self.weights.layers)):
            normed, residual = self._layer(layer, normed, residual)
        self._head(normed)

    def _shapes(self) -> None:
        """The run-time shapes that attention takes, computed once."""
        g, spec = self.graph, self.spec
        group = spec.heads // spec.kv_heads
        g.add("Concat", ["rows", "width", g.ints(spec.kv_heads, group, spec.head_dim)], "query_shape", axis=0)
        g.add("Concat", ["rows", g.ints(spec.kv_heads, -1, spec.head_dim)], "grouped_shape", axis=0)
        g.add("Concat", ["rows", "keys", g.ints(spec.kv_heads, spec.head_dim)], "key_shape", axis=0)
        g.add("Concat", ["rows", g.ints(spec.kv_heads, group), "width", "keys"], "score_shape", axis=0)
        g.add("Concat", ["rows", g.ints(spec.kv_heads, -1), "keys"], "weight_shape", axis=0)
        g.add("Concat", ["rows", g.ints(spec.kv_heads, group), "width", g.ints(spec.head_dim)], "out_shape", axis=0)

    def _embed(self) -> str:
        g = self.graph
        g.add("Gather", [g.floats("embedding", self.weights.embedding), "input_ids"], "embedded_flat")
        return g.add("Unsqueeze", ["embedded_flat", g.ints(0)], "embedded")

    def _layer(self, layer: int, normed: str, residual: str) -> tuple[str, str]:
        """``(normed, residual) -> (normed for the next layer, residual)``, both ``[1, N, hidden]``."""
        g, at = self.graph, f"{layer}."
        last = layer + 1 == len(self.weights.layers)
        query = self._keys_and_query(layer, normed)
        attended = self._attention(layer, query)
        places = "places"
        if last:
            # Of the last layer only the values that are asked for are computed; keys and values it has stored already.
            places = g.add("Gather", ["places", "wanted"], "places_wanted")
            residual = g.add("Gather", [residual, "wanted"], "residual_wanted", axis=1)
        g.add("Gather", [attended, places], at + "attended", axis=1)
        out = self._product(layer, "o", at + "attended")
        normed, residual = self._add_norm(out, residual, at + "post_norm", self.weights.layers[layer]["post_norm"])
        gate, up = self._product(layer, "gate", normed), self._product(layer, "up", normed)
        g.add("QuickGelu", [gate], at + "silu", domain=_CONTRIB, alpha=1.0)
        g.add("Mul", [at + "silu", up], at + "gated")
        out = self._product(layer, "down", at + "gated")
        following = self.weights.norm if last else self.weights.layers[layer + 1]["input_norm"]
        return self._add_norm(out, residual, f"{layer + 1}.input_norm", following)

    def _keys_and_query(self, layer: int, normed: str) -> str:
        """Store the layer's new keys and values; the queries ``[1, N, heads * head_dim]``."""
        g, at, weights = self.graph, f"{layer}.", self.weights.layers[layer]
        found = {}
        for kind in ("q", "k", "v"):
            bias = weights[f"{kind}_bias"]
            found[kind] = self._product(layer, kind, normed)
            if bias is not None:
                found[kind] = g.add("Add", [found[kind], g.floats(at + kind + "_bias", bias)], at + kind + "_biased")
        if weights["q_norm"] is not None:
            found["q"] = self._head_norm(found["q"], weights["q_norm"], self.spec.heads)
            found["k"] = self._head_norm(found["k"], weights["k_norm"], self.spec.kv_heads)
        key = self._rotate(found["k"])
        for what, source in (("keys", key), ("values", found["v"])):
            flat = g.add("Squeeze", [source, g.ints(0)], f"{at}{what}_new")
            g.add("ScatterND", [f"past_{what}.{layer}", "write_indices", flat], f"present_{what}.{layer}")
        return self._rotate(found["q"])

    def _rotate(self, name: str) -> str:
        g = self.graph
        tables = [g.floats("cos", self.weights.cos), g.floats("sin", self.weights.sin)]
        return g.add("RotaryEmbedding", [name, "positions_row", *tables], name + "_rotated", domain=_CONTRIB)

    def _head_norm(self, name: str, weight: Array | None, heads: int) -> str:
        """RMSNorm of every head: Qwen3."""
        g, dim = self.graph, self.spec.head_dim
        split = g.add("Reshape", [name, g.ints(1, -1, heads, dim)], name + "_heads")
        normed = self._norm(split, name + "_norm", weight)
        return g.add("Reshape", [normed, g.ints(1, -1, heads * dim)], name + "_normed")

    def _attention(self, layer: int, query: str) -> str:
        """``query [1, N, heads * D] -> [1, B * T, heads * D]``; heads that share keys stand side by side as queries."""
        g, at, spec = self.graph, f"{layer}.", self.spec
        flat = g.add("Squeeze", [query, g.ints(0)], at + "query_flat")
        g.add("Gather", [flat, "pad"], at + "query_rows")
        g.add("Reshape", [at + "query_rows", "query_shape"], at + "query_split")  # [B, T, kv, group, D]
        g.add("Transpose", [at + "query_split"], at + "query_turned", perm=[0, 2, 3, 1, 4])
        g.add("Reshape", [at + "query_turned", "grouped_shape"], at + "query_grouped")  # [B, kv, group * T, D]
        for what in ("keys", "values"):
            g.add("Gather", [f"present_{what}.{layer}", "tables"], f"{at}{what}_rows")
            g.add("Reshape", [f"{at}{what}_rows", "key_shape"], f"{at}{what}_split")
            g.add("Transpose", [f"{at}{what}_split"], f"{at}{what}_turned", perm=[0, 2, 1, 3])  # [B, kv, C, D]
        pair = [at + "query_grouped", at + "keys_turned"]
        g.add("FusedMatMul", pair, at + "scores_flat", domain=_CONTRIB, transB=1, alpha=spec.scaling)
        g.add("Reshape", [at + "scores_flat", "score_shape"], at + "scores")
        g.add("Add", [at + "scores", "mask_bias"], at + "scores_masked")
        g.add("Softmax", [at + "scores_masked"], at + "attention", axis=-1)
        g.add("Reshape", [at + "attention", "weight_shape"], at + "attention_flat")
        g.add("MatMul", [at + "attention_flat", at + "values_turned"], at + "mixed_flat")
        g.add("Reshape", [at + "mixed_flat", "out_shape"], at + "mixed")
        g.add("Transpose", [at + "mixed"], at + "mixed_turned", perm=[0, 3, 1, 2, 4])
        return g.add("Reshape", [at + "mixed_turned", g.ints(1, -1, self.widths[0])], at + "mixed_rows")

    def _product(self, layer: int, kind: str, name: str) -> str:
        """``[1, N, in] -> [1, N, out]``, in int8 where the layer has such weights."""
        g, output = self.graph, f"{layer}.{kind}"
        made = self.quantized.get((layer, kind))
        if made is None:
            weight = self.weights.layers[layer][kind]
            assert weight is not None
            return g.add("MatMul", [name, g.floats(output + "_weight", weight)], output)
        scale = g.weight(name + "_step", np.array(made.input_scale, dtype=np.float32))
        zero = g.weight("input_zero", np.array(128, dtype=np.uint8))
        if name not in self.whole:  # several products share an input
            self.whole[name] = g.add("QuantizeLinear", [name, scale, zero], name + "_uint8")
        weights = [g.weight(output + "_int8", made.values), scale, g.weight(output + "_scale", made.scales), zero]
        inputs = [self.whole[name], *weights, g.weight("weight_zero", np.array(0, dtype=np.int8))]
        return g.add("MatMulIntegerToFloat", inputs, output, domain=_CONTRIB)

    def _norm(self, name: str, output: str, weight: Array | None) -> str:
        assert weight is not None
        inputs = [name, self.graph.floats(output + "_weight", weight)]
        return self.graph.add(
            "SimplifiedLayerNormalization", inputs, output, axis=-1, epsilon=self.spec.eps, stash_type=1
        )

    def _add_norm(self, name: str, residual: str, output: str, weight: Array | None) -> tuple[str, str]:
        """``(norm(name + residual), name + residual)``."""
        assert weight is not None
        inputs = [name, residual, self.graph.floats(output + "_weight", weight)]
        outputs = [output, "", "", output + "_sum"]
        self.graph.many("SkipSimplifiedLayerNormalization", inputs, outputs, domain=_CONTRIB, epsilon=self.spec.eps)
        return output, output + "_sum"

    def _head(self, hidden: str) -> None:
        """``[1, M, hidden] -> logits [M], bin_logprobs [M, n]``, float32."""
        g = self.graph
        if self.precision != "float32":
            hidden = g.add("Cast", [hidden], "hidden_wide", to=TensorProto.FLOAT)
        hidden = g.add("Squeeze", [hidden, g.ints(0)], "hidden_flat")
        if self.weights.head_input is not None:
            weight, bias = self.weights.head_input
            g.add("Gemm", [hidden, g.weight("head_input", weight), g.weight("head_input_bias", bias)], "head_hidden")
            g.add("Sigmoid", ["head_hidden"], "head_gate")
            hidden = g.add("Mul", ["head_hidden", "head_gate"], "head_silu")
        weight, bias = self.weights.head_output
        g.add("Gemm", [hidden, g.weight("head_output", weight), g.weight("head_output_bias", bias)], "head")
        first = g.add("Slice", ["head", g.ints(0), g.ints(1), g.ints(1)], "head_first")
        if self.weights.gives_value:
            first = self._logit_of_value(first)
        g.add("Squeeze", [first, g.ints(1)], "logits")
        if weight.shape[1] > 1:
            g.add("Slice", ["head", g.ints(1), g.ints(weight.shape[1]), g.ints(1)], "bin_logits")
            g.add("LogSoftmax", ["bin_logits"], "bin_logprobs", axis=-1)

    def _logit_of_value(self, value: str) -> str:
        """z of a head that gives V = -sigmoid(z) itself, clamped away from its ends."""
        g = self.graph
        low, high = (g.weight(f"clip.{x}", np.array(x, dtype=np.float32)) for x in (VALUE_EPS, 1 - VALUE_EPS))
        g.add("Neg", [value], "chance_raw")
        g.add("Clip", ["chance_raw", low, high], "chance")
        g.add("Sub", [g.weight("one", np.ones(1, dtype=np.float32)), "chance"], "chance_not")
        g.add("Div", ["chance", "chance_not"], "odds")
        return g.add("Log", ["odds"], "value_logit")
