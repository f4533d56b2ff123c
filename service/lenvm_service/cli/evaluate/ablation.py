"""``lenvm eval ablation``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm_service.cli._options import DeviceOption, JsonOption
from lenvm_service.cli._output import ProgressReporter, number, print_json, print_warnings, stdout_console, table, title
from lenvm_service.cli._session import need
from lenvm_service.cli.evaluate._common import (
    FiguresOption,
    ReportOption,
    check_writable,
    draw,
    names,
    percent,
    publish,
)
from lenvm_service.cli.evaluate._experiments import (
    DEFAULT_ROLLOUTS,
    DEFAULT_TEST,
    BackboneNameOption,
    BatchOption,
    CompileOption,
    LearningRateOption,
    MicroOption,
    PromptsOption,
    SeedsOption,
    StepsOption,
    TestOption,
    TestPromptsOption,
    TrainOption,
    WorkFileOption,
    bench_of,
)

__all__ = ["ablation"]


def ablation(
    rollouts: TrainOption = DEFAULT_ROLLOUTS,
    test: TestOption = DEFAULT_TEST,
    backbone: BackboneNameOption = DEFAULT_BACKBONE,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Groups (target, order, head, gamma, precision, lambda) or variants, with commas."),
    ] = None,
    prompts: PromptsOption = None,
    steps: StepsOption = 150,
    batch_tokens: BatchOption = 65536,
    micro_tokens: MicroOption = 32768,
    learning_rate: LearningRateOption = 7e-4,
    full_learning_rate: Annotated[
        float, typer.Option("--full-learning-rate", help="Of the backbone where all weights are trained.")
    ] = 1e-4,
    seeds: SeedsOption = 2,
    test_prompts: TestPromptsOption = None,
    device: DeviceOption = "cpu",
    compile: CompileOption = None,
    work: WorkFileOption = None,
    report: ReportOption = None,
    figures: FiguresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train small models that differ in one thing each, on the same answers with the same budget, and compare them."""
    need("train")
    from lenvm.evaluation.ablation import ablation_specs, summarise

    check_writable(report)
    chosen = names(only) if only else None
    ablation_specs(chosen, seeds=seeds)  # a wrong name is told before anything is loaded
    bench = bench_of(
        rollouts, test, backbone, device, compile=compile, steps=steps, batch_tokens=batch_tokens,
        micro_tokens=micro_tokens, learning_rate=learning_rate, full_learning_rate=full_learning_rate,
        prompts=prompts, test_prompts=test_prompts,
    )  # fmt: skip
    with ProgressReporter() as progress:
        metrics = summarise(bench, chosen, seeds=seeds, work=work, progress=progress.update)
    publish(report, metrics, device)
    draw("ablation", metrics, figures)
    if as_json:
        print_json(metrics)
    else:
        _print_ablation(metrics)


def _print_ablation(metrics: Mapping[str, Any]) -> None:
    from lenvm.evaluation.results import difference_in_words

    console = stdout_console()
    for group, members in metrics["groups"].items():
        shown = table(
            ["variant", "MRE", "by seed", "math", "code", "if", "median", "RMSE", "tokens off", "points against first"],
            text=("variant", "by seed"),
        )
        for name in members:
            row = metrics["variants"][name]
            shown.add_row(
                name, percent(row["mre"]), ", ".join(f"{100 * value:.1f}" for value in row["mre_by_seed"]),
                *(percent(row["domains"].get(domain, {}).get("mre")) for domain in ("math", "code", "if")),
                percent(row["median_error"]), number(row["all_states"]["value_rmse"], ".4f"),
                number(row["all_states"]["mae"], ".0f"),
                difference_in_words(row) or "-",
            )  # fmt: skip
        title(console, f"Ablation: {group}")
        console.print(shown)
    print_warnings([f"{run['name']}, seed {run['seed']} was not trained: {run['error']}" for run in metrics["failed"]])
