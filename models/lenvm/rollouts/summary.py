"""What a rollout set looks like: counts, cut share and lengths by domain, and a histogram in text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lenvm.rollouts.records import IntArray, RolloutSet

__all__ = ["RolloutSummary", "histogram", "summary"]


@dataclass(frozen=True)
class RolloutSummary:
    """Figures of a rollout set: ``domains`` has one entry a domain and "all"; ``str()`` is a table and a histogram."""

    domains: dict[str, dict[str, float]]
    histogram: str

    def __str__(self) -> str:
        lines = ["domain   rollouts  prompts    cut    mean    p50    p90    p99"]
        for name, row in self.domains.items():
            lines.append(
                f"{name:<8} {row['count']:>8} {row['prompts']:>8} {row['cut_share']:>6.1%} {row['mean']:>7.1f} "
                f"{row['p50']:>6.0f} {row['p90']:>6.0f} {row['p99']:>6.0f}"
            )
        return "\n".join([*lines, "", self.histogram])


def summary(rollouts: RolloutSet) -> RolloutSummary:
    """Count, share of cut answers, mean and percentiles of the content length by domain; cut ones count as cut."""
    domains = np.asarray(rollouts.domains, dtype=str)
    keys = np.asarray(rollouts.prompt_keys, dtype=str)
    rows = {}
    for name in [*sorted(set(rollouts.domains)), "all"]:
        chosen = np.ones(len(rollouts), dtype=bool) if name == "all" else domains == name
        lengths = rollouts.lengths[chosen]
        p50, p90, p99 = np.percentile(lengths, [50, 90, 99]) if len(lengths) else (np.nan,) * 3
        rows[name] = {
            "count": int(chosen.sum()),
            "prompts": len(np.unique(keys[chosen])),
            "cut_share": float(1.0 - rollouts.finished[chosen].mean()) if len(lengths) else float("nan"),
            "mean": float(lengths.mean()) if len(lengths) else float("nan"),
            "p50": float(p50),
            "p90": float(p90),
            "p99": float(p99),
        }
    return RolloutSummary(rows, histogram(rollouts.lengths, rollouts.finished))


def histogram(lengths: IntArray, finished: NDArray[np.bool_] | None = None, *, width: int = 50) -> str:
    """Text histogram of content lengths in doubling ranges, one line each; cut answers have a line of their own."""
    done = lengths if finished is None else lengths[finished]
    counts: dict[str, int] = {}
    if len(done):
        exponents = np.frexp(done)[1]  # the bit length: l = 0 -> 0, 1 -> 1, 2..3 -> 2, 4..7 -> 3
        for exponent in range(int(exponents.max()) + 1):
            low, high = (2**exponent) // 2, max(2**exponent - 1, 0)
            counts[f"{low}" if low == high else f"{low}-{high}"] = int((exponents == exponent).sum())
    if finished is not None:
        counts["cut"] = len(lengths) - len(done)
    most = max(counts.values(), default=0)
    lines = [
        f"{name:>11}  {'#' * (-(-count * width // most) if most else 0):<{width}}  {count}"
        for name, count in counts.items()
    ]
    return "\n".join(line.rstrip() for line in lines)
