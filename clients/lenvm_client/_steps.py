"""A step of guided decoding as plain data, its arithmetic, and the report. Lists and ``math`` only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

__all__ = ["GuidanceReport", "GuidedRow", "RowReport", "WeightedRow", "uniform"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class GuidedRow:
    """One row of a step.

    ``prefix``: all of its token ids, prompt first and no padding, of which the last ``generated`` are content tokens of
    the answer. ``candidates`` [K] and ``logprobs`` [K]: possible next tokens, each once, with natural logs over the
    full vocabulary at the sampler's temperature; -inf leaves one out. ``eos_logprobs`` has the same for EOS and stop
    ids: those that are no candidates yet become some, as they always must be. ``objective`` is in wire form; None:
    unguided. ``finished``: the answer has ended (its EOS may stand at the end of ``prefix``); costs nothing.
    ``end_ids``: EOS and stop ids of this row alone; None: those of the decoder. ``after``: what the step before
    answered for the row that this one goes on from by one token, if the caller knows; then the prefix need not be read
    again before the service is asked.
    """

    prefix: Sequence[int]
    candidates: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    generated: int = 0
    objective: Mapping[str, Any] | None = None
    eos_logprobs: Mapping[int, float] = field(default_factory=dict)
    finished: bool = False
    end_ids: Sequence[int] | None = None
    after: WeightedRow | None = None


@dataclass(frozen=True)
class WeightedRow:
    """Candidates ``ids`` [K] that have a chance, ``logprobs`` [K], and the ``log_weights`` [K] to be added; zeros where
    the row was not ``guided``. The order is the row's own, EOS ids that were added come last."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    log_weights: tuple[float, ...]
    guided: bool = False
    mark: ClassVar[Any] = None  # of one that came from a step, for ``GuidedRow.after``; a copy has none

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "mark"}

    def log_q(self) -> list[float]:
        """Natural logs [K] of the guided law ``q ~ p exp(log_weight)``, normalised over the candidates."""
        return _normalised([p + w for p, w in zip(self.logprobs, self.log_weights, strict=True)])

    def costs(self) -> list[float]:
        """``log q - log p`` [K], both over the candidates, in nats."""
        if not any(self.log_weights):
            return [0.0] * len(self.ids)
        guided = log_sum([p + w for p, w in zip(self.logprobs, self.log_weights, strict=True)])
        shift = log_sum(self.logprobs) - guided
        return [weight + shift for weight in self.log_weights]

    def draw(self, draw: float) -> int:
        """The candidate that a uniform in [0, 1) picks from q. Sorted by id, so that nearly equal probabilities cannot
        change places between two batch shapes."""
        ranked = sorted(zip(self.ids, self.log_q(), strict=True))
        cumulative, total = [], 0.0
        for _, log_q in ranked:
            total += math.exp(log_q)
            cumulative.append(total)
        at = sum(value <= draw * total for value in cumulative)
        return ranked[min(at, len(ranked) - 1)][0]

    def best(self) -> int:
        """The candidate of the highest q; the lowest id among equals."""
        return min((-log_q, token) for token, log_q in zip(self.ids, self.log_q(), strict=True))[1]


@dataclass(frozen=True)
class RowReport:
    """What guidance did to one answer. ``fallbacks``: steps left unguided although an objective was set.

    ``forced_stop``: it took an EOS where the backbone gave all EOS ids together less than 1e-3. ``text_cost``: log q -
    log p summed over its tokens, EOS included, in nats; NaN for greedy decoding and beams: they follow no distribution.
    """

    steps: int = 0
    guided_steps: int = 0
    fallbacks: int = 0
    prefix_resends: int = 0
    forced_stop: bool = False
    text_cost: float = 0.0


@dataclass(frozen=True)
class GuidanceReport:
    """What guidance did to a generation: its rows, and the calls that they shared. ``errors``: how often each type of
    error left rows unguided (a failed call counts once). ``approximate``: what was only estimated, "tokenizer"
    (prefixes and candidates went through text) and units of targets; see ``TextAdapter``."""

    rows: tuple[RowReport, ...] = ()
    calls: int = 0
    service_seconds: float = 0.0
    errors: Mapping[str, int] = field(default_factory=dict)
    approximate: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return sum(row.steps for row in self.rows)

    @property
    def guided_steps(self) -> int:
        return sum(row.guided_steps for row in self.rows)

    @property
    def fallbacks(self) -> int:
        return sum(row.fallbacks for row in self.rows)

    @property
    def prefix_resends(self) -> int:
        return sum(row.prefix_resends for row in self.rows)

    @property
    def forced_stops(self) -> int:
        return sum(row.forced_stop for row in self.rows)

    @property
    def text_cost(self) -> float:
        """Nats, over all rows."""
        return math.fsum(row.text_cost for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the totals and ``rows``; NaN becomes None."""
        names = ("steps", "guided_steps", "fallbacks", "prefix_resends", "forced_stops", "text_cost", "calls")
        totals = {name: _finite(getattr(self, name)) for name in names}
        rows = [{name: _finite(value) for name, value in asdict(row).items()} for row in self.rows]
        return {
            **totals,
            "service_seconds": self.service_seconds,
            "errors": dict(self.errors),
            "approximate": list(self.approximate),
            "rows": rows,
        }


def log_sum(values: Sequence[float]) -> float:
    """Natural log of the sum of exponentials; -inf for none."""
    top = max(values, default=-math.inf)
    exp = math.exp  # a list and a local name: every row of every step of a generation comes here
    return top if math.isinf(top) else top + math.log(sum([exp(value - top) for value in values]))


def uniform(seed: int, step: int) -> float:
    """A uniform in [0, 1) for each (seed, step), the same that ``lenvm``'s own sampler draws: a row's tokens depend on
    its prompt and its seed, not on the batch around it. ``seed`` in [0, 2^63)."""
    return (_mix(_mix(seed * _GOLDEN & _MASK) + (step + 1) * _GOLDEN & _MASK) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele et al., 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _normalised(logs: Sequence[float]) -> list[float]:
    total = log_sum(logs)
    return [value - total for value in logs]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
