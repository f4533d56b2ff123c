"""Does training go on after ``kill -9`` with the loss curve it would have had? A run whole, one killed and begun again.

    python benchmarks/resume.py --rollouts runs/NAME/rollouts-valid --device cuda --report reports/resume.json

Both are ``lenvm train`` on the same answers. The second is killed once it has gone on past a checkpoint, and the same
command is given again. What is compared is the total loss of every step: bitwise on a CPU, within 1e-3 on a GPU. A
third run, whole as the first, tells how far two runs come apart by themselves: with ``--fast`` (kernels that add in any
order, the default of training) they do on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # device_name names a GPU only where torch is loaded

from lenvm.reports import device_name, write_report

_TIMEOUT_S = 600.0


def curve(work: Path) -> dict[int, float]:
    """Step -> total loss; what a kill cut off in mid-line does not count."""
    path, found = work / "train.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[int(row["step"])] = float(row["total"])
    return found


def command(options: argparse.Namespace, work: Path) -> list[str]:
    """One ``lenvm train``."""
    changes = {
        "train.log_every": 1,
        "train.checkpoint_every": options.checkpoint_every,
        "train.checkpoint_minutes": 0,
        "train.epochs": 1,
        "train.batch_tokens": options.batch_tokens,
        "train.micro_tokens": options.batch_tokens,
        "train.deterministic": str(not options.fast).lower(),
    }
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    extra = [part for change in options.set for part in ("--set", change)]
    where = ["--rollouts", str(options.rollouts), "--work", str(work), "--output", str(work / "out")]
    run = [sys.executable, "-m", "lenvm_service.cli", "train", options.recipe, "--device", options.device]
    return [*run, *where, *sets, *extra]


def environment() -> dict[str, str]:
    """Of every run: cuBLAS needs a fixed workspace to add in one order."""
    return {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def killed_and_resumed(options: argparse.Namespace, work: Path) -> int:
    """Kill the run behind its first checkpoint, run it again to its end; the last step before the kill."""
    process = subprocess.Popen(
        command(options, work), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + _TIMEOUT_S
    aim = options.checkpoint_every + options.checkpoint_every // 2
    while process.poll() is None and max(curve(work), default=0) < aim and time.monotonic() < deadline:
        time.sleep(0.02)
    if process.poll() is not None:
        sys.exit("error: the run ended before it could be killed: give more rollouts or a smaller --checkpoint-every")
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = max(curve(work), default=0)
    subprocess.run(command(options, work), env=environment(), check=True, stdout=subprocess.DEVNULL)
    return killed_at


def compare(first: dict[int, float], second: dict[int, float]) -> dict[str, Any]:
    """How far two loss curves are apart."""
    apart = {step: abs(second[step] - loss) for step, loss in first.items() if step in second}
    return {
        "steps_that_differ": sum(difference > 0.0 for difference in apart.values()),
        "largest_difference": max(apart.values()),
        "largest_relative_difference": max(difference / abs(first[step]) for step, difference in apart.items()),
        "lost_or_doubled_steps": len(set(first) ^ set(second)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rollouts", type=Path, required=True)
    parser.add_argument("--recipe", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--fast", action="store_true", help="the kernels of every day, which add in any order")
    parser.add_argument("--set", action="append", default=[], help="changes of the recipe, as lenvm train takes them")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lenvm-resume-") as folder:
        whole, cut, again = (Path(folder) / name for name in ("whole", "cut", "again"))
        subprocess.run(command(options, whole), env=environment(), check=True, stdout=subprocess.DEVNULL)
        killed_at = killed_and_resumed(options, cut)
        subprocess.run(command(options, again), env=environment(), check=True, stdout=subprocess.DEVNULL)
        first = curve(whole)
        metrics: dict[str, Any] = {
            "steps": len(first),
            "killed_after_step": killed_at,
            "batch_tokens": options.batch_tokens,
            "resumed": compare(first, curve(cut)),
            "same_run_again": compare(first, curve(again)),
        }
    print(json.dumps(metrics, indent=2))
    if options.report:
        call = shlex.join(["python", *sys.argv])
        write_report(options.report, command=call, metrics=metrics, device=device_name(options.device))


if __name__ == "__main__":
    main()
