"""How far every way to run the value model is from torch in float32: values and horizons along real texts.

    python benchmarks/parity.py --data ../shared/data --device cuda --report reports/engine.json

``--prompts`` held-out prompts and an answer each, sampled once by the model's generator in float32 on the CPU with
fixed seeds and cut at ``--answer-tokens``. Compared at the prompt boundary, after every token of the answer, and in
decoding steps with promotion (``lenvm.export.parity``): torch in bfloat16, on a GPU in float32 too, and every ONNX
Runtime variant, all of them on ``--device``. Mean and largest error of the value, and of the horizon relative to the
reference's. The report's key is ``parity``, or ``parity_cuda``. tests/integration enforce the limits on a few texts.
``--texts FILE`` keeps the texts, and what the reference says of them, for another machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _engine import merge
from cpu import answers
from numpy.typing import NDArray

from lenvm.backbones import encode_chat
from lenvm.export import VARIANTS
from lenvm.export.parity import LIMITS, TORCH_LIMITS, errors, state_logits
from lenvm.export.run import export_model
from lenvm.modeling import LengthValueModel
from lenvm.prompts import DOMAINS, load_prompts, select
from lenvm.scoring import OnnxModel, OnnxScorer, TorchScorer

Text = tuple[Sequence[int], int]


def reference(model: LengthValueModel, options: argparse.Namespace) -> tuple[list[Text], NDArray[np.float64]]:
    """The texts, and the value logits of their states by torch in float32 on the CPU."""
    if options.texts is not None and options.texts.exists():
        kept = json.loads(options.texts.read_text())
        return [(ids, length) for ids, length in kept["texts"]], np.array(kept["logits"])
    texts = texts_of(model, options)
    wanted = state_logits(TorchScorer(model), texts)
    if options.texts is not None:
        options.texts.write_text(json.dumps({"texts": texts, "logits": wanted.tolist()}))
    return texts, wanted


def texts_of(model: LengthValueModel, options: argparse.Namespace) -> list[Text]:
    """``(ids of prompt and answer, length of the prompt)``, prompts chosen by the digest of their ids."""
    prompts = [prompt for domain in DOMAINS for prompt in load_prompts(options.data, domain, "test")]
    short = [prompt for prompt in prompts if len(prompt.text) <= 4 * options.most_prompt]
    asked = [encode_chat(model.tokenizer, p.text) for p in select(short, options.prompts, seed=5)]
    sampled = answers(model, asked, options.answer_tokens)
    return [([*ids, *found], len(ids)) for ids, found in zip(asked, sampled, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a shipped checkpoint or a folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds prompts/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--most-prompt", type=int, default=256, help="tokens, about")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--texts", type=Path, help="sampled answers: written, or read where they were")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = LengthValueModel.from_pretrained(options.model)
    texts, wanted = reference(model, options)
    tokens = sum(len(ids) for ids, _ in texts)
    print(f"{len(texts)} prompts and answers, {tokens:,} tokens", flush=True)
    rows: dict[str, Any] = {}

    def compared(name: str, scorer: Any, limits: tuple[float, float]) -> None:
        row = rows[name] = errors(wanted, state_logits(scorer, texts), model.config.gamma).to_dict()
        row["within_limits"] = row["value_mean"] <= limits[0] and row["value_max"] <= limits[1]
        print(
            f"{name:16} value {row['value_mean']:.2g} (max {row['value_max']:.2g})  "
            f"horizon {100 * row['horizon_mean']:.2g} % (max {100 * row['horizon_max']:.2g} %)  "
            f"{'' if row['within_limits'] else 'BEYOND THE LIMITS'}",
            flush=True,
        )

    device = options.device
    for dtype in ("bfloat16",) if device == "cpu" else ("float32", "bfloat16"):
        other = LengthValueModel.from_pretrained(options.model, device=device, dtype=getattr(torch, dtype))
        compared(f"torch-{dtype}", TorchScorer(other, pool_tokens=1 << 15), TORCH_LIMITS[dtype])
    with tempfile.TemporaryDirectory() as scratch:
        for variant in () if options.no_onnx else VARIANTS:
            folder = Path(scratch) / variant
            export_model(model, folder, variant=variant)
            try:
                runner = OnnxModel(folder, device=device, threads=options.threads)
            except Exception as error:
                if device == "cpu":
                    raise
                print(f"onnx-{variant} is not run, its CUDA provider does not load: {str(error)[:200]}", flush=True)
                break
            compared(f"onnx-{variant}", OnnxScorer(runner), LIMITS[variant])
    found = {
        "prompts": len(texts),
        "tokens": tokens,
        "states": len(wanted),
        "against": "torch-cpu-float32",
        "runs": rows,
    }
    merge(options.report, {"parity" if device == "cpu" else "parity_cuda": found}, device)
    beyond = [name for name, row in rows.items() if not row["within_limits"]]
    if beyond:
        raise SystemExit(f"beyond the limits: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
