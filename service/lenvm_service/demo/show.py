"""The demonstration's tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lenvm_service.cli._output import elide, number, print_warnings, shift_style, table, title
from lenvm_service.cli.score import visible

__all__ = ["show_guided", "show_intro", "show_lengths", "show_shifts"]

_PER_LINE = 5
_SHOWN_TOKENS = 150


def show_intro(console: Console, found: dict[str, Any]) -> None:
    """Who predicts, who answers."""
    console.print(
        f"Length value model {found['model']} (gamma {found['gamma']:g}), asked over HTTP at {found['url']}; "
        f"answers by {found['backbone']} at temperature {found['temperature']:g}.\n"
    )
    print_warnings(found["warnings"])


def show_lengths(console: Console, found: dict[str, Any]) -> None:
    """Predictions beside sampled answers."""
    cap = found["cap"]
    columns = ["kind", "prompt", "horizon", "mean", "p50", "p90", "sampled mean", "range", "cut"]
    title(
        console,
        f"1. How long will the answer be? Predicted at its start, then sampled: min(l, {cap}) tokens, EOS included",
    )
    made = table(columns, text=("kind", "prompt"))
    for row in found["rows"]:
        predicted, sampled = row["predicted"], row["sampled"]
        quantiles = [str(predicted["quantiles"].get(level, "-")) for level in ("0.5", "0.9")]
        cells = [row["kind"], elide(row["prompt"], 90), number(predicted["horizon"]), number(predicted["mean"])]
        cells += [*quantiles, number(sampled["mean"]), f"{sampled['min']}-{sampled['max']}"]
        made.add_row(*cells, f"{sampled['cut']} of {len(sampled['lengths'])}")
    console.print(made)
    console.print(
        "horizon: the value read back as a length. mean, p50, p90: of the predicted length distribution. "
        f"cut: answers stopped at {cap} tokens.\n"
    )


def show_shifts(console: Console, found: dict[str, Any]) -> None:
    """Every token of an answer with its shift, a few to a line, and the horizon where the line begins."""
    shifts, tokens = found["length_shifts"], found["tokens"]
    largest = max(map(abs, shifts))
    title(console, f"2. What did each token do to the length? An answer to: {elide(found['prompt'], 90)}")
    made = Table.grid(padding=(0, 2))
    made.add_column(justify="right")
    for start in range(0, min(len(tokens), _SHOWN_TOKENS), _PER_LINE):
        cells: list[Text] = [Text(f"{found['horizons'][start]:.0f} to go", style="dim")]
        for token, shift in list(zip(tokens, shifts, strict=True))[start : start + _PER_LINE]:
            cells.append(Text(f"{visible(token)} {1000 * shift:+.0f}", style=shift_style(shift, largest)))
        made.add_row(*cells)
    console.print(made)
    if len(tokens) > _SHOWN_TOKENS:
        console.print(f"... and {len(tokens) - _SHOWN_TOKENS} more tokens")
    ranked = sorted(zip(shifts, tokens, strict=True))
    longer = ", ".join(f"{visible(token)} {1000 * shift:+.0f}" for shift, token in ranked[:-4:-1] if shift > 0)
    shorter = ", ".join(f"{visible(token)} {1000 * shift:+.0f}" for shift, token in ranked[:3] if shift < 0)
    console.print(
        Text.assemble("Most lengthening: ", (longer or "none", "red"), "   most shortening: ", (shorter, "bright_blue"))
    )
    console.print(
        "Length shift x 1000; positive (red): this token made the rest longer. To go: the horizon, in tokens.\n"
    )


def show_guided(console: Console, found: dict[str, Any]) -> None:
    """What each objective made of one prompt."""
    columns = ["objective", "tokens", "score", "cost", "stop", "text"]
    title(console, f"3. Steering the length. Prompt: {found['prompt']} (top-{found['top_k']} + EOS for all)")
    made = table(columns, text=("objective", "stop", "text"), show_lines=True)
    for row in found["rows"]:
        stop = "forced" if row["forced_stop"] else "own" if row["finished"] else f"cut at {found['cap']}"
        score = number(row["length_score"])
        cells = [_objective_cell(row["objective"]), str(row["content_tokens"]), score, number(row["text_cost"])]
        made.add_row(*cells, stop, Text(elide(row["text"], 170, 80)))
    console.print(made)
    forced = sum(row["forced_stop"] for row in found["rows"])
    console.print(
        "tokens: content tokens, EOS excluded. score: length score, 100 is exact. cost: text cost in nats a sequence.\n"
        f"stop: own, or forced (EOS where the backbone gave it less than 1 in 1000): {forced} forced here. "
        "The paper has no rule for scale.\n"
    )


def _objective_cell(objective: dict[str, Any] | None) -> str:
    if objective is None:
        return "unguided"
    name = next(key for key in ("target", "lambda", "beta", "factor") if key in objective)
    shown = f"{objective[name]:g}" if name == "target" else f"{name} {objective[name]:g}"
    return f"{objective['kind']} {shown}\n{objective['method']}"
