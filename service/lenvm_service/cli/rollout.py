"""``lenvm rollout``: sample answers to prompt files, the data that a length value model learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm_service.cli._options import DataOption, DeviceOption, JsonOption, SeedOption
from lenvm_service.cli._output import ProgressReporter, print_json
from lenvm_service.cli._session import check_device, need

__all__ = ["command"]


def command(
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the shards go; a second run goes on there.")],
    domain: Annotated[
        list[str] | None,
        typer.Option("--domain", metavar="NAME", help="math, code or if; repeat for several. Default: all."),
    ] = None,
    split: Annotated[
        Literal["train", "valid", "test", "calibration"], typer.Option("--split", help="Which prompts.")
    ] = "train",
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, metavar="N", help="Prompts a domain. Default: all.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="K", help="Answers a prompt.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampler; the vocabulary is whole.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longer answers are cut.")] = 2048,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", min=1, help="Answers in flight. Default: 64, on CUDA 1024.")
    ] = None,
    seed: SeedOption = 0,
    backbone: Annotated[str, typer.Option("--backbone", metavar="NAME|DIR", help="Who answers.")] = DEFAULT_BACKBONE,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Sample answers into Parquet shards, and show how long they are (content tokens, EOS excluded)."""
    need("train")
    from lenvm.decoding import SamplingParams
    from lenvm.prompts import DOMAINS, load_prompts, select
    from lenvm.rollouts import summary
    from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts

    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    chosen = [p for name in domain or DOMAINS for p in select(load_prompts(data, name, split), prompts)]
    # Prompts of all domains side by side: a batch that is all code would finish in one long tail.
    chosen = select(chosen, None, seed=1)
    generator = LocalGenerator(backbone, device=check_device(device), max_rows=max_rows)
    done, tokens = 0, 0
    with ProgressReporter() as progress:

        def on_done(answers: int, new_tokens: int) -> None:
            nonlocal done, tokens
            done, tokens = done + answers, tokens + new_tokens
            progress.update("Sampling", done, len(chosen) * samples, {"tokens": tokens})

        rollouts = sample_rollouts(generator, chosen, out, samples=samples, params=params, seed=seed, on_done=on_done)
    made = summary(rollouts)
    if as_json:
        print_json({"out": str(out), "generator": rollouts.generator, "domains": made.domains})
    else:
        typer.echo(str(made))
