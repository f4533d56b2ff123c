"""Prompts and answers that every export is measured on (``samples.json``): parity with torch, and the scales of int8.

Arithmetic, code, instructions, lists, dialogue and another language, short ones and long ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lenvm.backbones import encode_chat

__all__ = ["sample_ids"]


def sample_ids(tokenizer: Any, *, longest: int) -> list[tuple[list[int], int]]:
    """``(token ids of prompt and answer, length of the prompt)`` of each sample, cut to ``longest`` tokens."""
    samples = json.loads(Path(__file__).with_name("samples.json").read_text(encoding="utf-8"))
    found = []
    for sample in samples:
        ids = encode_chat(tokenizer, sample["prompt"])[: longest - 1]
        rest = [int(token) for token in tokenizer.encode(sample["answer"], add_special_tokens=False)]
        found.append(([*ids, *rest][:longest], len(ids)))
    return found
