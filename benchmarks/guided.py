"""What guidance adds to a decoding step: in-process, over loopback HTTP, and in our own sampler.

    python benchmarks/guided.py --device cuda --dtype bfloat16 --report reports/engine.json

The shipped model's backbone generates ``--sequences`` answers of ``--tokens`` tokens from random prompts, EOS kept out
so that all rows last. *Loop*: ``generate`` of transformers under ``lenvm_client.drivers.hf``, over ``LocalScorer``
(which on a GPU does all of a step there) and over a ``Client`` of a ``lenvm serve``, each guided and unguided with the
same sampler. The ways take turns, and what is added is the difference of their medians from logits to the next forward.
``step``: the scorer's part of it, as ``benchmarks/step.py`` measures it. Beside them: plain ``generate``, eager and
(``--compile``) with a compiled static cache; and our own sampler, unguided and guided.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine import Ceilings, merge, spread, timed
from _load import Replica
from step import Steps
from transformers import LogitsProcessor

from lenvm.backbones import load_backbone, load_eos_ids, resolve_backbone
from lenvm.decoding import Request, Sampler, SamplingParams
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.modeling import LengthValueModel
from lenvm.scoring import TorchScorer
from lenvm_client import CandidateScorer, Client
from lenvm_client.drivers.hf import generate
from lenvm_service.garbage import settle_garbage
from lenvm_service.local import LocalScorer

TEMPERATURE = 0.7
EARLY = 8  # steps at the start that are not counted


class Clock(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Notes when each step's logits are there, and when the next forward begins; both wait for the device. In between
    stand guidance and the sampler, and not the backbone, whose forward of hundreds of launches takes milliseconds more
    or less from one to the next."""

    def __init__(self) -> None:
        self.there: list[float] = []
        self.next: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.there.append(self._now(scores.device))
        return scores

    def forward(self, module: torch.nn.Module, _: Any) -> None:
        """Before a forward of the backbone."""
        if self.there:
            self.next.append(self._now(next(module.parameters()).device))

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def steps(self) -> list[float]:
        """Milliseconds of each whole step after the first ones."""
        return [1e3 * (after - before) for before, after in pairwise(self.there)][EARLY:]

    def between(self) -> list[float]:
        """Milliseconds from logits to the next forward, of each step after the first ones."""
        return [1e3 * (after - before) for before, after in zip(self.there, self.next, strict=False)][EARLY:]


class Loop:
    """``generate`` of transformers, guided by ``scorer`` or by nobody, with the same sampler; no row ends early."""

    def __init__(self, model: Any, prompts: torch.Tensor, options: argparse.Namespace) -> None:
        self.model, self.prompts, self.options = model, prompts, options

    def run(self, scorer: CandidateScorer, *, guided: bool) -> Clock:
        """The times of each step."""
        clock, tokens = Clock(), self.options.tokens + EARLY
        hook = self.model.register_forward_pre_hook(clock.forward)
        inputs = {"input_ids": self.prompts, "attention_mask": torch.ones_like(self.prompts)}
        _, report = generate(
            self.model,
            scorer,
            inputs,
            objectives={"kind": "equal_to", "target": self.options.target} if guided else None,
            temperature=TEMPERATURE,
            top_k=self.options.candidates,
            seeds=list(range(len(self.prompts))),
            on_error="raise",
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
            logits_processor=[clock],
        )
        hook.remove()
        if guided and report.guided_steps != len(self.prompts) * tokens:
            raise SystemExit(f"{report.guided_steps} steps of {len(self.prompts) * tokens} were guided")
        return clock


