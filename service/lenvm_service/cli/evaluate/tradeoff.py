"""``lenvm eval tradeoff``."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.errors import InvalidRequestError
from lenvm_service.cli._backend import ModelFacts
from lenvm_service.cli._options import DEFAULT_MODEL, BackboneOption, DataOption, DeviceOption, JsonOption, ModelOption
from lenvm_service.cli._output import ProgressReporter, number, print_json, print_warnings, stdout_console, table, title
from lenvm_service.cli._session import load_generator, load_scorer, need
from lenvm_service.cli.evaluate._common import (
    Dtype,
    ReportOption,
    check_writable,
    identity_of,
    in_words,
    names,
    percent,
    publish,
    whole_numbers,
)

__all__ = ["tradeoff"]


def tradeoff(
    data: DataOption,
    model: ModelOption = DEFAULT_MODEL,
    backbone: BackboneOption = None,
    sets: Annotated[
        str | None, typer.Option("--sets", help="Some of the sets, commas between them. Default: all that may be run.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option("--methods", help="Of tilt, at_most, scale, eos_gate and be_brief; or none."),
    ] = "tilt,at_most,eos_gate,be_brief",
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Problems of each set at most.")] = 500,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers of each problem and policy.")] = 2,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="An answer that is longer counts wrong, guided or not.")
    ] = 1024,
    least_pass: Annotated[
        float, typer.Option("--least-pass", min=0, max=1, help="Unguided pass@1 from which on a set is compared.")
    ] = 0.05,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Budgets in percent of the mean unguided length, commas between them.")
    ] = "30,50,80,120,170,220",
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Also sets of programs. This RUNS CODE THAT THE MODEL WROTE: with limits, and without a network where "
            "the system allows that, but use a machine or container that holds nothing of worth.",
        ),
    ] = False,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Answers in flight at once.")] = 64,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="FILE", help="Keep answers here as they end; a rerun with it goes on."),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="FILE", help="Use the answers of this other process's --work too (repeatable)."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="Also write every answer as JSON lines, to be read.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="DIR", help="Also draw the figure into this folder.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Precision of backbone and value model.")] = Dtype.float32,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pass@1 against mean length: value guidance beside truncation, a gate on EOS and a prompt that asks for brevity.

    Every set is measured unguided first; only those that the backbone can answer at all are compared. To divide the
    work, run once with --methods none, then processes with some methods each, --work of their own and --also of the
    first; a last run with --also of all of them samples nothing and reports.
    """
    need("train")
    from lenvm.evaluation.checkers import CODE_SETS, SETS
    from lenvm.evaluation.run_tradeoff import TradeoffSettings, pool_tokens, run_tradeoff
    from lenvm.scoring import TorchScorer

    check_writable(report, texts)
    chosen = names(sets) if sets else tuple(name for name in SETS if run_code or name not in CODE_SETS)
    programs = ", ".join(sorted(set(chosen) & set(CODE_SETS)))
    if programs and not run_code:
        raise InvalidRequestError(
            f"{programs}: add --run-code, since the check runs the model's programs", param="sets"
        )
    settings = TradeoffSettings(
        sets=chosen,
        methods=() if methods == "none" else names(methods),
        prompts=prompts,
        samples=samples,
        least_pass=least_pass,
        max_new_tokens=max_new_tokens,
        budgets=[part / 100 for part in whole_numbers(budgets)],
    )
    loaded, _ = load_scorer(model, device=device, dtype=dtype.value)
    generator, warnings = load_generator(
        ModelFacts.of(loaded), backbone, device=device, dtype=dtype.value, max_rows=max_rows
    )
    print_warnings(warnings)
    scorer = TorchScorer(loaded, pool_tokens=pool_tokens(generator, data, settings))
    identity = identity_of(loaded, dtype.value, device, ())
    # Each step makes thousands of small objects; without this every full collection walks all modules again.
    gc.collect()
    gc.freeze()
    try:
        with ProgressReporter() as progress:
            metrics, answers = run_tradeoff(
                generator,
                scorer,
                data,
                settings,
                work=work,
                others=also or (),
                identity=identity,
                progress=progress.update,
            )
    finally:
        gc.unfreeze()
    if texts is not None:
        _write_texts(texts, answers)
    publish(report, metrics, device)
    if figures is not None:
        from lenvm.evaluation.figures import draw_report

        draw_report("tradeoff", metrics, figures)
    if as_json:
        print_json(metrics)
    else:
        _print_tradeoff(metrics)


