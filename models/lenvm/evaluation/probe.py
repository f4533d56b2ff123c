"""The linear probe (TRAIL-like): length read off the frozen backbone's hidden state at the last prompt token.

Ridge regression of ``log(1 + length)`` on one layer's hidden state of the backbone as it was pretrained, without the
adapter. Layer and ridge are chosen by cross-validation over train prompts for the error that is reported (MRE), and the
prediction is scaled by the factor that is best for it on the train prompts: least squares in logs aims at the geometric
mean. One probe for all domains, as the value model has no domain label either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lenvm.errors import InvalidRequestError
from lenvm.evaluation.prediction import fit_constant, relative_errors

__all__ = ["MIN_PROMPTS", "LinearProbe", "fit_probe", "prompt_features"]

FloatArray: TypeAlias = NDArray[np.float64]

_RIDGES = tuple(10.0**power for power in range(-3, 4))  # beside a mean squared feature of 1
_FOLDS = 5
MIN_PROMPTS = 2 * _FOLDS
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: hidden states of ``layer`` (0: the embeddings) -> content tokens."""

    layer: int
    ridge: float
    center: FloatArray  # [hidden]
    weights: FloatArray  # [hidden], of the centred state
    offset: float
    factor: float
    cross_validated: float  # MRE on left-out train prompts

    def predict(self, states: ArrayLike) -> FloatArray:
        """Hidden states of every layer [prompts, layers, hidden] -> content tokens [prompts]."""
        chosen = np.asarray(states)[:, self.layer].astype(np.float64)
        return self.factor * _tokens((chosen - self.center) @ self.weights + self.offset)


def fit_probe(states: NDArray[Any], truth: ArrayLike) -> LinearProbe:
    """Fit on train prompts: states [prompts, layers, hidden], truth (mean ``min(L, cap)``) [prompts].

    Raises InvalidRequestError for fewer than 10 prompts.
    """
    lengths = np.asarray(truth, dtype=np.float64)
    if len(lengths) < MIN_PROMPTS or len(states) != len(lengths):
        raise InvalidRequestError(f"the linear probe needs at least {MIN_PROMPTS} train prompts, one state each")
    target = np.log1p(lengths)
    fold = np.random.default_rng(0).permutation(len(lengths)) % _FOLDS
    best: tuple[float, int, float] = (np.inf, 0, _RIDGES[0])
    for layer in range(states.shape[1]):
        x = states[:, layer].astype(np.float64)
        moments = [_Moments.of(x[fold == part], target[fold == part]) for part in range(_FOLDS)]
        left_out = np.zeros((len(_RIDGES), len(lengths)))
        for out in range(_FOLDS):
            rest, held = fold != out, fold == out
            center, offset, paths = _ridge_path(_Moments.sum(m for part, m in enumerate(moments) if part != out))
            found = _tokens((x - center) @ np.stack(paths, axis=1) + offset)  # [prompts, ridges]
            for at in range(len(paths)):
                factor = fit_constant(lengths[rest], np.maximum(found[rest, at], 1.0))
                left_out[at, held] = factor * found[held, at]
        errors = [float(relative_errors(row, lengths).mean()) for row in left_out]
        best = min(best, *((error, layer, ridge) for error, ridge in zip(errors, _RIDGES, strict=True)))
    error, layer, ridge = best
    x = states[:, layer].astype(np.float64)
    center, offset, paths = _ridge_path(_Moments.of(x, target))
    weights = paths[_RIDGES.index(ridge)]
    factor = fit_constant(lengths, np.maximum(_tokens((x - center) @ weights + offset), 1.0))
    return LinearProbe(layer, ridge, center, weights, offset, factor, error)


@dataclass(frozen=True)
class _Moments:
    """Sums over prompts that a ridge regression needs: they add up, so that five folds cost one pass."""

    count: int
    x: FloatArray  # [d]
    y: float
    xx: FloatArray  # [d, d]
    xy: FloatArray  # [d]

    @classmethod
    def of(cls, x: FloatArray, y: FloatArray) -> _Moments:
        return cls(len(x), x.sum(axis=0), float(y.sum()), x.T @ x, x.T @ y)

    @classmethod
    def sum(cls, parts: Iterable[_Moments]) -> _Moments:
        found = list(parts)
        return cls(
            sum(part.count for part in found),
            np.sum([part.x for part in found], axis=0),
            sum(part.y for part in found),
            np.sum([part.xx for part in found], axis=0),
            np.sum([part.xy for part in found], axis=0),
        )


def _ridge_path(moments: _Moments) -> tuple[FloatArray, float, list[FloatArray]]:
    """Centre of ``x`` [d], mean of ``y``, and the weights [d] for every one of ``_RIDGES``."""
    center, offset = moments.x / moments.count, moments.y / moments.count
    # One eigendecomposition for all ridges; relative to the mean variance, so that layers compare.
    values, vectors = np.linalg.eigh(moments.xx / moments.count - np.outer(center, center))
    aim = vectors.T @ (moments.xy / moments.count - center * offset)
    scale = max(float(values.mean()), 1e-12)
    return center, offset, [vectors @ (aim / (np.maximum(values, 0.0) + ridge * scale)) for ridge in _RIDGES]


def _tokens(log_length: FloatArray) -> FloatArray:
    return np.expm1(np.clip(log_length, 0.0, 20.0))  # an extrapolation must not overflow


def prompt_features(
    backbone: str,
    prompts: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float16]:
    """Hidden states at the last token of each prompt, every layer: float16 [prompts, layers + 1, hidden].

    Prompts of like length go through together; padding on the right cannot reach the last token of a causal model.
    """
    import torch

    from lenvm.backbones import load_backbone, resolve_backbone

    decoder = load_backbone(resolve_backbone(backbone), dtype=torch.float32, device=device).get_decoder()
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, Any] = {}
    at = 0
    with torch.inference_mode():
        while at < len(order):
            longest, stop = len(prompts[order[at]]), at + 1
            while stop < len(order) and len(prompts[order[stop]]) * (stop + 1 - at) <= _BATCH_TOKENS:
                longest, stop = len(prompts[order[stop]]), stop + 1
            batch = order[at:stop]
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : len(prompts[index])] = torch.tensor(prompts[index])
            last = torch.tensor([len(prompts[index]) - 1 for index in batch], device=device)
            hidden = decoder(input_ids=ids.to(device), use_cache=False, output_hidden_states=True).hidden_states
            rows = torch.arange(len(batch), device=device)
            picked = torch.stack([layer[rows, last] for layer in hidden], dim=1)
            # Half precision has digits enough for a probe, but not the range of some backbones' residual streams.
            values = picked.float().clamp(-6e4, 6e4).half().cpu().numpy()
            found.update(zip(batch, values, strict=True))
            at = stop
            if progress:
                progress(at, len(order))
    return np.stack([found[index] for index in range(len(prompts))])
