"""Targets in words on the real backbone, as if it had another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm.backbones import encode_chat, load_backbone
from lenvm.modeling import LengthValueModel
from lenvm_client import TextAdapter
from lenvm_client._text import count_units
from lenvm_client.drivers.hf import generate
from lenvm_service.local import LocalScorer

NAME = "smollm2-135m-instruct"
TARGETS = (6, 20)


@pytest.fixture(scope="module")
def scorer(real_backbone_dir: Path) -> LocalScorer:
    return LocalScorer(NAME)


@pytest.fixture(scope="module")
def backbone(real_backbone_dir: Path) -> Any:
    return load_backbone(real_backbone_dir, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def tokenizer(real_backbone_dir: Path) -> Any:
    return LengthValueModel.from_pretrained(NAME).tokenizer


def test_targets_in_words_move_the_length_through_text(backbone: Any, scorer: LocalScorer, tokenizer: Any) -> None:
    """The prompt keeps its template, the answer goes through text, as with another tokenizer."""
    ids = encode_chat(tokenizer, "Tell me about the sea.")
    text = TextAdapter(
        lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        lambda words: list(tokenizer.encode(words, add_special_tokens=False)),
        encode_prompt=lambda tokens: list(tokens),
        eos_id=tokenizer.eos_token_id,
    )
    out, report = generate(
        backbone,
        scorer,
        torch.tensor([ids, ids]),
        objectives=[{"kind": "equal_to", "target": target, "unit": "words"} for target in TARGETS],
        temperature=0.7,
        max_new_tokens=40,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        seeds=[1, 2],
        on_error="raise",
        text=text,
    )
    answers = [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, len(ids) :].tolist()]
    words = [count_units(answer, "words") for answer in answers]
    assert words[0] + 4 < words[1], answers
    assert report.approximate == ("tokenizer", "words")
    assert report.guided_steps == report.steps
    assert report.prefix_resends == 0
