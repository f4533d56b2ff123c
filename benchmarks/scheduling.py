"""How much waiting does length prediction save on a continuous-batching server? A discrete-event simulation.

    python benchmarks/scheduling.py --lengths runs/lengths-test.jsonl.gz --report reports/scheduling.json

``--lengths`` is what ``lenvm rollout lengths`` writes: held-out prompts, each with the lengths of many sampled answers.
A request is one of these prompts at random with one of its lengths at random; predictions are the value model's at the
prompt boundary (kept in ``--cache``). All policies see the same requests. The server: ``_scheduling``.
``--rollouts``, a folder of ``lenvm rollout``, adds the same study under ``progressive`` for the first answer of each of
its prompts, whose tokens are known: ``srpt_progressive`` then ranks by what the model says in mid-answer.

Policies that start the waiting request of the lowest rank and never preempt: ``fcfs``; ``sjf_p50``, ``sjf_p90``,
``sjf_mean`` by a predicted quantile or mean; ``guess`` by 1.5 x the prompt's length; ``oracle`` by the true length;
``prompt_oracle`` (``prompt_oracle_mean``) by the median (mean) of the prompt's own sampled lengths, the ceiling of
whatever can be known before the answer begins. Two keep the longest from starving: ``sjf_p50_aged`` ranks by p50 less
what a request gains by waiting (a number that is set once, which any server with priorities takes), and
``sjf_p50_deadline`` lets a request go first once it has waited so long (which needs a queue of one's own). Each ages no
more than it took to keep p99 within 8 % of FCFS's on other seeds, load by load; ``sjf_p50_aged_one`` has one rate for
all loads, that of the load which needs most. ``oracle_aged`` and ``oracle_deadline`` are the oracle with the same two.
Policies that preempt, ranked again whenever a request has generated another ``--quantum`` tokens, and who pay for it by
prefilling again: ``srpt`` by the mean of what is still to come given what was generated, from the distribution
predicted at the prompt boundary (no further call); ``gittins`` by the Gittins index of the same; ``oracle_srpt`` by
what is truly still to come; ``prompt_oracle_srpt`` as ``srpt``, from the prompt's own sampled lengths.

``gain_share``: of the oracle's gain over FCFS in mean latency. Latency: arrival to last token. The first and last tenth
of the requests of a run are not counted. Intervals: 95 %, bootstrap over runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _scheduling import (
    FloatArray,
    Workload,
    gittins_table,
    mean_table,
    prefill_steps,
    run_preemptive,
    run_to_completion,
    survival_table,
)
from _scheduling_data import Population, boundary_population, progressive_population

from lenvm.evaluation.lengths import read_answers, read_lengths
from lenvm.evaluation.stats import bootstrap_ci, kendall_tau
from lenvm.reports import device_name, write_report

# Mean share of the server's capacity in quiet times and in bursts, and how long these last (steps, exponential).
BURSTY = ((0.6, 6_000.0), (1.8, 2_000.0))
# Settings of the two kinds of ageing, the least first: tokens of rank for a step waited; the steps after which a
# request goes first, as a share of FCFS's p99 less the longest service.
RATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
DEADLINES = (1.5, 1.3, 1.2, 1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.6, 0.4)
AGED_P99 = 1.08
LONG = 1024


@dataclass(frozen=True)
class Ageing:
    """Settings for a load, of p50 and of the true length: tokens of rank for a step waited, steps until it goes first;
    ``one_rate`` is the same for all loads."""

    p50_rate: float
    p50_wait: float
    oracle_rate: float
    oracle_wait: float
    one_rate: float = 0.0


def workload(people: Population, kind: str, count: int, slots: int, seed: int) -> Workload:
    """``count`` requests at a load of ``kind`` (a share of capacity, or "bursty": Poisson at a rate that switches)."""
    rng = np.random.default_rng([seed, 20_260_427])
    prompt = rng.integers(len(people.work), size=count)
    sample = rng.integers(people.work.shape[1], size=count)
    service = prefill_steps(people.prompt_tokens)[:, None] - 1 + people.work
    capacity = slots / service.mean()  # requests a step
    expected = np.cumsum(rng.exponential(size=count))  # a Poisson process of rate 1, to be warped
    if kind != "bursty":
        arrival = expected / (float(kind) * capacity)
    else:
        times, counts = [0.0], [0.0]
        while counts[-1] <= expected[-1]:
            for share, length in BURSTY:
                lasts = rng.exponential(length)
                times.append(times[-1] + lasts)
                counts.append(counts[-1] + lasts * share * capacity)
        arrival = np.interp(expected, counts, times)
    return Workload(arrival, prompt, people.prompt_tokens[prompt], people.work[prompt, sample])


def keys(people: Population, load: Workload) -> dict[str, FloatArray]:
    """Ranks [n] of the policies that neither preempt nor age."""
    at = load.prompt
    return {
        "fcfs": load.arrival,
        "sjf_p50": people.p50[at],
        "sjf_p90": people.p90[at],
        "sjf_mean": people.mean[at],
        "guess": 1.5 * load.prompt_tokens,
        "oracle": load.work.astype(np.float64),
        **({} if people.progressive is not None else _prompt_oracles(people, load)),
    }


def _prompt_oracles(people: Population, load: Workload) -> dict[str, FloatArray]:
    """Of one answer a prompt they would be the oracle."""
    return {
        "prompt_oracle": np.median(people.work, axis=1)[load.prompt],
        "prompt_oracle_mean": people.work.mean(axis=1)[load.prompt],
    }


def tables(people: Population, quantum: int) -> dict[str, Any]:
    """Ranks of the policies that preempt, by prompt and full quanta generated."""
    predicted, own = survival_table(people.pmf), survival_table(people.own_pmf)
    found: dict[str, Any] = {
        "srpt": mean_table(predicted, quantum).tolist(),
        "gittins": gittins_table(predicted, quantum).tolist(),
    }
    if people.progressive is None:
        return found | {"prompt_oracle_srpt": mean_table(own, quantum).tolist()}
    return found | {"srpt_progressive": people.progressive}


def by_table(load: Workload, table: Any, quantum: int) -> Callable[[int, int], float]:
    prompt = load.prompt.tolist()
    return lambda request, generated: table[prompt[request]][generated // quantum]


def measured(load: Workload, start: FloatArray, end: FloatArray, longest_fcfs: float) -> dict[str, float]:
    """Of one run, in steps; ``starved`` is the share that waited longer for its start than anybody under FCFS."""
    tenth = len(start) // 10
    counted = slice(tenth, len(start) - tenth)
    latency, wait = (end - load.arrival)[counted], (start - load.arrival)[counted]
    long = load.work[counted] > LONG
    return {
        "mean": float(latency.mean()),
        "p50": float(np.median(latency)),
        "p99": float(np.quantile(latency, 0.99)),
        "max": float(latency.max()),
        "starved": float((wait > longest_fcfs).mean()),
        "long_mean": float(latency[long].mean()) if long.any() else float("nan"),
    }


def tuned(people: Population, kind: str, options: argparse.Namespace) -> Ageing:
    """The least ageing that keeps p99 near FCFS's, on seeds of its own."""
    runs = [workload(people, kind, options.requests, options.slots, 1000 + s) for s in range(options.tuning_seeds)]

    def p99(key: Callable[[Workload], FloatArray], wait: float | None = None) -> float:
        found = []
        for run in runs:
            ends = run_to_completion(run, key(run), options.slots, None if wait is None else run.arrival + wait)
            found.append(measured(run, *ends, 0.0)["p99"])
        return float(np.mean(found))

    fcfs = p99(lambda run: run.arrival)
    allowed, longest = AGED_P99 * fcfs, float(people.pmf.shape[1])
    waits = [max(0.0, share * fcfs - longest) for share in DEADLINES]
    settings: list[float] = []
    for rank in (lambda run: people.p50[run.prompt], lambda run: run.work.astype(np.float64)):

        def aged(rate: float, rank: Callable[[Workload], FloatArray] = rank) -> Callable[[Workload], FloatArray]:
            return lambda run: rank(run) + rate * run.arrival

        settings.append(next((rate for rate in RATES if p99(aged(rate)) <= allowed), RATES[-1]))
        settings.append(next((wait for wait in waits if p99(rank, wait) <= allowed), waits[-1]))
    return Ageing(*settings)


