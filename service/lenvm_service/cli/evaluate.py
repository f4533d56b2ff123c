"""``lenvm eval``: measure a checkpoint, and write the reports in which published figures live."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.errors import DataError
from lenvm_service.cli._backend import ModelFacts
from lenvm_service.cli._options import DEFAULT_MODEL, BackboneOption, DataOption, DeviceOption, JsonOption, ModelOption
from lenvm_service.cli._output import ProgressReporter, number, print_json, print_warnings, stdout_console, table, title
from lenvm_service.cli._session import check_device, load_generator, load_scorer, need

__all__ = ["app"]


class Dtype(StrEnum):
    """Precision of both models."""

    float32 = "float32"
    bfloat16 = "bfloat16"


app = typer.Typer(no_args_is_help=True, help="Measure a checkpoint and write reports (reports/NAME.json).")

ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write the metrics with command, commit and device."),
]
WorkOption = Annotated[
    Path | None, typer.Option("--work", metavar="DIR", help="Where sampled answers are kept. Default: runs/NAME.")
]


@app.command("prediction")
def prediction(
    data: DataOption,
    model: ModelOption = DEFAULT_MODEL,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Sampled answers of each test prompt.")] = 16,
    train_prompts: Annotated[
        int,
        typer.Option("--train-prompts", min=1, help="Train prompts a domain to fit the baselines on (4 answers each)."),
    ] = 200,
    work: WorkOption = None,
    device: DeviceOption = "cpu",
    report: ReportOption = None,
    update: Annotated[bool, typer.Option("--update-card", help="Put the figures into the checkpoint's card.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Error of the predicted length on every test prompt, by domain, next to constants fitted on train prompts.

    Answers in --work are used again, so an interrupted run goes on where it was. On a GPU this takes minutes; on a CPU
    sampling takes hours.
    """
    need("train")
    from lenvm.evaluation.run_prediction import evaluate_rollouts, rollouts_to_evaluate

    check_device(device)
    _check_writable(report)
    loaded, _ = load_scorer(model, device=device)
    generator = loaded.config.generator
    from lenvm.decoding import SamplingParams

    params = SamplingParams(generator.temperature, top_p=generator.top_p, max_new_tokens=generator.max_new_tokens)
    with ProgressReporter() as progress:
        test, train = rollouts_to_evaluate(
            generator.backbone,
            data,
            work or Path("runs") / loaded.config.name,
            samples=samples,
            train_prompts=train_prompts,
            params=params,
            device=device,
            progress=progress.update,
        )
    metrics = evaluate_rollouts(loaded, test, train)
    _publish(report, metrics, device)
    if update:
        from lenvm.card import update_card
        from lenvm.modeling import find_checkpoint

        update_card(find_checkpoint(model), "prediction", metrics)
    if as_json:
        print_json(metrics)
    else:
        _print_prediction(metrics)


