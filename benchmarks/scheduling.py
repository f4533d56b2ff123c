"""How much waiting does length prediction save on a continuous-batching server? A discrete-event simulation.

    python benchmarks/scheduling.py --lengths runs/lengths-test.jsonl.gz --report reports/scheduling.json

``--lengths`` is what ``lenvm rollout lengths`` writes: held-out prompts, each with the lengths of many sampled answers.
A request is one of these prompts at random with one of its lengths at random; predictions are the value model's at the
prompt boundary (kept beside the lengths in ``--cache``). All policies see the same requests. Server: ``_scheduling``.

Policies that start the waiting request of the lowest rank and never preempt: ``fcfs``; ``sjf_p50``, ``sjf_p90``,
``sjf_mean`` by a predicted quantile or mean; ``guess`` by 1.5 x the prompt's length; ``oracle`` by the true length;
``prompt_oracle`` (``prompt_oracle_mean``) by the median (mean) of the prompt's own sampled lengths, the ceiling of
whatever can be known before the answer begins. Two keep the longest from starving: ``sjf_p50_aged`` ranks by p50 less
what a request gains by waiting (a number that is set once, which any server with priorities takes), and
``sjf_p50_deadline`` lets a request go first once it has waited so long (which needs a queue of one's own). Each has the
setting that wins most among those that kept p99 within 8 % of FCFS's on other seeds, load by load;
``sjf_p50_aged_one`` has one ageing rate for all loads, that of the load which needs most.
Policies that preempt, ranked again whenever a request has generated another ``--quantum`` tokens, and who pay for it by
prefilling again: ``srpt`` by the mean of what is still to come given what was generated, from the distribution
predicted at the prompt boundary (no further call); ``gittins`` by the Gittins index of the same; ``oracle_srpt`` by
what is truly still to come; ``prompt_oracle_srpt`` as ``srpt``, from the prompt's own sampled lengths.

``gain_share``: of the oracle's gain over FCFS in mean latency. Latency: arrival to last token. The first and last tenth
of the requests of a run are not counted. Intervals: 95 %, bootstrap over runs.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _scheduling import (
    FloatArray,
    IntArray,
    Workload,
    gittins_table,
    mean_table,
    prefill_steps,
    run_preemptive,
    run_to_completion,
    survival_table,
)

from lenvm.calibration import Calibration
from lenvm.config import LenVMConfig
from lenvm.distribution import LengthBins, log_pmf, quantile, restricted_mean
from lenvm.evaluation.lengths import read_lengths
from lenvm.evaluation.states import PromptAnswers, StateRow, score_states
from lenvm.evaluation.stats import bootstrap_ci, kendall_tau
from lenvm.modeling import LengthValueModel, find_checkpoint
from lenvm.reports import device_name, write_report
from lenvm.scoring import TorchScorer

# Mean share of the server's capacity in quiet times and in bursts, and how long these last (steps, exponential).
BURSTY = ((0.6, 6_000.0), (1.8, 2_000.0))
# Settings of the two kinds of ageing, the least first: tokens of rank for a step waited; the steps after which a
# request goes first, as a share of FCFS's p99 less the longest service.
RATES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
DEADLINES = (1.5, 1.3, 1.2, 1.15, 1.1, 1.05, 1.0, 0.95, 0.9, 0.8, 0.6, 0.4)
AGED_P99 = 1.08
LONG = 1024


@dataclass(frozen=True)
class Population:
    """What requests are drawn from: prompts, the tokens of their answers [prompts, samples], what is predicted."""

    domain: list[str]
    prompt_tokens: IntArray
    work: IntArray  # EOS included where it came
    p50: FloatArray
    p90: FloatArray
    mean: FloatArray
    pmf: FloatArray  # predicted, of l = 1 .. cap [prompts, cap]

    @property
    def own_pmf(self) -> FloatArray:
        """Of the prompts' own samples [prompts, cap]."""
        counts = np.zeros_like(self.pmf)
        np.add.at(counts, (np.arange(len(self.work))[:, None], self.work - 1), 1.0)
        return counts / self.work.shape[1]


