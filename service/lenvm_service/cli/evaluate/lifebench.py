"""``lenvm eval lifebench``."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm.errors import DataError
from lenvm_service.cli._backend import ModelFacts
from lenvm_service.cli._options import DEFAULT_MODEL, BackboneOption, DataOption, DeviceOption, JsonOption, ModelOption
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
    numbers,
    percent,
    publish,
    whole_numbers,
)

__all__ = ["lifebench"]


def lifebench(
    data: DataOption,
    model: ModelOption = DEFAULT_MODEL,
    backbone: BackboneOption = None,
    targets: Annotated[
        str, typer.Option("--targets", help="Target lengths in tokens, commas between them.")
    ] = "32,64,128,256,512,1024",
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="English tasks.")] = 100,
    tuning_tasks: Annotated[int, typer.Option("--tuning-tasks", min=1, help="Other tasks to tune the rules on.")] = 16,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers of each task and target.")] = 1,
    resample: Annotated[
        int,
        typer.Option(
            "--resample", metavar="K", min=1, help="Also modes that sample K answers and draw one by importance weight."
        ),
    ] = 1,
    modes: Annotated[
        str | None, typer.Option("--modes", help="Some of the modes, commas between them. Default: all.")
    ] = None,
    kinds: Annotated[
        str, typer.Option("--kinds", help="What is asked for, commas between them.")
    ] = "equal_to,at_most,at_least",
    tolerance: Annotated[
        str, typer.Option("--tolerance", help="Of posterior, as a share of the target; several are tuned.")
    ] = "0.05",
    strength: Annotated[str, typer.Option("--strength", help="Of posterior; several are tuned.")] = "1",
    min_eos_prob: Annotated[
        str, typer.Option("--min-eos-prob", help="Of posterior: a less likely EOS is not offered; several are tuned.")
    ] = "0",
    cost_cap: Annotated[
        float,
        typer.Option("--cost-cap", min=0.0, help="Text cost (nats, targets of 64+) within which posterior is tuned."),
    ] = 8.0,
    forced_cap: Annotated[
        float, typer.Option("--forced-cap", min=0.0, max=1.0, help="Share of forced stops within which it is tuned.")
    ] = 0.05,
    front: Annotated[int, typer.Option("--front", min=2, help="Tuned gates of each kind that go to the test.")] = 12,
    cut: Annotated[int, typer.Option("--cut", min=1, help="Answers are cut at this many times the target.")] = 4,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Answers in flight at once.")] = 64,
    work: Annotated[
        list[Path] | None,
        typer.Option(
            "--work",
            metavar="FILE",
            help="Keep answers here as they end; a rerun with it goes on. Given again: other files to read.",
        ),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option("--texts", metavar="FILE", help="Also write every answer as JSON lines, to be read.")
    ] = None,
    report_only: ReportOnlyOption = False,
    device: DeviceOption = "cpu",
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Precision of backbone and value model.")] = Dtype.float32,
    report: ReportOption = None,
    figures: FiguresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Length scores of every mode under one sampler, each beside what it costs the text.

    Modes may be run one after another with the same --work, or at once with one --work each; a last run over all of
    them, given every file, samples nothing and reports. A report that is there keeps the kinds that are not asked for.
    """
    need("train")
    from lenvm.evaluation.lifebench_kinds import keep_other_kinds
    from lenvm.evaluation.lifebench_posterior import PosteriorRule
    from lenvm.evaluation.run_lifebench import MODES, RESAMPLED, LifebenchSettings, pool_tokens, run_lifebench
    from lenvm.scoring import TorchScorer

    check_writable(report, texts)
    before = _report_of(report) if report is not None and report.exists() else None
    settings = LifebenchSettings(
        targets=whole_numbers(targets),
        tasks=tasks,
        tuning_tasks=tuning_tasks,
        samples=samples,
        resample=resample,
        modes=names(modes) if modes else MODES if resample == 1 else (*MODES, *RESAMPLED),
        kinds=names(kinds),  # type: ignore[arg-type]  # checked by the settings
        posterior_grid=[
            PosteriorRule(soft, strong, least)
            for soft in numbers(tolerance)
            for strong in numbers(strength)
            for least in numbers(min_eos_prob)
        ],
        cost_cap=cost_cap,
        forced_cap=forced_cap,
        front=front,
        cut=cut,
    )
    loaded, _ = load_scorer(model, device=device, dtype=dtype.value)
    generator, warnings = load_generator(
        ModelFacts.of(loaded), backbone, device=device, dtype=dtype.value, max_rows=max_rows
    )
    print_warnings(warnings)
    scorer = TorchScorer(loaded, pool_tokens=pool_tokens(generator, data, settings))
    files = work or []
    identity = identity_of(loaded, dtype.value, device, files, report_only=report_only)
    # Each step makes thousands of small objects; without this every full collection walks all modules again.
    gc.collect()
    gc.freeze()
    try:
        with ProgressReporter() as progress:
            metrics, rows = run_lifebench(
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
    if texts is not None:
        _write_texts(texts, rows, generator.tokenizer)
    if before is not None:
        metrics = keep_other_kinds(metrics, settings.kinds, before)
    publish(report, metrics, None if report_only else device)
    draw("lifebench", metrics, figures)
    if as_json:
        print_json(metrics)
    else:
        for kind in settings.kinds:
            _print_lifebench(metrics, settings.modes, kind)


def _report_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found.get("metrics"), dict):
            raise TypeError("a report has metrics")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path} is no report that kinds could be kept of: choose another --report") from error
    return found  # type: ignore[no-any-return]


