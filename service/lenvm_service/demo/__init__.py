"""The newcomer's demonstration: predicted lengths beside sampled ones, length shifts, and steered answers."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

from lenvm.errors import LenVMError
from lenvm_client import LenVMClientError
from lenvm_service.cli._output import one_line, print_error, stdout_console
from lenvm_service.demo.parts import Demo, DemoOptions
from lenvm_service.demo.show import show_guided, show_intro, show_lengths, show_shifts

__all__ = ["Demo", "DemoOptions", "run_demo"]

Part = tuple[str, Callable[[Demo], dict[str, Any]], Callable[..., None]]

PARTS: tuple[Part, ...] = (
    ("lengths", Demo.lengths, show_lengths),
    ("shifts", Demo.shifts, show_shifts),
    ("guided", Demo.guided, show_guided),
)


def run_demo(options: DemoOptions, *, show: bool = True, debug: bool = False) -> dict[str, Any]:
    """Run every part, print each as it ends (``show``), and return the figures as one JSON document.

    A part that fails is one line on stderr and one entry in ``failures``; the others go on.
    """
    console = stdout_console()
    started = time.perf_counter()
    document: dict[str, Any] = {"failures": [], "options": asdict(options)}

    def attempt(name: str, work: Callable[[], dict[str, Any]], print_part: Callable[..., None]) -> Any:
        since = time.perf_counter()
        try:
            found = work()
            if show:
                print_part(console, found)
                sys.stdout.flush()  # a pipe gets each part as it ends
            document[name] = found | {"seconds": time.perf_counter() - since}
            return found
        except Exception as error:
            if debug:
                traceback.print_exc(file=sys.stderr)
            kind = "" if isinstance(error, LenVMError | LenVMClientError) else f"{type(error).__name__}: "
            message = f"demo, part {name}: {kind}{one_line(error)}"
            print_error(message)
            document["failures"].append(message)
            return None

    with closing(Demo(options)) as demo:
        if attempt("setup", demo.setup, show_intro) is not None:
            for name, part, print_part in PARTS:
                attempt(name, partial(part, demo), print_part)
    document["seconds"] = time.perf_counter() - started
    if show:
        failed = len(document["failures"])
        verdict = "Everything worked" if not failed else f"{failed} part{'s' if failed > 1 else ''} failed"
        console.print(f"{verdict}; {document['seconds']:.0f} s.")
    return document
