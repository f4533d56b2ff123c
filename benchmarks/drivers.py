"""Length scores of one model through several drivers (transformers in-process, transformers over HTTP, llama.cpp), of
targets in words beside unguided answers, and of a second backbone whose tokenizer is not the value model's.

    python benchmarks/drivers.py --data ../shared/data --gguf MODEL.gguf --second --work runs/drivers.jsonl \\
        --report reports/drivers.json

LIFEBench, Equal To, at ``--targets`` tokens in turn, ``--generations`` in all, temperature 0.7, 16 candidates and EOS,
one seed a generation. ``hf`` and ``hf_http`` draw the same tokens but for rounding; llama.cpp computes with 8-bit
activations, so that its answers part from theirs. Without ``--gguf`` (the backbone's own file) it is left out.
``--url`` asks a running service; otherwise one is started. Words: English LongBench-Write prompts of at most
``--most-words``. Second backbone: see ``_second.py``; plain questions, targets of ``--second-targets`` of its tokens.

``--device cuda`` puts backbone and value model on a GPU (float32); llama.cpp stays on the CPU. With ``--work`` a
finished generation is kept and not made again. ``--shard I/N`` makes every Nth, for a work file of its own and with no
report: a last run makes that, given the files of all by ``--others``. ``--drivers``: those to be run.

Each study is a part of the report with a command of its own, and leaves the others there; 0 generations leave one out.
``seconds`` and ``tokens`` are those of this run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

from _engine import merge
from _second import NAME as SECOND
from _second import Second

from lenvm.backbones import encode_chat, load_backbone, resolve_backbone
from lenvm.decoding import Generation
from lenvm.evaluation.answers import AnswerFile, Key
from lenvm.evaluation.lifebench import build_prompt, length_score, load_tasks
from lenvm.modeling import LengthValueModel
from lenvm.prompts import read_jsonl
from lenvm_client import CandidateScorer, Client, RowReport, TextAdapter
from lenvm_client._text import count_units

TEMPERATURE, TOP_K = 0.7, 16
MOST_PROMPT = 512  # tokens; a few tasks quote whole articles
QUESTIONS = (
    "Why is the sky blue?",
    "How do bees make honey?",
    "What causes earthquakes?",
    "Why do leaves change colour in autumn?",
    "How does a refrigerator keep food cold?",
    "Why do cats purr?",
    "How are mountains formed?",
    "What is a black hole?",
    "Why is sea water salty?",
    "How do vaccines work?",
    "What is inflation in an economy?",
    "How do birds find their way when they migrate?",
    "Why do we dream?",
    "How is paper made?",
    "What did the Romans build roads for?",
    "How does a sailing boat move against the wind?",
    "Why do onions make us cry?",
    "What is photosynthesis?",
    "How do volcanoes erupt?",
    "Why does bread rise?",
    "What is the difference between weather and climate?",
    "How does a bicycle stay upright?",
    "Why do we have leap years?",
    "How do computers store numbers?",
)


@dataclass(frozen=True)
class Job:
    """An answer to make: ``most`` new tokens at most; ``objective`` None is unguided, with the same sampler."""

    study: str
    driver: str
    at: int
    prompt: list[int]
    target: int
    objective: dict[str, Any] | None
    most: int
    keeps_tokens: ClassVar[bool] = True

    @property
    def key(self) -> Key:
        """What names the answer in a work file."""
        return self.study, self.driver, self.at

    @property
    def seed(self) -> int:
        return 1000 + self.at


Run = Callable[[Sequence[Job]], list[Generation]]  # the jobs of one batch


def generation(job: Job, ids: Sequence[int], ends: Sequence[int], report: RowReport) -> Generation:
    """``ids`` up to the first that ends the answer."""
    length = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return Generation(
        list(ids[:length]),
        finished=length < job.most,
        forced_stop=report.forced_stop,
        text_cost=report.text_cost,
        logprob=float("nan"),
        seed=job.seed,
    )


DRIVERS = ("hf", "hf_http", "llama_cpp")


def hf_driver(model: Any, scorer: CandidateScorer, ends: Sequence[int], text: TextAdapter | None = None) -> Run:
    """transformers. ``ends``: the EOS, then stop ids."""
    import torch

    from lenvm_client.drivers.hf import generate

    def run(jobs: Sequence[Job]) -> list[Generation]:
        width = max(len(job.prompt) for job in jobs)
        padding = [width - len(job.prompt) for job in jobs]
        inputs = {
            "input_ids": torch.tensor([[0] * pad + job.prompt for pad, job in zip(padding, jobs, strict=True)]),
            "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
        }
        sequences, report = generate(
            model,
            scorer,
            {name: tensor.to(model.device) for name, tensor in inputs.items()},
            objectives=[job.objective for job in jobs],
            temperature=TEMPERATURE,
            top_k=TOP_K,
            seeds=[job.seed for job in jobs],
            max_new_tokens=max(job.most for job in jobs),
            eos_token_id=ends[0],
            stop_token_ids=ends[1:],
            pad_token_id=0,
            on_error="raise",
            text=text,
        )
        rows = zip(jobs, sequences[:, width:].tolist(), report.rows, strict=True)
        return [generation(job, ids, ends, row) for job, ids, row in rows]

    return run


def llama_driver(gguf: Path, scorer: CandidateScorer, threads: int, context: int) -> Run:
    """llama.cpp, one row at a time."""
    from llama_cpp import Llama

    from lenvm_client.drivers.llama_cpp import generate

    llama = Llama(str(gguf), n_ctx=context, n_threads=threads, verbose=False)

    def one(job: Job) -> Generation:
        options: dict[str, Any] = {"temperature": TEMPERATURE, "top_k": TOP_K, "on_error": "raise"}
        ids, report = generate(
            llama, scorer, job.prompt, objective=job.objective, max_tokens=job.most, seed=job.seed, **options
        )
        return generation(job, ids, (), report.rows[0])

    return lambda jobs: [one(job) for job in jobs]


def make(store: AnswerFile, run: Run, jobs: Sequence[Job], batch: int) -> dict[str, float]:
    """Make the answers that the work file does not hold, those of like targets together so that they end together;
    returns what that took, if there were any."""
    missing = sorted((job for job in jobs if job not in store), key=lambda job: job.target)
    seconds, tokens = 0.0, 0
    for start in range(0, len(missing), batch):
        rows = missing[start : start + batch]
        started = time.perf_counter()
        made = run(rows)
        seconds += time.perf_counter() - started
        for job, answer in zip(rows, made, strict=True):
            store.add(job, answer)
            tokens += len(answer.token_ids)
    return {"seconds": seconds, "tokens": tokens} if missing else {}


@contextmanager
def service(url: str | None, model: str, device: str) -> Iterator[str]:
    """A running service: the one at ``url``, or one of our own on a free port."""
    if url:
        yield url
        return
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", str(port), "--model", model]
    command += ["--device", device]
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


def figures(
    store: AnswerFile, jobs: Sequence[Job], lengths: Sequence[float], against: Sequence[float] | None = None
) -> tuple[dict[str, Any], list[float]]:
    """``summary`` with what guidance cost, and the length scores themselves."""
    found = [length_score(round(length), job.target) for length, job in zip(lengths, jobs, strict=True)]
    answers = [store[job] for job in jobs]
    shares = {
        "forced_stop_rate": statistics.fmean(answer.forced_stop for answer in answers),
        "kl_per_sequence": statistics.fmean(answer.text_cost for answer in answers),
        "finished": statistics.fmean(answer.finished for answer in answers),
    }
    return summary(found, [job.target for job in jobs], against) | shares, found


def lifebench(
    options: argparse.Namespace, store: AnswerFile, tokenizer: Any, runs: dict[str, tuple[Run, int]]
) -> dict[str, Any]:
    """The same jobs through every driver; ``runs``: with their batch sizes."""
    asked: list[tuple[list[int], int]] = []
    tasks = iter(load_tasks(options.data, n=None))
    for at in range(options.generations):
        target = options.targets[at % len(options.targets)]
        prompt: list[int] = []
        while not 0 < len(prompt) <= MOST_PROMPT:
            prompt = encode_chat(tokenizer, build_prompt(next(tasks), "equal_to", target))
        asked.append((prompt, target))
    metrics: dict[str, Any] = {}
    reference: list[float] | None = None
    for name, (run, batch) in runs.items():
        jobs = [
            Job("lifebench", name, at, prompt, target, equal_to(target), 2 * max(options.targets))
            for at, (prompt, target) in enumerate(asked)
        ]
        took = make(store, run, options.mine(jobs), batch)
        if options.shard:
            continue
        metrics[name], found = figures(store, jobs, [store[job].length for job in jobs], reference)
        metrics[name] |= took | {"device": "cpu" if name == "llama_cpp" else options.device}
        reference = reference or found
        print(f"{name:10} length score {metrics[name]['ls']['mean']:5.1f}", flush=True)
    return metrics


def words(
    options: argparse.Namespace, store: AnswerFile, tokenizer: Any, driver: Callable[[TextAdapter | None], Run]
) -> dict[str, Any]:
    """LongBench-Write in words, guided and unguided by the same sampler. ``driver``: of guided text or unguided."""
    rows = [row for _, row in read_jsonl(options.data / "bench" / "longbench_write.jsonl.gz")]
    kept = [row for row in rows if row["lang"] == "en" and row["target_words"] <= options.most_words]
    metrics: dict[str, Any] = {}
    unguided: list[float] | None = None
    for name in ("unguided", "guided"):
        text = TextAdapter.from_tokenizers(tokenizer) if name == "guided" else None
        jobs = []
        for at, row in enumerate(kept[: options.words]):
            target, prompt = int(row["target_words"]), encode_chat(tokenizer, row["prompt"])
            goal = equal_to(target) | {"unit": "words"} if text else None
            jobs.append(Job("longbench_write", name, at, prompt, target, goal, 3 * options.most_words))
        took = make(store, lazily(partial(driver, text)), options.mine(jobs), options.batch)
        if options.shard:
            continue
        lengths = [count_units(tokenizer.decode(store[job].token_ids), "words") for job in jobs]
        metrics[name], found = figures(store, jobs, lengths, unguided)
        metrics[name] |= took | {"device": options.device}
        unguided = found
        print(f"words, {name:8} length score {metrics[name]['ls']['mean']:5.1f}", flush=True)
    return metrics


def second(options: argparse.Namespace, store: AnswerFile, tokenizer: Any, scorer: CandidateScorer) -> dict[str, Any]:
    """A backbone with another tokenizer, guided and unguided by the same sampler; lengths in its own tokens."""
    backbone = Second.load()
    text = backbone.text(tokenizer)
    metrics: dict[str, Any] = {"backbone": SECOND, "approximate": list(text.estimates(equal_to(1)))}
    unguided: list[float] | None = None
    for name in ("unguided", "guided"):
        jobs = []
        for at in range(options.second):
            lap, place = divmod(at, len(QUESTIONS))
            target = options.second_targets[(place + lap) % len(options.second_targets)]
            goal = equal_to(target) if name == "guided" else None
            prompt = backbone.prompt(QUESTIONS[place])
            jobs.append(Job("second", name, at, prompt, target, goal, 4 * max(options.second_targets)))
        run = hf_driver(backbone.model, scorer, backbone.end_ids, text if name == "guided" else None)
        took = make(store, run, jobs, options.batch)
        metrics[name], found = figures(store, jobs, [store[job].length for job in jobs], unguided)
        metrics[name] |= took
        unguided = found
        print(f"second, {name:8} length score {metrics[name]['ls']['mean']:5.1f}", flush=True)
    return metrics


def equal_to(target: int) -> dict[str, Any]:
    return {"kind": "equal_to", "target": target}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds bench/")
    parser.add_argument("--gguf", type=Path, default=os.environ.get("LENVM_GGUF"), help="the backbone for llama.cpp")
    parser.add_argument("--url", help="a running service; without it one is started")
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--words", type=int, default=20, help="prompts with targets in words; 0 leaves them out")
    parser.add_argument("--most-words", type=int, default=400)
    parser.add_argument("--second", type=int, nargs="?", const=24, default=0, help="answers of a second backbone (24)")
    parser.add_argument("--second-targets", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="of transformers and the value model")
    parser.add_argument("--drivers", nargs="+", default=list(DRIVERS), choices=DRIVERS)
    parser.add_argument("--work", type=Path, help="keep finished generations here; a rerun goes on")
    parser.add_argument("--others", type=Path, nargs="+", default=[], help="work files of shards")
    parser.add_argument("--shard", help="I/N: every Nth generation from the Ith on; no report")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    at, count = map(int, options.shard.split("/")) if options.shard else (0, 1)
    if options.shard and (options.work is None or not 0 <= at < count or options.second):
        parser.error("--shard I/N needs --work and I in 0 .. N - 1, and leaves --second out")
    options.mine = lambda jobs: [job for job in jobs if job.at % count == at]
    return options


def main() -> None:
    options = parsed()

    import torch

    from lenvm_service.local import LocalScorer

    torch.set_num_threads(options.threads)
    value_model = LengthValueModel.from_pretrained(options.model)
    tokenizer, ends = value_model.tokenizer, [value_model.tokenizer.eos_token_id]
    names = ("model", "targets", "most_words", "second_targets")
    settings = {name: getattr(options, name) for name in names} | {"files": value_model.config.files}
    settings |= {"temperature": TEMPERATURE, "top_k": TOP_K}

    # Made when an answer is missing: a run that only reports needs none of them.
    @cache
    def scorer() -> LocalScorer:
        return LocalScorer(options.model, device=options.device)

    @cache
    def backbone() -> Any:
        folder = resolve_backbone(value_model.config.generator.backbone)
        return load_backbone(folder, attn_implementation="sdpa", device=options.device)

    with AnswerFile(options.work, settings, options.others) as store, ExitStack() as stack:

        @cache
        def client() -> Client:
            url = stack.enter_context(service(options.url, options.model, options.device))
            return stack.enter_context(Client(url, timeout=300, total_timeout=None))

        context = MOST_PROMPT + 2 * max(options.targets)
        made: dict[str, tuple[Callable[[], Run], int]] = {
            "hf": (lambda: hf_driver(backbone(), scorer(), ends), options.batch),
            "hf_http": (lambda: hf_driver(backbone(), client(), ends), options.batch),
            "llama_cpp": (lambda: llama_driver(options.gguf, scorer(), options.threads, context), 1),
        }
        if options.gguf is None and "llama_cpp" in options.drivers:
            print("llama_cpp is left out: give --gguf")
            options.drivers.remove("llama_cpp")
        where = device_or_cpu(options.device)
        if options.generations:
            runs = {name: (lazily(made[name][0]), made[name][1]) for name in options.drivers}
            if found := lifebench(options, store, tokenizer, runs):
                merge(options.report, {"lifebench": found}, where)
        if options.words and (
            found := words(options, store, tokenizer, lambda text: hf_driver(backbone(), scorer(), ends, text))
        ):
            merge(options.report, {"longbench_write": found}, where)
        if options.second:
            merge(options.report, {"second": second(options, store, tokenizer, scorer())}, "cpu")


def lazily(make: Callable[[], Run]) -> Run:
    """A driver that is made when it is first run."""
    made = cache(make)
    return lambda jobs: made()(jobs)


def device_or_cpu(device: str) -> str:
    """A run that only reports may be on a machine without the device that its answers were made on."""
    import torch

    return device if device == "cpu" or torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
