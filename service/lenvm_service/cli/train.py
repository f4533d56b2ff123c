"""``lenvm train``: a recipe makes a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm import _resources
from lenvm.errors import DataError
from lenvm_service.cli._options import DeviceOption, JsonOption, parse_part
from lenvm_service.cli._output import ProgressReporter, print_json, stdout_console, table, title
from lenvm_service.cli._session import check_device, need

__all__ = ["command"]


def command(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a shipped recipe.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The folder that holds prompts/; needed without --rollouts."),
    ] = None,
    rollouts: Annotated[
        list[Path] | None,
        typer.Option("--rollouts", metavar="DIR", help="Train on this rollout folder instead of sampling; repeatable."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Rollouts, checkpoints, logs. Default: runs/NAME.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="The checkpoint. Default: models/zoo/NAME in a source tree, else NAME."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the checkpoint. Default: the recipe's.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as train.epochs=1; repeatable."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="STAGES",
            help="Only sample: valid, train, sentences, guide, branches, guide-2 ...; commas between several.",
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option("--part", metavar="I/N", help="With --only: the I-th of N parts, so that GPUs share a stage."),
    ] = "1/1",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Two steps on a tiny random model of that architecture; writes nothing."),
    ] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Roll out, train, and write a checkpoint. Run again after an interruption, it goes on from what is in --work.

    On several GPUs: torchrun --nproc-per-node 4 -m lenvm_service.cli train RECIPE --device cuda ...
    """
    need("train")
    from lenvm.training.distributed import World
    from lenvm.training.recipe import load_recipe, make_rollouts, run_recipe

    loaded = load_recipe(_find_recipe(recipe), changes or ())
    if name:
        loaded = replace(loaded, name=name)
    check_device(device)
    if dry_run:
        _dry_run(loaded, device, as_json)
        return
    work = work or Path("runs") / loaded.name
    output = output or _default_output(loaded.name)
    if only is not None or part != "1/1":
        if only is None or data is None:
            raise typer.BadParameter("goes with --only STAGE and --data DIR", param_hint="--part")
        with ProgressReporter() as progress:
            make_rollouts(
                loaded, data=data, work=work, device=device, progress=progress.update, only=only.split(","),
                part=parse_part(part),
            )  # fmt: skip
        return
    try:
        with ProgressReporter() as progress:
            result = run_recipe(
                loaded, data=data, work=work, output=output, device=device, progress=progress.update,
                rollouts=rollouts or (), on_resume=_say_resumed,
            )  # fmt: skip
    finally:
        World.leave()
    if not result:  # another process of this world prints
        return
    if as_json:
        print_json({"output": str(output), "work": str(work), **result})
    else:
        _print_result(result, output)


def _say_resumed(step: int, steps: int) -> None:
    if step < steps:
        print(f"training goes on from step {step} of {steps}", file=sys.stderr, flush=True)


def _dry_run(recipe: Any, device: str, as_json: bool) -> None:
    from lenvm.training.dry_run import dry_run

    result = dry_run(recipe, device=device)
    if as_json:
        print_json(result)
        return
    plan, console = result["plan"], stdout_console()
    settings = plan.pop("train")
    for heading, rows in (("What this recipe does", plan), ("How it trains", settings)):
        shown = table(["", "value"], text=("", "value"))
        for key, value in rows.items():
            shown.add_row(key, str(value))
        title(console, heading)
        console.print(shown)
    losses = result["train"]
    console.print(
        f"Dry run on a tiny random {plan['architecture']}: {result['steps']} steps, loss {losses['total']:.5f}, "
        f"{result['checkpoints']} checkpoints, {len(result['files'])} files saved; "
        f"loaded again, no value moved by more than {result['reload_error']:.1g}"
    )


def _find_recipe(text: str) -> Path:
    path = Path(text)
    if path.suffix == ".toml" or path.exists():
        return path
    folder = _resources.recipes_dir()
    shipped = sorted(found.stem for found in folder.glob("*.toml"))
    if text not in shipped:
        raise DataError(f"no recipe {text!r}: pass a .toml file or one of {', '.join(shipped) or 'none'}")
    return folder / f"{text}.toml"


def _default_output(name: str) -> Path:
    recipes = _resources.recipes_dir()
    in_source_tree = recipes.name == "recipes"  # in a wheel the folder is lenvm/_recipes
    return recipes.parent / "zoo" / name if in_source_tree else Path(name)


def _print_result(result: dict[str, Any], output: Path) -> None:
    console = stdout_console()
    rollouts = table(["set", "answers", "tokens", "mean length", "cut"], text=("set",))
    for name, row in result.get("rollouts", {}).items():
        lengths = [f"{row['answers']:,}", f"{row['tokens']:,}", f"{row['mean']:.1f}", f"{row['cut_share']:.1%}"]
        rollouts.add_row(name, *lengths)
    title(console, "Rollouts")
    console.print(rollouts)
    losses = table(["set", "total", "value", "bins"], text=("set",))
    for name in ("train", "valid"):
        row = result.get(name) or {}
        losses.add_row(name, *(f"{row[key]:.5f}" if key in row else "-" for key in ("total", "value", "bins")))
    title(console, "Losses")
    console.print(losses)
    resumed = f", gone on from step {result['resumed_from']}" if "resumed_from" in result else ""
    console.print(f"{result['steps']} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s{resumed}")
    console.print(f"Checkpoint: {output}")