def _print_lifebench(metrics: Mapping[str, Any], modes: Sequence[str], kind: str) -> None:
    from lenvm.evaluation.results_lifebench import mode_name

    console = stdout_console()
    head = ["mode", "length score", "|deviation|", "within 5 %", "cost (nats)", "cost, 64+", "log p/token", "rep-4"]
    shown = table([*head, "forced", "natural", "empty"], text=("mode",))
    for mode in modes:
        row = metrics[mode][kind]
        shown.add_row(
            mode_name(mode, row), number(row["ls"]), percent(row["ld"]), percent(row["within_5pct"]),
            number(row["kl_per_sequence"]), number(row["kl_per_sequence_64plus"]),
            number(row["logprob_per_token"], ".2f"), percent(row["rep4"]),
            percent(row["forced_stop_rate"]), percent(row["natural_end_rate"]), str(row["empty"]),
        )  # fmt: skip
    title(console, f"LIFEBench, {in_words(kind).title()}")
    console.print(shown)
    for mode in modes:
        row = metrics[mode][kind]
        if "rule" in row:
            settings = (f"{name} {'none' if value is None else f'{value:g}'}" for name, value in row["rule"].items())
            console.print(f"{mode_name(mode, row)}: {', '.join(settings)}{_how_chosen(metrics, mode, kind)}")
        if "same_as" in row:
            console.print(f"{mode_name(mode, row)}: the same rule as {in_words(row['same_as'])}, so the same answers")
    for name, found in metrics["comparisons"][kind].items():
        ours, _, other = name.partition("_minus_")
        told = " minus ".join(mode_name(mode, metrics[mode][kind]) for mode in (ours, other))
        parts = (f"{key} {diff:+.1f} [{low:+.1f}, {high:+.1f}]" for key, (diff, low, high) in found.items())
        console.print(f"{told}: {', '.join(parts)} (95 % intervals, bootstrap by task)")
    for suffix in ("", "_resampled"):
        front = metrics.get(f"gate_front{suffix}", {}).get(kind, {})
        ours, same = f"posterior{suffix}", " that draw from as many or have one" if suffix else ""
        for name, which in (("equal_cost", "the best mix of gates"), ("no_more_cost", "the best single gate")):
            if name in front:
                difference, low, high = front[name]["posterior_minus_gate"]
                verdict = "beats" if low > 0 else "is beaten by" if high < 0 else "is not told apart from"
                console.print(
                    f"At its text cost ({front['equal_cost']['posterior_kl_per_sequence']:.1f} nats) "
                    f"{mode_name(ours, metrics[ours][kind])} {verdict} {which} on EOS{same} (length score "
                    f"{front[name]['ls']:.1f}, {front[name]['kl_per_sequence']:.1f} nats): "
                    f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
                )
    limits = metrics["limits"]
    if limits["limited_by_context"]:
        console.print(f"{limits['limited_by_context']} answers met the end of the context ({limits['context']} tokens)")
    console.print()


def _how_chosen(metrics: Mapping[str, Any], mode: str, kind: str) -> str:
    tuning = metrics["tuning"]
    if mode.startswith("eos_gate") and kind in tuning["gates"]:
        return " (tuned on other tasks, by single answers)"
    if kind not in tuning.get(mode, {}):
        return ""
    caps = f"{tuning['cost_cap']:g} nats and {percent(tuning['forced_cap'])} forced stops"
    within = tuning[f"within_caps{mode.removeprefix('posterior')}"][kind]
    return f" (tuned on other tasks), {'' if within else 'none '}within {caps}"


def _write_texts(path: Path, rows: Sequence[Any], tokenizer: Any) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            text = tokenizer.decode(list(row.token_ids))
            answer = {"mode": row.mode, "kind": row.kind, "task": row.task_id, "target": row.target}
            answer |= {"tokens": len(row.token_ids), "text_cost": row.text_cost, "text": text}
            stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
