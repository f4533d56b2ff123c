"""``lenvm generate``: answers of the length that is wanted, by the backbone itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from lenvm_service.answers import generation_fields
from lenvm_service.cli._backend import open_backend
from lenvm_service.cli._objective import ObjectiveOptions
from lenvm_service.cli._options import (
    DEFAULT_MODEL,
    BackboneOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    SeedOption,
    TokenIdsOption,
    UrlOption,
    read_text,
)
from lenvm_service.cli._output import (
    number,
    print_json,
    print_warnings,
    printable,
    stdout_console,
    table,
    title,
)
from lenvm_service.cli._session import load_generator, need, sample

if TYPE_CHECKING:
    from lenvm.decoding import Generation
    from lenvm.guidance import Objective

__all__ = ["command"]

_TARGETS = "Objective"
_SAMPLING = "Sampling"


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from stdin.")],
    equal_to: Annotated[
        int | None, typer.Option("--equal-to", metavar="N", help="N content tokens.", rich_help_panel=_TARGETS)
    ] = None,
    at_most: Annotated[
        int | None, typer.Option("--at-most", metavar="N", help="N content tokens or fewer.", rich_help_panel=_TARGETS)
    ] = None,
    at_least: Annotated[
        int | None, typer.Option("--at-least", metavar="N", help="N content tokens or more.", rich_help_panel=_TARGETS)
    ] = None,
    tilt: Annotated[
        float | None,
        typer.Option(
            "--tilt",
            metavar="X",
            rich_help_panel=_TARGETS,
            help="posterior: lambda in nats a token, weight exp(-X L), X > 0 shortens (try 0.01). "
            "paper: beta, weight exp(-X V), X < 0 shortens (try -20).",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option("--scale", metavar="C", help="C times the mean length (posterior).", rich_help_panel=_TARGETS),
    ] = None,
    method: Annotated[
        Literal["posterior", "paper"] | None,
        typer.Option(
            "--method",
            rich_help_panel=_TARGETS,
            help="posterior samples the model's own answers of that length (default); paper is the paper's rule.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Softness of a target, relative to it (0.05).", rich_help_panel=_TARGETS),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="Factor on the log-weights (1).", rich_help_panel=_TARGETS)
    ] = None,
    space: Annotated[
        Literal["value", "length"] | None,
        typer.Option("--space", help="Where paper's --equal-to compares (value).", rich_help_panel=_TARGETS),
    ] = None,
    min_eos_prob: Annotated[
        float | None,
        typer.Option(
            "--min-eos-prob",
            rich_help_panel=_TARGETS,
            help="Do not end where the backbone finds that less likely (0: end anywhere).",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Default: that of the model's generator.", rich_help_panel=_SAMPLING),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k", min=0, rich_help_panel=_SAMPLING, help="Candidates, EOS beside them; 0: all (unguided only)."
        ),
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, rich_help_panel=_SAMPLING)] = 1024,
    n: Annotated[int, typer.Option("--n", min=1, max=1024, help="Answers.", rich_help_panel=_SAMPLING)] = 1,
    resample: Annotated[
        int,
        typer.Option(
            "--resample",
            metavar="K",
            min=1,
            max=64,
            rich_help_panel=_SAMPLING,
            help="Sample K for each answer and draw one by importance weight: nearer to the length and to the model's "
            "own text, for K times the work.",
        ),
    ] = 1,
    seed: SeedOption = 0,
    model: ModelOption = DEFAULT_MODEL,
    backbone: BackboneOption = None,
    device: DeviceOption = "cpu",
    url: UrlOption = None,
    token_ids: TokenIdsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate with the backbone, steered by its length value model; without an objective, unguided.

    Guided and unguided answers are sampled alike, from the 16 likeliest tokens and EOS, so that they can be compared.
    Targets count content tokens (EOS excluded). Text cost is what guidance cost in nats a sequence: log q - log p, and
    with --resample what the draw adds.
    """
    options = ObjectiveOptions(
        equal_to, at_most, at_least, tilt, scale, method, tolerance, strength, space, min_eos_prob
    )
    options.check(max_new_tokens)
    need("serve")
    objective = options.build()
    if objective is not None and top_k == 0:
        raise typer.BadParameter(
            "0 is for unguided answers only: guidance scores every candidate", param_hint="--top-k"
        )
    if resample > 1 and (objective is None or objective.method != "posterior" or objective.kind == "scale"):
        raise typer.BadParameter(
            "answers are weighed by --equal-to, --at-most, --at-least or --tilt, by posterior", param_hint="--resample"
        )
    if resample > 1 and temperature == 0:
        raise typer.BadParameter("greedy answers are all the same: raise --temperature", param_hint="--resample")
    from lenvm.decoding import Request, SamplingParams

    backend = open_backend(url, model, device=device)
    facts = backend.facts
    ids = backend.encode(read_text(prompt), token_ids=token_ids)
    guide = None if objective is None else backend.guide([objective] * (n * resample))
    if temperature is None:
        temperature = facts.temperature
    params = SamplingParams(temperature=temperature, top_k=top_k or None, max_new_tokens=max_new_tokens)
    generator, warnings = load_generator(facts, backbone, device=device)
    seeds = [seed + index for index in range(n)]
    requests = [Request(ids, each) for own in seeds for each in _seeds(own, resample)]
    drawn = _draw(sample(generator, requests, params, guide), objective, seeds, resample)
    rows = [
        {"index": index, **generation_fields(generation, objective, generator.tokenizer), **more}
        for index, (generation, more) in enumerate(drawn)
    ]
    backend.close()
    print_warnings(warnings)
    if as_json:
        sampling = {"temperature": temperature, "top_k": top_k or None, "max_new_tokens": max_new_tokens}
        wire = None if objective is None else objective.to_dict()
        head = {"model": facts.name, "backbone": generator.name, "prompt_tokens": len(ids), "objective": wire}
        print_json({**head, "sampling": sampling, "generations": rows, "warnings": warnings})
    else:
        _print_answers(rows, objective)