def one_run(
    people: Population, load: Workload, ageing: Ageing, ranked: Mapping[str, Any], options: Any
) -> dict[str, dict[str, float]]:
    """Every policy on the same requests."""
    ranks = keys(people, load)
    p50, oracle, came = ranks["sjf_p50"], ranks["oracle"], load.arrival
    policies: dict[str, tuple[FloatArray, FloatArray | None]] = {name: (rank, None) for name, rank in ranks.items()}
    policies |= {
        # All that wait gain at the same rate, so that a later arrival is as good as a larger rank.
        "sjf_p50_aged": (p50 + ageing.p50_rate * came, None),
        "sjf_p50_aged_one": (p50 + ageing.one_rate * came, None),
        "sjf_p50_deadline": (p50, came + ageing.p50_wait),
        "oracle_aged": (oracle + ageing.oracle_rate * came, None),
        "oracle_deadline": (oracle, came + ageing.oracle_wait),
    }
    found: dict[str, dict[str, float]] = {}
    longest = 0.0
    for name, (key, urgent) in policies.items():  # FCFS comes first
        start, end = run_to_completion(load, key, options.slots, urgent)
        longest = longest or float((start - load.arrival).max())
        found[name] = measured(load, start, end, longest)
    work = load.work.tolist()
    preempting = {name: by_table(load, table, options.quantum) for name, table in ranked.items()}
    preempting["oracle_srpt"] = lambda request, generated: work[request] - generated
    for name, rank in preempting.items():
        start, end, preemptions = run_preemptive(load, rank, options.slots, options.quantum)
        found[name] = measured(load, start, end, longest) | {"preemptions": preemptions / len(work)}
    return found


