"""``lenvm rollout``: sample answers to prompts, the data that a length value model learns from, and look at them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm.errors import EndpointUnavailableError, InvalidRequestError
from lenvm_service.cli._options import JsonOption, SeedOption, parse_part
from lenvm_service.cli._output import ProgressReporter, print_json, print_warnings
from lenvm_service.cli._session import check_device, need

if TYPE_CHECKING:
    from lenvm.prompts import Prompt
    from lenvm.rollouts import RolloutSet
    from lenvm.rollouts.collect import EndpointRun

__all__ = ["app"]

app = typer.Typer()
_SHOWN = 20  # refused prompts that are named one by one

_FigureOption = Annotated[
    Path | None, typer.Option("--figure", metavar="FILE.svg", help="Draw the histogram of lengths into this file.")
]


@app.callback(invoke_without_command=True)
def command(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="The folder that holds prompts/ and bench/.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file", metavar="FILE", help="JSON lines (.jsonl or gzip'd) with id, and prompt or messages."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the shards go; a second run goes on there.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option("--domain", metavar="NAME", help="math, code or if; repeat for several. Default: all."),
    ] = None,
    split: Annotated[
        Literal["train", "valid", "test", "calibration"] | None,
        typer.Option("--split", help="Which prompts. Default: train; all of --prompts-file."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, metavar="N", help="Prompts a domain. Default: all.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt where a prompt has none of its own.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="K", help="Answers a prompt.")] = 4,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampler; the vocabulary is whole.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus of the sampler; 1 is the whole vocabulary.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longer answers are cut.")] = 2048,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", min=1, help="Longer prompts are left out.")
    ] = 1024,
    max_rows: Annotated[
        int | None, typer.Option("--max-rows", min=1, help="Answers in flight here. Default: 64, on CUDA 1024.")
    ] = None,
    seed: SeedOption = 0,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Here: every N-th prompt alone, so that GPUs share the work."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", metavar="NAME|DIR", help=f"Who answers, here. Default: {DEFAULT_BACKBONE}."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N. Default: cpu.")] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="Ask this OpenAI-compatible server, like http://host:8000/v1."),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option("--endpoint-model", metavar="NAME", help="The model's name at the endpoint.")
    ] = None,
    endpoint_api: Annotated[
        Literal["chat", "completions"] | None,
        typer.Option(
            "--endpoint-api",
            help="chat: messages, the server applies its template (default). completions: token ids of the prompt.",
        ),
    ] = None,
    endpoint_extra: Annotated[
        str | None,
        typer.Option("--endpoint-extra", metavar="JSON", help="More of the request, like '{\"top_k\": -1}'."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", metavar="VAR", help="The environment variable that holds the key.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="NAME|DIR", help="With --endpoint: the tokenizer of its model."),
    ] = None,
    token_source: Annotated[
        Literal["auto", "server", "text"] | None,
        typer.Option("--token-source", help="Of answers: from the server, or its text encoded again. Default: auto."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, metavar="N", help="Requests in flight. Default: 32.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Seconds for one request. Default: 600.")
    ] = None,
    retries: Annotated[
        int | None, typer.Option("--retries", min=0, metavar="N", help="Of one request, after the first. Default: 8.")
    ] = None,
    flush: Annotated[
        float, typer.Option("--flush", min=0.1, metavar="S", help="An answer is on disk after so many seconds.")
    ] = 30.0,
    figure: _FigureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sample answers into Parquet shards, and show how long they are (content tokens, EOS excluded).

    A second run with the same arguments goes on where the first one ended, or was killed.
    """
    if context.invoked_subcommand is not None:
        return
    if out is None:
        raise typer.BadParameter("say where the shards go: --out DIR", context)
    here = {"--backbone": backbone, "--device": device, "--max-rows": max_rows, "--part": part}
    there = {
        "--endpoint-model": endpoint_model,
        "--endpoint-api": endpoint_api,
        "--endpoint-extra": endpoint_extra,
        "--api-key-env": api_key_env,
        "--tokenizer": tokenizer,
        "--token-source": token_source,
        "--concurrency": concurrency,
        "--timeout": timeout,
        "--retries": retries,
    }
    _check_together(context, endpoint, here, there)
    need("train")
    from lenvm.decoding import SamplingParams

    chosen = _choose(context, data, prompts_file, domain, split, prompts)
    if system is not None:
        chosen = [prompt.with_system(system) for prompt in chosen]
    shared: dict[str, Any] = {
        "samples": samples,
        "params": SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens),
        "seed": seed,
        "max_prompt_tokens": max_prompt_tokens,
        "flush_s": flush,
        "about": {"system": system} if system is not None else {},
    }
    if endpoint is None:
        which = parse_part(part or "1/1")
        rollouts = _sample_here(
            chosen[which[0] :: which[1]], out, which, backbone or DEFAULT_BACKBONE, device or "cpu", max_rows, shared
        )
        _show(rollouts, out, figure, as_json)
        return
    run = _sample_there(chosen, out, endpoint, there, shared)
    _show(run.rollouts, out, figure, as_json, run)
    if run.failed:
        reason = next(iter(run.failed.values()))
        raise EndpointUnavailableError(
            f"{len(run.failed)} samples failed ({reason}): run the same command again for them"
        )


