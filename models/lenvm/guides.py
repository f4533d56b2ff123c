"""Guides for the sampler: the Length Value Model's own, and the rival that needs no value model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lenvm.decoding import Candidates
from lenvm.errors import InvalidRequestError
from lenvm.guidance import LOG_WEIGHT_FLOOR, Objective, check_objective, log_weights, resolve_scale
from lenvm.scoring import PrefixState, Scorer, ScoreRow

__all__ = ["EosGateGuide", "ValueGuide"]


@dataclass
class _Track:
    """Where a row's prefix state stands, and the tokens that it has not seen yet."""

    objective: Objective | None
    pending: list[int]
    state: PrefixState | None = None


class ValueGuide:
    """Steers every row towards its own objective with the values of its candidates.

    A step is one scorer call for all rows: the first takes the prompts and their candidates together, each later one
    only candidates, since the token that was chosen among them is promoted.

    Args:
        scorer: an engine; the guide opens states in it and closes them.
        objectives: one for each request of the call, aligned; None leaves a row unguided.
    """

    def __init__(self, scorer: Scorer, objectives: Sequence[Objective | None]) -> None:
        self.scorer = scorer
        self.objectives = list(objectives)
        self._tracks: dict[int, _Track] = {}
        for objective in self.objectives:
            if objective is not None and objective.kind == "scale":
                if scorer.bins is None:
                    raise InvalidRequestError("scale needs a model with a length distribution", param="kind")
            else:
                check_objective(objective, bins=scorer.bins, gamma=scorer.gamma)

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Rows begin; the prompt is scored together with the first candidates."""
        for row, prompt in zip(rows, prompts, strict=True):
            self._tracks[row] = _Track(self.objectives[row], list(prompt))

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> NDArray[np.float64]:
        """Finite ``[B, K]`` log-weights; candidates that truncation cut get zero (the sampler leaves them out)."""
        guided = [at for at, row in enumerate(rows) if self._tracks[row].objective is not None]
        weights = np.zeros(candidates.logprobs.shape)
        if not guided:
            return weights
        wanted = candidates.kept & ~candidates.is_eos
        calls = []
        for at in guided:
            track = self._tracks[rows[at]]
            calls.append(ScoreRow(track.state, track.pending, candidates.ids[at][wanted[at]].tolist()))
        answers = self.scorer.score(calls)
        logits = np.zeros((len(guided), candidates.ids.shape[1]))
        bins = self.scorer.bins
        bin_logprobs = None if bins is None else np.zeros((*logits.shape, bins.size))
        objectives: list[Objective | None] = []
        for index, (at, answer) in enumerate(zip(guided, answers, strict=True)):
            track = self._tracks[rows[at]]
            if track.objective is not None and track.objective.kind == "scale" and bins is not None:
                assert answer.bin_logprobs is not None
                track.objective = resolve_scale(track.objective, answer.bin_logprobs[-1], bins)
            objectives.append(track.objective)
            logits[index, wanted[at]] = answer.candidate_logits
            if bin_logprobs is not None and answer.candidate_bin_logprobs is not None:
                bin_logprobs[index, wanted[at]] = answer.candidate_bin_logprobs
            if track.state is not None:
                track.state.close()
            track.state, track.pending = answer.state, []
        weights[guided] = log_weights(
            objectives,
            logits,
            bin_logprobs,
            candidates.is_eos[guided],
            candidates.generated[guided],
            np.where(candidates.kept[guided], candidates.logprobs[guided], -np.inf),
            bins=bins,
            gamma=self.scorer.gamma,
        )
        weights[~candidates.kept] = 0.0
        return weights

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """The chosen tokens; they reach the scorer with the next step's candidates."""
        for row, token in zip(rows, tokens, strict=True):
            self._tracks[row].pending.append(token)

    def finish(self, rows: Sequence[int]) -> None:
        """Close the states of rows that ended."""
        for row in rows:
            track = self._tracks.pop(row, None)
            if track is not None and track.state is not None:
                track.state.close()


class EosGateGuide:
    """Length control without a value model, the rival to beat: no EOS before ``(1 - slack) N``, the first EOS of
    probability ``threshold`` or more after it, and a hard stop at ``(1 + slack) N``.

    Args:
        targets: content tokens wanted, one for each request of the call.
        slack, threshold: one number for all requests, or one for each.
    """

    def __init__(
        self, targets: Sequence[int], *, slack: float | Sequence[float] = 0.1, threshold: float | Sequence[float] = 0.02
    ) -> None:
        self.targets = np.asarray(targets, dtype=np.float64)
        self.slack = np.broadcast_to(np.asarray(slack, dtype=np.float64), self.targets.shape)
        self.threshold = np.broadcast_to(np.asarray(threshold, dtype=np.float64), self.targets.shape)

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Nothing to do: the rule has no state."""

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> NDArray[np.float64]:
        """Zeros and floors ``[B, K]``."""
        at = list(rows)
        target, slack = self.targets[at], self.slack[at]
        likely = (candidates.is_eos & (candidates.logprobs >= np.log(self.threshold[at])[:, None])).any(axis=-1)
        early = candidates.generated < (1 - slack) * target
        late = candidates.generated >= (1 + slack) * target
        stop = late | (~early & likely)
        hold = (candidates.is_eos & early[:, None]) | (~candidates.is_eos & stop[:, None])
        return np.where(hold, LOG_WEIGHT_FLOOR, 0.0)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Nothing to do."""

    def finish(self, rows: Sequence[int]) -> None:
        """Nothing to do."""