def _seeds(seed: int, resample: int) -> list[int]:
    """Of an answer: its own, or one for each of the answers that it is drawn from, which no other answer has."""
    from lenvm.rollouts.sampling import stream_seed

    return [seed] if resample == 1 else [stream_seed("resample", number, seed) for number in range(resample)]


def _draw(
    generations: list[Generation], objective: Objective | None, seeds: list[int], resample: int
) -> list[tuple[Generation, dict[str, Any]]]:
    """One of each ``resample`` answers under the seed that stands for all of them, and what is told of the draw."""
    if resample == 1 or objective is None:
        return [(generation, {}) for generation in generations]
    import numpy as np

    from lenvm.resampling import resample_answers

    drawn = []
    for at, seed in enumerate(seeds):
        draw = np.random.default_rng(seed).uniform()
        chosen, found = resample_answers(objective, generations[at * resample : (at + 1) * resample], draw)
        told = {"resampled_from": resample, "effective_sample_size": found.effective_sample_size}
        drawn.append((replace(chosen, seed=seed), told))
    return drawn


def _print_answers(rows: list[dict[str, Any]], objective: Objective | None) -> None:
    console = stdout_console()
    wanted = "unguided"
    if objective is not None:
        value = next(
            v for v in (objective.target, objective.lambda_, objective.beta, objective.factor) if v is not None
        )
        wanted = f"{objective.kind} {value:g} by {objective.method}"
    columns = ["answer", "content tokens", "length score", "text cost (nats)", "forced stop", "finished"]
    made = table(columns)
    for row in rows:
        if len(rows) > 1:
            console.print(Text(f"[{row['index'] + 1}]", style="bold"))
        console.print(Text(printable(row["text"])))
        console.print()
        cells = [str(row["index"] + 1), str(row["content_tokens"]), number(row["length_score"])]
        flags = ["yes" if row[name] else "no" for name in ("forced_stop", "finished")]
        made.add_row(*cells, number(row["text_cost"], ".2f"), *flags)
    title(console, wanted)
    console.print(made)
    if "resampled_from" in rows[0]:
        sizes = ", ".join(number(row["effective_sample_size"]) for row in rows)
        console.print(
            f"Each drawn from {rows[0]['resampled_from']}, effective sample size {sizes}. The text cost counts that."
        )
