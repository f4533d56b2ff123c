"""A guided answer beside the unguided one of the same seed: lengths, length score, text cost, and both texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lenvm.guidance import Objective
from lenvm_service.ui.html import escape, note, number, table
from lenvm_service.ui.tokens_view import answer_html

__all__ = ["build_objective", "comparison_html", "running_html", "wish_of"]

METHODS = ("posterior", "paper, in values", "paper, in lengths")
KINDS = ("equal_to", "at_most", "at_least", "tilt")


def build_objective(
    *, kind: str, method: str, target: int, tilt: float, beta: float, tolerance: float, strength: float
) -> Objective:
    """The objective that the controls describe. Raises InvalidRequestError for what guidance does not know."""
    wire: dict[str, Any] = {"kind": kind, "method": "posterior" if method == "posterior" else "paper"}
    if kind == "tilt":
        wire |= {"lambda": tilt} if wire["method"] == "posterior" else {"beta": beta}
    else:
        wire["target"] = target
    if wire["method"] == "posterior":
        wire["tolerance"] = tolerance
    elif kind == "equal_to":
        wire["space"] = "length" if method.endswith("lengths") else "value"
    return Objective.from_dict(wire | {"strength": strength})


def wish_of(objective: Objective) -> str:
    """The objective in a few words."""
    wire = objective.to_dict()
    if objective.kind == "tilt":
        wanted = f"tilt by λ = {objective.lambda_:g}" if objective.method == "posterior" else f"β = {objective.beta:g}"
    else:
        wanted = f"{objective.kind.replace('_', ' ')} {objective.target:,} tokens"
    space = f", in {wire['space']}s" if objective.method == "paper" and objective.kind == "equal_to" else ""
    return f"{wanted}, {objective.method}{space}"


def running_html(objective: Objective, texts: Sequence[str], counts: Sequence[int], limit: int) -> str:
    """What is there so far of (guided, unguided)."""
    columns = (
        _column(name, f'<div class="lv-text-box">{escape(text)}</div>', f"{count:,} of at most {limit:,} tokens")
        for name, text, count in zip((f"Guided: {wish_of(objective)}", "Unguided"), texts, counts, strict=True)
    )
    return f'<div class="lv-pair" aria-busy="true">{"".join(columns)}</div>'


def comparison_html(
    objective: Objective, rows: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any] | None], limit: int
) -> str:
    """(guided, unguided) answers as ``generation_fields`` gives them; ``scores``: their tokens, None for an empty one
    that was cut."""
    lines = [
        (
            name,
            f"{row['content_tokens']:,}",
            number(row["length_score"]),
            number(row["text_cost"], ",.2f"),
            _end(row, limit),
        )
        for name, row in zip(("guided", "unguided"), rows, strict=True)
    ]
    columns = [wish_of(objective), "content tokens", "length score (0 to 100)", "text cost (nats)", "end"]
    answers = (
        _column(name.capitalize(), "" if score is None else answer_html(score, finished=row["finished"]), "")
        for name, row, score in zip(("guided", "unguided"), rows, scores, strict=True)
    )
    told = (
        "Same prompt, same seed, same candidates at every step (the 16 likeliest tokens and end-of-sequence). The text "
        "cost is log q − log p over the answer: what guidance spent in probability. A length score means little "
        "without it. One answer is one sample: both would differ with another seed."
    )
    return table(columns, lines) + f'<div class="lv-pair">{"".join(answers)}</div>' + note(told)


def _column(title: str, body: str, below: str) -> str:
    foot = note(below) if below else ""
    return f"<section><h3>{escape(title)}</h3>{body}{foot}</section>"


def _end(row: Mapping[str, Any], limit: int) -> str:
    if not row["finished"]:
        return f"cut at {limit:,}"
    return "forced stop" if row["forced_stop"] else "by itself"
