"""Scoring: values of prefixes and of candidate next tokens, with cached prefix states.

The engines are imported at their first use: each needs a runtime that an installation may lack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lenvm.scoring._rows import packed_ids
from lenvm.scoring.blocks import BlockLayout, StateBlock
from lenvm.scoring.protocol import PoolCounts, PrefixState, RowScore, Scorer, ScoreRow, ScorerStats, StepScores

if TYPE_CHECKING:
    from lenvm.scoring.onnx_model import OnnxModel
    from lenvm.scoring.onnx_scorer import OnnxScorer
    from lenvm.scoring.torch_scorer import TorchScorer

__all__ = [
    "BlockLayout",
    "OnnxModel",
    "OnnxScorer",
    "PoolCounts",
    "PrefixState",
    "RowScore",
    "ScoreRow",
    "Scorer",
    "ScorerStats",
    "StateBlock",
    "StepScores",
    "TorchScorer",
    "packed_ids",
]


def __getattr__(name: str) -> Any:
    # Written out, so that type checkers and readers see the homes.
    if name == "TorchScorer":
        from lenvm.scoring.torch_scorer import TorchScorer

        return TorchScorer
    if name == "OnnxModel":
        from lenvm.scoring.onnx_model import OnnxModel

        return OnnxModel
    if name == "OnnxScorer":
        from lenvm.scoring.onnx_scorer import OnnxScorer

        return OnnxScorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
