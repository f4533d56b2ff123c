"""Counter-based uniforms: the draw of a row depends on its seed and step alone, never on the batch around it."""

from __future__ import annotations

import torch

__all__ = ["uniforms"]


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele et al., 2014) in wrapping int64; masks stand for the logical shift torch lacks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniforms(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Uniforms in [0, 1), float64, one for each (seed, step); int64 tensors of one shape. The same on every device."""
    bits = _mix(_mix(seeds * _GOLDEN) + (steps + 1) * _GOLDEN)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53
