"""``lenvm predict``: how long will the answer be?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenvm.errors import ContextTooLongError, InvalidRequestError
from lenvm_service.cli._options import (
    DEFAULT_MODEL,
    DeviceOption,
    JsonOption,
    ModelOption,
    TokenIdsOption,
    parse_quantiles,
    read_lines,
)
from lenvm_service.cli._output import ProgressReporter, elide, number, print_json, stdout_console, table, title
from lenvm_service.cli._session import encode_prompt, load_scorer, need

if TYPE_CHECKING:
    from lenvm.scoring import RowScore, TorchScorer

__all__ = ["command", "prediction"]

_ROWS = 64  # prompts a forward, so that many prompts neither fill the pool nor hide the progress


def command(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Prompts; '-' reads one a line from stdin.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
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
    need("serve")
    texts = read_lines(prompts or [], prompts_file)
    loaded, scorer = load_scorer(model, device=device)
    encoded = _encode(loaded.tokenizer, scorer.context, texts, token_ids)
    rows = _predict(scorer, encoded, levels, max_tokens)
    cap = scorer.bins.cap if scorer.bins else None
    if as_json:
        print_json({"model": loaded.config.name, "gamma": scorer.gamma, "cap": cap, "predictions": rows})
    else:
        _print_table(loaded.config.name, texts, rows, levels, max_tokens, cap)


def _encode(tokenizer: Any, context: int, texts: list[str], token_ids: bool) -> list[list[int]]:
    """Ids of every prompt; an error says which prompt it is about."""
    encoded: list[list[int]] = []
    for position, text in enumerate(texts, 1):
        which = f"prompt {position}: " if len(texts) > 1 else ""
        try:
            ids = encode_prompt(tokenizer, text, token_ids=token_ids)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{which}{error}", param=error.param) from None
        if len(ids) > context:
            message = f"{which}it has {len(ids)} tokens but the model's context is {context}: shorten it"
            raise ContextTooLongError(message, param="prompt")
        encoded.append(ids)
    return encoded


def _predict(
    scorer: TorchScorer, encoded: list[list[int]], levels: list[float], max_tokens: int | None
) -> list[dict[str, Any]]:
    from lenvm.scoring import ScoreRow

    rows: list[dict[str, Any]] = []
    with ProgressReporter() as progress:
        for start in range(0, len(encoded), _ROWS):
            if len(encoded) > _ROWS:
                progress.update("Predicting", start, len(encoded))
            for score in scorer.score([ScoreRow(append=ids) for ids in encoded[start : start + _ROWS]]):
                score.state.close()
                index = len(rows)
                found = prediction(scorer, score, levels, max_tokens)
                rows.append({"index": index, "prompt_tokens": len(encoded[index]), **found})
    return rows


def prediction(
    scorer: TorchScorer, score: RowScore, levels: list[float], max_tokens: int | None = None
) -> dict[str, Any]:
    """The fields of a prediction at the end of a scored prefix; those of the distribution are None without bins."""
    from lenvm.distribution import quantile, restricted_mean, survival
    from lenvm.returns import horizon_from_logit, value_from_logit

    logit = float(score.logits[-1])
    found: dict[str, Any] = {
        "value": value_from_logit(logit),
        "horizon": horizon_from_logit(logit, scorer.gamma),
        "mean": None,
        "quantiles": None,
        "p_exceeds_max_tokens": None,
        "saturated": None,
    }
    if scorer.bins is not None and score.bin_logprobs is not None:
        logp = score.bin_logprobs[-1]
        lengths, saturated = quantile(logp, scorer.bins, levels)
        found["mean"] = float(restricted_mean(logp, scorer.bins))
        found["quantiles"] = {f"{level:g}": int(length) for level, length in zip(levels, lengths, strict=True)}
        found["saturated"] = bool(saturated.any())
        if max_tokens is not None:
            found["p_exceeds_max_tokens"] = float(survival(logp, scorer.bins, max_tokens))
    return found


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
        cells += [str(lengths.get(f"{level:g}", "-")) for level in levels]
        cells += [number(row["p_exceeds_max_tokens"], ".3f")] if max_tokens is not None else []
        made.add_row(*cells)
    console = stdout_console()
    title(console, f"Remaining tokens l by {name} (EOS included: an answer of L content tokens has l = L + 1)")
    console.print(made)
    if any(row["saturated"] for row in rows):
        console.print(f"A quantile of {cap} stands for {cap} or more: the distribution ends there.")
