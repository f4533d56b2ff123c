"""What a guided decoding step costs: candidates promoted (ours), in two phases, without graphs and without a cache.

    python benchmarks/step.py --models 135m,1.5b --device cuda --dtype bfloat16 --report reports/engine.json

A step is one call of the scorer as the service makes it for a step in columns: promotion, copy-on-write, the forward,
numbers on the host. What the service does once the answer is on its way, the states that the next step goes on from, is
done between two steps and not timed; garbage collection is as the service has it.
``floor_ratio`` is its time over the least that this device can take (``_engine.Ceilings``). *Two phases*: the chosen
token goes through the model by itself before the candidates do, with the same kernels and graphs. *Eager*: kernels
launched one by one. ``by_prefix``: the step over longer prefixes. Medians and quartiles over ``--repeats`` steps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine import MODELS, Ceilings, load, merge, spread, timed
from numpy.typing import NDArray

from lenvm.modeling import LengthValueModel
from lenvm.scoring import RowScore, ScoreRow, StepScores, TorchScorer
from lenvm_service.garbage import settle_garbage


class Steps:
    """Decoding steps of some rows, one after another."""

    def __init__(self, scorer: TorchScorer, rows: int, candidates: int, prefix: int) -> None:
        self.scorer = scorer
        rng = np.random.default_rng(0)
        self.prefixes = [rng.integers(3, scorer.vocab_size, prefix).tolist() for _ in range(rows)]
        self.counts = [candidates] * rows
        # Made beforehand: whoever asks has them in hand. Distinct tokens, other ones for each row and step.
        starts = rng.integers(3, scorer.vocab_size - candidates, (67, rows, 1)).astype(np.int32)
        self.shortlists = itertools.cycle(starts + np.arange(candidates, dtype=np.int32))
        self.states: Sequence[Any] = []
        self.chosen: list[list[int]] = []
        self.found: StepScores | None = None

    def restart(self) -> None:
        """Every prefix anew, and a first shortlist for each."""
        self.states, self.found = [], None  # the pool need not hold both
        self.states = [score.state for score in self._scored([None] * len(self.counts), self.prefixes)]
        self.settle()
        self.promoted()
        self.settle()

    def promoted(self) -> None:
        """The chosen token was a candidate: one forward."""
        self._step(self.chosen)

    def settle(self) -> None:
        """What no answer waits for, as in the service: the states that the next step goes on from."""
        if self.found is not None:
            self.states, self.found = self.found.states(), None
        self.chosen = [[state.scored.ids[0]] for state in self.states]

    def two_phases(self) -> None:
        """The chosen token first, alone, then the candidates."""
        tokens = next(self.shortlists)[:, :1]
        self._step([()] * len(self.counts), tokens)
        self.settle()
        self._step(self.chosen)

    def uncached(self) -> None:
        """The whole prefix each time."""
        for answer in self._scored([None] * len(self.counts), self.prefixes):
            answer.state.close()

    def _step(self, appended: Sequence[Sequence[int]], ids: NDArray[np.int32] | None = None) -> None:
        """By the graph where there is one."""
        ids = next(self.shortlists) if ids is None else ids
        self.found = self.scorer.step(self.states, appended, ids.reshape(-1), [ids.shape[1]] * len(ids))
        if self.found is None:
            self.states = [score.state for score in self._scored(self.states, appended, ids)]

    def _scored(
        self, states: Sequence[Any], appended: Sequence[Sequence[int]], ids: NDArray[np.int32] | None = None
    ) -> list[RowScore]:
        ids = next(self.shortlists) if ids is None else ids
        return self.scorer.score(
            [ScoreRow(state, new, its) for state, new, its in zip(states, appended, ids.tolist(), strict=True)]
        )


def measure(model: LengthValueModel, ceilings: Ceilings, options: argparse.Namespace) -> dict[str, Any]:
    """All ways of one model."""
    device, rows, width = options.device, options.rows, options.candidates
    longest = max([options.prefix, *options.prefixes])
    needed = rows * (longest + 4 * options.repeats + 256) + 4096
    scorer = TorchScorer(model, pool_tokens=needed)
    steps = Steps(scorer, rows, width, options.prefix)
    for _ in range(2):  # the first pass is thrown away: clocks, caches and the allocator come up
        steps.restart()
        found: dict[str, Any] = spread(timed(steps.promoted, options.repeats, device, steps.settle))
    found["floor_ms"] = ceilings.floor_ms(model, rows=rows, tokens=rows * width, prefix=options.prefix)
    found["floor_ratio"] = found["ms"] / found["floor_ms"]
    found["graphs"] = scorer._steps is not None
    steps.restart()
    found["two_phases"] = spread(timed(steps.two_phases, options.repeats, device, steps.settle))
    found["two_phase_ratio"] = found["ms"] / found["two_phases"]["ms"]
    graphs, scorer._steps = scorer._steps, None
    if graphs is not None:
        steps.restart()
        found["eager"] = spread(timed(steps.promoted, options.repeats, device, steps.settle))
    steps.restart()
    found["uncached"] = spread(timed(steps.uncached, max(3, options.repeats // 8), device))
    scorer._steps = graphs
    found["by_prefix"] = {}
    for prefix in options.prefixes:
        steps = Steps(scorer, rows, width, prefix)
        steps.restart()
        row: dict[str, Any] = spread(timed(steps.promoted, options.repeats, device, steps.settle))
        row["floor_ms"] = ceilings.floor_ms(model, rows=rows, tokens=rows * width, prefix=prefix)
        found["by_prefix"][str(prefix)] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default="135m", help=f"some of {', '.join(MODELS)}, commas between them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--prefixes", default="", help="more prefixes to measure, commas between them")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    options.prefixes = [int(part) for part in options.prefixes.split(",") if part]
    dtype = getattr(torch, options.dtype)
    ceilings = Ceilings.measure(options.device, dtype)
    print(f"copy {ceilings.bandwidth / 1e9:.0f} GB/s, product {ceilings.flops / 1e12:.1f} TFLOP/s", flush=True)
    found: dict[str, Any] = {"bandwidth_bytes_per_s": ceilings.bandwidth, "product_flops": ceilings.flops}
    for name in options.models.split(","):
        model = load(name, options.device, dtype)
        settle_garbage()
        with torch.inference_mode():
            row = found[name] = measure(model, ceilings, options)
        row |= {"rows": options.rows, "candidates": options.candidates, "prefix": options.prefix}
        ways = {"step": row, **{way: row[way] for way in ("two_phases", "eager", "uncached") if way in row}}
        for way, times in ways.items():
            print(f"{name:5} {way:10} {times['ms']:9.2f} ms  {times['ms'] / row['floor_ms']:7.1f} x the floor")
        for prefix, times in row["by_prefix"].items():
            ratio = times["ms"] / times["floor_ms"]
            print(f"{name:5} prefix {prefix:>5} {times['ms']:7.2f} ms  {ratio:7.1f} x the floor", flush=True)
        del model
    merge(options.report, {"step": found}, options.device)


if __name__ == "__main__":
    main()
