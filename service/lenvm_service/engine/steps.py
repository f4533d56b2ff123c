"""Decoding steps as columns: all rows of all steps of a batch side by side, from the sessions to the answer.

On a GPU a step of 32 rows takes a millisecond: here as little as can be is done for each row by itself, and what need
not be known before the launch is done while the device is at work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import InvalidRequestError, PoolExhaustedError
from lenvm.guidance import Objective, PreparedWeights, check_objective, expect_step, shared_utility
from lenvm.returns import horizon_from_logit, value_from_logit
from lenvm.scoring import PrefixState, StepScores
from lenvm_service.engine.jobs import Result, StepJob
from lenvm_service.engine.sessions import Session
from lenvm_service.garbage import collect_young
from lenvm_service.prefix_cache import Chain
from lenvm_service.tracing import traced

if TYPE_CHECKING:
    from lenvm_service.engine.core import EngineCore

__all__ = ["answer_steps"]

_BLOCKS = 2  # of the pool, at most, for a row: that of its new token, and one for a copy-on-write


class _Stepping(Protocol):
    """A scorer that takes a step as columns (``TorchScorer.step``)."""

    def step(
        self,
        before: Sequence[PrefixState | None],
        appended: Sequence[Sequence[int]],
        ids: NDArray[np.int32],
        counts: Sequence[int],
        meanwhile: Callable[[StepScores], None] | None = None,
        *,
        utilities: NDArray[np.float32] | None = None,
        record: bool = True,
    ) -> StepScores | None: ...


def answer_steps(core: EngineCore, jobs: Sequence[StepJob], *, record: bool = True) -> list[Result] | None:
    """Answers aligned with ``jobs``, by one graph for all of their rows. None, with nothing done, where any row is in
    any way not plainly as it should be: row by row it gets its answer, or its typed error. ``record`` False: also where
    the graph is not there yet."""
    if not hasattr(core.scorer, "step") or any(job.odd for job in jobs) or (step := _Step.of(core, jobs)) is None:
        return None
    return step.answers(record=record)


class _NotPlainError(Exception):
    """Some row is not as it should be: found out while the device was at work."""


class _Step:
    """The rows of some steps, with what must be known before the launch.

    ``flat`` [T]: all candidates, one row's after another's; ``terminal`` [T]: which of them end the answer, and so are
    not scored; ``ids`` [S]: the others, ``counts[r]`` of row r.
    """

    def __init__(
        self,
        core: EngineCore,
        jobs: Sequence[StepJob],
        sessions: Sequence[Session],
        candidates: Sequence[Sequence[int]],
        flat: NDArray[np.int32],
        terminal: NDArray[np.bool_],
        counts: Sequence[int],
    ) -> None:
        self.core, self.jobs, self.sessions, self.candidates = core, jobs, sessions, candidates
        self.flat, self.terminal, self.ids, self.counts = flat, terminal, flat[~terminal], counts
        self.appended = [new for job in jobs for new in job.appended]
        self.generated = [count for job in jobs for count in job.generated]
        self.objectives = [objective for job in jobs for objective in job.objectives]

    @classmethod
    def of(cls, core: EngineCore, jobs: Sequence[StepJob]) -> _Step | None:
        """None where some row is not as it should be."""
        sessions: list[Session] = []
        for job in jobs:
            its = core.sessions.get_all(job.sessions)
            root = core.prefixes.root(job.tenant)
            if its is None or any(session.chain.root is not root for session in its):
                return None
            sessions += its
        candidates = [ids for job in jobs for ids in job.candidates]
        sizes = list(map(len, candidates))
        packed = [ids for job in jobs if (ids := job.packed()) is not None]
        if len(packed) < len(jobs) or not all(sizes):
            return None
        flat = packed[0] if len(packed) == 1 else np.concatenate(packed)
        terminal = _ends(core, jobs, flat)
        starts = np.array([0, *accumulate(sizes[:-1])])
        counts: list[int] = np.add.reduceat(~terminal, starts, dtype=np.intp).tolist()
        needed = _BLOCKS * len(sizes)
        if not min(counts) or needed >= core.scorer.pool.max_blocks:
            return None
        core.prefixes.make_room(core.scorer, needed)
        return cls(core, jobs, sessions, candidates, flat, terminal, counts)

    def answers(self, *, record: bool) -> list[Result] | None:
        """See ``answer_steps``."""
        core = self.core
        states = [session.state for session in self.sessions]
        utilities = shared_utility(self.objectives, self.generated, core.scorer.bins)
        try:
            with traced(core.tracing, "forward", rows=len(states)):
                found = cast(_Stepping, core.scorer).step(
                    states, self.appended, self.ids, self.counts, self._meanwhile, utilities=utilities, record=record
                )
        except PoolExhaustedError:
            return None
        except _NotPlainError:
            for job in self.jobs:
                job.odd = len(self.jobs) == 1
            return None
        return None if found is None else self._answers(found)

    def _check(self, lengths: Sequence[int]) -> None:
        """Raise _NotPlainError for candidates that come twice or are no ids (the scorer has looked at those that it
        scores), more content tokens than tokens, or an objective that cannot be answered as it stands."""
        twice = any(len(set(ids)) != len(ids) for ids in self.candidates)
        if (
            twice
            or self.flat.view(np.uint32).max() >= self.core.scorer.vocab_size  # negative ids are the largest then
            or any(not 0 <= count <= length for count, length in zip(self.generated, lengths, strict=True))
            or not all(_suits(self.core, job) for job in self.jobs)
        ):
            raise _NotPlainError

    def _meanwhile(self, step: StepScores) -> None:
        """What follows from the jobs and the prefixes alone."""
        self._check(step.lengths)
        self.sizes = list(map(len, self.candidates))
        self.shape = rows, width = len(self.sizes), max(self.sizes)
        each = np.array(self.sizes)
        # [T]: where each candidate stands in [R, width].
        self.places = np.arange(each.sum()) + np.repeat(width * np.arange(rows) - each.cumsum() + each, each)
        own, lengths = step.logits, list(step.lengths)
        self.columns: dict[str, list[Any]] = {
            "prefix_tokens": lengths,
            "cached_tokens": lengths,
            "value": value_from_logit(own).tolist(),
            "horizon": horizon_from_logit(own, self.core.scorer.gamma).tolist(),
        }
        self.finite = bool(np.isfinite(own).all())
        self.chains: list[Chain] = [
            session.chain.extend(new) for session, new in zip(self.sessions, self.appended, strict=True)
        ]
        for chain in self.chains:
            assert chain.handle  # worked out now
        is_eos, logprobs = np.zeros(self.shape, np.bool_), np.full(self.shape, -np.inf)
        is_eos.reshape(-1)[self.places[self.terminal]] = True
        begin = 0
        for job in self.jobs:
            end = begin + sum(map(len, job.candidates))
            if job.logprobs is not None:
                logprobs.reshape(-1)[self.places[begin:end]] = [log for its in job.logprobs for log in its]
            begin = end
        self.weights = PreparedWeights(
            self.objectives,
            is_eos,
            np.array(self.generated),
            logprobs,
            bins=self.core.scorer.bins,
            gamma=self.core.scorer.gamma,
        )
        given = [objective for objective in self.objectives if objective is not None]
        self.core.counts.guided.update(Counter((objective.kind, objective.method) for objective in given))

    def _answers(self, found: StepScores) -> list[Result]:
        core, columns = self.core, self.columns
        numbers = found.scored()
        if not (self.finite and np.isfinite(numbers[:, 0]).all()):
            raise ArithmeticError("the model gave values that are not finite")  # whatever these are, no answers
        columns["log_weights"] = self._weights(numbers, None if found.means is None else found.of_all(found.means))
        columns["session"] = [chain.handle for chain in self.chains]
        columns["objective"] = [None] * len(self.chains)
        core.counts.cached_tokens += sum(columns["cached_tokens"])
        core.later(partial(self._keep, found))
        if len(self.jobs) == 1:
            return [{"columns": columns, "errors": {}}]
        results: list[Result] = []
        begin = 0
        for job in self.jobs:
            end = begin + len(job.sessions)
            results.append({"columns": {name: its[begin:end] for name, its in columns.items()}, "errors": {}})
            begin = end
        return results

    def _keep(self, found: StepScores) -> None:
        """What the next step needs and this one's callers do not."""
        core = self.core
        core.prefixes.keep_step(core.scorer, self.chains, found.states(), [session.chain for session in self.sessions])
        ahead = set(zip(map(id, self.objectives), self.generated, strict=True))
        if len(ahead) == 1 and (objective := self.objectives[0]) is not None:
            expect_step(objective, self.generated[0] + 1, core.scorer.bins)
        collect_young(len(self.sizes))

    def _weights(self, numbers: NDArray[np.floating[Any]], means: NDArray[np.float32] | None) -> list[Any]:
        """Log-weights of each row's candidates; None where it has no objective."""
        scored = self.places[~self.terminal]
        if self.core.scorer.bins is not None and self.weights.reads_bins_alone:
            # The head computes in float32: more would be no more exact, unless it is magnified.
            plain = means is not None or all(each is not None and each.strength <= 1.0 for each in self.objectives)
            logprobs: NDArray[Any] = numbers[:, 1:].astype(np.float32 if plain else np.float64, copy=False)
            weights = self.weights.of_scored(scored, logprobs, means)
        else:
            flat = np.full((self.shape[0] * self.shape[1], numbers.shape[1]), np.nan)
            flat[scored] = numbers
            whole = flat.reshape(*self.shape, -1)
            weights = self.weights(whole[..., 0], None if self.core.scorer.bins is None else whole[..., 1:])
        listed, width = weights.tolist(), self.shape[1]
        return [
            None if objective is None else its if size == width else its[:size]
            for its, size, objective in zip(listed, self.sizes, self.objectives, strict=True)
        ]


def _suits(core: EngineCore, job: StepJob) -> bool:
    """Whether this model can answer the job's objectives as they stand, and its log-probs are as many as candidates."""
    logprobs = job.logprobs
    if logprobs is not None and list(map(len, logprobs)) != list(map(len, job.candidates)):
        return False
    wanted: dict[int, Objective | None] = {id(objective): objective for objective in job.objectives}
    try:
        for objective in wanted.values():
            check_objective(
                objective, bins=core.scorer.bins, gamma=core.scorer.gamma, has_logprobs=logprobs is not None
            )
    except InvalidRequestError:  # a scale, too
        return False
    return True


def _ends(core: EngineCore, jobs: Sequence[StepJob], flat: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[T]: which candidates end the answer."""
    terminal = np.zeros(len(flat), np.bool_)
    begin = 0
    for job in jobs:
        end = begin + sum(map(len, job.candidates))
        for token in core.eos_ids.union(job.eos_ids):
            terminal[begin:end] |= flat[begin:end] == token
        begin = end
    return terminal