def population(prompts: list[PromptAnswers], logits: FloatArray, logp: FloatArray, config: LenVMConfig) -> Population:
    """Predictions as the service gives them: calibrated quantiles, the network's own mean."""
    bins, calibration = config.head.bins, Calibration.from_dict(config.calibration)
    assert isinstance(bins, LengthBins)
    cap = config.generator.max_new_tokens
    calibrated = logp if calibration is None else calibration.apply(logits, logp, bins, config.gamma)
    levels = quantile(calibrated, bins, [0.5, 0.9])[0].astype(np.float64)
    pmf = np.exp(log_pmf(calibrated, bins))[:, : cap + 1]
    pmf[:, cap - 1] += pmf[:, cap:].sum(axis=1)  # the server cuts answers at the cap
    work = np.stack([np.minimum(prompt.lengths + prompt.finished, cap) for prompt in prompts])
    return Population(
        [prompt.domain for prompt in prompts],
        np.array([len(prompt.prompt_ids) for prompt in prompts]),
        np.maximum(work, 1),
        levels[:, 0],
        levels[:, 1],
        np.asarray(restricted_mean(logp, bins)),
        pmf[:, :cap],
    )


def predictions(options: argparse.Namespace, prompts: list[PromptAnswers]) -> tuple[FloatArray, FloatArray]:
    """Value logits [prompts] and bin log-probs [prompts, bins] at the prompt boundary, from the cache where it fits."""
    folder = find_checkpoint(options.model)
    digest = hashlib.sha256(options.lengths.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    if options.cache.exists():
        kept = np.load(options.cache, allow_pickle=False)
        if str(kept["key"]) == digest.hexdigest():
            return kept["logits"], kept["logp"]

    def progress(done: int, total: int) -> None:
        print(f"predicted {done} of {total} prompts", flush=True)

    scorer = TorchScorer(LengthValueModel.from_pretrained(options.model))
    scores = score_states(scorer, [StateRow(prompt.prompt_ids) for prompt in prompts], progress=progress)
    logits = np.array([score.logits[-1] for score in scores])
    logp = np.stack([np.asarray(score.bin_logprobs)[-1] for score in scores]).astype(np.float64)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.cache, key=digest.hexdigest(), logits=logits, logp=logp)
    return logits, logp


@dataclass(frozen=True)
class Ageing:
    """Settings for a load: tokens of rank for a step waited, the same for all loads, steps until it goes first."""

    rate: float
    one_rate: float
    wait: float


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
        "prompt_oracle": np.median(people.work, axis=1)[at],
        "prompt_oracle_mean": people.work.mean(axis=1)[at],
    }


def tables(people: Population, quantum: int) -> dict[str, list[list[float]]]:
    """Ranks of the policies that preempt, by prompt and full quanta generated."""
    predicted, own = survival_table(people.pmf), survival_table(people.own_pmf)
    return {
        "srpt": mean_table(predicted, quantum).tolist(),
        "gittins": gittins_table(predicted, quantum).tolist(),
        "prompt_oracle_srpt": mean_table(own, quantum).tolist(),
    }


def by_table(load: Workload, table: list[list[float]], quantum: int) -> Callable[[int, int], float]:
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


def tuned(people: Population, kind: str, options: argparse.Namespace) -> tuple[float, float]:
    """Ageing rate and deadline (steps) for a load: the least that keep p99 near FCFS's, on seeds of their own."""
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
    rate = next((r for r in RATES if p99(lambda run: people.p50[run.prompt] + r * run.arrival) <= allowed), RATES[-1])  # noqa: B023
    wait = next((w for w in waits if p99(lambda run: people.p50[run.prompt], w) <= allowed), waits[-1])
    return rate, wait


