"""What a LIFEBench run makes: its settings, and one job an answer, named so that a file of answers can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lenvm.decoding import SamplingParams
from lenvm.errors import InvalidRequestError
from lenvm.evaluation.answers import Key
from lenvm.evaluation.lifebench import KINDS, Kind, Task
from lenvm.evaluation.lifebench_gates import FORCED, GRIDS, GateRule
from lenvm.evaluation.lifebench_posterior import PosteriorRule
from lenvm.guidance import Objective

__all__ = ["MODES", "RESAMPLED", "Job", "LifebenchSettings", "Policy", "fixed_policies", "jobs_of"]

MODES = ("unguided", "eos_gate", "force_eos", "paper_value", "paper_length", "posterior")
RESAMPLED: Mapping[str, str] = {f"{mode}_resampled": mode for mode in ("unguided", "eos_gate", "posterior")}
"""Modes of which one of several answers is drawn by importance weight (``lenvm.resampling``) -> what samples them."""

Policy: TypeAlias = str | GateRule | PosteriorRule
"""What decides about the length: "unguided", one of the paper's rules, a gate, or a posterior rule."""


@dataclass(frozen=True)
class Job:
    """One answer to make. ``keeps_tokens`` False: only its figures are kept, as for tuning and the gates' front."""

    policy: Policy
    task: Task
    kind: Kind
    target: int
    sample: int = 0
    keeps_tokens: bool = field(default=True, compare=False)

    @property
    def key(self) -> Key:
        """What names the answer in a work file."""
        return str(self.policy), self.kind, self.task.id, self.target, self.sample

    @property
    def guided(self) -> bool:
        """Whether the value model takes part."""
        return isinstance(self.policy, PosteriorRule) or self.policy in ("paper_value", "paper_length")


@dataclass(frozen=True)
class LifebenchSettings:
    """What is generated: ``tasks`` x ``targets`` x ``samples`` answers a mode and kind, all with the same ``params``;
    a mode of ``RESAMPLED`` draws each of them from ``resample``.

    ``grids`` are the gates and ``posterior_grid`` the posterior rules to choose from, tried on ``tuning_tasks`` tasks
    that are not in the test; a single posterior rule needs no trying. ``cost_cap`` (nats a sequence, targets of 64 and
    more) and ``forced_cap`` (a share) bound what posterior may be chosen. ``front`` gates of a kind go to the test.
    Raises InvalidRequestError for an unknown mode or kind and for a posterior rule out of range.
    """

    targets: Sequence[int] = (32, 64, 128, 256, 512, 1024)
    tasks: int = 100
    tuning_tasks: int = 16
    samples: int = 1
    resample: int = 1
    modes: Sequence[str] = MODES
    kinds: Sequence[Kind] = KINDS
    posterior_grid: Sequence[PosteriorRule] = (PosteriorRule(),)
    cost_cap: float = 8.0
    forced_cap: float = 0.05
    seed: int = 0
    cut: int = 4  # answers are cut at this many times the target, where Equal To's score is 0.2 of 100 anyway
    # One sampler for all modes.
    params: SamplingParams = field(default_factory=lambda: SamplingParams(0.7, top_k=16))
    grids: Mapping[Kind, Sequence[GateRule]] = field(default_factory=lambda: GRIDS)
    front: int = 12

    def __post_init__(self) -> None:
        if self.resample < 1:
            raise InvalidRequestError(f"resample must be at least 1, not {self.resample}", param="resample")
        modes = MODES if self.resample == 1 else (*MODES, *RESAMPLED)
        for name, known in (("mode", modes), ("kind", KINDS)):
            given = getattr(self, f"{name}s")
            unknown = set(given) - set(known)
            if unknown or not given:
                shown = ", ".join(sorted(unknown)) or "(none)"
                raise InvalidRequestError(f"unknown {name} {shown}: use {', '.join(known)}", param=f"{name}s")
        if not self.posterior_grid:
            raise InvalidRequestError("there is no posterior rule: give at least one", param="posterior_grid")
        for rule in self.posterior_grid:
            Objective("equal_to", 1, **rule.to_dict())  # raises for a bad number

    @property
    def tunes_gates(self) -> bool:
        """Whether gates are chosen on the tuning tasks."""
        return not {"eos_gate", "eos_gate_resampled"}.isdisjoint(self.modes)

    @property
    def tunes_posterior(self) -> bool:
        """Whether a posterior rule is chosen there."""
        return self.posterior_modes != [] and len(self.posterior_grid) > 1

    @property
    def posterior_modes(self) -> list[str]:
        """Those of the modes that follow a posterior rule; each has its own."""
        return [mode for mode in ("posterior", "posterior_resampled") if mode in self.modes]

    def drawn_from(self, mode: str) -> int:
        """Answers of which a mode draws one."""
        return self.resample if mode in RESAMPLED else 1


def fixed_policies(settings: LifebenchSettings) -> dict[tuple[str, Kind], Policy]:
    """``(mode, kind)`` -> what is sampled for it, for those that wait for no tuning.

    The paper's space matters to Equal To alone, so that nothing is sampled twice.
    """
    found: dict[tuple[str, Kind], Policy] = {}
    for mode in settings.modes:
        sampled = RESAMPLED.get(mode, mode)
        for kind in settings.kinds:
            if sampled == "force_eos":
                found[mode, kind] = FORCED[kind]
            elif sampled == "posterior":
                if not settings.tunes_posterior:
                    found[mode, kind] = settings.posterior_grid[0]
            elif sampled != "eos_gate":
                found[mode, kind] = "paper_value" if sampled == "paper_length" and kind != "equal_to" else sampled
    return found


def jobs_of(
    policy: Policy,
    kind: Kind,
    tasks: Sequence[Task],
    settings: LifebenchSettings,
    *,
    of: int = 1,
    tuning: bool = False,
    keeps_tokens: bool = True,
) -> list[Job]:
    """Every answer of a policy: by task, target, sample, and of each sample the ``of`` answers that one is drawn from.
    Tuning takes one sample, and figures alone."""
    return [
        Job(policy, task, kind, target, sample, keeps_tokens=keeps_tokens and not tuning)
        for task in tasks
        for target in settings.targets
        for sample in range(of * (1 if tuning else settings.samples))
    ]
