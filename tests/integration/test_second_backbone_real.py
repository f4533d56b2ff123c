"""A second real backbone, Gemma 3 270M, guided by a value model with another tokenizer."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm.backbones import cache_root, load_tokenizer
from lenvm.evaluation.lifebench import length_score
from lenvm_client.drivers.hf import generate
from lenvm_service.local import LocalScorer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAME = "smollm2-135m-instruct"
ASKED = (
    ("Why is the sky blue?", 8),
    ("How do bees make honey?", 20),
    ("What causes earthquakes?", 8),
    ("Why do cats purr?", 20),
)


@pytest.fixture(scope="module")
def second(real_backbone_dir: Path, real_parts_required: bool) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("_second", BENCHMARKS / "_second.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["_second"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not real_parts_required and not (cache_root() / "tests" / module.NAME).is_dir():
        pytest.skip(f"{module.NAME} is not in the cache (LENVM_REQUIRE_REAL=1 fetches it)")
    yield module.Second.load()
    del sys.modules["_second"]


def answers(second: Any, scorer: LocalScorer, text: Any) -> tuple[list[list[int]], Any]:
    """Content tokens of an answer to each question, and the report; guided where ``text`` is given."""
    prompts = [second.prompt(question) for question, _ in ASKED]
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    inputs = {
        "input_ids": torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]),
        "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
    }
    sequences, report = generate(
        second.model,
        scorer,
        inputs,
        objectives=[{"kind": "equal_to", "target": target} if text else None for _, target in ASKED],
        temperature=0.7,
        max_new_tokens=28,
        seeds=range(1, 1 + len(ASKED)),
        eos_token_id=second.end_ids[0],
        stop_token_ids=second.end_ids[1:],
        pad_token_id=0,
        on_error="raise",
        text=text,
    )
    rows = sequences[:, width:].tolist()
    ends = {0, *second.end_ids}
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in rows], report


def test_the_fetched_backbone_speaks(second: Any) -> None:
    prompt = torch.tensor([second.prompt("What is the capital of France?")])
    options = {"do_sample": False, "max_new_tokens": 10, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    out = second.model.generate(prompt, **options)
    assert "Paris" in second.tokenizer.decode(out[0, prompt.shape[1] :])


def test_targets_in_its_own_tokens(second: Any, real_backbone_dir: Path) -> None:
    """Length scores above those of unguided answers, and the report says that they rest on an estimate."""
    scorer = LocalScorer(NAME)
    guided, report = answers(second, scorer, second.text(load_tokenizer(real_backbone_dir)))
    unguided, plain = answers(second, scorer, None)
    targets = [target for _, target in ASKED]
    means = [
        statistics.fmean(length_score(len(ids), target) for ids, target in zip(rows, targets, strict=True))
        for rows in (guided, unguided)
    ]
    lengths = [[len(ids) for ids in rows] for rows in (guided, unguided)]
    assert means[0] > means[1] + 20, lengths
    assert max(lengths[0][0::2]) < min(lengths[0][1::2]), lengths  # short and long targets in turn
    assert report.approximate == ("tokenizer",)
    assert plain.approximate == ()
    assert report.guided_steps == report.steps == sum(lengths[0]) + len(ASKED)  # the end is a step too
    assert report.prefix_resends == 0
