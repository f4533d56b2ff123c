"""``lenvm eval conditional``."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm_service.cli._backend import ModelFacts
from lenvm_service.cli._options import (
    DEFAULT_MODEL,
    BackboneOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    parse_part,
)
from lenvm_service.cli._output import ProgressReporter, number, print_json, print_warnings, stdout_console, table, title
from lenvm_service.cli._session import load_generator, load_scorer, need
from lenvm_service.cli.evaluate._common import (
    Dtype,
    FiguresOption,
    ReportOnlyOption,
    ReportOption,
    check_writable,
    draw,
    identity_of,
    in_words,
    maker_of,
    names,
    percent,
    publish,
)

__all__ = ["conditional"]


def conditional(
    data: DataOption,
    model: ModelOption = DEFAULT_MODEL,
    backbone: BackboneOption = None,
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Test prompts, as many of each domain.")] = 300,
    tasks: Annotated[int, typer.Option("--tasks", min=0, help="LIFEBench tasks, without their requirement.")] = 0,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Unguided answers of each prompt.")] = 64,
    pairs_per_prompt: Annotated[
        int, typer.Option("--pairs-per-prompt", min=1, help="Guided answers of each prompt and objective.")
    ] = 3,
    resample: Annotated[
        int, typer.Option("--resample", metavar="K", min=1, help="Sample K of each and draw one by importance weight.")
    ] = 1,
    kinds: Annotated[
        str, typer.Option("--kinds", help="What is asked for, commas between them.")
    ] = "at_most,at_least,equal_to",
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0.0, help="Of at_most and at_least, as a share of the target.")
    ] = 0.05,
    equal_tolerance: Annotated[float, typer.Option("--equal-tolerance", min=0.0, help="Of equal_to.")] = 0.1,
    min_eos_prob: Annotated[
        float, typer.Option("--min-eos-prob", min=0.0, max=1.0, help="A less likely EOS is not offered.")
    ] = 0.0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="All answers are cut here; prompts mostly cut are left out.")
    ] = 512,
    part: Annotated[
        str, typer.Option("--part", metavar="K/N", help="Every N-th prompt alone, for one of N processes.")
    ] = "1/1",
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Answers in flight at once.")] = 64,
    work: Annotated[
        list[Path] | None,
        typer.Option(
            "--work",
            metavar="FILE",
            help="Keep answers here as they end; a rerun with it goes on. Given again: other files to read.",
        ),
    ] = None,
    report_only: ReportOnlyOption = False,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Precision of backbone and value model.")] = Dtype.float32,
    report: ReportOption = None,
    figures: FiguresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether guided answers are samples from the conditional: their lengths ranked among accepted unguided ones.

    Targets are lengths that some unguided answers of the same prompt reach. An exact sampler's ranks are uniform.
    """
    need("train")
    from lenvm.evaluation.run_conditional import ConditionalSettings, pool_tokens, run_conditional
    from lenvm.scoring import TorchScorer

    check_writable(report)
    index, count = parse_part(part)
    settings = ConditionalSettings(
        prompts=prompts,
        tasks=tasks,
        samples=samples,
        pairs_per_prompt=pairs_per_prompt,
        resample=resample,
        kinds=names(kinds),  # type: ignore[arg-type]  # checked by the settings
        tolerances={"equal_to": equal_tolerance, "at_most": tolerance, "at_least": tolerance},
        min_eos_prob=min_eos_prob,
        max_new_tokens=max_new_tokens,
        part=(index + 1, count),
    )
    loaded, _ = load_scorer(model, device=device, dtype=dtype.value)
    generator, warnings = load_generator(
        ModelFacts.of(loaded), backbone, device=device, dtype=dtype.value, max_rows=max_rows
    )
    print_warnings(warnings)
    scorer = TorchScorer(loaded, pool_tokens=pool_tokens(generator, settings))
    files = work or []
    identity = identity_of(loaded, dtype.value, device, files, report_only=report_only)
    # Each step makes thousands of small objects; without this every full collection walks all modules again.
    gc.collect()
    gc.freeze()
    try:
        with ProgressReporter() as progress:
            metrics = run_conditional(
                generator,
                scorer,
                data,
                settings,
                work=None if report_only or not files else files[0],
                others=[file for file in files if file.exists()] if report_only else files[1:],
                identity=identity,
                progress=progress.update,
                maker=None if report_only else maker_of(device),
                report_only=report_only,
            )
    finally:
        gc.unfreeze()
    publish(report, metrics, None if report_only else device)
    draw("conditional", metrics, figures)
    if as_json:
        print_json(metrics)
    else:
        _print_conditional(metrics, settings.kinds)


def _print_conditional(metrics: Mapping[str, Any], kinds: Sequence[str]) -> None:
    console = stdout_console()
    sampling = metrics["sampling"]
    title(
        console,
        f"{sampling['prompts']} prompts, {sampling['prompts_mostly_cut']} left out (mostly cut at "
        f"{sampling['max_new_tokens']} tokens); {sampling['samples']} unguided answers each, "
        f"{sampling['samples_for_targets']} of them choose targets",
    )
    ranks = table(["objective", "pairs", "KS", "exact", "exact, 95 %", "unguided", "KS, hard", "satisfied"],
                  text=("objective",))  # fmt: skip
    texts = table(["objective", "effective unguided", "gap log p/token", "95 %", "natural", "forced", "cost", "exact"],
                  text=("objective",))  # fmt: skip
    found = [(in_words(kind), metrics[kind]) for kind in kinds]
    if sampling["resample"] > 1:
        found += [(f"{in_words(kind)}, 1 of {sampling['resample']}", metrics[kind]["resampled"]) for kind in kinds]
    for name, row in found:
        if not row["pairs"]:
            console.print(f"{name}: no prompt has a target for it")
            continue
        ranks.add_row(
            name, str(row["pairs"]),
            *(number(row[name], ".3f") for name in ("ks", "ks_null", "ks_null_95", "ks_control", "ks_hard")),
            f"{percent(row['satisfied_rate'])} ({percent(row['satisfied_rate_exact'])})",
        )  # fmt: skip
        interval = ", ".join(f"{bound:+.3f}" for bound in row["logprob_gap_ci"])
        texts.add_row(
            name, number(row["effective_unguided"]), f"{row['logprob_gap']:+.3f}", interval,
            percent(row["natural_end_rate"]), percent(row["forced_stop_rate"]), number(row["text_cost"], ".2f"),
            number(row["text_cost_exact"], ".2f"),
        )  # fmt: skip
    for caption, made in (
        ("Ranks: distance from uniform, beside an exact sampler's and an unguided one's", ranks),
        ("Texts: guided minus accepted unguided, and the text cost in nats", texts),
    ):
        title(console, caption)
        console.print(made)
