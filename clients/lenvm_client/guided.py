"""Guided decoding for any backbone: rows and candidates go in, log-weights come out.

The core keeps its state by the CONTENT of a prefix, not by the place of a row: beams may be reordered, rows may repeat
or vanish. It does no input or output: ``_flow`` asks for scores, and the blocking and the asynchronous decoder answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeAlias

from lenvm_client._state import Lineage, Live, Recent, Record, Tally, digests, objective_key
from lenvm_client._steps import GuidanceReport, GuidedRow, RowReport, WeightedRow, log_sum, uniform
from lenvm_client._types import CandidateInput, CandidateScorer, CandidateScores, RowError
from lenvm_client._wire import Wait
from lenvm_client.errors import (
    BadAnswerError,
    ContextTooLongError,
    InvalidRequestError,
    LenVMClientError,
    ModelNotFoundError,
    PayloadTooLargeError,
    ServiceError,
    ServiceUnreachableError,
    UnauthorizedError,
)

__all__ = [
    "AsyncCandidateScorer",
    "AsyncGuidedDecoder",
    "GuidanceReport",
    "GuidedDecoder",
    "GuidedRow",
    "RowReport",
    "WeightedRow",
    "uniform",
]

FORCED_STOP_LOGPROB = math.log(1e-3)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
ROW_RETRIES = 2

# No waiting cures these: before a row's first guided step they are raised, whatever on_error says.
_HOPELESS = (
    InvalidRequestError,
    UnauthorizedError,
    ModelNotFoundError,
    PayloadTooLargeError,
    ContextTooLongError,
)

Answers: TypeAlias = Sequence[CandidateScores | RowError]
Flow: TypeAlias = Generator[list[CandidateInput] | Wait, Answers | None, list[WeightedRow]]
Batch: TypeAlias = tuple[list[Live], list[CandidateInput]]


class AsyncCandidateScorer(Protocol):
    """What ``AsyncGuidedDecoder`` needs, e.g. ``AsyncClient``."""

    async def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        """Answers aligned with ``rows``. Raises LenVMClientError where the call as a whole failed."""


class _Core:
    """All of a decoder but the calls; see ``GuidedDecoder``."""

    def __init__(
        self,
        scorer: Any,
        eos_ids: Iterable[int],
        stop_ids: Iterable[int] = (),
        *,
        on_error: Literal["passthrough", "raise"] = "passthrough",
        max_batch_rows: int = 512,
        max_body_bytes: int = 2 << 20,
        max_prefixes: int = 8192,
    ) -> None:
        if on_error not in ("passthrough", "raise"):
            raise InvalidRequestError(f'on_error must be "passthrough" or "raise", not {on_error!r}', param="on_error")
        self.scorer = scorer
        self.end_ids = tuple(dict.fromkeys((*eos_ids, *stop_ids)))
        self.on_error = on_error
        self.max_batch_rows = max_batch_rows
        self.max_body_bytes = max_body_bytes
        self._sessions: Recent[bytes, str] = Recent(max_prefixes)
        self._records: Recent[Lineage, Record] = Recent(max_prefixes)
        self._tilts: Recent[Lineage, Mapping[str, Any]] = Recent(max_prefixes)
        self._pause, self._resume_at = FIRST_PAUSE_S, -math.inf
        self._clock = time.monotonic  # a seam of the tests
        self.start()

    def start(self, *, sampled: bool = True) -> None:
        """A new generation: the report's counters start again; known prefixes stay. ``sampled`` False (greedy, beams):
        tokens follow no distribution, so that the text cost is NaN."""
        self._sampled = sampled
        self._calls = 0
        self._seconds = 0.0
        self._errors: Counter[str] = Counter()

    def report(self, rows: Iterable[GuidedRow]) -> GuidanceReport:
        """The report on answers as they came out: ``prefix`` with all that was generated (an EOS that ended it too),
        ``generated`` and ``objective``; the other fields are not read."""
        reports = tuple(self._tally(row, ended=True).report for row in rows)
        return GuidanceReport(reports, self._calls, self._seconds, dict(self._errors))

    def _flow(self, rows: Sequence[GuidedRow]) -> Flow:
        """One step: yields rows to score, is sent the answers or thrown their error, returns the weighted rows. After a
        ``Wait`` it is sent None."""
        live = [self._enter(at, row) for at, row in enumerate(rows) if not row.finished]
        for row in rows:
            if row.finished:
                self._tally(row, ended=True)  # keeps its record from being forgotten before the report
        resting = self.on_error == "passthrough" and self._clock() < self._resume_at
        wanted = [x for x in live if x.row.objective is not None and x.ids and not x.tally.given_up and not resting]
        batches, later = self._batches(wanted), list[Live]()
        while batches or later:
            if not batches:
                yield Wait(max(x.wait_s for x in later))
                batches, later = self._batches(later), []
            batch, inputs = batches.pop(0)
            started = self._clock()
            try:
                try:
                    answers = yield inputs
                finally:
                    self._calls += 1
                    self._seconds += self._clock() - started
                again = self._accept(batch, inputs, answers or ())
            except LenVMClientError as error:
                self._fail(batch, error)
                break
            self._pause, self._resume_at = FIRST_PAUSE_S, -math.inf
            later += [x for x in again if x.wait_s]
            batches += self._batches([x for x in again if not x.wait_s])
        asked = max((x.wait_s for x in wanted if x.weights is None), default=0.0)
        if asked:  # by rows of calls that went well themselves
            self._resume_at = max(self._resume_at, self._clock() + asked)
        weighted = {x.at: self._leave(x) for x in live}
        return [weighted.get(at) or WeightedRow((), (), ()) for at in range(len(rows))]

    def _enter(self, at: int, row: GuidedRow) -> Live:
        if len(row.candidates) != len(row.logprobs) or not len(row.prefix):
            raise InvalidRequestError(f"row {at} needs a prefix, and as many logprobs as candidates", param="logprobs")
        if row.objective is not None and not isinstance(row.objective, Mapping):
            raise InvalidRequestError(f'row {at}: an objective looks like {{"kind": ...}}', param="objective")
        chances = {int(i): float(p) for i, p in zip(row.candidates, row.logprobs, strict=True)}
        if len(chances) != len(row.candidates):
            raise InvalidRequestError(f"row {at} names a candidate twice: give each once", param="candidates")
        for token, logprob in row.eos_logprobs.items():
            chances.setdefault(int(token), float(logprob))
        kept = {token: logprob for token, logprob in chances.items() if logprob != -math.inf}
        if not all(math.isfinite(logprob) for logprob in kept.values()):
            raise InvalidRequestError(f"row {at} has a log-prob that is NaN or +inf", param="logprobs")
        parent, digest = digests(row.prefix)
        key = objective_key(row.objective)
        tally = self._tally(row, ended=False, parent=(parent, key))
        return Live(at, row, tuple(kept), tuple(kept.values()), parent, digest, (digest, key), tally)

    def _tally(self, row: GuidedRow, *, ended: bool, parent: Lineage | None = None) -> Tally:
        """The tally up to and with the last token of ``row.prefix``."""
        last = int(row.prefix[-1]) if len(row.prefix) else -1
        if row.generated == 0 and not (ended and last in self.end_ids):
            return Tally()  # nothing is generated yet; an older generation may have passed here
        record = self._records.get(parent or (digests(row.prefix)[0], objective_key(row.objective)))
        if record is None:
            return Tally()
        # A token that was no candidate was not drawn from q: its cost cannot be told.
        cost = record.tally.report.text_cost + record.costs.get(last, math.nan)
        forced = record.forced and last in self.end_ids
        return replace(record.tally, report=replace(record.tally.report, text_cost=cost, forced_stop=forced))

    def _batches(self, rows: Sequence[Live]) -> list[Batch]:
        """All rows in one call, unless that passes the service's limits."""
        batches: list[Batch] = []
        size = 0
        for x in rows:
            item = self._input(x)
            # An upper guess.
            bytes_ = 512 + 8 * (len(item.token_ids or ()) + len(self.end_ids)) + 40 * len(x.ids)
            if not batches or len(batches[-1][0]) >= self.max_batch_rows or size + bytes_ > self.max_body_bytes:
                batches.append(([], []))
                size = 0
            batches[-1][0].append(x)
            batches[-1][1].append(item)
            size += bytes_
        return batches

    def _input(self, x: Live) -> CandidateInput:
        row, objective, prefix, digest = x.row, x.row.objective, x.row.prefix, x.digest
        generated = row.generated
        if objective is not None and objective.get("kind") == "scale" and generated > 0:
            prompt = prefix[: len(prefix) - generated]
            x.prompt = x.prompt or digests(prompt)[1]
            tilt = self._tilts.get((x.prompt, x.lineage[1]))
            if tilt is None:  # its first step was lost: this one resolves it, the next is guided
                x.boundary, generated, prefix, digest = True, 0, prompt, x.prompt
            else:
                objective = tilt
        common: dict[str, Any] = {
            "candidates": x.ids,
            "logprobs": x.logprobs,
            "generated": generated,
            "objective": objective,
            "eos_ids": self.end_ids,
        }
        # A handle of the prefix itself serves a repeated row, one of its parent the usual step.
        known: list[tuple[bytes, tuple[int, ...]]] = [(digest, ())]
        if not x.boundary:
            known.append((x.parent, (int(prefix[-1]),)))
        for key, append in known:
            session = None if x.resent else self._sessions.get(key)
            if session is not None:
                x.used = key
                return CandidateInput(session=session, append=append, **common)
        x.used = None
        return CandidateInput(token_ids=[int(token) for token in prefix], **common)

    def _accept(self, batch: Sequence[Live], inputs: Sequence[CandidateInput], answers: Answers) -> list[Live]:
        """Take the answers in; returns the rows to be sent again: whole, where the session is gone; after ``wait_s``,
        where the error may pass."""
        if len(answers) != len(batch):
            raise BadAnswerError(f"{len(batch)} rows were sent, {len(answers)} answers came back")
        again = []
        for x, sent, answer in zip(batch, inputs, answers, strict=True):
            x.wait_s = 0.0
            if isinstance(answer, RowError):
                if answer.type == "prefix_unknown" and x.used is not None:
                    self._sessions.drop(x.used)
                    x.resent = True
                    report = replace(x.tally.report, prefix_resends=x.tally.report.prefix_resends + 1)
                    x.tally = replace(x.tally, report=report)
                    again.append(x)
                elif self._fail_row(x, answer.to_exception()):
                    again.append(x)
                continue
            weights = answer.log_weights
            if weights is None or len(weights) != len(x.ids) or not all(map(math.isfinite, weights)):
                raise BadAnswerError(f"row {x.at} needs {len(x.ids)} finite log_weights, one a candidate")
            digest = x.prompt if x.boundary else x.digest
            if answer.session is not None:
                self._sessions.put(digest, answer.session)
            if sent.objective is not None and sent.objective.get("kind") == "scale":
                if answer.objective is None:
                    raise BadAnswerError(f"row {x.at}: a scale was not resolved to a tilt")
                self._tilts.put((digest, x.lineage[1]), answer.objective)
            if not x.boundary:
                x.weights = tuple(weights)
        return again

    def _fail(self, batch: Sequence[Live], error: LenVMClientError) -> None:
        """A call failed as a whole: raise, or leave the service alone for a while."""
        hopeless = _is_hopeless(error) and not any(x.tally.report.guided_steps for x in batch)
        if self.on_error == "raise" or hopeless:
            raise error
        self._count(error)
        self._resume_at = self._clock() + max(self._pause, error.retry_after_s or 0.0)
        self._pause = min(LONGEST_PAUSE_S, 2 * self._pause)

    def _fail_row(self, x: Live, error: ServiceError) -> bool:
        """A row failed in a call that went well: raise, or leave it unguided. True where it is to be sent again."""
        hopeless = _is_hopeless(error)
        if self.on_error == "raise" and error.retryable and x.retries < ROW_RETRIES:
            asked = FIRST_PAUSE_S if error.retry_after_s is None else error.retry_after_s
            if asked <= LONGEST_PAUSE_S:  # the caller can wait for longer by itself
                x.wait_s, x.retries = max(asked, 1e-3), x.retries + 1
                return True
        if self.on_error == "raise" or (hopeless and not x.tally.report.guided_steps):
            error.add_note(f"row {x.at} of the step, {x.row.generated} tokens generated")
            raise _RowFailure(error)
        self._count(error)
        if hopeless:
            x.tally = replace(x.tally, given_up=True)
        elif error.retryable:
            x.wait_s = error.retry_after_s or 0.0
        return False

    def _count(self, error: LenVMClientError) -> None:
        self._errors[error.type if isinstance(error, ServiceError) else type(error).__name__] += 1

    def _leave(self, x: Live) -> WeightedRow:
        """The row's answer; what its children need is kept."""
        guided = x.weights is not None
        weighted = WeightedRow(x.ids, x.logprobs, x.weights or (0.0,) * len(x.ids), guided)
        costs = weighted.costs() if self._sampled else [math.nan] * len(x.ids)
        forced = log_sum([p for i, p in zip(x.ids, x.logprobs, strict=True) if i in self.end_ids]) < FORCED_STOP_LOGPROB
        report = replace(
            x.tally.report,
            steps=x.tally.report.steps + 1,
            guided_steps=x.tally.report.guided_steps + guided,
            fallbacks=x.tally.report.fallbacks + (x.row.objective is not None and not guided),
        )
        tally = replace(x.tally, report=report)
        self._records.put(x.lineage, Record(tally, dict(zip(x.ids, costs, strict=True)), forced))
        return weighted


