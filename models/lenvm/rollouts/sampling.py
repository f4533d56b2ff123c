"""Make rollouts: sample every prompt several times and store the answers as they end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lenvm.backbones import backbone_sha256, encode_chat, load_backbone, load_eos_ids, load_tokenizer, resolve_backbone
from lenvm.decoding import Request, Sampler, SamplingParams
from lenvm.prompts import Prompt
from lenvm.rollouts.records import Key, Rollout, RolloutSet
from lenvm.rollouts.store import RolloutWriter, completed, read_rollouts

__all__ = ["LocalGenerator", "sample_rollouts", "stream_seed"]


def stream_seed(prompt_id: str, sample: int, seed: int) -> int:
    """Seed of one answer's random stream: a function of the prompt, the sample's number and the run's seed alone."""
    digest = hashlib.sha256(f"{seed}:{sample}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


class LocalGenerator:
    """A backbone on this machine that generates: tokenizer, weights and the batched sampler.

    Args:
        backbone: a name, folder or hub id.
        device: ``cpu`` or ``cuda``.
        dtype: precision of the weights; default bfloat16 on CUDA, float32 on the CPU.
        max_rows: answers in flight at once.
    """

    def __init__(
        self, backbone: str, *, device: str = "cpu", dtype: str | None = None, max_rows: int | None = None
    ) -> None:
        self.name = backbone
        folder = resolve_backbone(backbone)
        self.sha256 = backbone_sha256(folder)
        self.tokenizer = load_tokenizer(folder)
        dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        self.model = load_backbone(folder, dtype=dtype, device=device)
        self.eos_ids = load_eos_ids(folder)
        rows = max_rows or (1024 if device.startswith("cuda") else 64)
        self.sampler = Sampler(self.model, eos_ids=self.eos_ids, max_rows=rows)

    def describe(self, params: SamplingParams) -> dict[str, Any]:
        """What identifies the policy: stored with rollouts, so that two policies never mix in a folder."""
        return {"backbone": self.name, "sha256": self.sha256, **asdict(params)}


def sample_rollouts(
    generator: LocalGenerator,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    samples: int,
    params: SamplingParams,
    seed: int = 0,
    max_prompt_tokens: int = 1024,
    flush_s: float = 60.0,
    about: Mapping[str, Any] | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> RolloutSet:
    """``samples`` answers of each prompt. What ``folder`` holds already is used and the rest sampled into it, so that a
    rerun goes on; a prompt given twice counts once.

    Prompts of more than ``max_prompt_tokens`` tokens are left out. ``on_done(answers, tokens)`` reports progress; its
    first call tells how many answers were there before. ``about`` is more that identifies the policy, such as a system
    prompt; it goes into the manifest. A kill costs the answers of the last ``flush_s`` seconds, at most.
    """
    description = generator.describe(params) | {"seed": seed} | dict(about or {})
    done = completed(folder, description)
    keys, requests = [], []
    wanted: set[Key] = set()
    for prompt in prompts:
        ids = encode_chat(generator.tokenizer, prompt.conversation)
        if len(ids) > max_prompt_tokens:
            continue
        for sample in range(samples):
            key = (prompt.id, stream_seed(prompt.id, sample, seed))
            if key not in done and key not in wanted:
                keys.append(prompt)
                requests.append(Request(ids, key[1]))
            wanted.add(key)
    if on_done:
        on_done(len(done & wanted), 0)
    if not wanted:
        return RolloutSet((), description)
    with RolloutWriter(folder, description, flush_s=flush_s) as writer:
        for index, generation in generator.sampler.stream(requests, params):
            prompt, request = keys[index], requests[index]
            writer.add(
                Rollout(
                    prompt_id=prompt.id,
                    domain=prompt.domain,
                    prompt_ids=list(request.prompt_ids),
                    token_ids=generation.token_ids,
                    finished=generation.finished,
                    seed=request.seed,
                )
            )
            if on_done:
                on_done(1, len(generation.token_ids))
    return read_rollouts(folder).with_keys(wanted)  # not what an earlier call asked for beside it
