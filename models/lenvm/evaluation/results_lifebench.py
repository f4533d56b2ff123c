"""The LIFEBench tables of ``docs/results.md``: modes, gates at posterior's text cost, posterior by target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lenvm.evaluation.results_cells import change, dig, number, percent, table

__all__ = ["gates", "mode_name", "modes", "targets"]

_KINDS = ("equal_to", "at_most", "at_least")
_MODES = ("unguided", "eos_gate", "force_eos", "paper_value", "paper_length", "posterior", "unguided_resampled",
          "eos_gate_resampled", "posterior_resampled")  # fmt: skip


def mode_name(mode: str, row: Mapping[str, Any]) -> str:
    """As people read it: "posterior, 1 of 4" where one of four answers was drawn."""
    of = dig(row, "resampling", "answers")
    return _words(mode) if of is None else f"{_words(mode.removesuffix('_resampled'))}, 1 of {of}"


def modes(metrics: Mapping[str, Any]) -> str:
    """One table a kind: every mode that was run."""
    parts = []
    for kind in _KINDS:
        rows = []
        for mode in _MODES:
            row = dig(metrics, mode, kind)
            if row is not None:
                rows.append(
                    [
                        mode_name(mode, row), number(row["ls"]), percent(row["within_5pct"]),
                        number(row["kl_per_sequence"]), number(row.get("kl_per_sequence_64plus")),
                        percent(row["forced_stop_rate"]), percent(row["natural_end_rate"]),
                        percent(row["empty_rate"]), percent(row["rep4"]),
                    ]
                )  # fmt: skip
        if rows:
            head = ["mode", "length score", "within 5 %", "text cost (nats)", "cost, targets of 64+", "forced stops",
                    "natural ends", "empty", "rep-4"]  # fmt: skip
            parts.append(f"**{_words(kind)}**{_run_of(metrics, kind)}\n\n" + table(head, rows))
    return "\n\n".join(parts)


def gates(metrics: Mapping[str, Any]) -> str:
    """Posterior against the best gates on EOS that cost the text no more, chosen on the test itself."""
    rows = []
    for suffix, kind in [(suffix, kind) for suffix in ("", "_resampled") for kind in _KINDS]:
        front, ours = dig(metrics, f"gate_front{suffix}", kind), dig(metrics, f"posterior{suffix}", kind)
        if front is None or ours is None:
            continue
        of = f", 1 of {ours['resampling']['answers']}" if "resampling" in ours else ""
        for name, words in (("equal_cost", "mix of two"), ("no_more_cost", "single gate")):
            if (found := front.get(name)) is not None:
                rows.append(
                    [
                        f"{_words(kind)}{of}", words, number(ours["ls"]),
                        number(ours["kl_per_sequence"]), number(found["ls"]), number(found["kl_per_sequence"]),
                        change(found["posterior_minus_gate"]),
                    ]
                )  # fmt: skip
    if not rows:
        return "*Not measured yet: `lenvm eval lifebench --modes eos_gate,posterior`.*"
    head = ["asked for", "best gate", "posterior's length score", "its cost (nats)", "gate's length score", "its cost",
            "posterior - gate (95 %)"]  # fmt: skip
    return table(head, rows)


def targets(metrics: Mapping[str, Any]) -> str:
    """Posterior, Equal To, by target, beside the best mix of gates at the cost that it has there; a second table where
    one of several answers was drawn."""
    if not dig(metrics, "posterior", "equal_to", "by_target"):
        return "*Not measured yet: `lenvm eval lifebench --modes posterior`.*"
    several = dig(metrics, "posterior_resampled", "equal_to")
    if several is None:
        return _targets(metrics, "")
    of = several["resampling"]["answers"]
    told = f"One of {of} answers, drawn by importance weight; the text cost counts the draw."
    return f"{_targets(metrics, '')}\n\n{told}\n\n{_targets(metrics, '_resampled')}"


def _targets(metrics: Mapping[str, Any], suffix: str) -> str:
    found = dig(metrics, f"posterior{suffix}", "equal_to", "by_target")
    rows = [
        [
            target, number(row["ls"]), percent(row["within_5pct"]), number(row["mean_length"], ".0f"),
            number(row["kl_per_sequence"]), percent(row["forced_stop_rate"]), percent(row["natural_end_rate"]),
            change(dig(metrics, f"gate_front{suffix}", "equal_to", "by_target", target, "posterior_minus_gate")),
        ]
        for target, row in sorted(found.items(), key=lambda item: int(item[0]))
    ]  # fmt: skip
    head = ["target (tokens)", "length score", "within 5 %", "mean length", "text cost (nats)", "forced stops",
            "natural ends", "score - that of gates at this cost (95 %)"]  # fmt: skip
    caps = {**metrics.get("tuning", {}), **(dig(metrics, "made", "equal_to", "tuning") or {})}
    if "forced_cap" not in caps or not dig(caps, f"posterior{suffix}", "equal_to"):
        return table(head, rows)
    within = (
        "" if dig(caps, f"within_caps{suffix}", "equal_to") is not False else " (none of the rules stayed within them)"
    )
    told = (
        f"The rule was chosen on {caps['tasks']} other tasks for its length score, among those within "
        f"{number(caps['cost_cap'], 'g')} nats at targets of 64 and more and {percent(caps['forced_cap'])} forced "
        f"stops{within}."
    )
    return f"{told}\n\n{table(head, rows)}"


def _run_of(metrics: Mapping[str, Any], kind: str) -> str:
    made = dig(metrics, "made", kind)
    return "" if made is None else f" (reported at commit {made['commit']}, {made['date'][:10]})"


def _words(name: str) -> str:
    return name.replace("_", " ")