def _print_prediction(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    console = stdout_console()
    some = next(iter(metrics.values()))
    title(
        console,
        f"Truth: mean over a prompt's answers of min(L, {some['cap']}), an answer cut there counts as {some['cap']}",
    )
    head = ["domain", "prompts", "answers", "cut", "mean truth", "MRE", "95 %", "median error", "noise floor", "tau"]
    shown = table(head, text=("domain",))
    rivals = table(
        ["domain", "MRE", "MRE of the mean", "constant", "prompt length", "best constant on test"], text=("domain",)
    )
    spread = table(
        ["domain", "p50 covers", "p90 covers", "p95 covers", "pinball", "pinball, constant"], text=("domain",)
    )
    for domain, row in metrics.items():
        interval = "-".join(f"{100 * bound:.1f}" for bound in row["mre_ci"])
        shown.add_row(
            domain, str(row["prompts"]), str(row["samples"]), _percent(row["cut_share"]), number(row["truth_mean"]),
            _percent(row["mre"]), interval, _percent(row["median_error"]), _percent(row["noise_floor"]),
            number(row["kendall_tau"], ".2f"),
        )  # fmt: skip
        base = row["baselines"]
        rivals.add_row(
            domain,
            *map(
                _percent,
                (row["mre"], row["mre_mean"], base["constant"], base["prompt_length"], base["constant_on_test"]),
            ),
        )
        spread.add_row(
            domain,
            *(_percent(row[f"coverage_{level}"]) for level in ("p50", "p90", "p95")),
            number(row["pinball"]),
            number(row["pinball_constant"]),
        )
    for caption, made in (
        ("Mean relative error (MRE) of the horizon at the prompt boundary", shown),
        ("Next to baselines fitted on train prompts", rivals),
        ("Quantiles", spread),
    ):
        title(console, caption)
        console.print(made)


@app.command("lifebench")
def lifebench(
    data: DataOption,
    model: ModelOption = DEFAULT_MODEL,
    backbone: BackboneOption = None,
    targets: Annotated[
        str, typer.Option("--targets", help="Target lengths in tokens, commas between them.")
    ] = "64,128,256",
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="English tasks.")] = 100,
    tuning_tasks: Annotated[int, typer.Option("--tuning-tasks", min=1, help="Other tasks to tune the gates on.")] = 16,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers of each task and target.")] = 1,
    modes: Annotated[
        str | None, typer.Option("--modes", help="Some of the modes, commas between them. Default: all.")
    ] = None,
    kinds: Annotated[
        str, typer.Option("--kinds", help="What is asked for, commas between them.")
    ] = "equal_to,at_most,at_least",
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Answers in flight at once.")] = 64,
    work: Annotated[
        Path | None,
        typer.Option("--work", metavar="FILE", help="Keep answers here as they end; a rerun with it goes on."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="Also write every answer as JSON lines, to be read.")
    ] = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Precision of backbone and value model.")] = Dtype.float32,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Length scores of every mode under one sampler, each beside what it costs the text.

    Modes may be run one after another with the same --work; a last run over all of them samples nothing and reports.
    """
    need("train")
    from lenvm.evaluation.run_lifebench import MODES, LifebenchSettings, pool_tokens, run_lifebench
    from lenvm.scoring import TorchScorer

    _check_writable(report, texts)
    settings = LifebenchSettings(
        targets=_whole_numbers(targets),
        tasks=tasks,
        tuning_tasks=tuning_tasks,
        samples=samples,
        modes=_names(modes) if modes else MODES,
        kinds=_names(kinds),  # type: ignore[arg-type]  # checked by the settings
    )
    loaded, _ = load_scorer(model, device=device, dtype=dtype.value)
    generator, warnings = load_generator(
        ModelFacts.of(loaded), backbone, device=device, dtype=dtype.value, max_rows=max_rows
    )
    print_warnings(warnings)
    scorer = TorchScorer(loaded, pool_tokens=pool_tokens(generator, data, settings))
    identity = {"model": loaded.config.name, "files": loaded.config.files, "dtype": dtype.value, "device": device}
    # Each step makes thousands of small objects; without this every full collection walks all modules again.
    gc.collect()
    gc.freeze()
    try:
        with ProgressReporter() as progress:
            metrics, rows = run_lifebench(
                generator, scorer, data, settings, work=work, identity=identity, progress=progress.update
            )
    finally:
        gc.unfreeze()
    if as_json:
        print_json(metrics)
    else:
        for kind in settings.kinds:
            _print_lifebench(metrics, settings.modes, kind)
    if texts is not None:
        _write_texts(texts, rows, generator.tokenizer)
    _publish(report, metrics, device)


def _print_lifebench(metrics: Mapping[str, Any], modes: Sequence[str], kind: str) -> None:
    console = stdout_console()
    head = [
        "mode",
        "length score",
        "|deviation|",
        "within 5 %",
        "cost (nats)",
        "log p/token",
        "rep-4",
        "forced",
        "ended",
    ]
    shown = table(head, text=("mode",))
    for mode in modes:
        row = metrics[mode][kind]
        shown.add_row(
            mode, number(row["ls"]), _percent(row["ld"]), _percent(row["within_5pct"]), number(row["kl_per_sequence"]),
            number(row["logprob_per_token"], ".2f"), _percent(row["rep4"]), _percent(row["forced_stop_rate"]),
            _percent(row["finished_rate"]),
        )  # fmt: skip
    title(console, f"LIFEBench, {_words(kind).title()}")
    console.print(shown)
    for mode in modes:
        row = metrics[mode][kind]
        if "rule" in row:
            settings = (f"{name} {'none' if value is None else f'{value:g}'}" for name, value in row["rule"].items())
            console.print(f"{_words(mode)}: {', '.join(settings)} (tuned on other tasks)")
        if "same_as" in row:
            console.print(f"{_words(mode)}: the same rule as {_words(row['same_as'])}, so the same answers")
    for name, found in metrics["comparisons"][kind].items():
        parts = (f"{key} {diff:+.1f} [{low:+.1f}, {high:+.1f}]" for key, (diff, low, high) in found.items())
        console.print(f"{_words(name)}: {', '.join(parts)} (95 % intervals, resampled by task)")
    equal = metrics.get("gate_front", {}).get(kind, {}).get("equal_cost")
    if equal is not None:
        difference, low, high = equal["posterior_minus_gate"]
        verdict = "beats" if low > 0 else "is beaten by" if high < 0 else "is not told apart from"
        console.print(
            f"At its text cost ({equal['posterior_kl_per_sequence']:.1f} nats) posterior {verdict} the gate on EOS "
            f"(length score {equal['ls']:.1f}): {difference:+.1f} [{low:+.1f}, {high:+.1f}]"
        )
    console.print()


def _words(name: str) -> str:
    return name.replace("_", " ")


def _write_texts(path: Path, rows: Sequence[Any], tokenizer: Any) -> None:
    import json

    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            text = tokenizer.decode(list(row.token_ids))
            answer = {"mode": row.mode, "kind": row.kind, "task": row.task_id, "target": row.target}
            answer |= {"tokens": len(row.token_ids), "text_cost": row.text_cost, "text": text}
            stream.write(json.dumps(answer, ensure_ascii=False) + "\n")


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r}: give whole numbers with commas between them, like 64,128")
    return tuple(dict.fromkeys(found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _check_writable(*paths: Path | None) -> None:
    """Before hours of work, not after them. Raises DataError where a file could not be written."""
    for path in paths:
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise DataError(f"{path} cannot be written: make the folder {path.parent} first")


def _publish(report: Path | None, metrics: Mapping[str, Any], device: str) -> None:
    if report is None:
        return
    from lenvm.reports import device_name, write_report

    command = shlex.join(["lenvm", *sys.argv[1:]])
    write_report(report, command=command, metrics=metrics, device=device_name(device))


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else number(100 * fraction, ".1f") + " %"