def _print_tradeoff(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    console = stdout_console()
    shown = table(["set", "prompts", "pass@1", "95 %", "mean length", "ended", "compared"], text=("set", "compared"))
    for name, row in metrics.items():
        interval = "-".join(f"{100 * bound:.1f}" for bound in row["unguided_pass_ci"])
        shown.add_row(
            name, str(row["prompts"]), percent(row["unguided_pass"]), interval, number(row["unguided_mean_length"]),
            percent(row["unguided_finished_rate"]), "yes" if row["qualifies"] else "no: too few are right",
        )  # fmt: skip
    title(console, "Unguided")
    console.print(shown)
    for name, row in metrics.items():
        if row.get("points"):
            _print_set(name, row)


def _print_set(name: str, row: Mapping[str, Any]) -> None:
    console = stdout_console()
    shown = table(
        ["method", "value", "mean length", "of unguided", "pass@1", "95 %", "cost (nats)", "forced", "ended"],
        text=("method",),
    )
    for point in row["points"]:
        interval = "-".join(f"{100 * bound:.1f}" for bound in point["pass_ci"])
        shown.add_row(
            in_words(point["method"]), f"{point['value']:g}", number(point["mean_length"]),
            percent(point["share_of_unguided"]), percent(point["pass"]), interval, number(point["text_cost"]),
            percent(point["forced_stop_rate"]), percent(point["finished_rate"]),
        )  # fmt: skip
    title(console, f"{name}: every policy, on all prompts")
    console.print(shown)
    if "guided_method" not in row:
        return
    low, high = row["share_compared"]
    found = row.get("against_truncation")
    if found is None:
        console.print(f"No mean length from {low:.0%} to {high:.0%} of the unguided one is reached by both.")
        return
    console.print(
        f"Guided by {in_words(row['guided_method'])} against truncation, {row['measured']['prompts']} prompts, mean "
        f"lengths from {found['covered'][0]:.0%} to {found['covered'][1]:.0%}: area {_ratio(found)}"
    )
    console.print(
        f"{'above' if found['above_everywhere'] else 'not above'} it everywhere: smallest margin "
        f"{100 * found['smallest_margin']:+.1f} points at {found['margin_at']:.0%} "
        f"[{100 * found['margin_ci'][0]:+.1f}, {100 * found['margin_ci'][1]:+.1f}]"
    )
    front = row["front"]
    if "area_ratio" in front:
        console.print(
            f"As a budget (no more tokens than that; only policies that are worth their length): area {_ratio(front)}, "
            f"smallest margin {100 * front['smallest_margin']:+.1f} points"
        )
    for cap, found in row.get("by_cap", {}).items():
        console.print(
            f"With answers of at most {cap} tokens: area {_ratio(found.get('against_truncation'))}, as a budget "
            f"{_ratio(found['front'])}"
        )
    for rival, both in row["rivals"].items():
        theirs, ours = both["against_truncation"], both["guided_against_it"]
        console.print(f"{in_words(rival)}: area {_ratio(theirs)}; guided against it {_ratio(ours)}")


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None or found.get("area_ratio") is None:
        return "-"
    interval = found["area_ratio_ci"]
    return f"{found['area_ratio']:.2f} x" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _write_texts(path: Path, answers: Sequence[Any]) -> None:
    import json

    with path.open("w", encoding="utf-8") as stream:
        for answer in answers:
            stream.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
