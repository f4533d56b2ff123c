"""Length scores of one model through several drivers (transformers in-process, transformers over HTTP, llama.cpp), and
of targets in words beside unguided answers.

    python benchmarks/drivers.py --data ../shared/data --gguf MODEL.gguf --report reports/drivers.json

LIFEBench, Equal To, at ``--targets`` tokens in turn, ``--generations`` in all, temperature 0.7, 16 candidates and EOS,
one seed a generation. ``hf`` and ``hf_http`` draw the same tokens but for rounding; llama.cpp computes with 8-bit
activations, so that its answers part from theirs. Without ``--gguf`` (the backbone's own file) it is left out.
``--url`` asks a running service; otherwise one is started. Words: English LongBench-Write prompts of at most
``--most-words``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lenvm.backbones import encode_chat, load_backbone, resolve_backbone
from lenvm.evaluation.lifebench import build_prompt, length_score, load_tasks
from lenvm.modeling import LengthValueModel
from lenvm.prompts import read_jsonl
from lenvm.reports import device_name, versions, write_report
from lenvm_client import CandidateScorer, Client, TextAdapter
from lenvm_client._text import count_units

TEMPERATURE, TOP_K = 0.7, 16
MOST_PROMPT = 512  # tokens; a few tasks quote whole articles
Job = tuple[list[int], dict[str, Any] | None, int]  # prompt, objective, seed
Run = Callable[[Sequence[Job], int], list[list[int]]]  # jobs, most new tokens -> content tokens


def hf_driver(model: Any, scorer: CandidateScorer, eos: int, batch: int, text: TextAdapter | None = None) -> Run:
    """transformers, ``batch`` rows at a time."""
    import torch

    from lenvm_client.drivers.hf import generate

    def run(jobs: Sequence[Job], most: int) -> list[list[int]]:
        answers = []
        for start in range(0, len(jobs), batch):
            rows = jobs[start : start + batch]
            width = max(len(ids) for ids, *_ in rows)
            inputs = {
                "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids, *_ in rows]),
                "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, *_ in rows]),
            }
            sequences, _ = generate(
                model,
                scorer,
                inputs,
                objectives=[objective for _, objective, _ in rows],
                temperature=TEMPERATURE,
                top_k=TOP_K,
                seeds=[seed for *_, seed in rows],
                max_new_tokens=most,
                eos_token_id=eos,
                pad_token_id=0,
                on_error="raise",
                text=text,
            )
            for row in sequences[:, width:].tolist():
                answers.append(row[: row.index(eos)] if eos in row else row)
        return answers

    return run


def llama_driver(gguf: Path, scorer: CandidateScorer, threads: int, context: int) -> Run:
    """llama.cpp, one row at a time."""
    from llama_cpp import Llama

    from lenvm_client.drivers.llama_cpp import generate

    llama = Llama(str(gguf), n_ctx=context, n_threads=threads, verbose=False)

    def run(jobs: Sequence[Job], most: int) -> list[list[int]]:
        options: dict[str, Any] = {"temperature": TEMPERATURE, "top_k": TOP_K, "on_error": "raise"}
        return [
            generate(llama, scorer, ids, objective=objective, max_tokens=most, seed=seed, **options)[0]
            for ids, objective, seed in jobs
        ]

    return run


@contextmanager
def service(url: str | None, model: str) -> Iterator[str]:
    """A running service: the one at ``url``, or one of our own on a free port."""
    if url:
        yield url
        return
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", str(port), "--model", model]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with Client(f"http://127.0.0.1:{port}", timeout=5, max_retries=0) as client:
            while not client.ready():
                if process.poll() is not None:
                    raise SystemExit("lenvm serve has ended: run it by hand to see why, and give --url")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def scores(lengths: Sequence[float], targets: Sequence[int]) -> list[float]:
    return [length_score(round(length), target) for length, target in zip(lengths, targets, strict=True)]


def summary(found: Sequence[float], targets: Sequence[int], against: Sequence[float] | None = None) -> dict[str, Any]:
    """Mean and standard error of length scores, by target too, and of the difference to other scores, job by job."""

    def mean(values: Sequence[float]) -> dict[str, float]:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return {"mean": statistics.fmean(values), "standard_error": error}

    by_target = {
        str(target): mean([score for score, at in zip(found, targets, strict=True) if at == target])["mean"]
        for target in sorted(set(targets))
    }
    out: dict[str, Any] = {"ls": mean(found), "by_target": by_target, "generations": len(found)}
    if against is not None:
        out["difference"] = mean([here - there for here, there in zip(found, against, strict=True)])
    return out


def lifebench(options: argparse.Namespace, tokenizer: Any, runs: dict[str, Run]) -> dict[str, Any]:
    """The same jobs through every driver."""
    targets = [options.targets[at % len(options.targets)] for at in range(options.generations)]
    jobs: list[Job] = []
    tasks = iter(load_tasks(options.data, n=None))
    for at, target in enumerate(targets):
        prompt: list[int] = []
        while not 0 < len(prompt) <= MOST_PROMPT:
            prompt = encode_chat(tokenizer, build_prompt(next(tasks), "equal_to", target))
        jobs.append((prompt, {"kind": "equal_to", "target": target}, 1000 + at))
    found: dict[str, list[float]] = {}
    metrics: dict[str, Any] = {}
    for name, run in runs.items():
        started = time.perf_counter()
        answers = run(jobs, 2 * max(targets))
        seconds = time.perf_counter() - started
        found[name] = scores([len(answer) for answer in answers], targets)
        metrics[name] = summary(found[name], targets, found["hf"] if name != "hf" else None)
        metrics[name] |= {"seconds": seconds, "tokens": sum(map(len, answers))}
        print(f"{name:10} length score {metrics[name]['ls']['mean']:5.1f}  {seconds:6.0f} s", flush=True)
    return metrics


def words(options: argparse.Namespace, tokenizer: Any, model: Any, scorer: CandidateScorer, eos: int) -> dict[str, Any]:
    """LongBench-Write in words, guided and unguided by the same sampler."""
    rows = [row for _, row in read_jsonl(options.data / "bench" / "longbench_write.jsonl.gz")]
    kept = [row for row in rows if row["lang"] == "en" and row["target_words"] <= options.most_words]
    kept = kept[: options.words]
    targets = [int(row["target_words"]) for row in kept]
    metrics: dict[str, Any] = {}
    unguided: list[float] | None = None
    for name in ("unguided", "guided"):
        text = TextAdapter.from_tokenizers(tokenizer) if name == "guided" else None
        jobs: list[Job] = []
        for at, row in enumerate(kept):
            goal = {"kind": "equal_to", "target": targets[at], "unit": "words"}
            jobs.append((encode_chat(tokenizer, row["prompt"]), goal if text else None, 2000 + at))
        answers = hf_driver(model, scorer, eos, options.batch, text)(jobs, 3 * max(targets))
        lengths = [count_units(tokenizer.decode(answer), "words") for answer in answers]
        found = scores(lengths, targets)
        metrics[name] = summary(found, targets, unguided)
        unguided = found
        print(f"words, {name:8} length score {metrics[name]['ls']['mean']:5.1f}", flush=True)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds bench/")
    parser.add_argument("--gguf", type=Path, default=os.environ.get("LENVM_GGUF"), help="the backbone for llama.cpp")
    parser.add_argument("--url", help="a running service; without it one is started")
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--words", type=int, default=20, help="prompts with targets in words; 0 leaves them out")
    parser.add_argument("--most-words", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()

    import torch

    from lenvm_service.local import LocalScorer

    torch.set_num_threads(options.threads)
    value_model = LengthValueModel.from_pretrained(options.model)
    tokenizer, eos = value_model.tokenizer, value_model.tokenizer.eos_token_id
    backbone = load_backbone(resolve_backbone(value_model.config.generator.backbone), attn_implementation="sdpa")
    scorer = LocalScorer(options.model)
    metrics: dict[str, Any] = {}
    with service(options.url, options.model) as url, Client(url, timeout=300, total_timeout=None) as client:
        runs = {
            "hf": hf_driver(backbone, scorer, eos, options.batch),
            "hf_http": hf_driver(backbone, client, eos, options.batch),
        }
        if options.gguf is None:
            print("llama_cpp is left out: give --gguf")
        else:
            runs["llama_cpp"] = llama_driver(
                options.gguf, scorer, options.threads, MOST_PROMPT + 2 * max(options.targets)
            )
        metrics["lifebench"] = lifebench(options, tokenizer, runs)
    if options.words:
        metrics["longbench_write"] = words(options, tokenizer, backbone, scorer, eos)
    if options.report:
        made = versions()
        if options.gguf is not None:
            import llama_cpp

            made |= {"llama-cpp-python": llama_cpp.__version__}
        command = ["python", *sys.argv]
        write_report(options.report, command=command, metrics=metrics, device=device_name("cpu"), versions=made)


if __name__ == "__main__":
    main()