@app.command("stats")
def stats(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of rollouts.")],
    figure: _FigureOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lengths by domain, the share of cut answers, and a histogram (content tokens, EOS excluded)."""
    need("train")
    from lenvm.rollouts import read_rollouts

    _show(read_rollouts(folder), folder, figure, as_json)


@app.command("lengths")
def lengths(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of rollouts.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.jsonl.gz", help="Where the lengths go.")],
) -> None:
    """Write the lengths of the answers alone: all that lenvm eval prediction needs, in a file that is easy to carry."""
    need("train")
    from lenvm.evaluation.lengths import write_lengths
    from lenvm.evaluation.states import group_prompts
    from lenvm.rollouts import read_rollouts

    prompts = group_prompts(read_rollouts(folder))
    write_lengths(prompts, out)
    typer.echo(f"{len(prompts)} prompts, {sum(len(prompt.lengths) for prompt in prompts)} lengths: {out}")


def _check_together(context: typer.Context, endpoint: str | None, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Wrong usage where options of one way to sample are given with the other."""
    alien = [name for name, value in (there if endpoint is None else here).items() if value is not None]
    if alien:
        verb = "does" if len(alien) == 1 else "do"
        needs = "needs --endpoint URL" if endpoint is None else f"{verb} not go with --endpoint"
        raise typer.BadParameter(f"{', '.join(alien)} {needs}", context)
    missing = [name for name in ("--endpoint-model", "--tokenizer") if there[name] is None]
    if endpoint is not None and missing:
        raise typer.BadParameter(f"--endpoint needs {' and '.join(missing)}", context)


def _choose(
    context: typer.Context,
    data: Path | None,
    prompts_file: Path | None,
    domains: list[str] | None,
    split: str | None,
    count: int | None,
) -> list[Prompt]:
    """The prompts that the options name, of all domains side by side."""
    from lenvm.prompts import DOMAINS, carve, load_prompts, load_prompts_file, select

    if (data is None) == (prompts_file is None):
        raise typer.BadParameter("give the prompts: either --data DIR or --prompts-file FILE", context)
    if data is not None:
        by_domain = {name: load_prompts(data, name, split or "train") for name in domains or DOMAINS}
    else:
        assert prompts_file is not None
        found = load_prompts_file(prompts_file)
        found = found if split is None else carve(found, split)
        by_domain = {name: [p for p in found if p.domain == name] for name in domains or {p.domain: 0 for p in found}}
        if absent := [name for name, part in by_domain.items() if not part]:
            raise InvalidRequestError(f"{prompts_file} has no prompts of domain {', '.join(absent)}", param="domain")
    chosen = [prompt for part in by_domain.values() for prompt in select(part, count)]
    # Prompts of all domains side by side: a batch that is all code would finish in one long tail.
    return select(chosen, None, seed=1)


class _Progress:
    """Counts answers and tokens for the progress line."""

    def __init__(self, reporter: ProgressReporter, total: int) -> None:
        self._reporter, self._total, self._done, self._tokens = reporter, total, 0, 0

    def __call__(self, answers: int, tokens: int) -> None:
        self._done, self._tokens = self._done + answers, self._tokens + tokens
        self._reporter.update("Sampling", self._done, self._total, {"tokens": self._tokens})


def _sample_here(
    chosen: list[Prompt],
    out: Path,
    part: tuple[int, int],
    backbone: str,
    device: str,
    max_rows: int | None,
    shared: dict[str, Any],
) -> RolloutSet:
    from lenvm.rollouts.sampling import LocalGenerator, sample_rollouts
    from lenvm.rollouts.store import COMPLETE, part_folder

    generator = LocalGenerator(backbone, device=check_device(device), max_rows=max_rows)
    with ProgressReporter() as reporter:
        on_done = _Progress(reporter, len(chosen) * shared["samples"])
        folder = part_folder(out, part)
        found = sample_rollouts(generator, chosen, folder, on_done=on_done, **shared)
        if part[1] > 1:
            (folder / COMPLETE).touch()
        return found


def _sample_there(
    chosen: list[Prompt], out: Path, url: str, options: dict[str, Any], shared: dict[str, Any]
) -> EndpointRun:
    from lenvm.rollouts.collect import EndpointGenerator, rollouts_from_endpoint
    from lenvm.rollouts.endpoint import EndpointSettings

    given = {
        field: options[name]
        for field, name in (
            ("api", "--endpoint-api"),
            ("concurrency", "--concurrency"),
            ("timeout_s", "--timeout"),
            ("retries", "--retries"),
        )
        if options[name] is not None
    }
    settings = EndpointSettings(
        url,
        options["--endpoint-model"],
        api_key=_api_key(options["--api-key-env"]),
        extra=_extra(options["--endpoint-extra"]),
        **given,
    )
    generator = EndpointGenerator(
        settings, tokenizer=options["--tokenizer"], token_ids=options["--token-source"] or "auto"
    )
    with ProgressReporter() as reporter:
        on_done = _Progress(reporter, len(chosen) * shared["samples"])
        return rollouts_from_endpoint(generator, chosen, out, on_done=on_done, **shared)


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise InvalidRequestError(f"the environment has no {variable}: set it to the endpoint's key", param="api_key")
    return os.environ[variable]


def _extra(text: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(text or "{}")
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise InvalidRequestError(f"--endpoint-extra must be a JSON object, not {text!r}", param="extra")
    return extra


def _show(rollouts: RolloutSet, out: Path, figure: Path | None, as_json: bool, run: EndpointRun | None = None) -> None:
    from lenvm.rollouts import draw_histogram, summary

    made = summary(rollouts)
    if figure is not None:
        draw_histogram(rollouts, figure)
    if as_json:
        document: dict[str, Any] = {"out": str(out), "generator": rollouts.generator, "domains": made.domains}
        if run is not None:
            document |= {"refused": run.refused, "failed": len(run.failed), "notes": run.notes}
        print_json(document)
    else:
        typer.echo(str(made))
    if run is not None:
        refused = [f"prompt {name!r} was refused: {reason}" for name, reason in run.refused.items()]
        more = [f"{len(refused) - _SHOWN} more prompts were refused"] if len(refused) > _SHOWN else []
        print_warnings([*run.notes, *refused[:_SHOWN], *more])
