"""Guided decoding for any backbone: rows and candidates go in, log-weights come out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from lenvm_client._core import Core, OnError, RowFailure
from lenvm_client._steps import GuidanceReport, GuidedRow, RowReport, WeightedRow, uniform
from lenvm_client._text import TextAdapter
from lenvm_client._types import CandidateInput, CandidateScorer, CandidateScores, RowError
from lenvm_client._wire import Wait
from lenvm_client.errors import LenVMClientError

__all__ = [
    "AsyncCandidateScorer",
    "AsyncGuidedDecoder",
    "GuidanceReport",
    "GuidedDecoder",
    "GuidedRow",
    "RowReport",
    "TextAdapter",
    "WeightedRow",
    "uniform",
]


class AsyncCandidateScorer(Protocol):
    """What ``AsyncGuidedDecoder`` needs, e.g. ``AsyncClient``."""

    async def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        """Answers aligned with ``rows``. Raises LenVMClientError where the call as a whole failed."""


class _Meanwhile:
    """Work that is done beside a call. What it raises is no error of the call, which goes on: it is kept to its end."""

    def __init__(self, work: Callable[[], None] | None) -> None:
        self._work, self._failed = work, list[Exception]()

    def __call__(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failed.append(error)

    def once(self) -> None:
        """The caller's own, if that was not done yet."""
        work, self._work = self._work, None
        if work is not None:
            self(work)

    def end(self) -> None:
        """Raise what was kept."""
        self.once()
        if self._failed:
            raise self._failed[0] from None


async def _once(also: _Meanwhile) -> None:
    """Begun after the call beside it, which is on its way then."""
    also.once()


class GuidedDecoder(Core):
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
            for a guided one. Later (e.g. the context is full) the row goes on without guidance and without calls. "log"
            raises nothing of this: the first error of each type is logged. It is for hosts whose whole batch one raised
            error would end.
        max_batch_rows, max_body_bytes: limits of one call, as in ``info().limits``; a larger step takes several calls.
        max_prefixes: prefixes remembered; at least twice the rows of a step, more with beams.
        text: for a backbone with another tokenizer than the value model's, and for targets in words, characters or
            sentences.
        max_append: how many tokens a known session may lie behind a row's prefix and still be gone on from: 1 by
            default (8 with ``text``), more where rows advance by blocks.
    """

    _sleep = staticmethod(time.sleep)  # a seam of the tests

    def __init__(
        self,
        scorer: CandidateScorer,
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
        super().__init__(
            scorer,
            eos_ids,
            stop_ids,
            on_error=on_error,
            max_batch_rows=max_batch_rows,
            max_body_bytes=max_body_bytes,
            max_prefixes=max_prefixes,
            text=text,
            max_append=max_append,
        )

    def _scored(
        self, rows: Sequence[CandidateInput], meanwhile: Callable[[], None]
    ) -> Sequence[CandidateScores | RowError]:
        """The scorer's answers. Some take a step's rows side by side; a ``Client`` also lets the step catch up while it
        waits."""
        found: Sequence[CandidateScores | RowError]
        if self._side_by_side:
            found = self.scorer._score_overlapped(rows, meanwhile)
        else:
            found = self.scorer.score_candidates(rows)
        return found

    @property
    def _side_by_side(self) -> bool:
        return hasattr(type(self.scorer), "_overlaps") and self.scorer._overlaps

    def step(self, rows: Sequence[GuidedRow], meanwhile: Callable[[], None] | None = None) -> list[WeightedRow]:
        """The rows' candidates with their log-weights, aligned with ``rows``; empty for finished rows. ``meanwhile`` is
        called once before that: where a client is asked, while it waits, so that what it does costs no time.

        Raises LenVMClientError (see ``on_error``), InvalidRequestError for rows that make no sense."""
        flow, also = self._flow(rows), _Meanwhile(meanwhile)

        def waiting() -> None:
            also(self._catch_up)
            also.once()

        try:
            wanted = next(flow)
            while True:
                if isinstance(wanted, Wait):
                    self._sleep(wanted.seconds)
                    wanted = flow.send(None)
                    continue
                try:
                    answers = self._scored(wanted, waiting)
                except LenVMClientError as error:
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(answers)
        except StopIteration as stop:
            weighted: list[WeightedRow] = stop.value
            also.end()
            return weighted
        except RowFailure as failure:
            raise failure.error from None
        finally:
            flow.close()


class AsyncGuidedDecoder(Core):
    """``GuidedDecoder`` over an ``AsyncClient``: same arguments, ``step`` is awaited."""

    scorer: AsyncCandidateScorer
    _sleep = staticmethod(asyncio.sleep)  # a seam of the tests

    async def step(self, rows: Sequence[GuidedRow], meanwhile: Callable[[], None] | None = None) -> list[WeightedRow]:
        """See ``GuidedDecoder.step``."""
        flow, also = self._flow(rows), _Meanwhile(meanwhile)
        try:
            wanted = next(flow)
            while True:
                if isinstance(wanted, Wait):
                    await self._sleep(wanted.seconds)
                    wanted = flow.send(None)
                    continue
                try:
                    if meanwhile is None:
                        answers = await self.scorer.score_candidates(wanted)
                    else:
                        answers, _ = await asyncio.gather(self.scorer.score_candidates(wanted), _once(also))
                except LenVMClientError as error:
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(answers)
        except StopIteration as stop:
            weighted: list[WeightedRow] = stop.value
            also.end()
            return weighted
        except RowFailure as failure:
            raise failure.error from None
        finally:
            flow.close()