def loops(loop: Loop, scorers: dict[str, CandidateScorer], rounds: int) -> dict[str, dict[str, Any]]:
    """Step times of each way, ``unguided_`` before the name where nobody guides; whole answers take turns, the first
    round is thrown away."""
    ways = {f"{prefix}{name}": scorer for name, scorer in scorers.items() for prefix in ("unguided_", "")}
    clocks: dict[str, list[Clock]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, kept in clocks.items():
            clock = loop.run(ways[name], guided=name in scorers)
            if turn:
                kept.append(clock)
    return {
        name: {
            **spread([ms for clock in kept for ms in clock.steps()]),
            "between": spread([ms for clock in kept for ms in clock.between()]),
        }
        for name, kept in clocks.items()
    }


def scorer_step(model: LengthValueModel, options: argparse.Namespace) -> dict[str, Any]:
    """What ``benchmarks/step.py`` measures, at this many rows and the middle of these answers."""
    prefix = options.prompt + options.tokens // 2
    scorer = TorchScorer(model, pool_tokens=options.sequences * (prefix + 256) + 4096)
    steps = Steps(scorer, options.sequences, options.candidates, prefix)
    with torch.inference_mode():
        steps.restart()
        return spread(timed(steps.promoted, max(8, options.tokens // 2), options.device, steps.settle))


def generated(model: Any, prompts: torch.Tensor, tokens: int, repeats: int, **settings: Any) -> dict[str, Any]:
    """Milliseconds a step of transformers' ``generate``, sampling; the prompt's share is taken out."""

    def once(count: int) -> float:
        if prompts.device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            **settings,
        )
        if prompts.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    once(tokens)
    whole = [once(tokens) for _ in range(repeats)]
    short = [once(1) for _ in range(repeats)]
    return spread([(w - statistics.median(short)) / (tokens - 1) for w in whole])


def sampled(model: Any, value: LengthValueModel, eos: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Our own sampler, a step, unguided over the same candidates and guided; on a GPU a step is one graph."""
    sampler = Sampler(model, eos_ids=eos, max_rows=options.sequences)
    params = SamplingParams(TEMPERATURE, top_k=options.candidates - len(eos), max_new_tokens=options.tokens)
    scorer = TorchScorer(value)  # on a GPU it only names the model: the sampler's graph has the value model in it
    rng = np.random.default_rng(3)
    prompts = rng.integers(3, sampler.vocab_size, (options.sequences, options.prompt)).tolist()
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    found: dict[str, Any] = {}
    plain = SamplingParams(TEMPERATURE, max_new_tokens=options.tokens)
    for name in ("unguided", "guided"):
        times = []
        for _ in range(options.rounds + 1):
            guide = None
            if name == "guided":
                guide = ValueGuide(scorer, [Objective(kind="equal_to", target=options.target)] * len(requests))
            begin = time.perf_counter()
            answers = sampler.generate(requests, params if guide else plain, guide=guide)
            longest = max(len(answer.token_ids) for answer in answers)
            times.append(1e3 * (time.perf_counter() - begin) / max(1, longest))
        found[name] = {"ms": statistics.median(times[1:]), "ms_all": times[1:]}
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a shipped checkpoint or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16, help="a row")
    parser.add_argument("--prompt", type=int, default=448, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer; the prefix is 512 in the middle")
    parser.add_argument("--target", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-tokens", type=int, help="of the service")
    parser.add_argument("--compile", action="store_true", help="also generate with a compiled static cache")
    parser.add_argument("--report", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device, dtype = options.device, getattr(torch, options.dtype)
    ceilings = Ceilings.measure(device, dtype)
    value = LengthValueModel.from_pretrained(options.model, device=device, dtype=dtype)
    folder = resolve_backbone(value.config.generator.backbone)
    eos_ids = list(load_eos_ids(folder))

    def backbone() -> Any:
        return load_backbone(folder, dtype=options.dtype, device=device, attn_implementation="sdpa").eval()

    model = backbone()
    rng = np.random.default_rng(7)
    prompts = torch.from_numpy(
        rng.integers(3, int(value.decoder.config.vocab_size), (options.sequences, options.prompt))
    ).to(device)
    found: dict[str, Any] = {"sequences": options.sequences, "candidates": options.candidates}
    found |= {"prompt": options.prompt, "tokens": options.tokens}
    settle_garbage()
    step = scorer_step(value, options)
    middle = options.prompt + options.tokens // 2
    floor = ceilings.floor_ms(
        value, rows=options.sequences, tokens=options.sequences * options.candidates, prefix=middle
    )
    found |= {"step": step, "step_ms": step["ms"], "floor_ms": floor}
    loop = Loop(model, prompts, options)
    flags = ["--device", device, "--dtype", options.dtype]
    if options.cache_tokens:
        flags += ["--cache-tokens", str(options.cache_tokens)]
    with tempfile.TemporaryDirectory() as scratch:
        replica = Replica(Path(scratch), *flags, model=options.model).ready()
        try:
            with Client(replica.url, timeout=600, total_timeout=None) as client:
                local = LocalScorer(options.model, device=device, dtype=options.dtype)
                ways = loops(loop, {"in_process": local, "loopback": client}, options.rounds)
        finally:
            replica.stop()
    found["loop"] = ways
    for name in ("in_process", "loopback"):
        found[f"added_ms_{name}"] = ways[name]["between"]["ms"] - ways[f"unguided_{name}"]["between"]["ms"]
    found["added_in_process_over_step"] = found["added_ms_in_process"] / step["ms"]
    found["added_floor_ratio"] = found["added_ms_in_process"] / floor
    merge(options.report, {"guided": found}, device)  # what follows is only for comparison
    repeats = max(2, options.rounds)
    found["generate"] = {"eager": generated(model, prompts, options.tokens, repeats)}
    found["sampler"] = sampled(backbone(), value, eos_ids, options)
    merge(options.report, {"guided": found}, device)
    if options.compile:
        try:
            compiled = generated(model, prompts, options.tokens, repeats, cache_implementation="static")
            found["generate"]["compiled"] = compiled
        except Exception as error:  # transformers and the compiler of this machine: not ours to fail on
            print(f"compiled generate failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            found["generate"]["compiled"] = None
    table = {"step (scorer alone)": step, **{f"loop, {name}": row for name, row in ways.items()}}
    table |= {f"generate, {name}": row for name, row in found["generate"].items() if row is not None}
    table |= {f"own sampler, {name}": row for name, row in found["sampler"].items()}
    for name, row in table.items():
        between = f", {row['between']['ms']:6.2f} from logits to the next forward" if "between" in row else ""
        print(f"{name:24} {row['ms']:8.2f} ms a step{between}")
    print(
        f"guidance adds {found['added_ms_in_process']:.2f} ms in-process "
        f"({found['added_in_process_over_step']:.2f} x step, {found['added_floor_ratio']:.1f} x the floor), "
        f"{found['added_ms_loopback']:.2f} ms over loopback"
    )
    merge(options.report, {"guided": found}, device)


if __name__ == "__main__":
    main()
