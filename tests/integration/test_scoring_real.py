"""The scorer on the real backbone and the shipped checkpoint, against transformers' own full forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenvm.backbones import encode_chat, load_backbone
from lenvm.distribution import log_softmax, value_at
from lenvm.lora import merge
from lenvm.modeling import LengthValueModel, find_checkpoint
from lenvm.returns import value_from_logit
from lenvm.scoring import ScoreRow, TorchScorer

NAME = "smollm2-135m-instruct"
PROMPTS = (
    "What is 17 times 24?",
    "Write a Python function that tells whether a string is a palindrome. Explain how it works.",
    "Give me three reasons to visit Iceland in winter.",
    "Hi!",
)


@pytest.fixture(scope="module")
def model(real_backbone_dir: Path) -> LengthValueModel:
    return LengthValueModel.from_pretrained(NAME)


@pytest.fixture(scope="module")
def full_forward(real_backbone_dir: Path, model: LengthValueModel) -> Any:
    """``ids -> z [T]``: adapter merged into a fresh backbone, transformers' own attention, no cache, no packing."""
    decoder = load_backbone(real_backbone_dir, attn_implementation="sdpa").get_decoder()
    assert model.config.lora_scale is not None
    merge(decoder, find_checkpoint(NAME), model.config.lora_scale)

    def run(ids: Sequence[int]) -> Any:
        with torch.no_grad():
            return model.head(decoder(torch.tensor([list(ids)])).last_hidden_state[0]).logits.numpy()

    return run


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_cached_masked_promoted_and_ragged_scoring_equal_a_full_forward(
    model: LengthValueModel, full_forward: Any
) -> None:
    scorer = TorchScorer(model)
    texts = [encode_chat(model.tokenizer, prompt) for prompt in PROMPTS]
    states: list[Any] = scorer.open(texts)
    assert scorer.stats.forwards == 1
    for text, state in zip(texts, states, strict=True):
        close(state.logit, full_forward(text)[-1])
    rng = np.random.default_rng(0)
    chosen: list[list[int]] = [[] for _ in texts]
    steps, width = 6, 8
    forwards, tokens = scorer.stats.forwards, scorer.stats.tokens
    for step in range(steps):
        rows = [
            ScoreRow(state, append, rng.choice(49152, width, replace=False).tolist())
            for state, append in zip(states, chosen, strict=True)
        ]
        answers = scorer.score(rows)
        for at, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            texts[at] = [*texts[at], *row.append]
            if step in (0, steps - 1):
                for candidate, logit in zip(row.candidates, answer.candidate_logits, strict=True):
                    close(logit, full_forward([*texts[at], candidate])[-1])
            close(answer.logits[-1], full_forward(texts[at])[-1])
        states = [answer.state for answer in answers]
        chosen = [[row.candidates[step]] for row in rows]
    assert scorer.stats.forwards - forwards == steps
    assert scorer.stats.tokens - tokens == steps * width * len(texts)


def test_values_along_an_answer_equal_a_full_forward(model: LengthValueModel, full_forward: Any) -> None:
    prompt = encode_chat(model.tokenizer, PROMPTS[0])
    answer = model.tokenizer.encode("17 times 24 is 408, because 17 x 20 = 340 and 17 x 4 = 68.")
    score = TorchScorer(model).token_values(prompt, answer)
    assert score.logits.shape == (len(answer) + 1,)
    close(score.logits, full_forward([*prompt, *answer])[len(prompt) - 1 :])


def test_the_shipped_checkpoint_gives_the_same_values_on_every_load(model: LengthValueModel) -> None:
    ids = [encode_chat(model.tokenizer, prompt) for prompt in PROMPTS]
    first = [state.logit for state in TorchScorer(model).open(ids)]
    second = [state.logit for state in TorchScorer(LengthValueModel.from_pretrained(NAME)).open(ids)]
    assert first == second
    # Pinned: another value means another checkpoint, backbone, tokenizer or template.
    np.testing.assert_allclose(first, PINNED, atol=2e-4, rtol=0)


PINNED = [-1.237816, -0.033041, -0.290584, -1.379725]


def test_the_two_heads_agree(model: LengthValueModel) -> None:
    """The value from the value logit and the one from the length distribution, along a real answer."""
    prompt = encode_chat(model.tokenizer, PROMPTS[2])
    answer = model.tokenizer.encode(
        "Iceland in winter offers the northern lights, quiet hot springs and ice caves. First, the long nights are "
        "ideal to watch the sky. Second, bathing in warm water under falling snow is unforgettable."
    )
    score = TorchScorer(model).token_values(prompt, answer)
    bins = model.config.head.bins
    assert bins is not None
    assert score.bin_logprobs is not None
    from_bins = value_at(log_softmax(score.bin_logprobs), bins, model.config.gamma)
    gap = np.abs(from_bins - value_from_logit(score.logits))
    assert gap.mean() < 0.03
    assert gap.max() < 0.12


def test_longer_tasks_have_longer_horizons(model: LengthValueModel) -> None:
    """Not a figure, a sign check: an essay is longer than a yes, and the end of an answer is nearer than its start."""
    texts = ("Answer with yes or no: is water wet?", "Write a long and detailed essay about the history of Rome.")
    short, long = TorchScorer(model).open([encode_chat(model.tokenizer, text) for text in texts])
    assert long.logit > short.logit + 0.5
