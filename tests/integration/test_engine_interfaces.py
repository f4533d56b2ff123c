"""The engines' own interface files: out of the published packages (``make engines``), or unpacked wheels of other
versions in $LENVM_ENGINE_SOURCES.

The record is compared with them, and the drivers run on the real base classes: the files are loaded one by one, without
the packages around them, which need a GPU build of torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lenvm_client import GuidedDecoder
from lenvm_client.drivers import hf
from tests.support import decoding_loop as loops
from tests.support.engine_interfaces import RECORD, differences
from tests.support.engine_sources import FOLDER
from tests.unit import test_drivers as unit
from tests.unit.client_fakes import FakeScorer

TEMPERATURE = 0.8


def sources(engine: str) -> Path:
    record = RECORD[engine]
    unpacked = os.environ.get("LENVM_ENGINE_SOURCES")
    if unpacked:
        return Path(unpacked)
    if (FOLDER / f".{record['package']}").is_file():
        return FOLDER
    missing = f"{record['package']}'s interface files are not there: run make engines"
    if any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in ("CI", "LENVM_REQUIRE_REAL")):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.mark.parametrize("engine", RECORD)
def test_interfaces_are_as_recorded(engine: str) -> None:
    record = RECORD[engine]
    assert differences(engine, sources(engine)) == [], f"recorded from {record['package']} {record['version']}"


def load(monkeypatch: pytest.MonkeyPatch, folder: Path, path: str, name: str) -> ModuleType:
    """One source file as the module ``name``."""
    loops.module(monkeypatch, name)
    spec = importlib.util.spec_from_file_location(name, folder / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def driver(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    full = f"lenvm_client.drivers.{name}"
    monkeypatch.delitem(sys.modules, full, raising=False)
    module = importlib.import_module(full)
    monkeypatch.setitem(sys.modules, full, module)  # so that it goes again
    decoder = GuidedDecoder(FakeScorer(), (), on_error="raise")
    monkeypatch.setattr(module, "_decoder", lambda: decoder, raising=False)
    return module


@pytest.fixture(scope="module")
def model(tiny_backbone: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)


@pytest.fixture(scope="module")
def next_logits(model: Any) -> Callable[[Sequence[Sequence[int]]], torch.Tensor]:
    def run(prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([model(torch.tensor([list(prefix)])).logits[0, -1] for prefix in prefixes])

    return run


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    out = []
    for request in unit.requests():
        sequences, _ = hf.generate(
            model,
            FakeScorer(),
            torch.tensor([request.prompt]),
            objectives=request.objective,
            temperature=TEMPERATURE,
            top_k=unit.TOP_K,
            seeds=[request.seed],
            eos_token_id=unit.EOS,
            stop_token_ids=[unit.STOP],
            max_new_tokens=unit.LENGTH,
            pad_token_id=0,
        )
        out.append(sequences[0, len(request.prompt) :].tolist())
    return out


def decode(host: loops.Host, next_logits: Any) -> list[list[int]]:
    return loops.decode(host, next_logits, unit.requests(), ends=unit.ENDS, max_tokens=unit.LENGTH)


def test_vllm_on_the_real_classes(monkeypatch: pytest.MonkeyPatch, next_logits: Any, expected: list[list[int]]) -> None:
    folder = sources("vllm")
    loops.install_vllm(monkeypatch, v2=True)
    monkeypatch.setattr(sys.modules["vllm"], "SamplingParams", loops.VllmParams, raising=False)
    name = "vllm.v1.sample.logits_processor"
    v1 = load(monkeypatch, folder, f"{name.replace('.', '/')}/interface.py", f"{name}.interface")
    loops.module(monkeypatch, name, LogitsProcessor=v1.LogitsProcessor, MoveDirectionality=v1.MoveDirectionality)
    name = "vllm.v1.worker.gpu.sample.logits_processor"
    v2 = load(monkeypatch, folder, f"{name.replace('.', '/')}/interface.py", name)
    # Its dataclasses are made of what the stand-in gives: a field more or less raises.
    monkeypatch.setattr(loops, "BatchUpdate", v1.BatchUpdate)
    monkeypatch.setattr(loops, "MoveDirectionality", v1.MoveDirectionality)
    ours = driver(monkeypatch, "vllm")
    assert issubclass(ours.LenVMLogitsProcessorV1, v1.LogitsProcessor)
    assert issubclass(ours.LenVMLogitsProcessorV2, v2.LogitsProcessor)
    params = unit.vllm_params(TEMPERATURE)
    assert decode(loops.VllmV1(ours, params), next_logits) == expected
    assert decode(loops.VllmV2(ours, params), next_logits) == expected


def test_sglang_on_the_real_class(monkeypatch: pytest.MonkeyPatch, next_logits: Any, expected: list[list[int]]) -> None:
    folder = sources("sglang")
    loops.install_sglang(monkeypatch)
    path = "sglang/srt/sampling/custom_logit_processor.py"
    real = load(monkeypatch, folder, path, path[:-3].replace("/", "."))
    ours = driver(monkeypatch, "sglang")
    assert issubclass(ours.LenVMLogitProcessor, real.CustomLogitProcessor)
    # As it travels: by its name, not by its code.
    text = ours.LenVMLogitProcessor.to_str()
    assert len(text) < 400
    assert isinstance(real.CustomLogitProcessor.from_str(text), ours.LenVMLogitProcessor)
    monkeypatch.setattr(ours, "request_fields", lambda objective, top_k: fields(objective, top_k))
    host = loops.Sglang(ours, lambda request: unit.sglang_sampling(ours, request, TEMPERATURE), {unit.EOS})
    assert decode(host, next_logits) == expected


def fields(objective: Any, top_k: int) -> dict[str, Any]:
    """``request_fields``, whose processor is checked above in its real form."""
    params = {"lenvm": dict(objective), "lenvm_top_k": top_k}
    return {
        "custom_logit_processor": "lenvm_client.drivers.sglang:LenVMLogitProcessor",
        "sampling_params": {"custom_params": params},
    }


def test_dynamo_on_the_real_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sources("dynamo")
    real = load(monkeypatch, folder, "dynamo/logits_processing/base.py", "dynamo.logits_processing.base")
    ours = driver(monkeypatch, "dynamo")
    request = ours.GuidedRequest(objective=None, end_ids=unit.ENDS)
    processor = ours.LenVMLogitsProcessor(GuidedDecoder(FakeScorer(), ()), request)
    assert isinstance(processor, real.BaseLogitsProcessor)
    logits = torch.randn(128)
    assert processor([1, 2, 3], logits) is None
    assert torch.isfinite(logits).sum() == 1
