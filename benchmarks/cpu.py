"""Single 64-token predictions on the CPU, torch against every ONNX Runtime variant, and what each variant loses.

    python benchmarks/cpu.py --data ../shared/data --lengths runs/lengths-test.jsonl.gz --report reports/engine.json

Times: medians with quartiles over rounds in which the variants take turns, on ``--threads`` cores. Parity: value and
horizon at the prompt boundary and along sampled answers (their first ``--answer-tokens``), against torch in float32, on
``--prompts`` prompts. MRE: of the horizon at the boundary against the mean of many sampled lengths, which come from
``--lengths`` (JSON lines with id, prompt_ids and lengths); without it prompts come from ``--data`` and there is no MRE.
The fastest variant with a mean value error of at most 0.02 and an MRE within a point of torch's is the one reported.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from _engine import merge

from lenvm.backbones import encode_chat
from lenvm.export import VARIANTS
from lenvm.export.parity import errors, state_logits
from lenvm.export.run import export_model
from lenvm.modeling import LengthValueModel
from lenvm.prompts import DOMAINS, load_prompts, read_jsonl, select
from lenvm.returns import horizon_from_logit
from lenvm.scoring import OnnxModel, OnnxScorer, Scorer, ScoreRow, TorchScorer

TOKENS = 64
MOST_ERROR = 0.02  # of the value, on average
MOST_MRE = 0.01  # above torch's


@dataclass(frozen=True)
class Question:
    """A prompt as ids, and how many tokens its answers took on average, EOS included (NaN: not known)."""

    id: str
    ids: list[int]
    length: float


def questions(options: argparse.Namespace, model: LengthValueModel) -> list[Question]:
    """Held-out prompts, chosen by the digest of their ids."""
    if options.lengths is None:
        prompts = [prompt for domain in DOMAINS for prompt in load_prompts(options.data, domain, "test")]
        found = [Question(p.id, encode_chat(model.tokenizer, p.text), float("nan")) for p in prompts]
    else:
        rows = [row for _, row in read_jsonl(options.lengths)]
        found = [Question(row["id"], row["prompt_ids"], 1 + statistics.mean(row["lengths"])) for row in rows]
    return select([question for question in found if len(question.ids) <= 512], options.prompts, seed=5)


def answers(model: LengthValueModel, prompts: Sequence[list[int]], longest: int) -> list[list[int]]:
    """One sampled answer of each prompt by the model's generator, cut at ``longest`` tokens."""
    from lenvm.decoding import Request, SamplingParams
    from lenvm.rollouts.sampling import LocalGenerator

    policy = model.config.generator
    params = SamplingParams(policy.temperature, top_p=policy.top_p, max_new_tokens=longest)
    requests = [Request(ids, 17 + at) for at, ids in enumerate(prompts)]
    return [list(answer.token_ids) for answer in LocalGenerator(policy.backbone).sampler.generate(requests, params)]


def timed(scorers: dict[str, Scorer], prompts: Sequence[list[int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of single predictions; the variants take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in scorers}
    for turn in range(rounds + 2):
        row = ScoreRow(append=prompts[turn % len(prompts)])
        for name, scorer in scorers.items():
            start = time.perf_counter()
            (answer,) = scorer.score([row])
            times[name].append(1e3 * (time.perf_counter() - start))
            answer.state.close()
    found = {}
    for name, all_times in times.items():
        low, middle, high = statistics.quantiles(all_times[2:], n=4)
        found[name] = {"p50_ms": middle, "ms_quartiles": [low, high]}
    return found


def mean_relative_error(scorer: Scorer, asked: Sequence[Question]) -> float:
    """Of the horizon at the prompt boundary; NaN where lengths are not known."""
    logits = [scorer.score([ScoreRow(append=question.ids)])[0].logits[-1] for question in asked]
    horizons, truth = horizon_from_logit(np.array(logits), scorer.gamma), np.array([q.length for q in asked])
    return float(np.mean(np.abs(horizons - truth) / truth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds prompts/")
    parser.add_argument("--lengths", type=Path, help="sampled lengths of held-out prompts, which are taken then")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    model = LengthValueModel.from_pretrained(options.model)
    reference = TorchScorer(model)
    asked = questions(options, model)
    sampled = answers(model, [question.ids for question in asked], options.answer_tokens)
    texts = [([*question.ids, *found], len(question.ids)) for question, found in zip(asked, sampled, strict=True)]
    print(f"{len(texts)} prompts and answers, {sum(len(ids) for ids, _ in texts):,} tokens", flush=True)

    scorers: dict[str, Scorer] = {"torch": reference}
    rows: dict[str, dict[str, Any]] = {"torch": {"mre": mean_relative_error(reference, asked)}}
    wanted = state_logits(reference, texts)
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            export_model(model, Path(scratch) / variant, variant=variant)
            scorer = scorers[variant] = OnnxScorer(OnnxModel(Path(scratch) / variant, threads=options.threads))
            rows[variant] = errors(wanted, state_logits(scorer, texts), model.config.gamma).to_dict()
            rows[variant]["mre"] = mean_relative_error(scorer, asked)
        exactly = [(question.ids * TOKENS)[:TOKENS] for question in asked]
        for name, found in timed(scorers, exactly, options.rounds).items():
            rows[name] |= found
    for name, row in rows.items():
        row["speedup"] = rows["torch"]["p50_ms"] / row["p50_ms"]
        lost = f"value error {row['value_mean']:.2g} (max {row['value_max']:.2g})" if "value_mean" in row else ""
        print(f"{name:6} p50 {row['p50_ms']:7.1f} ms  {row['speedup']:5.2f} x  MRE {100 * row['mre']:.1f} %  {lost}")
    allowed = [
        name
        for name in VARIANTS
        if rows[name]["value_mean"] <= MOST_ERROR and not rows[name]["mre"] > rows["torch"]["mre"] + MOST_MRE
    ]
    best = max(allowed, key=lambda name: rows[name]["speedup"])
    summary = {"variant": best, "ort_speedup": rows[best]["speedup"], "value_error_mean": rows[best]["value_mean"]}
    print(f"fastest within the limits: {best}, {summary['ort_speedup']:.2f} x torch, p50 {rows[best]['p50_ms']:.1f} ms")
    if options.report:
        found = {**summary, "threads": options.threads, "tokens": TOKENS, "prompts": len(texts), "variants": rows}
        merge(options.report, {"cpu": {**found, "onnxruntime": onnxruntime.__version__}}, "cpu")


if __name__ == "__main__":
    main()
