"""``lenvm eval scaling``."""

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

__all__ = ["scaling"]

_UNITS = {"depth": "layers", "prompts": "train prompts", "samples": "answers a prompt"}


def scaling(
    rollouts: TrainOption = DEFAULT_ROLLOUTS,
    test: TestOption = DEFAULT_TEST,
    backbone: BackboneNameOption = DEFAULT_BACKBONE,
    axes: Annotated[
        str, typer.Option("--axes", help="Some of depth, prompts and samples, commas between them.")
    ] = "depth,prompts,samples",
    prompts: PromptsOption = None,
    steps: StepsOption = 0,
    batch_tokens: BatchOption = 65536,
    micro_tokens: MicroOption = 32768,
    learning_rate: LearningRateOption = 7e-4,
    seeds: SeedsOption = 1,
    test_prompts: TestPromptsOption = None,
    device: DeviceOption = "cpu",
    compile: CompileOption = None,
    work: WorkFileOption = None,
    report: ReportOption = None,
    figures: FiguresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train models on more and more: layers of the backbone, train prompts, answers a prompt; all with equal steps."""
    need("train")
    from lenvm.evaluation.scaling import scaling_specs, summarise_scaling

    check_writable(report)
    chosen = names(axes)
    scaling_specs(1, 1, chosen)  # a wrong name is told before anything is loaded
    bench = bench_of(
        rollouts, test, backbone, device, compile=compile, steps=steps, batch_tokens=batch_tokens,
        micro_tokens=micro_tokens, learning_rate=learning_rate, prompts=prompts, test_prompts=test_prompts,
    )  # fmt: skip
    with ProgressReporter() as progress:
        metrics = summarise_scaling(bench, chosen, seeds=seeds, work=work, progress=progress.update)
    publish(report, metrics, device)
    draw("scaling", metrics, figures)
    if as_json:
        print_json(metrics)
    else:
        _print_scaling(metrics)


def _print_scaling(metrics: Mapping[str, Any]) -> None:
    console = stdout_console()
    for axis, points in metrics["axes"].items():
        shown = table([_UNITS[axis], "epochs", "MRE", "math", "code", "if", "value loss", "bins loss", "RMSE"], text=())
        for row in points:
            shown.add_row(
                str(row["at"]), number(row["epochs"], ".2f"), percent(row["mre"]),
                *(percent(row["domains"].get(domain, {}).get("mre")) for domain in ("math", "code", "if")),
                number(row["losses"]["value"], ".4f"), number(row["losses"]["bins"], ".3f"),
                number(row["all_states"]["value_rmse"], ".4f"),
            )  # fmt: skip
        title(console, f"Scaling: {_UNITS[axis]}")
        console.print(shown)
    seen = min((row["epochs"] for points in metrics["axes"].values() for row in points), default=1.0)
    if seen < 1.0:
        print_warnings([f"the budget is {seen:.2f} epochs of the fullest data: its points do not see all of it"])
    print_warnings([f"{run['name']}, seed {run['seed']} was not trained: {run['error']}" for run in metrics["failed"]])
