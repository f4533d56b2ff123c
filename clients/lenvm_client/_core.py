"""The core of guided decoding: what a step asks the service for, and what it makes of the answers.

It keeps its state by the CONTENT of a prefix, not by the place of a row: beams may be reordered, rows may repeat
or vanish. It does no input or output: ``_flow`` asks for scores, and the blocking and the asynchronous decoder answer.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from struct import Struct
from typing import Any, Literal, TypeAlias

from lenvm_client._columns import StepAnswers, StepRows, listed
from lenvm_client._state import Lineage, Live, Mark, Recent, Record, Tally, digests, hashed, objective_key
from lenvm_client._steps import GuidanceReport, GuidedRow, RowReport, WeightedRow, log_sum
from lenvm_client._text import TextAdapter, View
from lenvm_client._types import CandidateInput, CandidateScores, RowError
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

__all__ = ["Core", "OnError", "RowFailure"]

FORCED_STOP_LOGPROB = math.log(1e-3)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
ROW_RETRIES = 2
_LARGEST_ID = 1 << 31
_TOKEN = Struct("=q")  # as ``hashed`` has them
# Re-encoding a text changes its last few tokens, so that the session that is gone on from may lie further behind.
TEXT_APPEND = 8

# No waiting cures these: before a row's first guided step they are raised, whatever on_error says.
_HOPELESS = (
    InvalidRequestError,
    UnauthorizedError,
    ModelNotFoundError,
    PayloadTooLargeError,
    ContextTooLongError,
)

Answers: TypeAlias = Sequence[CandidateScores | RowError]
Flow: TypeAlias = Generator[Sequence[CandidateInput] | Wait, Answers | None, list[WeightedRow]]
Batch: TypeAlias = tuple[Sequence[Live], Sequence[CandidateInput]]
OnError: TypeAlias = Literal["passthrough", "raise", "log"]

_log = logging.getLogger(__name__)

_NOTHING_ASKED = vars(CandidateInput(candidates=()))


class Core:
    """All of a decoder but the calls; see ``GuidedDecoder``."""

    def __init__(
        self,
        scorer: Any,
        eos_ids: Iterable[int],
        stop_ids: Iterable[int] = (),
        *,
        on_error: OnError = "passthrough",
        max_batch_rows: int = 512,
        max_body_bytes: int = 2 << 20,
        max_prefixes: int = 8192,
        text: TextAdapter | None = None,
        max_append: int | None = None,
    ) -> None:
        if on_error not in ("passthrough", "raise", "log"):
            message = f'on_error must be "passthrough", "raise" or "log", not {on_error!r}'
            raise InvalidRequestError(message, param="on_error")
        self.scorer = scorer
        self.end_ids = tuple(dict.fromkeys((*eos_ids, *stop_ids)))
        self.on_error = on_error
        self.max_batch_rows = max_batch_rows
        self.max_body_bytes = max_body_bytes
        self.text = text
        self.max_append = max_append or (1 if text is None else TEXT_APPEND)
        self._sessions: Recent[bytes, str] = Recent(max_prefixes)
        self._records: Recent[Lineage, Record] = Recent(max_prefixes)
        self._tilts: Recent[Lineage, Mapping[str, Any]] = Recent(max_prefixes)
        self._pause, self._resume_at = FIRST_PAUSE_S, -math.inf
        self._clock = time.monotonic  # a seam of the tests
        # What the next step needs and this one's caller does not: done while the next call is under way.
        self._left: list[tuple[Live, WeightedRow]] = []
        self._entered: list[Live] = []
        self._ended: list[GuidedRow] = []
        self._unkept: list[tuple[bytes, str]] = []  # sessions of the last step, by the digests of their prefixes
        self._gave_up = False  # some row did, ever
        self.start()

    def start(self, *, sampled: bool = True) -> None:
        """A new generation: the report's counters start again; known prefixes stay. ``sampled`` False (greedy, beams):
        tokens follow no distribution, so that the text cost is NaN."""
        self._catch_up()
        self._sampled = sampled
        self._calls = 0
        self._seconds = 0.0
        self._errors: Counter[str] = Counter()

    def report(self, rows: Iterable[GuidedRow]) -> GuidanceReport:
        """The report on answers as they came out: ``prefix`` with all that was generated (an EOS that ended it too),
        ``generated`` and ``objective``; the other fields are not read."""
        self._catch_up()
        rows = list(rows)
        reports = tuple(self._tally(row, ended=True).report for row in rows)
        estimates = () if self.text is None else [self.text.estimates(row.objective) for row in rows]
        approximate = tuple(dict.fromkeys(name for each in estimates for name in each))
        return GuidanceReport(reports, self._calls, self._seconds, dict(self._errors), approximate)

    def _flow(self, rows: Sequence[GuidedRow]) -> Flow:
        """One step: yields rows to score, is sent the answers or thrown their error, returns the weighted rows. After a
        ``Wait`` it is sent None."""
        if self._entered:  # of a step that is under way beside this one
            self._catch_up()
        self._entered = live = [self._enter(at, row) for at, row in enumerate(rows) if not row.finished]
        self._ended = [row for row in rows if row.finished]
        if self._gave_up:
            self._catch_up()
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
                    self._catch_up()
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
        self._catch_up()
        weighted = {x.at: self._leave(x) for x in live}
        return [weighted.get(at) or WeightedRow((), (), ()) for at in range(len(rows))]

    def _enter(self, at: int, row: GuidedRow) -> Live:
        if len(row.candidates) != len(row.logprobs) or not len(row.prefix):
            raise InvalidRequestError(f"row {at} needs a prefix, and as many logprobs as candidates", param="logprobs")
        if row.objective is not None and not isinstance(row.objective, Mapping):
            raise InvalidRequestError(f'row {at}: an objective looks like {{"kind": ...}}', param="objective")
        if self.text is None and (row.objective or {}).get("unit", "tokens") != "tokens":
            raise InvalidRequestError(
                f"row {at}: a unit is counted on text: give the decoder a TextAdapter", param="unit"
            )
        plain = _plain_chances(row)
        if plain is not None:
            return self._known(Live(at, row, *plain))
        chances = {int(i): float(p) for i, p in zip(row.candidates, row.logprobs, strict=True)}
        if len(chances) != len(row.candidates):
            raise InvalidRequestError(f"row {at} names a candidate twice: give each once", param="candidates")
        for token, logprob in row.eos_logprobs.items():
            chances.setdefault(int(token), float(logprob))
        kept = {token: logprob for token, logprob in chances.items() if logprob != -math.inf}
        if not all(math.isfinite(logprob) for logprob in kept.values()):
            raise InvalidRequestError(f"row {at} has a log-prob that is NaN or +inf", param="logprobs")
        return self._known(Live(at, row, tuple(kept), tuple(kept.values())))

    def _known(self, x: Live) -> Live:
        """The row with its parent's mark, which stands for its session, or hashed."""
        row = x.row
        mark, prefix = None if row.after is None else row.after.mark, row.prefix
        if (
            mark is not None
            and len(prefix) == mark.length + 1
            and prefix[-2] == mark.last
            and type(prefix[-1]) is int
            and 0 <= prefix[-1] < _LARGEST_ID
        ):
            x.before = mark
        else:
            self._hash(x)
        return x

    def _hash(self, x: Live) -> None:
        """Once; with a mark it can wait until the call is under way."""
        if x.hash is not None:
            return
        if x.before is None:
            (x.parent, x.digest), x.hash = hashed(x.row.prefix)
        else:
            x.parent, x.hash = x.before.digest, x.before.hash.copy()
            x.hash.update(_TOKEN.pack(x.row.prefix[-1]))
            x.digest = x.hash.digest()
        x.lineage = x.digest, objective_key(x.row.objective)

    def _catch_up(self) -> None:
        """Note down the rows that the last step left, then look up those that have come since."""
        self._keep_sessions()
        left, self._left = self._left, []
        for x, weighted in left:
            self._note(x, weighted)
        entered, self._entered = self._entered, []
        for x in entered:
            self._hash(x)
            x.tally = self._tally(x.row, ended=False, parent=(x.parent, x.lineage[1]))
        ended, self._ended = self._ended, []
        for row in ended:
            self._tally(row, ended=True)  # keeps its record from being forgotten before the report

    def _keep_sessions(self) -> None:
        """By content, for rows that do not say what they come after."""
        unkept, self._unkept = self._unkept, []
        for digest, session in unkept:
            self._sessions.put(digest, session)

    def _tally(self, row: GuidedRow, *, ended: bool, parent: Lineage | None = None) -> Tally:
        """The tally up to and with the last token of ``row.prefix``."""
        last = int(row.prefix[-1]) if len(row.prefix) else -1
        is_end = last in self._ends(row)
        if row.generated == 0 and not (ended and is_end):
            return Tally()  # nothing is generated yet; an older generation may have passed here
        record = self._records.get(parent or (digests(row.prefix)[0], objective_key(row.objective)))
        if record is None:
            return Tally()
        before = record.tally.report
        # A token that was no candidate was not drawn from q: its cost cannot be told.
        cost = before.text_cost + record.costs.get(last, math.nan)
        report = RowReport(
            before.steps,
            before.guided_steps,
            before.fallbacks,
            before.prefix_resends,
            forced_stop=record.forced and is_end,
            text_cost=cost,
        )
        return Tally(report, record.tally.given_up)

    def _ends(self, row: GuidedRow) -> tuple[int, ...]:
        return self.end_ids if row.end_ids is None else tuple(row.end_ids)

    @property
    def _side_by_side(self) -> bool:
        """Whether the scorer takes ``StepRows`` as they are."""
        return False

    def _batches(self, rows: Sequence[Live]) -> list[Batch]:
        """All rows in one call, unless that passes the service's limits."""
        plain = self.text is None and self.max_append == 1
        if plain and len(rows) > 1 and self._side_by_side and (step := self._step_rows(rows)) is not None:
            return [(rows, step)]
        batches: list[tuple[list[Live], list[CandidateInput]]] = []
        size = 0
        for x in rows:
            item = (plain and self._plain_input(x)) or self._input(x)
            # An upper guess.
            bytes_ = 512 + 8 * (len(item.token_ids or ()) + len(item.eos_ids)) + 40 * len(x.ids)
            if not batches or len(batches[-1][0]) >= self.max_batch_rows or size + bytes_ > self.max_body_bytes:
                batches.append(([], []))
                size = 0
            batches[-1][0].append(x)
            batches[-1][1].append(item)
            size += bytes_
        return list(batches)

    def _step_rows(self, rows: Sequence[Live]) -> StepRows | None:
        """The rows side by side where each goes on from a known session by one token, as in nearly every step of a
        generation; None for others, and for more than one call holds."""
        first = rows[0].row
        objective, reads, ends = first.objective, _reads_logprobs(first.objective), self._ends(first)
        if not _is_plain(objective):
            return None
        sessions, appended, generated = list[str](), list[Sequence[int]](), list[int]()
        for x in rows:
            row = x.row
            if row.objective is not objective and (
                not _is_plain(row.objective) or _reads_logprobs(row.objective) != reads
            ):
                return None
            session = None if x.resent else self._session_before(x)
            if session is None or (row.end_ids is not first.end_ids and self._ends(row) != ends):
                return None
            sessions.append(session)
            appended.append((int(row.prefix[-1]),))
            generated.append(row.generated)
        candidates = list[Sequence[int]](x.ids for x in rows)
        bytes_ = len(rows) * 512 + 8 * len(ends) + 40 * sum(map(len, candidates))  # an upper guess
        if len(rows) > self.max_batch_rows or bytes_ > self.max_body_bytes:
            return None
        logprobs = list[Sequence[float]](x.logprobs for x in rows) if reads else None
        objectives = [x.row.objective for x in rows]
        return StepRows(sessions, appended, candidates, generated, objectives, listed(ends), logprobs)

    def _session_before(self, x: Live) -> str | None:
        """The session of the prefix without its last token, noted as used; None where another serves the row better or
        none is known."""
        if x.before is not None:
            x.used = x.before.digest
            return x.before.session
        self._keep_sessions()
        session = self._sessions.get(x.parent)
        if session is None or x.digest in self._sessions:
            return None
        x.used = x.parent
        return session

    def _view(self, x: Live) -> View:
        """The row as it is asked about, and the digests of its prefix."""
        if x.view is None:
            row, ends = x.row, self._ends(x.row)
            if self.text is None or row.objective is None:
                objective: Mapping[str, Any] | None = row.objective
                if objective and "unit" in objective:
                    objective = {name: value for name, value in objective.items() if name != "unit"}
                x.view = View(row.prefix, row.generated, x.ids, x.logprobs, objective, ends)
            else:
                x.view = self.text.view(row, x.ids, x.logprobs, ends)
            same = self.text is None and self.max_append == 1
            x.digests = [x.parent, x.digest] if same else digests(x.view.prefix, self.max_append)
        return x.view

    def _plain_input(self, x: Live) -> CandidateInput | None:
        """What nearly every row of a generation asks for: its own candidates, after the one token that its parent's
        session lacks. None for any other row."""
        row, objective = x.row, x.row.objective
        session = self._session_before(x) if _is_plain(objective) and not x.resent else None
        if session is None:
            return None
        asked = object.__new__(CandidateInput)
        asked.__dict__.update(
            _NOTHING_ASKED,
            candidates=x.ids,
            logprobs=x.logprobs if _reads_logprobs(objective) else None,
            generated=row.generated,
            objective=objective,
            eos_ids=self._ends(row),
            return_values=False,
            session=session,
            append=(int(row.prefix[-1]),),
        )
        return asked

    def _input(self, x: Live) -> CandidateInput:
        self._hash(x)
        self._keep_sessions()
        view = self._view(x)
        prefix, generated, objective, known = view.prefix, view.generated, view.objective, x.digests
        if objective is not None and objective.get("kind") == "scale" and generated > 0:
            prompt = prefix[: len(prefix) - generated]
            x.prompt = x.prompt or digests(prompt)[-1]
            tilt = self._tilts.get((x.prompt, x.lineage[1]))
            if tilt is None:  # its first step was lost: this one resolves it, the next is guided
                x.boundary, generated, prefix, known = True, 0, prompt, [x.prompt]
            else:
                objective = tilt
        # What the __init__ of a frozen dataclass does, at once and not field by field.
        asked = object.__new__(CandidateInput)
        asked.__dict__.update(
            _NOTHING_ASKED,
            candidates=view.candidates,
            logprobs=view.logprobs if _reads_logprobs(objective) else None,
            generated=generated,
            objective=objective,
            eos_ids=view.end_ids,
            return_values=False,
        )
        # A handle of the prefix itself serves a repeated row, one of its parent the usual step.
        for behind, key in enumerate(reversed(known)):
            session = None if x.resent else self._sessions.get(key)
            if session is not None:
                x.used = key
                append = tuple(map(int, prefix[len(prefix) - behind :]))
                asked.__dict__.update(session=session, append=append)
                return asked
        x.used = None
        asked.__dict__["token_ids"] = list(map(int, prefix))
        return asked

    def _accept(self, batch: Sequence[Live], inputs: Sequence[CandidateInput], answers: Answers) -> list[Live]:
        """Take the answers in; returns the rows to be sent again: whole, where the session is gone; after ``wait_s``,
        where the error may pass."""
        if len(answers) != len(batch):
            raise BadAnswerError(f"{len(batch)} rows were sent, {len(answers)} answers came back")
        if isinstance(answers, StepAnswers):
            for x, session, listed in zip(batch, answers.sessions, answers.log_weights, strict=True):
                x.mark = Mark(len(x.row.prefix), x.row.prefix[-1], x.hash, x.digest, session)
                self._unkept.append((x.digest, session))
                x.weights, x.wait_s = tuple(listed), 0.0
            return []
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
            view, weights = x.view, answer.log_weights
            if weights is None or len(weights) != len(sent.candidates) or not _are_finite(weights):
                raise BadAnswerError(f"row {x.at} needs {len(sent.candidates)} finite log_weights, one a candidate")
            digest = x.digest if view is None else x.prompt if x.boundary else x.digests[-1]
            if (
                answer.session is not None and self.text is None and not x.boundary
            ):  # by its content once nobody waits: see _keep_sessions
                x.mark = Mark(len(x.row.prefix), x.row.prefix[-1], x.hash, digest, answer.session)
                self._unkept.append((digest, answer.session))
            elif answer.session is not None:
                self._sessions.put(digest, answer.session)
            if sent.objective is not None and sent.objective.get("kind") == "scale":
                if answer.objective is None:
                    raise BadAnswerError(f"row {x.at}: a scale was not resolved to a tilt")
                self._tilts.put((digest, x.lineage[1]), answer.objective)
            if not x.boundary:
                x.weights = tuple(weights) if view is None else view.spread(weights)
        return again

    def _fail(self, batch: Sequence[Live], error: LenVMClientError) -> None:
        """A call failed as a whole: raise, or leave the service alone for a while."""
        hopeless = _is_hopeless(error) and not any(x.tally.report.guided_steps for x in batch)
        if self.on_error == "raise" or (hopeless and self.on_error != "log"):
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
        if self.on_error == "raise" or (hopeless and self.on_error != "log" and not x.tally.report.guided_steps):
            error.add_note(f"row {x.at} of the step, {x.row.generated} tokens generated")
            raise RowFailure(error)
        self._count(error)
        if hopeless:
            self._gave_up = True
            x.tally = replace(x.tally, given_up=True)
        elif error.retryable:
            x.wait_s = error.retry_after_s or 0.0
        return False

    def _count(self, error: LenVMClientError) -> None:
        kind = error.type if isinstance(error, ServiceError) else type(error).__name__
        if self.on_error == "log" and not self._errors[kind]:
            _log.warning("guided decoding goes on without guidance: %s: %s", kind, error)
        self._errors[kind] += 1

    def _leave(self, x: Live) -> WeightedRow:
        """The row's answer."""
        guided = x.weights is not None
        # What the __init__ of a frozen dataclass does, at once and not field by field.
        weighted = object.__new__(WeightedRow)
        weighted.__dict__.update(
            ids=x.ids, logprobs=x.logprobs, log_weights=x.weights or (0.0,) * len(x.ids), guided=guided, mark=x.mark
        )
        self._left.append((x, weighted))
        return weighted

    def _note(self, x: Live, weighted: WeightedRow) -> None:
        """Keep what the row's children need."""
        guided = weighted.guided
        costs = weighted.costs() if self._sampled else [math.nan] * len(x.ids)
        ends = self._ends(x.row)
        forced = log_sum([p for i, p in zip(x.ids, x.logprobs, strict=True) if i in ends]) < FORCED_STOP_LOGPROB
        before = x.tally.report
        report = RowReport(
            before.steps + 1,
            before.guided_steps + guided,
            before.fallbacks + (x.row.objective is not None and not guided),
            before.prefix_resends,
            before.forced_stop,
            before.text_cost,
        )
        tally = Tally(report, x.tally.given_up)
        self._records.put(x.lineage, Record(tally, dict(zip(x.ids, costs, strict=True)), forced))


