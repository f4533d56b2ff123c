"""One of several LIFEBench answers, drawn by its importance weight: ``lenvm.resampling`` on a work file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lenvm.evaluation.answers import Answer, AnswerFile
from lenvm.evaluation.lifebench_posterior import PosteriorRule
from lenvm.evaluation.lifebench_work import Job
from lenvm.guidance import Objective
from lenvm.resampling import resample
from lenvm.rollouts.sampling import stream_seed

__all__ = ["drawn"]


def drawn(
    jobs: Sequence[Job], of: int, store: AnswerFile, *, tolerance: float, seed: int
) -> Iterator[tuple[Job, Answer]]:
    """Of each ``of`` answers in a row (one sample's, as ``jobs_of`` lists them) one, with the text cost of the draw.

    A posterior rule says itself how soft the target is; answers of other policies are weighed by ``tolerance``.
    """
    for start in range(0, len(jobs), of):
        group = jobs[start : start + of]
        answers = [store[job] for job in group]
        if of == 1:
            yield group[0], answers[0]
            continue
        first = group[0]
        soft = first.policy.tolerance if isinstance(first.policy, PosteriorRule) else tolerance
        name = f"{first.policy}/{first.kind}/{first.task.id}/{first.target}/draw"
        found = resample(
            Objective(first.kind, first.target, tolerance=soft),
            [answer.length for answer in answers],
            [answer.text_cost for answer in answers],
            np.random.default_rng(stream_seed(name, first.sample, seed)).uniform(),
        )
        yield group[found.index], replace(answers[found.index], text_cost=found.text_cost)
