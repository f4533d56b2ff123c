"""Prompts a second through the scorer against transformers' ``AutoModel`` at its best batch size.

    python benchmarks/prefill.py --device cuda --dtype bfloat16 --report reports/engine.json

Prompts have mixed lengths around ``--tokens``. Ours packs them side by side and gives the value at each prompt's end;
AutoModel (no logits, ``sdpa``) pads each batch to its longest, sorted by length, and gives last hidden states. What is
counted are the prompts' own tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine import Ceilings, load, merge, spread, timed

from lenvm.backbones import load_backbone
from lenvm.scoring import ScoreRow, TorchScorer


def ours(scorer: TorchScorer, prompts: list[list[int]]) -> None:
    """One call for all prompts, as a batch of /predict_length is; no state is kept."""
    for answer in scorer.score([ScoreRow(append=prompt) for prompt in prompts]):
        answer.state.close()


def padded(model: Any, prompts: list[list[int]], batch: int, device: str) -> None:
    """AutoModel over batches of like length."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for row, prompt in enumerate(part):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            mask[row, : len(prompt)] = 1
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state[:, -1].cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="135m", choices=["135m"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batches", default="8,32,64,128,256", help="AutoModel's batch sizes to try")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), options.device
    model = load(options.model, device, dtype)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(options.tokens), 0.5, options.prompts).astype(int), 8, 8 * options.tokens)
    vocabulary = int(model.decoder.config.vocab_size)
    prompts = sorted((rng.integers(3, vocabulary, n).tolist() for n in lengths), key=len)
    tokens = int(lengths.sum())
    rates: dict[str, Any] = {}
    with torch.inference_mode():
        scorer = TorchScorer(model, pool_tokens=2 * tokens + 64 * len(prompts))
        found = spread(timed(lambda: ours(scorer, prompts), options.repeats, device))
        plain: Any = load_backbone(model.backbone_dir, dtype=options.dtype, device=device).get_decoder()
        plain.set_attn_implementation("sdpa")
        for batch in (int(part) for part in options.batches.split(",")):
            times = timed(lambda batch=batch: padded(plain, prompts, batch, device), options.repeats, device)  # type: ignore[misc]
            rates[str(batch)] = tokens / (spread(times)["ms"] / 1e3)
    ceilings = Ceilings.measure(device, dtype)
    rate, best = tokens / (found["ms"] / 1e3), max(rates.values())
    # The least time of this much arithmetic; weights and caches are small beside it.
    floor = ceilings.floor_ms(model, rows=0, tokens=tokens, prefix=int(lengths.mean() / 2))
    metrics = {
        "tokens_per_s": rate,
        "automodel_tokens_per_s": rates,
        "ratio": rate / best,
        "floor_ratio": found["ms"] / floor,
        "prompts": len(prompts),
        "mean_tokens": tokens / len(prompts),
        **found,
    }
    print(
        f"scorer {rate:,.0f} tokens/s, AutoModel at best {best:,.0f}: {rate / best:.2f} x; "
        f"{metrics['floor_ratio']:.1f} x the floor"
    )
    merge(options.report, {"prefill": metrics}, device)


if __name__ == "__main__":
    main()