def _plain_chances(row: GuidedRow) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """Candidates and log-probs with the EOS ids that are none yet, where all are numbers and finite, as nearly always;
    None for all else, which is looked at one by one."""
    try:
        ids, logprobs = tuple(array("q", row.candidates)), tuple(array("d", row.logprobs))
    except (TypeError, OverflowError):
        return None
    for token, logprob in row.eos_logprobs.items():
        if token not in ids:
            ids, logprobs = (*ids, int(token)), (*logprobs, float(logprob))
    return (ids, logprobs) if len(set(ids)) == len(ids) and math.isfinite(sum(logprobs)) else None


def _are_finite(numbers: Sequence[float]) -> bool:
    """No sum is finite that holds what is not; where finite numbers have none, each is looked at."""
    return math.isfinite(sum(numbers)) or all(map(math.isfinite, numbers))


def _is_plain(objective: Mapping[str, Any] | None) -> bool:
    """Whether it is sent as it is, and answered by log-weights alone."""
    return objective is not None and objective.get("kind") != "scale" and "unit" not in objective


def _reads_logprobs(objective: Mapping[str, Any] | None) -> bool:
    """Posterior guidance needs none, but for ``min_eos_prob``; they would be half of a request."""
    return objective is not None and (objective.get("method") == "paper" or bool(objective.get("min_eos_prob")))


def _is_hopeless(error: LenVMClientError) -> bool:
    """True for what no waiting cures: another server than a LenVM service is among it."""
    if isinstance(error, BadAnswerError):
        return error.status is not None and error.status < 500 and not error.retryable
    return isinstance(error, _HOPELESS) or (isinstance(error, ServiceUnreachableError) and not error.retryable)


class RowFailure(Exception):
    """Carries a row's error past the handler of failed calls."""

    def __init__(self, error: ServiceError) -> None:
        super().__init__(str(error))
        self.error = error
