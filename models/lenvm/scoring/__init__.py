"""Scoring: values of prefixes and of candidate next tokens, with cached prefix states."""

from __future__ import annotations

from lenvm.scoring.protocol import PrefixState, RowScore, Scorer, ScoreRow, ScorerStats
from lenvm.scoring.torch_scorer import TorchScorer

__all__ = ["PrefixState", "RowScore", "ScoreRow", "Scorer", "ScorerStats", "TorchScorer"]