def one_run(
    people: Population, load: Workload, ageing: Ageing, ranked: Mapping[str, Any], options: Any
) -> dict[str, dict[str, float]]:
    """Every policy on the same requests."""
    by_p50 = people.p50[load.prompt]
    unaged: dict[str, tuple[FloatArray, FloatArray | None]] = {n: (key, None) for n, key in keys(people, load).items()}
    # All that wait gain at the same rate, so that a later arrival is as good as a larger rank.
    policies = unaged | {
        "sjf_p50_aged": (by_p50 + ageing.rate * load.arrival, None),
        "sjf_p50_aged_one": (by_p50 + ageing.one_rate * load.arrival, None),
        "sjf_p50_deadline": (by_p50, load.arrival + ageing.wait),
    }
    found: dict[str, dict[str, float]] = {}
    longest = 0.0
    for name, (key, urgent) in policies.items():  # FCFS comes first
        start, end = run_to_completion(load, key, options.slots, urgent)
        longest = longest or float((start - load.arrival).max())
        found[name] = measured(load, start, end, longest)
    work = load.work.tolist()
    ranks = {name: by_table(load, table, options.quantum) for name, table in ranked.items()}
    ranks["oracle_srpt"] = lambda request, generated: work[request] - generated
    for name, rank in ranks.items():
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


def about(people: Population, options: argparse.Namespace, ageing: Mapping[str, Ageing]) -> dict[str, Any]:
    """What the figures rest on. ``between_prompts``: the share of the variance of lengths that a prompt explains."""
    means = people.work.mean(axis=1)
    return {
        "slots": options.slots,
        "step_s": options.step_ms / 1e3,
        "requests": options.requests,
        "runs": options.seeds,
        "quantum": options.quantum,
        "bursty": {"load": [share for share, _ in BURSTY], "steps": [length for _, length in BURSTY]},
        "prompts": len(means),
        "samples": people.work.shape[1],
        "tokens_mean": means.mean(),
        "between_prompts": means.var() / people.work.var(),
        "kendall_tau": {
            "p50": kendall_tau(people.p50, np.median(people.work, axis=1)),
            "guess": kendall_tau(people.prompt_tokens, np.median(people.work, axis=1)),
        },
        "ageing_rate": {kind: found.rate for kind, found in ageing.items()},
        "deadline_s": {kind: options.step_ms / 1e3 * found.wait for kind, found in ageing.items()},
        "p90_at_cap": float((people.p90 >= people.pmf.shape[1]).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cache", type=Path, default=Path("runs/scheduling-predictions.npz"))
    parser.add_argument("--loads", nargs="+", default=["0.5", "0.7", "0.9", "0.98", "bursty"])
    parser.add_argument("--requests", type=int, default=20_000, help="of one run")
    parser.add_argument("--seeds", type=int, default=12, help="runs of each load")
    parser.add_argument("--tuning-seeds", type=int, default=6, help="runs that ageing is chosen on")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--quantum", type=int, default=32, help="tokens between two looks at a running request")
    parser.add_argument("--step-ms", type=float, default=20.0, help="nominal: only turns steps into seconds")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()

    prompts = read_lengths(options.lengths)
    config = LenVMConfig.load(find_checkpoint(options.model))
    people = population(prompts, *predictions(options, prompts), config)
    settings = {kind: tuned(people, kind, options) for kind in options.loads}
    most = max(rate for rate, _ in settings.values())
    ageing = {kind: Ageing(rate, most, wait) for kind, (rate, wait) in settings.items()}
    ranked = tables(people, options.quantum)
    metrics: dict[str, Any] = {}
    for kind in options.loads:
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
    if options.report:
        command = shlex.join(["python", *sys.argv])
        extra = {"about": about(people, options, ageing)}
        write_report(options.report, command=command, metrics=metrics | extra, device=device_name("cpu"))


if __name__ == "__main__":
    main()
