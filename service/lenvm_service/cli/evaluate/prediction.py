"""``lenvm eval prediction``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenvm_service.cli._options import DEFAULT_MODEL, DataOption, DeviceOption, JsonOption, ModelOption
from lenvm_service.cli._output import ProgressReporter, number, print_json, stdout_console, table, title
from lenvm_service.cli._session import check_device, load_scorer, need
from lenvm_service.cli.evaluate._common import (
    FiguresOption,
    ReportOption,
    WorkOption,
    check_writable,
    draw,
    percent,
    publish,
)

if TYPE_CHECKING:
    from lenvm.evaluation.states import PromptAnswers
    from lenvm.modeling import LengthValueModel

__all__ = ["prediction"]


def prediction(
    data: DataOption,
    model: ModelOption = DEFAULT_MODEL,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Sampled answers of each test prompt.")] = 64,
    train_prompts: Annotated[
        int,
        typer.Option("--train-prompts", min=1, help="Train prompts a domain to fit the baselines on (4 answers each)."),
    ] = 200,
    test_rollouts: Annotated[
        Path | None,
        typer.Option(
            "--test-rollouts",
            metavar="DIR|FILE",
            help="Answers of test prompts that are there already, or a file of their lengths (lenvm rollout lengths).",
        ),
    ] = None,
    train_rollouts: Annotated[
        Path | None,
        typer.Option("--train-rollouts", metavar="DIR|FILE", help="Likewise of train prompts."),
    ] = None,
    prompt_encoder: Annotated[
        str | None,
        typer.Option("--prompt-encoder", metavar="DIR", help="A checkpoint trained on the prompt's state alone."),
    ] = None,
    along: Annotated[
        int, typer.Option("--along", min=0, help="Answers of each prompt to follow from beginning to end; 0: none.")
    ] = 2,
    probe_prompts: Annotated[
        int | None,
        typer.Option(
            "--probe-prompts", min=0, help="Train prompts for the linear probe at most; 0: none. Default: all."
        ),
    ] = None,
    work: WorkOption = None,
    device: DeviceOption = "cpu",
    report: ReportOption = None,
    figures: FiguresOption = None,
    update: Annotated[bool, typer.Option("--update-card", help="Put the figures into the checkpoint's card.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Error of the predicted length on every test prompt, by domain, next to baselines fitted on train prompts.

    Answers in --work are used again, so an interrupted run goes on where it was. On a GPU this takes minutes; on a CPU
    sampling takes hours.
    """
    need("train")
    from lenvm.evaluation.prediction import pooled
    from lenvm.evaluation.run_prediction import PredictionOptions, evaluate_prompts

    check_device(device)
    check_writable(report)
    loaded, _ = load_scorer(model, device=device)
    rival = None if prompt_encoder is None else load_scorer(prompt_encoder, device=device)[0]
    options = PredictionOptions(along=along, probe_prompts=probe_prompts, prompt_encoder=rival, device=device)
    with ProgressReporter() as progress:
        folder = work or Path("runs") / loaded.config.name
        given = (test_rollouts, train_rollouts)
        test, train = _rollouts(loaded, data, folder, given, samples, train_prompts, device, progress)
        metrics = evaluate_prompts(loaded, test, train, options, progress=progress.update)
    published = {**metrics, "pooled": pooled(metrics)}
    publish(report, published, device)
    draw("prediction", metrics, figures)
    if update:
        from lenvm.card import update_card
        from lenvm.modeling import find_checkpoint

        update_card(find_checkpoint(model), "prediction", metrics)
    if as_json:
        print_json(published)
    else:
        _print_prediction(metrics, published["pooled"])


def _rollouts(
    model: LengthValueModel,
    data: Path,
    work: Path,
    given: tuple[Path | None, Path | None],
    samples: int,
    train_prompts: int,
    device: str,
    progress: ProgressReporter,
) -> tuple[list[PromptAnswers], list[PromptAnswers]]:
    """Answers of test and train prompts: read where a folder or file is given, else sampled into ``work``."""
    from lenvm.decoding import SamplingParams
    from lenvm.evaluation.lengths import read_answers
    from lenvm.evaluation.run_prediction import rollouts_to_evaluate
    from lenvm.evaluation.states import group_prompts

    found = {split: read_answers(path)[0] for split, path in zip(("test", "train"), given, strict=True) if path}
    missing = [split for split in ("test", "train") if split not in found]
    if missing:
        policy = model.config.generator
        params = SamplingParams(policy.temperature, top_p=policy.top_p, max_new_tokens=policy.max_new_tokens)
        made = rollouts_to_evaluate(
            policy.backbone,
            data,
            work,
            samples=samples,
            train_prompts=train_prompts,
            params=params,
            device=device,
            progress=progress.update,
            splits=missing,
        )
        found.update(zip(missing, map(group_prompts, made), strict=True))
    return found["test"], found["train"]


