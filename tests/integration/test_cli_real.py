"""The command line on the real backbone: what a person types in a shell."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lenvm.backbones import DEFAULT_BACKBONE
from lenvm.modeling import find_checkpoint

PROMPT = "Why is the sky blue?"


@pytest.fixture(scope="module")
def checkpoint(real_backbone_dir: Path) -> Path:
    """The shipped checkpoint, on the real backbone."""
    return find_checkpoint(DEFAULT_BACKBONE)


def lenvm(*arguments: object, status: int = 0, stdin: str | None = None) -> tuple[str, str]:
    command = [sys.executable, "-m", "lenvm_service.cli", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, input=stdin, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def lenvm_json(*arguments: object, stdin: str | None = None) -> dict[str, Any]:
    out, err = lenvm(*arguments, "--json", stdin=stdin)
    # A slow machine shows how far it is; nothing else may stand there.
    assert [line for line in err.splitlines() if not line.startswith("Generating: ")] == []
    document: dict[str, Any] = json.loads(out)
    return document


def test_pull_says_where_the_backbone_is(real_backbone_dir: Path) -> None:
    assert lenvm("pull", DEFAULT_BACKBONE, "--verify") == (f"{real_backbone_dir}\n", "")


def test_predict_is_the_same_alone_and_in_company(checkpoint: Path) -> None:
    found = lenvm_json("predict", "-", "--model", checkpoint, "--max-tokens", 64, stdin=f"{PROMPT}\nSay hi.\n")
    (alone,) = lenvm_json("predict", PROMPT, "--model", checkpoint)["predictions"]
    first = found["predictions"][0]
    assert first["prompt_tokens"] == alone["prompt_tokens"] == 36
    assert first["value"] == pytest.approx(alone["value"], abs=1e-4)
    assert first["horizon"] == pytest.approx(math.log1p(first["value"]) / math.log(found["gamma"]))
    assert first["quantiles"]["0.5"] <= first["quantiles"]["0.9"] <= first["quantiles"]["0.95"] <= found["cap"]
    assert 0 <= first["p_exceeds_max_tokens"] <= 1


def test_score_joins_tokens_to_the_text(checkpoint: Path) -> None:
    answer = "Sunlight is scattered by the air,\nand blue light most of all."
    (row,) = lenvm_json("score", PROMPT, "--completion", answer, "--eos", "--model", checkpoint)["scores"]
    assert "".join(row["tokens"]) == answer + "<|im_end|>"
    assert len(row["values"]) == len(row["tokens"]) + 1 == len(row["length_shifts"]) + 1
    assert row["values"][-1] == 0.0
    out, _ = lenvm("score", PROMPT, "--completion", answer, "--eos", "--model", checkpoint)
    assert "·scattered" in out


def test_generate_is_repeatable_and_guidance_changes_it(checkpoint: Path) -> None:
    options = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", 24, "--seed", 3)
    plain, again = (lenvm_json(*options)["generations"] for _ in range(2))
    assert plain == again
    (row,) = plain
    assert 0 < row["content_tokens"] <= 24
    assert "sky" in row["text"].lower()
    (paper,) = lenvm_json(*options, "--at-least", 12, "--method", "paper")["generations"]
    assert paper["text_cost"] > 0
    out, err = lenvm(*options, "--equal-to", 12)
    assert "equal_to 12 by posterior" in out
    assert all(line.startswith("Generating:") for line in err.splitlines())  # progress, where it takes long


def test_a_prompt_beyond_the_context_is_one_line(checkpoint: Path) -> None:
    out, err = lenvm("predict", "-", "--model", checkpoint, status=1, stdin="word " * 9000)
    assert out == ""
    assert err.startswith("error: it has 90")
    assert err.count("\n") == 1
