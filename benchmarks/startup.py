"""How long the CPU service takes until it is ready, and how much memory it takes at most.

    python benchmarks/startup.py --report reports/startup.json
    python benchmarks/startup.py --quick

Each start is a new process, ``lenvm serve`` with the shipped model, and the variants take turns, so that a busy moment
hits all of them; the one before the first turn, which brings the files into the page cache, does not count. Time: from
the start of the process to the first 200 of ``/health/ready``, and the processor's time that this took. Memory: the
peak of the process (VmHWM) then, and after one answer to 8 prompts of 256 tokens. Medians, with the extremes. ``torch``
is the checkpoint in float32; the other variants are exports, taken from ``--exports DIR/VARIANT`` where they are there,
else made first.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil
from _engine import merge
from _load import free_port

MODEL = "smollm2-135m-instruct"
LIMIT_S = 20.0  # on two idle cores, weights cached
WORK = {"inputs": [{"token_ids": [500 + (37 * row + at) % 40_000 for at in range(256)]} for row in range(8)]}


def start(arguments: list[str], folder: Path) -> dict[str, float]:
    """One start, one answer, one stop."""
    port, log = free_port(), folder / "serve.log"
    command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", str(port), *arguments]
    with log.open("wb") as output:
        since = time.perf_counter()
        process = subprocess.Popen([*command, "--log-level", "warning"], stdout=output, stderr=output)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while not _ready(client):
                if process.poll() is not None:
                    raise SystemExit(f"lenvm serve ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.02)
            ready_s, ready_mib = time.perf_counter() - since, _peak_mib(process.pid)
            used = psutil.Process(process.pid).cpu_times()
            asked = time.perf_counter()
            client.post("/predict_length", json={"prompt": "Why is the sky blue?"}).raise_for_status()
            first_ms = 1000 * (time.perf_counter() - asked)
            client.post("/predict_length", json=WORK).raise_for_status()
            return {
                "ready_s": ready_s,
                "ready_cpu_s": used.user + used.system,
                "first_answer_ms": first_ms,
                "peak_ready_mib": ready_mib,
                "peak_mib": _peak_mib(process.pid),
            }
    finally:
        process.terminate()
        process.wait(60)


def _ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


def _peak_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def exported(variant: str, exports: Path | None, scratch: Path) -> Path:
    """The folder of an export, made where it is not there yet."""
    if exports is not None and (exports / variant / "lenvm.json").is_file():
        return exports / variant
    from lenvm.export.run import export_model
    from lenvm.modeling import LengthValueModel

    export_model(LengthValueModel.from_pretrained(MODEL), scratch / variant, variant=variant)  # type: ignore[arg-type]
    return scratch / variant


def summary(starts: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the extremes of the time."""
    found: dict[str, Any] = {name: statistics.median(one[name] for one in starts) for name in starts[0]}
    times = [one["ready_s"] for one in starts]
    return {**found, "ready_s_range": [min(times), max(times)], "starts": len(starts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="torch,fp32,int8", help="with commas")
    parser.add_argument("--exports", type=Path, help="a folder with exports, each named by its variant")
    parser.add_argument("--starts", type=int, default=7, help="of each variant")
    parser.add_argument("--quick", action="store_true", help="torch, one start, to see that it works; no report")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.quick and given.report:
        parser.error("--quick makes no report")
    if given.quick:
        given.variants, given.starts = "torch", 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        variants = {
            variant: ["--model", MODEL]
            if variant == "torch"
            else ["--model", str(exported(variant, given.exports, folder)), "--backend", "onnx"]
            for variant in given.variants.split(",")
        }
        for arguments in variants.values():
            start(arguments, folder)
        turns = [{name: start(arguments, folder) for name, arguments in variants.items()} for _ in range(given.starts)]
    found: dict[str, Any] = {name: summary([turn[name] for turn in turns]) for name in variants}
    for name, row in found.items():
        print(name, {key: value if isinstance(value, list) else round(value, 2) for key, value in row.items()})
        row["within_limit"] = row["ready_s"] <= LIMIT_S
    merge(given.report, {"startup": {**found, "limit_s": LIMIT_S}}, "cpu")


if __name__ == "__main__":
    main()
