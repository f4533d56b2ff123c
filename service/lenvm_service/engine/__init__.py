"""The scoring engine: jobs in, rows of the wire contract out."""

from __future__ import annotations

from lenvm_service.engine.core import EngineCore
from lenvm_service.engine.engine import Engine
from lenvm_service.engine.jobs import CandidateJob, Job, PredictJob, Prefix, Reply, Result, TokenScoreJob
from lenvm_service.engine.loading import EngineOptions, Loaded, load_core
from lenvm_service.engine.sessions import SessionStore

__all__ = [
    "CandidateJob",
    "Engine",
    "EngineCore",
    "EngineOptions",
    "Job",
    "Loaded",
    "PredictJob",
    "Prefix",
    "Reply",
    "Result",
    "SessionStore",
    "TokenScoreJob",
    "load_core",
]