def _is_hopeless(error: LenVMClientError) -> bool:
    """True for what no waiting cures: another server than a LenVM service is among it."""
    if isinstance(error, BadAnswerError):
        return error.status is not None and error.status < 500 and not error.retryable
    return isinstance(error, _HOPELESS) or (isinstance(error, ServiceUnreachableError) and not error.retryable)


class _RowFailure(Exception):
    """Carries a row's error past the handler of failed calls."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(str(error))
        self.error = error


class GuidedDecoder(_Core):
    """The guidance of a step loop over any backbone; not thread-safe.

    For each step call ``step`` with the rows; add the log-weights to the candidates' log-probs and choose one (or use
    ``WeightedRow.draw`` and ``best``). At the end ``report`` tells what guidance did; ``start`` begins the next
    generation. All rows of a step go in one call, each with the one token that its session does not have yet; a prefix
    that the service no longer knows is sent again as a whole, once. Unguided and finished rows cost nothing.

    Args:
        scorer: a ``Client``, or anything else with ``score_candidates``. In a loop of many short calls a ``Client``
            with a short ``timeout`` and ``max_retries=0`` suits ``passthrough`` best.
        eos_ids, stop_ids: ids that end an answer.
        on_error: "raise" lets the typed error of a failed call or row through; a row whose error may pass (e.g. the
            service is full) is sent again first, at most twice, after the wait that it asks for (0.5 s where it does
            not say; a wait of over 30 s is left to the caller). "passthrough" leaves the rows of a failed step
            unguided, counts them, and lets the service rest: after a row's error as long as that asks for; after a
            failed call 0.5 s at first, twice as long each time up to 30 s, so that decoding does not wait for a
            time-out at every step. What can never work (an impossible objective, an unknown model, a wrong key, another
            server) is raised even then, as long as the row has had no guided step: nobody should take such an answer
            for a guided one. Later (e.g. the context is full) the row goes on without guidance and without calls.
        max_batch_rows, max_body_bytes: limits of one call, as in ``info().limits``; a larger step takes several calls.
        max_prefixes: prefixes remembered; at least twice the rows of a step, more with beams.
    """

    _sleep = staticmethod(time.sleep)  # a seam of the tests

    def __init__(
        self,
        scorer: CandidateScorer,
        eos_ids: Iterable[int],
        stop_ids: Iterable[int] = (),
        *,
        on_error: Literal["passthrough", "raise"] = "passthrough",
        max_batch_rows: int = 512,
        max_body_bytes: int = 2 << 20,
        max_prefixes: int = 8192,
    ) -> None:
        super().__init__(
            scorer,
            eos_ids,
            stop_ids,
            on_error=on_error,
            max_batch_rows=max_batch_rows,
            max_body_bytes=max_body_bytes,
            max_prefixes=max_prefixes,
        )

    def step(self, rows: Sequence[GuidedRow]) -> list[WeightedRow]:
        """The rows' candidates with their log-weights, aligned with ``rows``; empty for finished rows.

        Raises LenVMClientError (see ``on_error``), InvalidRequestError for rows that make no sense."""
        flow = self._flow(rows)
        try:
            wanted = next(flow)
            while True:
                if isinstance(wanted, Wait):
                    self._sleep(wanted.seconds)
                    wanted = flow.send(None)
                    continue
                try:
                    answers = self.scorer.score_candidates(wanted)
                except LenVMClientError as error:
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(answers)
        except StopIteration as stop:
            weighted: list[WeightedRow] = stop.value
            return weighted
        except _RowFailure as failure:
            raise failure.error from None


class AsyncGuidedDecoder(_Core):
    """``GuidedDecoder`` over an ``AsyncClient``: same arguments, ``step`` is awaited."""

    scorer: AsyncCandidateScorer
    _sleep = staticmethod(asyncio.sleep)  # a seam of the tests

    async def step(self, rows: Sequence[GuidedRow]) -> list[WeightedRow]:
        """See ``GuidedDecoder.step``."""
        flow = self._flow(rows)
        try:
            wanted = next(flow)
            while True:
                if isinstance(wanted, Wait):
                    await self._sleep(wanted.seconds)
                    wanted = flow.send(None)
                    continue
                try:
                    answers = await self.scorer.score_candidates(wanted)
                except LenVMClientError as error:
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(answers)
        except StopIteration as stop:
            weighted: list[WeightedRow] = stop.value
            return weighted
        except _RowFailure as failure:
            raise failure.error from None
