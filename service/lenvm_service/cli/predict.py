"""``lenvm predict``: how long will the answer be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm_service.answers import level_name
from lenvm_service.cli._backend import open_backend
from lenvm_service.cli._options import (
    DEFAULT_MODEL,
    DeviceOption,
    JsonOption,
    ModelOption,
    TokenIdsOption,
    UrlOption,
    parse_quantiles,
    read_lines,
)
from lenvm_service.cli._output import ProgressReporter, elide, number, print_json, stdout_console, table, title

__all__ = ["command"]


def command(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts; '-' reads one a line from stdin.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    url: UrlOption = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts-file", help="A file with one prompt a line.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Also give the probability that more tokens come.")
    ] = None,
    quantiles: Annotated[str, typer.Option("--quantiles", help="Quantiles of the length to give.")] = "0.5,0.9,0.95",
    token_ids: TokenIdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict the length of the answer to each prompt, before its first token.

    Lengths are remaining tokens l: the end-of-sequence token counts, so an answer of L content tokens has l = L + 1.
    value = E[-(1 - gamma^l)], horizon = the value read back as a length (at most the
    expected one), mean = E[min(l, cap)].
    """
    levels = parse_quantiles(quantiles)
    if not prompts and prompts_file is None:
        raise typer.BadParameter("there is no prompt: pass some, '-' for standard input, or --prompts-file")
    texts = read_lines(prompts or [], prompts_file)
    backend = open_backend(url, model, device=device)
    with ProgressReporter() as progress:

        def show(done: int, total: int) -> None:
            if total > done > 0:  # one call needs no bar
                progress.update("Predicting", done, total)

        rows = backend.predict(texts, levels, max_tokens, token_ids=token_ids, progress=show)
    backend.close()
    facts = backend.facts
    if as_json:
        print_json({"model": facts.name, "gamma": facts.gamma, "cap": facts.cap, "predictions": rows})
    else:
        _print_table(facts.name, texts, rows, levels, max_tokens, facts.cap)


def _print_table(
    name: str,
    texts: list[str],
    rows: list[dict[str, Any]],
    levels: list[float],
    max_tokens: int | None,
    cap: int | None,
) -> None:
    columns = ["prompt", "prompt tokens", "value", "horizon", "mean", *(f"p{100 * level:g}" for level in levels)]
    columns += [f"P(l > {max_tokens})"] if max_tokens is not None else []
    made = table(columns, text=("prompt",))
    for text, row in zip(texts, rows, strict=True):
        cells = [elide(text, 40), str(row["prompt_tokens"])]
        cells += [number(row["value"], ".4f"), number(row["horizon"]), number(row["mean"])]
        lengths = row["quantiles"] or {}
        cells += [str(lengths.get(level_name(level), "-")) for level in levels]
        cells += [number(row["p_exceeds_max_tokens"], ".3f")] if max_tokens is not None else []
        made.add_row(*cells)
    console = stdout_console()
    title(console, f"Remaining tokens l by {name} (EOS included: an answer of L content tokens has l = L + 1)")
    console.print(made)
    if any(row["saturated"] for row in rows):
        console.print(f"A quantile of {cap} stands for {cap} or more: the distribution ends there.")
