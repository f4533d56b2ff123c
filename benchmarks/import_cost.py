"""What does ``import lenvm_client`` cost beside the HTTP library that it needs anyway? Time and peak memory.

    python benchmarks/import_cost.py

Each measurement is a fresh interpreter; the variants take turns, so that a busy moment hits all of them. Time: of the
imports alone, by the wall clock and by the processor's. Memory: the process's peak (VmHWM). Differences are paired by
turn; medians with quartiles. The limits, 30 ms and 6 MB, are of ``import lenvm_client``, which imports its names at
their first use; what the clients add then, and what all names do, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

VARIANTS = {
    "httpx2": "import httpx2",
    "lenvm_client": "import httpx2, lenvm_client",
    "Client": "import httpx2; from lenvm_client import AsyncClient, Client",
    "everything": "import httpx2, lenvm_client\nfor n in lenvm_client.__all__: getattr(lenvm_client, n)",
}
LIMIT_MS, LIMIT_MB = 30.0, 6.0

_PROBE = """
import json, resource, time
wall, cpu = time.perf_counter(), time.process_time()
{code}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
try:
    # Not ru_maxrss: that begins with the peak of the process which this one was started from.
    peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([1e3 * wall, 1e3 * cpu, peak]))
"""


def measure(code: str) -> list[float]:
    """Milliseconds by the wall and by the processor, and MiB."""
    command = [sys.executable, "-c", _PROBE.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: list[float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()

    for code in VARIANTS.values():
        measure(code)  # writes the byte code
    turns = [{name: measure(code) for name, code in VARIANTS.items()} for _ in range(options.rounds)]
    metrics: dict[str, Any] = {"rounds": options.rounds, "limit_ms": LIMIT_MS, "limit_mb": LIMIT_MB}
    for name in VARIANTS:
        base = [0.0, 0.0, 0.0] if name == "httpx2" else None
        row: dict[str, Any] = {}
        for at, figure in enumerate(("ms", "cpu_ms", "mb")):
            values = [turn[name][at] - (base or turn["httpx2"])[at] for turn in turns]
            low, middle, high = statistics.quantiles(values, n=4)
            row |= {figure: middle, f"{figure}_quartiles": [low, high]}
        metrics[name] = row
        print(f"{name:13} {row['ms']:+7.1f} ms, {row['cpu_ms']:+7.1f} ms of CPU, {row['mb']:+6.1f} MiB")
    own = metrics["lenvm_client"]
    within = own["ms"] <= LIMIT_MS and own["mb"] <= LIMIT_MB
    print(f"import lenvm_client within {LIMIT_MS:g} ms and {LIMIT_MB:g} MB: {'yes' if within else 'no'}")
    if options.report:
        from lenvm.reports import device_name, write_report

        command = shlex.join(["python", *sys.argv])
        write_report(options.report, command=command, metrics={**metrics, "within": within}, device=device_name("cpu"))


if __name__ == "__main__":
    main()
