"""Guides for the sampler: the Length Value Model's own, and the rival that needs no value model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lenvm.decoding import Candidates
from lenvm.device_guidance import Column, Family, Rules, objective_rules
from lenvm.errors import InvalidRequestError
from lenvm.guidance import LOG_WEIGHT_FLOOR, Objective, check_objective, log_weights, resolve_scale
from lenvm.paged import PoolShape
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

    def device_rules(self, device: torch.device) -> Rules | None:
        """The objectives as rules for a sampler on ``device``; None where the model is elsewhere, behind another
        scorer, or an objective waits for the prompt's distribution (scale)."""
        model = getattr(self.scorer, "model", None)
        if model is None or model.device != device or any(o is not None and o.kind == "scale" for o in self.objectives):
            return None
        if not PoolShape.of(model.decoder.config).suits_kernel:
            return None
        return Rules(objective_rules(self.objectives), model)

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
        tracks = [self._tracks[rows[at]] for at in guided]
        wanted = (candidates.kept & ~candidates.is_eos)[guided]  # [G, K]
        ids: list[int] = candidates.ids[guided][wanted].tolist()  # row after row; arrays a row would cost more than
        ends = np.cumsum(wanted.sum(axis=-1)).tolist()  # the guidance itself when hundreds of rows run
        answers = self.scorer.score(
            [
                ScoreRow(track.state, track.pending, ids[start:end])
                for track, start, end in zip(tracks, [0, *ends], ends, strict=False)
            ]
        )
        logits = np.zeros(wanted.shape)
        logits[wanted] = np.concatenate([answer.candidate_logits for answer in answers])
        bins = self.scorer.bins
        bin_logprobs = None
        if bins is not None:
            bin_logprobs = np.zeros((*wanted.shape, bins.size))
            bin_logprobs[wanted] = np.concatenate([_needed(answer.candidate_bin_logprobs) for answer in answers])
        for track, answer in zip(tracks, answers, strict=True):
            if track.objective is not None and track.objective.kind == "scale" and bins is not None:
                track.objective = resolve_scale(track.objective, _needed(answer.bin_logprobs)[-1], bins)
            if track.state is not None:
                track.state.close()
            track.state, track.pending = answer.state, []
        weights[guided] = log_weights(
            [track.objective for track in tracks],
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


def _needed(array: NDArray[np.floating[Any]] | None) -> NDArray[np.floating[Any]]:
    assert array is not None  # a scorer with bins gives their log-probabilities
    return array


class EosGateGuide:
    """Length control without a value model, the rival to beat. Three thresholds on the content tokens so far:

    - *hold*: no EOS before ``(1 - slack) N``; at_most never holds.
    - *seek*: from ``(1 - slack) N`` on, the first EOS of probability ``threshold`` or more is taken.
    - *stop*: at ``stop * N`` the answer ends, whatever EOS costs there.

    Args:
        targets: content tokens wanted (N), one for each request of the call.
        kinds: "equal_to", "at_most" or "at_least".
        slack: 0 to 1 (then nothing is held).
        threshold: a probability at the sampler's temperature; infinite never seeks.
        stop: in targets; infinite never stops. None: ``1 + slack`` for equal_to, 1 for at_most, never for at_least.

    Every argument but the first is one for all requests, or one for each. Raises InvalidRequestError for an unknown
    kind, a number out of range and a stop before the hold ends.
    """

    def __init__(
        self,
        targets: Sequence[int],
        *,
        kinds: str | Sequence[str] = "equal_to",
        slack: float | Sequence[float] = 0.1,
        threshold: float | Sequence[float] = 0.02,
        stop: float | Sequence[float] | None = None,
    ) -> None:
        target = np.asarray(targets, dtype=np.float64)

        def each(value: Any, dtype: Any = np.float64) -> NDArray[Any]:
            return np.broadcast_to(np.asarray(value, dtype=dtype), target.shape)

        kind, slacks, thresholds = each(kinds, np.str_), each(slack), each(threshold)
        unknown = set(kind.tolist()) - {"equal_to", "at_most", "at_least"}
        if unknown:
            raise InvalidRequestError(f"the gate knows no kind {min(unknown)!r}", param="kind")
        for name, good in (("slack", (slacks >= 0) & (slacks <= 1)), ("threshold", thresholds > 0)):
            if not good.all():
                raise InvalidRequestError(f"the gate's {name} is out of range", param=name)
        usual = np.where(kind == "equal_to", 1 + slacks, np.where(kind == "at_most", 1.0, np.inf))
        self.seek_from = (1 - slacks) * target
        self.hold_until = np.where(kind == "at_most", 0.0, self.seek_from)
        self.stop_at = target * (usual if stop is None else each(stop))
        self.log_threshold = np.log(thresholds)
        if not (self.stop_at >= self.hold_until).all():
            raise InvalidRequestError("the gate would stop while it still holds EOS back: raise stop", param="stop")

    def device_rules(self, device: torch.device) -> Rules:
        """The gates as rules for a sampler on a GPU."""
        table = np.zeros((len(self.stop_at), len(Column)))
        table[:, Column.FAMILY] = Family.GATE
        table[:, Column.A], table[:, Column.B] = self.hold_until, self.seek_from
        table[:, Column.C], table[:, Column.LOG_THRESHOLD] = self.stop_at, self.log_threshold
        return Rules(table)

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Nothing to do: the rule has no state."""

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> NDArray[np.float64]:
        """Zeros and floors ``[B, K]``."""
        at = list(rows)
        likely = (candidates.is_eos & (candidates.logprobs >= self.log_threshold[at][:, None])).any(axis=-1)
        early = candidates.generated < self.hold_until[at]
        stop = (candidates.generated >= self.stop_at[at]) | (likely & (candidates.generated >= self.seek_from[at]))
        hold = (candidates.is_eos & early[:, None]) | (~candidates.is_eos & stop[:, None])
        return np.where(hold, LOG_WEIGHT_FLOOR, 0.0)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Nothing to do."""

    def finish(self, rows: Sequence[int]) -> None:
        """Nothing to do."""
