"""One of several LIFEBench answers, drawn by its importance weight: ``lenvm.resampling`` on a work file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lenvm.evaluation.answers import Answer, AnswerFile
from lenvm.evaluation.lifebench_posterior import PosteriorRule
from lenvm.evaluation.lifebench_work import Job
from lenvm.guidance import Objective
from lenvm.resampling import resample_answers
from lenvm.rollouts.sampling import stream_seed

__all__ = ["drawn"]


def drawn(jobs: Sequence[Job], of: int, store: AnswerFile, *, tolerance: float, seed: int) -> list[tuple[Job, Answer]]:
    """Of each ``of`` answers in a row (one sample's, as ``jobs_of`` lists them) one, with the text cost of the draw.

    A posterior rule says itself how soft the target is; answers of other policies are weighed by ``tolerance``.
    """
    if of == 1:
        return [(job, store[job]) for job in jobs]
    found = []
    for start in range(0, len(jobs), of):
        group, first = jobs[start : start + of], jobs[start]
        soft = first.policy.tolerance if isinstance(first.policy, PosteriorRule) else tolerance
        name = f"{first.policy}/{first.kind}/{first.task.id}/{first.target}/draw"
        draw = np.random.default_rng(stream_seed(name, first.sample, seed)).uniform()
        objective = Objective(first.kind, first.target, tolerance=soft)
        answer, its = resample_answers(objective, [store[job] for job in group], draw)
        found.append((group[its.index], answer))
    return found
