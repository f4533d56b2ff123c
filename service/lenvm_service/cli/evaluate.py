"""``lenvm eval``: measure a checkpoint, and write the reports in which published figures live."""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Measure a checkpoint and write reports (reports/NAME.json).")


@app.callback()
def _eval() -> None:
    """Keeps this a group while it has fewer than two commands (typer would make a lone one the command itself)."""


# The commands ``prediction`` and ``first-light`` go here: each reads its options, calls ``need("train")`` of _session,
# runs lenvm.evaluation.run_prediction or run_lifebench with a ProgressReporter, and prints a table or ``print_json``.