def summary(runs: list[dict[str, dict[str, float]]], step_s: float) -> dict[str, dict[str, Any]]:
    """Policy -> its figures over the runs."""

    def over(name: str, figure: str) -> FloatArray:
        return np.array([run[name][figure] for run in runs])

    base = over("fcfs", "mean")
    possible = base - over("oracle", "mean")
    found: dict[str, dict[str, Any]] = {}
    for name in runs[0]:
        mean, p99 = over(name, "mean"), over(name, "p99")
        share, ratio = (base - mean) / possible, p99 / over("fcfs", "p99")
        found[name] = {
            "mean_s": step_s * mean.mean(),
            "mean_s_ci": [step_s * end for end in bootstrap_ci(mean)],
            "p50_s": step_s * over(name, "p50").mean(),
            "p99_s": step_s * p99.mean(),
            "max_s": step_s * over(name, "max").mean(),
            "gain_share": share.mean(),
            "gain_share_ci": list(bootstrap_ci(share)),
            "mean_ratio": (mean / base).mean(),
            "p99_ratio": ratio.mean(),
            "p99_ratio_ci": list(bootstrap_ci(ratio)),
            "starved": over(name, "starved").mean(),
            "long_mean_ratio": (over(name, "long_mean") / over("fcfs", "long_mean")).mean(),
        }
        if "preemptions" in runs[0][name]:
            found[name]["preemptions"] = over(name, "preemptions").mean()
    return found


def about(people: Population, ageing: Mapping[str, Ageing]) -> dict[str, Any]:
    """What the figures rest on. ``between_prompts``: the share of the variance of lengths that a prompt explains."""
    means, medians = people.work.mean(axis=1), np.median(people.work, axis=1)
    return {
        "prompts": len(means),
        "samples": people.work.shape[1],
        "tokens_mean": means.mean(),
        "between_prompts": means.var() / people.work.var(),
        "kendall_tau": {
            "p50": kendall_tau(people.p50, medians),
            "guess": kendall_tau(people.prompt_tokens, medians),
        },
        "p90_at_cap": float((people.p90 >= people.pmf.shape[1]).mean()),
        "ageing_steps": {kind: asdict(found) for kind, found in ageing.items()},
    }


def study(people: Population, loads: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Every load and policy for one population, printed as it comes."""
    ageing = {kind: tuned(people, kind, options) for kind in loads}
    most = max(found.p50_rate for found in ageing.values())
    ageing = {kind: Ageing(**{**asdict(found), "one_rate": most}) for kind, found in ageing.items()}
    ranked = tables(people, options.quantum)
    metrics: dict[str, Any] = {}
    for kind in loads:
        made = (workload(people, kind, options.requests, options.slots, seed) for seed in range(options.seeds))
        metrics[kind] = summary(
            [one_run(people, load, ageing[kind], ranked, options) for load in made], options.step_ms / 1e3
        )
        print(f"load {kind}: {ageing[kind]}", flush=True)
        for name, row in metrics[kind].items():
            low, high = row["gain_share_ci"]
            print(
                f"  {name:20} mean {row['mean_s']:8.2f} s  p99 {row['p99_s']:8.1f} s ({row['p99_ratio']:5.2f} x)  "
                f"share {row['gain_share']:6.3f} [{low:.3f}, {high:.3f}]  starved {100 * row['starved']:.2f} %",
                flush=True,
            )
    return metrics | {"about": about(people, ageing)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--rollouts", type=Path, help="a folder of lenvm rollout: predictions in mid-answer, too")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu", help="of the value model; the simulation is on the CPU")
    parser.add_argument("--cache", type=Path, default=Path("runs"), help="keeps what the model said")
    parser.add_argument("--loads", nargs="+", default=["0.5", "0.7", "0.9", "0.98", "bursty"])
    parser.add_argument("--requests", type=int, default=20_000, help="of one run")
    parser.add_argument("--seeds", type=int, default=12, help="runs of each load")
    parser.add_argument("--tuning-seeds", type=int, default=6, help="runs that ageing is chosen on")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--quantum", type=int, default=32, help="tokens between two looks at a running request")
    parser.add_argument("--step-ms", type=float, default=20.0, help="nominal: only turns steps into seconds")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()

    lengths = read_lengths(options.lengths)
    people = boundary_population(lengths, options.model, options.cache / "scheduling-boundary.npz", options.device)
    metrics = study(people, options.loads, options)
    if options.rollouts:
        answers, _ = read_answers(options.rollouts)
        cache = options.cache / "scheduling-progressive.npz"
        print(f"one answer of each of {len(answers)} prompts, with predictions in mid-answer", flush=True)
        followed = progressive_population(answers, options.model, cache, options.device, options.quantum)
        loads = [kind for kind in options.loads if kind == "bursty" or float(kind) >= 0.9]
        metrics["progressive"] = study(followed, loads, options)
    if options.report:
        names = ("slots", "requests", "seeds", "tuning_seeds", "quantum", "step_ms")
        metrics["settings"] = {name: getattr(options, name) for name in names} | {"bursty": BURSTY}
        command = shlex.join(["python", *sys.argv])
        write_report(options.report, command=command, metrics=metrics, device=device_name("cpu"))


if __name__ == "__main__":
    main()
