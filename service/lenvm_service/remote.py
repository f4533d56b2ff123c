"""The sampler's guidance hook, served over HTTP: a local generator, a remote value model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lenvm.decoding import Candidates
from lenvm.errors import InvalidRequestError
from lenvm.guidance import Objective
from lenvm_client import CandidateScorer, GuidedDecoder, GuidedRow

__all__ = ["RemoteGuide"]


class RemoteGuide:
    """Steers every row towards its own objective, as ``lenvm.guides.ValueGuide`` does, by asking a service.

    A step is one call for all rows.

    Args:
        scorer: a ``lenvm_client.Client``, or whatever else scores candidates.
        objectives: one for each request of the sampler's call, aligned; None leaves a row unguided.
        on_error: what a failed call does to the step; see ``lenvm_client.GuidedDecoder``.
    """

    def __init__(
        self,
        scorer: CandidateScorer,
        objectives: Sequence[Objective | None],
        *,
        on_error: Literal["passthrough", "raise"] = "raise",
    ) -> None:
        self.objectives = [None if objective is None else objective.to_dict() for objective in objectives]
        # EOS is marked by the service itself, and always among the sampler's candidates.
        self.decoder = GuidedDecoder(scorer, (), on_error=on_error, max_prefixes=max(8192, 4 * len(self.objectives)))
        self._prefixes: dict[int, list[int]] = {}

    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Rows begin; nothing is sent before their first candidates are known."""
        for row, prompt in zip(rows, prompts, strict=True):
            if row >= len(self.objectives):
                raise InvalidRequestError(f"there is no objective for request {row}", param="objectives")
            self._prefixes[row] = list(prompt)

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> NDArray[np.float64]:
        """Finite ``[B, K]`` log-weights; candidates that truncation cut get zero (the sampler leaves them out).

        Raises LenVMClientError as ``on_error`` says.
        """
        weights = np.zeros(candidates.logprobs.shape)
        possible = candidates.kept & np.isfinite(candidates.logprobs)  # JSON has no infinity
        kept = [np.flatnonzero(possible[at]) for at in range(len(rows))]
        steps = [
            GuidedRow(
                prefix=self._prefixes[row],
                candidates=candidates.ids[at, kept[at]].tolist(),
                logprobs=candidates.logprobs[at, kept[at]].tolist(),
                generated=int(candidates.generated[at]),
                objective=self.objectives[row],
            )
            for at, row in enumerate(rows)
        ]
        for at, found in enumerate(self.decoder.step(steps)):
            weights[at, kept[at]] = found.log_weights
        return weights

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """The chosen tokens; they go out with the next step's candidates."""
        for row, token in zip(rows, tokens, strict=True):
            self._prefixes[row].append(int(token))

    def finish(self, rows: Sequence[int]) -> None:
        """Forget rows that ended; the service forgets their states by itself."""
        for row in rows:
            self._prefixes.pop(row, None)
