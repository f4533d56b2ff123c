"""What a guided decoding step costs: candidates promoted (ours), two phases, and no cache at all, in one run.

    python benchmarks/step.py --rows 8 --candidates 16 --prefix 256

Ratios are to the promoted step; medians over ``--repeats`` steps with their quartiles.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.modeling import LengthValueModel
from lenvm.reports import device_name, write_report
from lenvm.scoring import ScoreRow, TorchScorer


def timed(step: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, after two that are thrown away."""
    times = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()

    import torch

    model = LengthValueModel.from_pretrained(options.model, device=options.device, dtype=getattr(torch, options.dtype))
    scorer = TorchScorer(model)
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(3, scorer.vocab_size, options.prefix).tolist() for _ in range(options.rows)]

    def shortlist() -> list[int]:
        ids: list[int] = rng.choice(scorer.vocab_size, options.candidates, replace=False).tolist()
        return ids

    def synchronize() -> None:
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    state: dict[str, Any] = {}

    def restart() -> None:
        rows = [ScoreRow(append=prefix, candidates=shortlist()) for prefix in prefixes]
        state["answers"] = scorer.score(rows)
        state["chosen"] = [row.candidates[0] for row in rows]

    def promoted() -> None:
        rows = [
            ScoreRow(answer.state, [token], shortlist())
            for answer, token in zip(state["answers"], state["chosen"], strict=True)
        ]
        state["answers"] = scorer.score(rows)
        state["chosen"] = [row.candidates[0] for row in rows]

    def two_phase() -> None:
        # A token outside the shortlist cannot be promoted: one forward extends, another scores.
        extended = scorer.score([ScoreRow(answer.state, [1]) for answer in state["answers"]])
        state["answers"] = scorer.score([ScoreRow(answer.state, candidates=shortlist()) for answer in extended])

    def uncached() -> None:
        for answer in scorer.score([ScoreRow(append=prefix, candidates=shortlist()) for prefix in prefixes]):
            answer.state.close()

    metrics: dict[str, Any] = {"rows": options.rows, "candidates": options.candidates, "prefix": options.prefix}
    for name, step in (("promoted", promoted), ("two_phase", two_phase), ("uncached", uncached)):
        restart()
        times = timed(step, options.repeats, synchronize)
        quartiles = statistics.quantiles(times, n=4)
        metrics[name] = {"ms": statistics.median(times), "ms_quartiles": [quartiles[0], quartiles[2]]}
        metrics[name]["ratio"] = metrics[name]["ms"] / metrics["promoted"]["ms"]
        print(f"{name:10} {metrics[name]['ms']:9.1f} ms  {metrics[name]['ratio']:6.2f} x the promoted step")
    if options.report:
        command = shlex.join(["python", *sys.argv])
        write_report(options.report, command=command, metrics=metrics, device=device_name(options.device))


if __name__ == "__main__":
    main()