def _print_prediction(metrics: Mapping[str, Mapping[str, Any]], pooled: Mapping[str, Any]) -> None:
    console = stdout_console()
    some = next(iter(metrics.values()))
    title(
        console,
        f"Truth: mean over a prompt's answers of min(L, {some['cap']}), an answer cut there counts as {some['cap']}",
    )
    for caption, made in (
        ("Mean relative error (MRE) of the horizon at the prompt boundary", _errors(metrics)),
        ("Next to baselines fitted on train prompts", _rivals(metrics)),
        ("Share of a baseline's error that is gone", _gains({**metrics, "pooled": pooled})),
        ("Quantiles" + (", calibrated" if some["calibrated"] else ""), _quantiles(metrics)),
        ("Error of the predicted rest relative to the whole answer, by the share that was generated", _along(metrics)),
    ):
        if made is not None:
            title(console, caption)
            console.print(made)
    console.print("exact value: horizon of an exact value, on the same samples and on half against the other half.")
    console.print("An answer cut at the cap is covered with the share of the mass above the cap below the level.")


def _errors(metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    head = ["domain", "prompts", "answers", "cut", "mean truth", "MRE", "95 %", "median error", "noise floor",
            "exact value", "MRE of the mean", "tau"]  # fmt: skip
    shown = table(head, text=("domain",))
    for domain, row in metrics.items():
        interval = "-".join(f"{100 * bound:.1f}" for bound in row["mre_ci"])
        errors = (row[name] for name in ("median_error", "noise_floor"))
        exact = f"{number(100 * row['oracle_horizon_same'])}-{percent(row['oracle_horizon'])}"
        shown.add_row(
            domain, str(row["prompts"]), str(row["samples"]), percent(row["cut_share"]), number(row["truth_mean"]),
            percent(row["mre"]), interval, *map(percent, errors), exact, percent(row["mre_mean"]),
            number(row["kendall_tau"], ".2f"),
        )  # fmt: skip
    return shown


_RIVALS = {
    "constant": "constant", "prompt_length": "prompt length", "linear_probe": "linear probe",
    "prompt_encoder": "prompt only", "constant_on_test": "best constant on test",
}  # fmt: skip


def _rivals(metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    shown = table(["domain", "MRE", *_RIVALS.values()], text=("domain",))
    for domain, row in metrics.items():
        shown.add_row(domain, percent(row["mre"]), *(percent(row["baselines"][name]) for name in _RIVALS))
    return shown


def _gains(metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    shown = table(["domain", *_RIVALS.values()], text=("domain",))
    for domain, row in metrics.items():
        shown.add_row(domain, *(percent(row["gain_over"][name]) for name in _RIVALS))
    return shown


def _quantiles(metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    head = ["domain", "p50 covers", "p90 covers", "p95 covers", "p90 resolved", "p90 saturated", "p90 strict",
            "pinball", "pinball, constant"]  # fmt: skip
    names = ("coverage_p50", "coverage_p90", "coverage_p95", "coverage_p90_resolved", "saturated_p90",
             "coverage_p90_strict")  # fmt: skip
    shown = table(head, text=("domain",))
    for domain, row in metrics.items():
        shares = (percent(row[name]) for name in names)
        shown.add_row(domain, *shares, number(row["pinball"]), number(row["pinball_constant"]))
    return shown


def _along(metrics: Mapping[str, Mapping[str, Any]]) -> Any:
    if not all("along" in row for row in metrics.values()):
        return None
    some = next(iter(metrics.values()))["along"]
    shown = table(["domain", "answers", *(f"{100 * float(at):.0f} %" for at in some)], text=("domain",))
    for domain, row in metrics.items():
        found = row["along"].values()
        answers = str(max(one["answers"] for one in found))
        shown.add_row(domain, answers, *(percent(one["error"]) for one in found))
    return shown
