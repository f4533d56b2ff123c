"""The ``lenvm`` command line.

torch and NumPy are imported inside the commands: on the base install each command says which extra it needs. Results go
to stdout, progress, warnings and errors to stderr. Exit status: 0 done, 1 failed (one line says why), 2 wrong usage.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from lenvm import LenVMError, __version__
from lenvm_client import LenVMClientError
from lenvm_service.cli import (
    calibrate,
    demo,
    evaluate,
    export,
    generate,
    importing,
    key,
    predict,
    pull,
    rollout,
    score,
    serve,
    train,
)
from lenvm_service.cli._output import one_line, print_error

__all__ = ["app", "main"]

app = typer.Typer(
    name="lenvm",
    help="Length Value Models: predict how long answers will be, and steer them to the length you want.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("pull")(pull.command)
app.command("predict")(predict.command)
app.command("score")(score.command)
app.command("generate")(generate.command)
app.add_typer(rollout.app, name="rollout")
app.command("train")(train.command)
app.command("calibrate")(calibrate.command)
app.command("export")(export.command)
app.command("import")(importing.command)
app.add_typer(evaluate.app, name="eval")
app.command("serve")(serve.command)
app.command("key")(key.command)
app.command("demo")(demo.command)


class _Settings:
    """Options of ``lenvm`` itself, which ``main`` needs after the command has failed."""

    debug = False


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lenvm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _lenvm(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _Settings.debug = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lenvm`` with these arguments (default: the process's own) and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal cannot show must not end the command
            stream.reconfigure(errors="replace")
    _Settings.debug = False
    try:
        status = app(args=None if argv is None else list(argv), prog_name="lenvm", standalone_mode=False)
        sys.stdout.flush()  # here, where a closed pipe is still caught
    except SystemExit as error:  # typer's own answer to a closed pipe
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on (`lenvm ... | head`); what is still buffered must not raise again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _report(error)
    return status if isinstance(status, int) else 0


def _report(error: Exception) -> int:
    if _Settings.debug:
        traceback.print_exception(error)
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        message = one_line(error.format_message()).rstrip(".")
        if message:  # a group without a command has printed its help, and says no more
            print_error(f"{message}{hint}")
        return error.exit_code
    if isinstance(error, LenVMError | LenVMClientError):
        print_error(one_line(error))
        return 1
    reason = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
    print_error(f"{reason} (unexpected: run lenvm --debug with the same arguments for the traceback)")
    return 1
