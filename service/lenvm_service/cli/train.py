"""``lenvm train``: a recipe makes a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lenvm import _resources
from lenvm.errors import DataError
from lenvm_service.cli._options import DataOption, DeviceOption, JsonOption
from lenvm_service.cli._output import ProgressReporter, print_json, stdout_console, table, title
from lenvm_service.cli._session import check_device, need

__all__ = ["command"]


def command(
    recipe: Annotated[str, typer.Argument(help="A .toml file, or the name of a shipped recipe.")],
    data: DataOption,
    work: Annotated[
        Path | None, typer.Option("--work", metavar="DIR", help="Rollouts and logs. Default: runs/NAME.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="The checkpoint. Default: models/zoo/NAME in a source tree, else NAME."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Roll out, train, and write a checkpoint. Run again after an interruption, it uses the rollouts in --work."""
    need("train")
    from lenvm.training.recipe import load_recipe, run_recipe

    loaded = load_recipe(_find_recipe(recipe))
    check_device(device)
    work = work or Path("runs") / loaded.name
    output = output or _default_output(loaded.name)
    with ProgressReporter() as progress:
        result = run_recipe(loaded, data=data, work=work, output=output, device=device, progress=progress.update)
    if as_json:
        print_json({"output": str(output), "work": str(work), **result})
    else:
        _print_result(result, output)


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
    console.print(f"{result['steps']} steps, {result['tokens']:,} tokens, {result['seconds']:.0f} s")
    console.print(f"Checkpoint: {output}")
