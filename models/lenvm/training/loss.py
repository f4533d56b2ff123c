"""The training loss: token-averaged squared error on the return (paper Eq. 9) and cross-entropy on the length bins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from lenvm.distribution import LengthBins
from lenvm.modeling import HeadOutput

__all__ = ["LossParts", "Targets", "length_loss", "survival_table"]


@dataclass(frozen=True)
class Targets:
    """Per token ``[N]``: ``remaining`` is l (``finished``) or the known bound c (cut); ``weight`` 0 leaves it out."""

    remaining: torch.Tensor
    finished: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class LossParts:
    """Token means: ``total = value + alpha * bins``."""

    total: torch.Tensor
    value: torch.Tensor
    bins: torch.Tensor


def survival_table(bins: LengthBins, device: torch.device | str = "cpu") -> torch.Tensor:
    """``log P(l > c | bin)`` for c = 0 .. cap, float32 ``[cap + 1, n]``; -inf becomes a large negative number."""
    table = np.log(np.maximum(bins.survival_weights(np.arange(bins.cap + 1)), 1e-30))
    return torch.from_numpy(table).float().to(device)


def length_loss(
    output: HeadOutput,
    targets: Targets,
    *,
    gamma: float,
    alpha: float,
    bins: LengthBins | None,
    survival: torch.Tensor | None,
) -> LossParts:
    """Loss of a batch. A cut answer costs only where the value says "shorter than what is already known"."""
    value = -torch.sigmoid(output.logits)
    target = torch.expm1(targets.remaining.float() * math.log(gamma))
    error = value - target
    error = torch.where(targets.finished, error, error.clamp_min(0.0))
    count = targets.weight.sum().clamp_min(1.0)
    value_loss = (error.square() * targets.weight).sum() / count
    bin_loss = torch.zeros_like(value_loss)
    if output.bin_logprobs is not None and bins is not None and survival is not None:
        edges = torch.tensor(bins.hi[:-1].tolist(), device=output.logits.device)
        index = torch.searchsorted(edges, targets.remaining.long())
        observed = -output.bin_logprobs.gather(-1, index[:, None])[:, 0]
        known = survival[targets.remaining.long().clamp_max(bins.cap)]
        cut = -torch.logsumexp(output.bin_logprobs + known, dim=-1)
        bin_loss = (torch.where(targets.finished, observed, cut) * targets.weight).sum() / count
    return LossParts(value_loss + alpha * bin_loss, value_loss, bin_loss)
