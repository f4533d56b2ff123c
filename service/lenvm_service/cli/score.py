"""``lenvm score``: what did each token do to the length?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from lenvm.errors import InvalidRequestError
from lenvm_service.cli._options import DEFAULT_MODEL, DeviceOption, JsonOption, ModelOption, TokenIdsOption, read_text
from lenvm_service.cli._output import number, print_json, printable, shift_style, stdout_console, table, title
from lenvm_service.cli._session import encode_completion, encode_prompt, load_scorer, need

if TYPE_CHECKING:
    from lenvm.modeling import LengthValueModel
    from lenvm.scoring import TorchScorer

__all__ = ["command", "score_completion", "visible"]


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    completion: Annotated[str, typer.Option("--completion", metavar="TEXT", help="The answer, or its beginning.")],
    eos: Annotated[
        bool, typer.Option("--eos", help="The answer ends here: score its end-of-sequence token too.")
    ] = False,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    token_ids: TokenIdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score an answer token by token: value, horizon and length shift.

    T tokens have T + 1 states s_0..s_T, each with a value, and T shifts. A positive shift (red) means that this token
    made the rest longer than expected, a negative one (blue) shorter. Horizons are remaining tokens, EOS included.
    """
    need("serve")
    loaded, scorer = load_scorer(model, device=device)
    prompt_ids = encode_prompt(loaded.tokenizer, read_text(prompt), token_ids=token_ids)
    completion_ids = encode_completion(loaded.tokenizer, completion, token_ids=token_ids)
    row = score_completion(loaded, scorer, prompt_ids, completion_ids, eos=eos)
    if as_json:
        print_json({"model": loaded.config.name, "gamma": scorer.gamma, "scores": [{"index": 0, **row}]})
    else:
        _print_table(loaded.config.name, row)


def score_completion(
    model: LengthValueModel, scorer: TorchScorer, prompt: list[int], completion: list[int], *, eos: bool
) -> dict[str, Any]:
    """Values and horizons of s_0..s_T and the T length shifts; with ``eos`` the last token is EOS and ``V_T = 0``.

    Raises InvalidRequestError where there is no token to score.
    """
    from lenvm.returns import horizon_from_logit, length_shift, value_from_logit

    if not completion and not eos:
        raise InvalidRequestError("the completion is empty: pass some text, or --eos", param="completion")
    score = scorer.token_values(prompt, completion)
    score.state.close()
    values = [float(value) for value in value_from_logit(score.logits)]
    horizons = [float(length) for length in horizon_from_logit(score.logits, scorer.gamma)]
    ids = list(completion)
    if eos:
        ids.append(int(model.tokenizer.eos_token_id))
        values.append(0.0)
        horizons.append(0.0)
    return {
        "prompt_tokens": len(prompt),
        "token_ids": ids,
        "tokens": [model.tokenizer.decode([token]) for token in ids],
        "values": values,
        "horizons": horizons,
        "length_shifts": [float(shift) for shift in length_shift(values, scorer.gamma)],
    }


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
