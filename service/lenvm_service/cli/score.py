"""``lenvm score``: what did each token do to the length?"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from lenvm_service.cli._backend import open_backend
from lenvm_service.cli._options import (
    DEFAULT_MODEL,
    DeviceOption,
    JsonOption,
    ModelOption,
    TokenIdsOption,
    UrlOption,
    read_text,
)
from lenvm_service.cli._output import number, print_json, printable, shift_style, stdout_console, table, title

__all__ = ["command", "visible"]


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    completion: Annotated[str, typer.Option("--completion", metavar="TEXT", help="The answer, or its beginning.")],
    eos: Annotated[
        bool, typer.Option("--eos", help="The answer ends here: score its end-of-sequence token too.")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    url: UrlOption = None,
    token_ids: TokenIdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score an answer token by token: value, horizon and length shift.

    T tokens have T + 1 states s_0..s_T, each with a value, and T shifts. A positive shift (red) means that this token
    made the rest longer than expected, a negative one (blue) shorter. Horizons are remaining tokens, EOS included.
    """
    backend = open_backend(url, model, device=device)
    row = backend.score(read_text(prompt), completion, eos=eos, token_ids=token_ids)
    backend.close()
    facts = backend.facts
    if as_json:
        print_json({"model": facts.name, "gamma": facts.gamma, "scores": [{"index": 0, **row}]})
    else:
        _print_table(facts.name, row)


def visible(token: str) -> str:
    """A token for a table: spaces at its ends and line breaks can be seen."""
    return printable(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·"))


def _print_table(name: str, row: dict[str, Any]) -> None:
    made = table(["t", "token", "value", "horizon", "length shift"], text=("token",))
    made.add_row("0", Text("(prompt)", style="dim"), f"{row['values'][0]:.4f}", number(row["horizons"][0]), "")
    largest = max(map(abs, row["length_shifts"]))
    states = zip(row["tokens"], row["values"][1:], row["horizons"][1:], row["length_shifts"], strict=True)
    for step, (token, value, horizon, shift) in enumerate(states, 1):
        style = shift_style(shift, largest)
        cells: list[Text | str] = [number(value, ".4f"), number(horizon), Text(f"{shift:+.4f}", style=style)]
        made.add_row(str(step), Text(visible(token), style=style), *cells)
    console = stdout_console()
    title(console, f"Length shift by token, by {name} (positive: the rest became longer)")
    console.print(made)
    console.print("horizon: remaining tokens, EOS included.")
