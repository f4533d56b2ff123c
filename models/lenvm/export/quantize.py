"""Products in int8: which scales, where, and with what error. Measured on texts, chosen at export.

Weights have one scale a column and seven bits: eight would overflow the 16-bit sums of CPUs without VNNI. Inputs have
one fixed scale a product, from the texts, so that an answer does not depend on what else is in its batch. Two things
make that exact enough: channels that are large at the input are shrunk there and their weights grown (SmoothQuant, Xiao
et al., 2022; folded into the norm or the product before), and products that would still lose much, as single tokens are
huge at their input, stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.export.weights import PRODUCTS, Array, GraphWeights
from lenvm.modeling import LengthValueModel
from lenvm.scoring import TorchScorer

__all__ = ["Quantization", "QuantizedWeight", "quantize"]

_LEVELS = 63  # of a weight, either side of zero
_INPUT_LEVELS = 127
_SMOOTHING = 0.5  # how much of the range of inputs goes into the weights
_MARGIN = 1.25  # inputs may be larger than those of the texts
_MOST_ERROR = 0.002  # mean squared error of a product, relative, above which it stays in float32
# Queries and keys stand in exponents: in int8 they would lose more than all others, and they are a sixth of the work.
_FLOAT = ("q", "k", "v")
_SMOOTHED = {"gate": "post_norm", "up": "post_norm", "down": "up"}  # and what comes before them

Place = tuple[int, str]  # layer and product


@dataclass(frozen=True)
class QuantizedWeight:
    """``values`` int8 ``[in, out]``, ``scales`` float32 ``[out]``; ``input_scale``: one step of the input in int8."""

    values: NDArray[np.int8]
    scales: Array
    input_scale: float


@dataclass(frozen=True)
class Quantization:
    """Smoothed weights, and the products that run in int8, by layer and kind."""

    weights: GraphWeights
    products: Mapping[Place, QuantizedWeight]


def quantize(model: LengthValueModel, weights: GraphWeights, texts: Sequence[Sequence[int]]) -> Quantization:
    """Most products of the decoder in int8, with scales from token sequences that are like those to come."""
    largest: dict[Place, Array] = {}

    def note(place: Place, inputs: torch.Tensor) -> None:
        size = inputs.abs().amax(0).float().cpu().numpy()
        largest[place] = np.maximum(largest[place], size) if place in largest else size

    _watch(model, texts, note)
    factors = _smoothing(weights, largest)
    smoothed = _smooth(weights, factors)
    ranges = {
        place: float((size / factors[place]).max() if place in factors else size.max()) * _MARGIN / _INPUT_LEVELS
        for place, size in largest.items()
    }
    errors = _errors(model, smoothed, factors, ranges, texts)
    made: dict[Place, QuantizedWeight] = {}
    for place in (place for place, error in errors.items() if error <= _MOST_ERROR):
        weight = smoothed.layers[place[0]][place[1]]
        assert weight is not None
        scales = np.maximum(np.abs(weight).max(axis=0) / _LEVELS, 1e-12).astype(np.float32)
        values = np.rint(weight / scales).astype(np.int8)
        made[place] = QuantizedWeight(values, scales, ranges[place])
    return Quantization(smoothed, made)


def _watch(
    model: LengthValueModel, texts: Sequence[Sequence[int]], seen: Callable[[Place, torch.Tensor], None]
) -> None:
    """Run the texts through the model and show the input ``[N, in]`` of each product."""
    handles = []
    try:
        for layer, module in enumerate(model.decoder.layers):
            for kind, path in PRODUCTS.items():
                if kind in _FLOAT:
                    continue

                def hook(_: Any, inputs: tuple[torch.Tensor, ...], place: Place = (layer, kind)) -> None:
                    seen(place, inputs[0].reshape(-1, inputs[0].shape[-1]))

                handles.append(module.get_submodule(path).register_forward_pre_hook(hook))
        for state in TorchScorer(model).open(texts):
            state.close()
    finally:
        for handle in handles:
            handle.remove()


def _smoothing(weights: GraphWeights, largest: Mapping[Place, Array]) -> dict[Place, Array]:
    """What each channel of an input is divided by, ``[in]``; products of one input share it."""
    factors: dict[Place, Array] = {}
    for layer, found in enumerate(weights.layers):
        for source in ("post_norm", "up"):
            kinds = [kind for kind, name in _SMOOTHED.items() if name == source]
            sizes = np.maximum(largest[layer, kinds[0]], 1e-5)
            columns = np.max(
                [np.abs(weight).max(axis=1) for kind in kinds if (weight := found[kind]) is not None], axis=0
            )
            factor = sizes**_SMOOTHING / np.maximum(columns, 1e-5) ** (1 - _SMOOTHING)
            factors |= {(layer, kind): np.clip(factor, 1e-4, 1e4).astype(np.float32) for kind in kinds}
    return factors


def _smooth(weights: GraphWeights, factors: Mapping[Place, Array]) -> GraphWeights:
    """The same function with inputs divided by the factors: the norm or product before a product gives them so."""
    layers: list[Mapping[str, Array | None]] = []
    for layer, found in enumerate(weights.layers):
        changed = dict(found)
        for kind in _SMOOTHED:
            weight = changed[kind]
            assert weight is not None
            changed[kind] = weight * factors[layer, kind][:, None]
        for source, kind in (("post_norm", "gate"), ("up", "down")):
            before = changed[source]
            assert before is not None
            changed[source] = before / factors[layer, kind]  # of a product: its columns
        layers.append(changed)
    return replace(weights, layers=layers)


def _errors(
    model: LengthValueModel,
    weights: GraphWeights,
    factors: Mapping[Place, Array],
    ranges: Mapping[Place, float],
    texts: Sequence[Sequence[int]],
) -> dict[Place, float]:
    """Squared error of each product with its input in int8, relative to the product's square: mean over tokens."""
    found: dict[Place, list[float]] = {place: [] for place in ranges}

    def measure(place: Place, inputs: torch.Tensor) -> None:
        if place in factors:
            inputs = inputs / torch.from_numpy(factors[place]).to(inputs.device)
        weight = weights.layers[place[0]][place[1]]
        assert weight is not None
        matrix = torch.from_numpy(weight).to(inputs.device)
        step = ranges[place]
        lost = (torch.clamp(torch.round(inputs / step), -_INPUT_LEVELS, _INPUT_LEVELS) * step - inputs) @ matrix
        size = (inputs @ matrix).square().sum(-1).clamp_min(1e-12)
        found[place].append(float((lost.square().sum(-1) / size).mean()))

    _watch(model, texts, measure)
    return {place: float(np.mean(errors)) for place, errors in found.items()}
