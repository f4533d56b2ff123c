"""What the service owes its callers when things break: overload, a Redis in every bad state, a killed replica, a poison
row, a stop under load, curious tenants, hostile requests and bytes; and when a Redis is worth having.

Real parts on this machine: ``lenvm serve`` with the shipped model and one torch thread, a real redis-server; the load
generator has the other core.

    python benchmarks/resilience.py --data ../shared/data --report reports/resilience.json
    python benchmarks/resilience.py --data ../shared/data --only overload,redis --quick
    python benchmarks/resilience.py --only break_even --device cuda --report reports/resilience.json
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

from _engine import merge

# Each part's module is imported when its turn comes: break_even runs where there is neither a Redis nor an HTTP client.
PARTS = {
    "overload": "_overload",
    "redis": "_redis_faults",
    "sharing": "_redis_faults",
    "failover": "_redis_faults",
    "poison": "_hostile",
    "drain": "_overload",
    "tenants": "_hostile",
    "schemathesis": "_hostile",
    "fuzz": "_hostile",
    "break_even": "_restore",
}


def run(part: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What a part found."""
    module = importlib.import_module(PARTS[part])
    found: dict[str, Any]
    if part == "break_even":
        found = module.break_even(folder, device=given.device, quick=given.quick)
    else:
        from _load import Bench

        found = getattr(module, part)(Bench(given.data, folder, given.quick))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the data folder; break_even needs none")
    parser.add_argument("--only", help="parts with commas, of " + ", ".join(PARTS))
    parser.add_argument("--device", default="cpu", help="of break_even; the service always runs on the CPU here")
    parser.add_argument("--quick", action="store_true", help="a twentieth of everything; no report")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    parts = given.only.split(",") if given.only else list(PARTS)
    unknown = set(parts) - set(PARTS)
    if unknown or (given.quick and given.report):
        parser.error(f"unknown part {unknown}" if unknown else "--quick makes no report")
    if given.data is None and parts != ["break_even"]:
        parser.error("--data is missing")
    if given.device != "cpu" and parts != ["break_even"]:
        parser.error("--device is for --only break_even")
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            since = time.monotonic()
            found = run(part, Path(folder), given)
        print(f"== {part} ({time.monotonic() - since:.0f} s)", found, sep="\n", flush=True)
        name = part if given.device == "cpu" else f"{part}_{given.device.partition(':')[0]}"
        merge(given.report, {name: found}, given.device)
        if part == "break_even" and given.report is not None:
            from _restore import draw, figure_path

            try:
                print("drawn:", draw(found, figure_path(given.device)))
            except ImportError as missing:
                print(f"not drawn ({missing}): python benchmarks/_restore.py {given.report}, where matplotlib is")


if __name__ == "__main__":
    main()
