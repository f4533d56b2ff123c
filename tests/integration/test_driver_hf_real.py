"""The transformers driver on the real backbone and the shipped checkpoint, scored in-process as the service does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm.backbones import encode_chat, load_backbone
from lenvm.decoding import Request, Sampler, SamplingParams
from lenvm.guidance import Objective
from lenvm.guides import ValueGuide
from lenvm.modeling import LengthValueModel
from lenvm.scoring import TorchScorer
from lenvm_client.drivers.hf import generate
from lenvm_service.local import LocalScorer

NAME = "smollm2-135m-instruct"
EOS = 2
PROMPTS = ("Hi!", "What is 17 times 24?", "Name three fruits.")
OBJECTIVES = (Objective("equal_to", target=16), None, Objective("scale", factor=0.5))
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def prompt_ids(real_backbone_dir: Path) -> list[list[int]]:
    tokenizer = LengthValueModel.from_pretrained(NAME).tokenizer
    return [encode_chat(tokenizer, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def guided(real_backbone_dir: Path, prompt_ids: list[list[int]]) -> tuple[list[list[int]], Any]:
    width = max(map(len, prompt_ids))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids]),
    }
    sequences, report = generate(
        load_backbone(real_backbone_dir, attn_implementation="sdpa"),
        LocalScorer(NAME),
        inputs,
        objectives=[None if objective is None else objective.to_dict() for objective in OBJECTIVES],
        temperature=0.7,
        max_new_tokens=32,
        eos_token_id=EOS,
        pad_token_id=0,
        seeds=SEEDS,
        on_error="raise",
    )
    answers = []
    for row in sequences[:, width:].tolist():
        answers.append(row[: row.index(EOS)] if EOS in row else row)
    return answers, report


def test_generate_gives_the_tokens_of_the_sampler(
    guided: tuple[list[list[int]], Any], real_backbone_dir: Path, prompt_ids: list[list[int]]
) -> None:
    answers, report = guided
    guide = ValueGuide(TorchScorer(LengthValueModel.from_pretrained(NAME)), OBJECTIVES)
    requests = [Request(ids, seed) for ids, seed in zip(prompt_ids, SEEDS, strict=True)]
    sampler = Sampler(load_backbone(real_backbone_dir), eos_ids=[EOS])
    params = SamplingParams(temperature=0.7, top_k=16, max_new_tokens=32)
    for generation, answer, row in zip(
        sampler.generate(requests, params, guide=guide), answers, report.rows, strict=True
    ):
        assert answer == generation.token_ids
        assert row.text_cost == pytest.approx(generation.text_cost, abs=1e-2)
        assert row.forced_stop == generation.forced_stop


def test_the_report_counts_every_step(guided: tuple[list[list[int]], Any]) -> None:
    answers, report = guided
    steps = [min(32, len(answer) + 1) for answer in answers]
    assert [row.steps for row in report.rows] == steps
    assert [row.guided_steps for row in report.rows] == [steps[0], 0, steps[2]]
    assert report.fallbacks == report.prefix_resends == 0
    assert report.calls == max(steps[0], steps[2])
    assert report.rows[0].text_cost > 0
    assert abs(len(answers[0]) - 16) <= 2
