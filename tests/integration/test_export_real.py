"""Exports of the real checkpoint: parity of every variant with torch, and a service without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lenvm.export import VARIANTS
from lenvm.export.parity import LIMITS, TORCH_LIMITS, check_parity, compare
from lenvm.export.run import export_model
from lenvm.export.samples import sample_ids
from lenvm.modeling import LengthValueModel
from lenvm.scoring import OnnxModel, OnnxScorer, TorchScorer
from lenvm_client import Client
from tests.integration.conftest import start_service

NAME = "smollm2-135m-instruct"
# Not among the samples that an export is fitted on and checked with.
TEXTS = (
    ("How do bees make honey?", "Bees collect nectar from flowers and carry it to the hive in a special stomach."),
    ("Write a haiku about rain.", "Soft drops on the roof,\nthe garden drinks without haste,\na snail sets out."),
    (
        "Sort the list [3, 1, 2] in Python and explain the complexity of what you use.",
        "```python\nprint(sorted([3, 1, 2]))\n```\n\n`sorted` uses Timsort, which is O(n log n).",
    ),
    ("Tom has 12 apples and gives away a third. How many are left?", "A third of 12 is 4, so Tom has 12 - 4 = 8 left."),
    (
        "Give me a recipe for pancakes, in exactly four steps.",
        "1. Mix flour, milk and eggs.\n2. Heat a pan.",
    ),
    ("Who wrote Faust?", "Faust was written by Johann Wolfgang von Goethe."),
)


@pytest.fixture(scope="module")
def model(real_backbone_dir: Path) -> LengthValueModel:
    return LengthValueModel.from_pretrained(NAME)


@pytest.fixture(scope="module")
def exports(model: LengthValueModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("exports")
    for variant in VARIANTS:
        export_model(model, home / variant, variant=variant)
    return {variant: home / variant for variant in VARIANTS}


def _texts(model: LengthValueModel) -> list[tuple[list[int], int]]:
    from lenvm.backbones import encode_chat

    texts = []
    for prompt, answer in TEXTS:
        ids = encode_chat(model.tokenizer, prompt)
        texts.append(([*ids, *model.tokenizer.encode(answer, add_special_tokens=False)], len(ids)))
    return texts


def test_bfloat16_gives_what_float32_gives(model: LengthValueModel) -> None:
    import torch

    other = LengthValueModel.from_pretrained(NAME, dtype=torch.bfloat16)
    found = compare(TorchScorer(model), TorchScorer(other), _texts(model))
    mean, largest = TORCH_LIMITS["bfloat16"]
    assert 0 < found.value_mean <= mean
    assert found.value_max <= largest
    assert found.horizon_mean < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_what_torch_gives(variant: str, model: LengthValueModel, exports: dict[str, Path]) -> None:
    texts = _texts(model)
    found = compare(TorchScorer(model), OnnxScorer(OnnxModel(exports[variant])), texts)
    check_parity(variant, found)  # type: ignore[arg-type]
    assert found.states > 100
    assert found.horizon_mean < {"fp32": 1e-4, "fp16": 0.02, "int8": 0.12}[variant]
    assert set(LIMITS) == set(VARIANTS)
    assert len(sample_ids(model.tokenizer, longest=64)) >= 10


# An environment without torch: it cannot be imported, however it is asked for.
WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "gguf", "accelerate", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ("torch", "onnx") else find(name, package)
from lenvm_service.cli import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))


def test_predictions_without_torch(model: LengthValueModel, exports: dict[str, Path]) -> None:
    from lenvm.backbones import encode_chat

    prompt = TEXTS[0][0]
    done = without_torch("predict", prompt, "--model", str(exports["fp32"]), "--json")
    assert done.returncode == 0, done.stderr
    (state,) = TorchScorer(model).open([encode_chat(model.tokenizer, prompt)])
    value = json.loads(done.stdout)["predictions"][0]["value"]
    assert value == pytest.approx(-1 / (1 + np.exp(-state.logit)), abs=1e-4)
    refused = without_torch("predict", prompt, "--model", NAME)
    assert refused.returncode == 1
    assert "pip install 'lenvm[serve]'" in refused.stderr


def test_the_service_answers_from_an_export(model: LengthValueModel, exports: dict[str, Path], tmp_path: Path) -> None:
    running = start_service(tmp_path, "--backend", "onnx", "--model", str(exports["fp32"]))
    try:
        with Client(running.url, timeout=60) as client:
            prediction = client.predict_length(TEXTS[0][0]).prediction
            first = client.score_candidates(
                [{"session": prediction.session, "candidates": [504, 5212], "generated": 0}]
            )
            again = client.score_candidates(
                [{"session": first[0].session, "append": [504], "candidates": [504], "generated": 1}]  # type: ignore[union-attr]
            )
            assert first[0].values[0] == pytest.approx(again[0].value, abs=1e-6)  # type: ignore[union-attr]
            (info,) = client.info().models
            assert info.name == NAME
        assert running.metric("lenvm_tokens_total", source="promoted") == 1
    finally:
        assert running.stop() == 0
