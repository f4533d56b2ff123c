"""A LIFEBench report that was made of several runs: each makes some kinds, and the others stay as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.errors import DataError
from lenvm.evaluation.lifebench import KINDS

__all__ = ["keep_other_kinds"]

_MADE = ("command", "commit", "date", "device", "versions")
_TUNING = ("tasks", "cost_cap", "forced_cap")


def keep_other_kinds(metrics: Mapping[str, Any], kinds: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run of ``kinds`` and, of the report ``before``, everything that it says of other kinds.

    ``made`` says for each kind that was kept how: command, commit, date, device, versions, what sampled it, and the
    limits and the tuning that are not by kind. Raises DataError for a report on another checkpoint.
    """
    old: Mapping[str, Any] = before.get("metrics", {})
    theirs, ours = old.get("checkpoint"), metrics.get("checkpoint")
    if theirs and ours and theirs != ours:
        raise DataError("the report that is there is on another checkpoint: choose another --report, or remove it")
    others = [kind for kind in KINDS if kind not in kinds]
    kept = [kind for kind in others if any(kind in part for part in old.values() if isinstance(part, Mapping))]
    found = _with(metrics, old, others)
    if kept:
        earlier = old.get("made", {})
        own = {name: before.get(name) for name in _MADE} | {name: old.get(name) for name in ("limits", "sampled_by")}
        own["tuning"] = {name: old.get("tuning", {}).get(name) for name in _TUNING}
        found["made"] = {kind: earlier.get(kind, own) for kind in kept}
    return found


def _with(new: Mapping[str, Any], old: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """``new``, and what stands under ``others`` anywhere in ``old``."""
    found = dict(new)
    for name, part in old.items():
        if name in others:
            found[name] = part
        elif name not in ("made", "checkpoint") and name not in KINDS and isinstance(part, Mapping):
            below = _with(new.get(name, {}), part, others)
            if below:
                found[name] = below
    return found
