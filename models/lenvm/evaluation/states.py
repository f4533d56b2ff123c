"""Sampled answers by prompt, and what a value model says at chosen states of them, in packed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lenvm.errors import DataError
from lenvm.rollouts import RolloutSet
from lenvm.scoring import Scorer, ScoreRow

__all__ = ["PromptAnswers", "StateRow", "StateScores", "by_domain", "group_prompts", "score_states"]

FloatArray: TypeAlias = NDArray[np.float64]

_BATCH_TOKENS = 16384  # of one call; the scorer splits it further to fit its forward


@dataclass(frozen=True)
class PromptAnswers:
    """One prompt with its answers: content tokens and whether each ended by itself [answers], by seed.

    ``rollouts`` None: only their lengths are known.
    """

    prompt_id: str
    domain: str
    prompt_ids: list[int]
    lengths: NDArray[np.int64]
    finished: NDArray[np.bool_]
    rollouts: RolloutSet | None = None
    indices: Sequence[int] = ()

    def tokens(self, answer: int) -> list[int]:
        """Content token ids of one answer. Raises DataError where only lengths are known."""
        if self.rollouts is None:
            raise DataError(f"only the lengths of the answers to {self.prompt_id} are known: give the rollouts")
        ids: list[int] = self.rollouts.tokens(self.indices[answer]).tolist()
        return ids


def group_prompts(rollouts: RolloutSet) -> list[PromptAnswers]:
    """One entry a prompt, by prompt id."""
    return [
        PromptAnswers(
            prompt_id=prompt_id,
            domain=rollouts.domains[indices[0]],
            prompt_ids=rollouts.prompt_tokens(indices[0]).tolist(),
            lengths=rollouts.lengths[indices],
            finished=rollouts.finished[indices],
            rollouts=rollouts,
            indices=indices,
        )
        for prompt_id, indices in rollouts.by_prompt().items()
    ]


def by_domain(prompts: Sequence[PromptAnswers]) -> dict[str, list[PromptAnswers]]:
    """Domain -> its prompts, in the order given."""
    domains: dict[str, list[PromptAnswers]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    return domains


@dataclass(frozen=True)
class StateRow:
    """A prompt with (the beginning of) an answer, and the states wanted: ``t`` content tokens after the prompt."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int] = ()
    places: Sequence[int] = (0,)


@dataclass(frozen=True)
class StateScores:
    """Value logits [k] and bin log-probs [k, n] (None without bins) at the k places of a row."""

    logits: FloatArray
    bin_logprobs: FloatArray | None


def score_states(
    scorer: Scorer, rows: Sequence[StateRow], *, progress: Callable[[int, int], None] | None = None
) -> list[StateScores]:
    """What the model says at the places of each row, aligned with ``rows``; each row is one pass over its tokens."""
    found: list[StateScores] = []
    for chunk in _chunks(rows):
        calls = [_call(row) for row in chunk]
        for row, answer in zip(chunk, scorer.score(calls), strict=True):
            at = np.asarray(row.places) - min(row.places)
            bins = None if answer.bin_logprobs is None else answer.bin_logprobs[at].copy()
            # Copies: a view would keep the numbers of all places alive.
            found.append(StateScores(np.asarray(answer.logits[at], dtype=np.float64).copy(), bins))
            answer.state.close()
        if progress:
            progress(len(found), len(rows))
    return found


def _call(row: StateRow) -> ScoreRow:
    ids = [*row.prompt_ids, *row.token_ids[: max(row.places)]]
    return ScoreRow(append=ids, values_from=len(row.prompt_ids) - 1 + min(row.places))


def _chunks(rows: Sequence[StateRow]) -> Iterator[list[StateRow]]:
    chunk: list[StateRow] = []
    tokens = 0
    for row in rows:
        size = len(row.prompt_ids) + max(row.places)
        if chunk and tokens + size > _BATCH_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(row)
        tokens += size
    if chunk:
        yield chunk
