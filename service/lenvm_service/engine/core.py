"""From jobs to answers with one model: sessions, one scorer call, and the numbers of the wire contract. No threads."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import Any

import numpy as np

from lenvm.calibration import Calibration
from lenvm.config import LenVMConfig
from lenvm.errors import InvalidRequestError, LenVMError, PoolExhaustedError
from lenvm.scoring import RowScore, Scorer, ScoreRow
from lenvm_service.answers import prediction_fields, token_score_fields
from lenvm_service.engine.candidates import CandidateRow, CandidateRows
from lenvm_service.engine.checks import check_candidates
from lenvm_service.engine.jobs import CandidateJob, Job, PredictJob, Prefix, Result, StepJob, TokenScoreJob, folded
from lenvm_service.engine.prefixes import PrefixStore
from lenvm_service.engine.sessions import SessionStore
from lenvm_service.engine.steps import answer_steps
from lenvm_service.errors import OverloadedError
from lenvm_service.garbage import collect_young
from lenvm_service.prefix_cache import Chain, SessionRecord
from lenvm_service.tracing import Tracing, traced

__all__ = ["BatchCounts", "EngineCore", "model_sha"]


def model_sha(config: LenVMConfig) -> str:
    """SHA-256 that changes whenever an answer may: weights of head and adapter, backbone, tokenizer, gamma, bins,
    calibration."""
    parts = [*sorted(config.files.values()), config.backbone.sha256, config.backbone.tokenizer_sha256]
    parts += [repr(config.gamma), repr(config.lora_scale), repr(config.head)]
    if config.calibration is not None:
        parts.append(json.dumps(config.calibration, sort_keys=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass
class BatchCounts:
    """What one ``run`` did, for the metrics."""

    computed_tokens: int = 0
    cached_tokens: int = 0
    promoted_tokens: int = 0
    forwards: int = 0
    shared_tokens: int = 0  # of the cached ones, those that came from the shared tier
    memoised: int = 0  # rows whose numbers came from there
    guided: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, method) -> rows


class _NoState:
    """Stands for the state of a prefix whose numbers alone are known."""

    length = 0
    logit = float("nan")
    bin_logprobs = None

    def close(self) -> None:
        """Nothing to give back."""


_NO_STATE = _NoState()


@dataclass(slots=True)
class _Work:
    """A job on its way through a run."""

    job: Job
    row: ScoreRow
    prefix_tokens: int
    chain: Chain | None = None  # of the whole prefix; None: nothing is kept of it
    terminal: list[bool] = field(default_factory=list)  # which candidates end the answer
    score: RowScore | None = None
    known: bool = False  # its numbers came from the shared tier: nothing to compute, and no state


class EngineCore:
    """Answers jobs with one scorer. Not thread-safe: one thread at a time has it (``Batcher``).

    Args:
        config: of the model; its digest is part of every session handle.
        tokenizer: used to show tokens.
        eos_ids: ids that end an answer.
        secret: key of the session handles, 16 to 64 bytes.
        shared_secret: key of the blocks' keys, of all replicas; empty for none.
    """

    def __init__(
        self,
        config: LenVMConfig,
        tokenizer: Any,
        scorer: Scorer,
        *,
        eos_ids: Sequence[int],
        secret: bytes,
        shared_secret: bytes = b"",
        sessions: SessionStore | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.scorer = scorer
        self.eos_ids = frozenset(eos_ids)
        self.eos_id = next(iter(eos_ids))
        self.sha = model_sha(config)
        self.calibration = Calibration.from_dict(config.calibration)
        layout = scorer.layout
        self.prefixes = PrefixStore(
            model_sha=self.sha,
            layout=repr(layout),
            block_tokens=layout.tokens if layout else 32,
            secret=secret,
            shared_secret=shared_secret,
            sessions=sessions,
        )
        self.counts = BatchCounts()
        self.tracing: Tracing | None = None
        self._later: list[Callable[[], None]] = []

    @property
    def sessions(self) -> SessionStore:
        """The sessions that are held."""
        return self.prefixes.sessions

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Answer all jobs, aligned, in one scorer call where the pool allows. A bad job gets its error and no other.

        Raises only what is nobody's fault but ours; nothing is half done then.
        """
        with self._counted():
            steps = {at: job for at, job in enumerate(jobs) if isinstance(job, StepJob)}
            return self._run_steps(jobs, steps) if steps else self._run_rows(jobs)

    def run_step(self, job: StepJob) -> Result | None:
        """:meth:`run` of one decoding step, if it is plainly one and a graph for it was recorded: it takes milliseconds
        then. None for all else, with nothing answered. Raises what is our fault, as ``run`` does."""
        with self._counted():
            found = answer_steps(self, [job], record=False)
        return None if found is None else found[0]

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Around a run: what it does is in ``counts``."""
        self.settle()
        counts = self.counts = BatchCounts()
        self.prefixes.begin()
        stats = self.scorer.stats
        tokens, promoted, forwards = stats.tokens, stats.promoted, stats.forwards
        yield
        counts.shared_tokens = self.prefixes.shared_tokens
        counts.computed_tokens, counts.promoted_tokens = stats.tokens - tokens, stats.promoted - promoted
        counts.forwards = stats.forwards - forwards

    def later(self, work: Callable[[], None]) -> None:
        """To be done after the run's answers were handed out, and before the next run."""
        self._later.append(work)

    def clear(self) -> None:
        """Let go of everything that is held, and of what was left for later: its states may be of another pool."""
        self._later.clear()
        self.prefixes.clear()

    @property
    def settled(self) -> bool:
        """Nothing was left for later."""
        return not self._later

    def settle(self) -> None:
        """Do what was left for later."""
        works, self._later = self._later, []
        for work in works:
            work()

    def _run_steps(self, jobs: Sequence[Job], steps: dict[int, StepJob]) -> list[Result]:
        """All steps side by side where each is plainly one, and the other jobs; or all of their rows one by one."""
        found = answer_steps(self, list(steps.values()))
        if found is not None:
            others = [at for at in range(len(jobs)) if at not in steps]
            results = dict(zip(steps, found, strict=True))
            try:
                rows = self._run_rows([jobs[at] for at in others]) if others else []
            except BaseException:
                self._later.clear()  # nobody is given these answers
                raise
            results.update(zip(others, rows, strict=True))
            return [results[at] for at in range(len(jobs))]
        spread = [job.rows() if isinstance(job, StepJob) else [job] for job in jobs]
        each = iter(self._run_rows([row for its in spread for row in its]))
        return [
            folded([next(each) for _ in its]) if isinstance(job, StepJob) else next(each)
            for job, its in zip(jobs, spread, strict=True)
        ]

    def _run_rows(self, jobs: Sequence[Job]) -> list[Result]:
        results: list[Result | None] = [None] * len(jobs)
        works: dict[int, _Work] = {}
        for at, job in enumerate(jobs):
            try:
                works[at] = self._prepare(job)
            except LenVMError as error:
                # Its traceback holds this frame, and with it every state of the batch, until a cyclic collection: on
                # another thread, perhaps, and long after the pool has run dry.
                error.__context__ = error.__cause__ = None
                results[at] = error.with_traceback(None)
        self._score(works, results)
        return [result for result in results if result is not None]

    # -- from jobs to rows ---------------------------------------------------------------------------------------------

    def _prepare(self, job: Job) -> _Work:
        """Resolve the session, check everything that concerns this job alone. Raises a typed error for the row."""
        assert not isinstance(job, StepJob)
        if isinstance(job, TokenScoreJob):
            return self._prepare_tokens(job)
        work = self._prefix(job)
        if isinstance(job, CandidateJob):
            check_candidates(job, self.scorer)
            ends = self.eos_ids
            if not ends.issuperset(job.eos_ids):
                ends = ends.union(job.eos_ids)
            work.terminal = terminal = list(map(ends.__contains__, job.candidates))
            work.row.candidates = list(compress(job.candidates, map(not_, terminal)))
        state, context = work.row.state, self.scorer.context
        # What else a scorer looks at was looked at here, and a step has dozens of rows.
        if not work.known and (state is None or work.prefix_tokens >= context or not isinstance(job, CandidateJob)):
            self.scorer.check(work.row)
        return work

    def _prepare_tokens(self, job: TokenScoreJob) -> _Work:
        completion = list(job.completion_ids)
        ends = [at for at, token in enumerate(completion) if token in self.eos_ids]
        if ends and ends[0] != len(completion) - 1:
            raise InvalidRequestError(
                "the end-of-sequence token stands inside the completion: nothing may follow it", param="completion_ids"
            )
        if not completion and not job.eos:
            raise InvalidRequestError("the completion is empty: give at least one token, or eos", param="completion")
        if not job.prompt_ids:
            raise InvalidRequestError("the prompt is empty: give at least one token", param="token_ids")
        content = completion[: ends[0]] if ends else completion
        size = self.scorer.vocab_size
        for name, ids in (("token_ids", job.prompt_ids), ("completion_ids", content)):
            if len(ids) and (min(ids) < 0 or max(ids) >= size):
                raise InvalidRequestError(f"{name} must be in [0, {size})", param=name)
        row = ScoreRow(append=[*job.prompt_ids, *content], values_from=len(job.prompt_ids) - 1)
        self.scorer.check(row)
        return _Work(job, row, len(job.prompt_ids))

    def _prefix(self, job: PredictJob | CandidateJob) -> _Work:
        prefix: Prefix = job.prefix
        ids = prefix.token_ids
        if len(ids) and (min(ids) < 0 or max(ids) >= self.scorer.vocab_size):  # before they go into the digest
            name = "token_ids" if prefix.session is None else "append"
            raise InvalidRequestError(f"{name} must be in [0, {self.scorer.vocab_size})", param=name)
        chain, state = self.prefixes.resolve(prefix)
        length = chain.length
        if not 0 <= job.generated <= length:
            raise InvalidRequestError(
                f"generated must be from 0 to the prefix's {length} tokens, not {job.generated}",
                param="generated",
            )
        shared = prefix.shared
        same = self.sessions.get(chain.handle)
        if same is not None:  # asked before, perhaps by way of another chain: only candidates are left to compute
            return _Work(job, ScoreRow(same.state), length, chain)
        if shared is not None and shared.record is not None and isinstance(job, PredictJob):
            return self._known(job, chain, shared.record)
        # A prefix that is too long is refused: nothing is let go for its sake.
        if state is None and length <= self.scorer.context:
            # Computed again sooner than gone on from: the system prompt that all chats begin with, mostly.
            least = getattr(self.scorer, "least_prefix", 0) if isinstance(job, PredictJob) else 0
            state, tokens = self.prefixes.from_blocks(self.scorer, chain, shared, least=least)
            ids = ids[tokens:]
        return _Work(job, ScoreRow(state, ids), length, chain)

    def _known(self, job: PredictJob, chain: Chain, record: SessionRecord) -> _Work:
        """A prediction whose numbers another replica has computed."""
        bins = None if record.bin_logprobs is None else record.bin_logprobs[None]
        score = RowScore(_NO_STATE, np.array([record.logit]), bins, np.empty(0), None, chain.length)
        self.counts.memoised += 1
        return _Work(job, ScoreRow(_NO_STATE), chain.length, chain, score=score, known=True)

    # -- the scorer ----------------------------------------------------------------------------------------------------

    def _score(self, works: dict[int, _Work], results: list[Result | None]) -> None:
        """Score and answer all rows, in as few scorer calls as the pool allows; what has no room even alone, with no
        session left, is an overload of its row."""
        pool = self.scorer.pool
        self._answer({at: work for at, work in works.items() if work.known}, results)
        for at in [at for at, work in works.items() if work.known]:
            del works[at]
        groups = [list(works)] if works else []
        while groups:
            group = groups.pop()
            halves = [group[len(group) // 2 :], group[: len(group) // 2]]
            needed = sum(self.scorer.blocks_needed(works[at].row) for at in group)
            if needed >= pool.max_blocks and len(group) > 1:
                groups += halves
                continue
            self.prefixes.make_room(self.scorer, needed)
            try:
                self._score_group({at: works[at] for at in group}, results)
            except PoolExhaustedError:
                if len(group) > 1:
                    groups += halves
                else:
                    problem = "the pool of prefix states is full: try again"
                    results[group[0]] = OverloadedError(problem, retry_after_s=1.0)
                continue
            for at in group:
                del works[at]  # its state is the store's now, which may let it go for the next group

    def _score_group(self, works: dict[int, _Work], results: list[Result | None]) -> None:
        rows = [work.row for work in works.values()]
        candidates: CandidateRows | None = None
        asked = {at: work for at, work in works.items() if work.terminal}

        def meanwhile() -> None:
            nonlocal candidates
            if asked:
                candidates = self._candidate_rows(asked.values())
            collect_young(len(rows))

        with traced(self.tracing, "forward", rows=len(rows)):
            scores = self.scorer.score(rows, meanwhile)
        for work, score in zip(works.values(), scores, strict=True):
            work.score = score
        if candidates is not None:
            given = [work.score for work in asked.values() if work.score is not None]
            results_of = candidates.answers(given)
            self.counts.guided.update(candidates.guided())
            for at, result in zip(asked, results_of, strict=True):
                results[at] = result
        self._answer(works, results)

    def _candidate_rows(self, works: Iterable[_Work]) -> CandidateRows:
        rows = []
        for work in works:
            assert isinstance(work.job, CandidateJob)
            assert work.chain is not None
            rows.append(CandidateRow(work.job, work.terminal, work.prefix_tokens, work.chain.handle))
        return CandidateRows(rows, bins=self.scorer.bins, gamma=self.scorer.gamma)

    # -- from scores to answers ----------------------------------------------------------------------------------------

    def _answer(self, works: dict[int, _Work], results: list[Result | None]) -> None:
        kinds: dict[type, list[int]] = defaultdict(list)
        for at, work in works.items():
            assert work.score is not None
            if not work.terminal:  # or they were looked at with the candidates
                if not np.isfinite(work.score.logits).all():
                    raise ArithmeticError("the model gave values that are not finite")  # whatever these are, no answers
                kinds[type(work.job)].append(at)
            if work.chain is not None:
                self.counts.cached_tokens += work.score.cached_tokens
        for kind, answer in _ANSWERS:
            if kinds[kind]:
                found = answer(self, [works[at] for at in kinds[kind]])
                for at, result in zip(kinds[kind], found, strict=True):
                    results[at] = result
        for work in works.values():
            assert work.score is not None
            if work.chain is None:
                work.score.state.close()
            elif not work.known:
                self.prefixes.keep(self.scorer, work.chain, work.score)

    def _predictions(self, works: list[_Work]) -> list[Result]:
        found: list[Result] = [{} for _ in works]
        alike: dict[tuple[tuple[float, ...], bool], list[int]] = defaultdict(list)
        for at, work in enumerate(works):
            assert isinstance(work.job, PredictJob)
            alike[tuple(work.job.quantiles), work.job.distribution].append(at)
        for (levels, distribution), group in alike.items():
            scores = [works[at].score for at in group]
            has_bins = self.scorer.bins is not None
            rows = prediction_fields(
                [score.logits[-1] for score in scores if score],
                np.stack([score.bin_logprobs[-1] for score in scores if score and score.bin_logprobs is not None])
                if has_bins
                else None,
                bins=self.scorer.bins,
                gamma=self.scorer.gamma,
                quantiles=levels,
                max_tokens=[_tokens_left(works[at].job) for at in group],
                calibration=self.calibration,
                distribution=distribution,
            )
            for at, row in zip(group, rows, strict=True):
                work, score = works[at], works[at].score
                assert score is not None
                assert work.chain is not None
                found[at] = {
                    "prompt_tokens": work.prefix_tokens,
                    "cached_tokens": score.cached_tokens,
                    **row,
                    "session": work.chain.handle,
                    "prediction_id": work.chain.handle,
                }
        return found

    def _token_scores(self, works: list[_Work]) -> list[Result]:
        found: list[Result] = []
        for work in works:
            job, score = work.job, work.score
            assert isinstance(job, TokenScoreJob)
            assert score is not None
            ids = list(job.completion_ids)
            ends = bool(ids) and ids[-1] in self.eos_ids
            fields = token_score_fields(
                score.logits,
                ids[:-1] if ends else ids,
                self.tokenizer,
                gamma=self.scorer.gamma,
                eos_id=ids[-1] if ends else self.eos_id if job.eos else None,
            )
            found.append({"prompt_tokens": work.prefix_tokens, **fields})
        return found


_ANSWERS: tuple[tuple[type, Callable[[EngineCore, list[_Work]], list[Result]]], ...] = (
    (PredictJob, EngineCore._predictions),
    (TokenScoreJob, EngineCore._token_scores),
)


def _tokens_left(job: Job) -> int | None:
    """What ``max_tokens`` leaves after what was generated."""
    if not isinstance(job, PredictJob) or job.max_tokens is None:
        return None
    return max(0, job.max_tokens - job.generated)
