"""Export: what is written, what is refused, and variants against torch, on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lenvm.config import GRAPH_FILE, GeneratorRef, HeadConfig, LenVMConfig
from lenvm.distribution import LengthBins
from lenvm.errors import ArtifactError, BackboneError, InvalidRequestError, ParityError
from lenvm.export import backend_of
from lenvm.export.artifact import DATA_FILE, ExportInfo
from lenvm.export.parity import LIMITS, Parity, check_parity, compare
from lenvm.export.quantize import quantize
from lenvm.export.run import export_model
from lenvm.export.weights import read_weights
from lenvm.modeling import LengthValueModel
from lenvm.scoring import OnnxModel, OnnxScorer, ScoreRow, TorchScorer
from lenvm_service.cli import main

RNG = np.random.default_rng(11)


def texts(count: int = 6) -> list[tuple[list[int], int]]:
    return [(RNG.integers(3, 128, 40).tolist(), 12) for _ in range(count)]


def test_a_folder_that_stands_alone(tiny_export: Path, tiny_checkpoint: Path) -> None:
    config, source = LenVMConfig.load(tiny_export), LenVMConfig.load(tiny_checkpoint)
    config.verify_files(tiny_export)
    assert replace(config, files={}, lora_scale=source.lora_scale) == replace(source, files={})
    assert set(config.files) == {GRAPH_FILE, DATA_FILE}
    info = ExportInfo.load(tiny_export)
    assert (info.variant, info.context, info.vocab_size, info.eos_ids) == ("fp32", 512, 128, (2,))
    assert info.checkpoint_files == source.files
    assert info.parity["value_max"] < LIMITS["fp32"][1]
    assert OnnxModel(tiny_export).tokenizer.encode("ab") == LengthValueModel.from_pretrained(
        tiny_checkpoint
    ).tokenizer.encode("ab")
    assert not [path for path in tiny_export.parent.iterdir() if path != tiny_export]  # no scratch is left


def test_the_graph_has_dynamic_axes_and_past_and_present(tiny_export: Path) -> None:
    session = OnnxModel(tiny_export).session
    inputs = {value.name: value.shape for value in session.get_inputs()}
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert inputs["mask"] == ["rows", "width", "keys"]
    for layer in range(2):
        for what in ("keys", "values"):
            assert inputs[f"past_{what}.{layer}"] == outputs[f"present_{what}.{layer}"] == ["slots", 2 * 8]
    assert outputs["logits"] == ["wanted"]


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_variants_are_near(variant: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = LengthValueModel.from_pretrained(tiny_checkpoint)
    sequences = texts()
    info = export_model(model, tmp_path / "out", variant=variant, texts=sequences)
    found = compare(TorchScorer(model), OnnxScorer(OnnxModel(tmp_path / "out")), sequences)
    assert 1e-6 < found.value_mean <= LIMITS[variant][0]
    assert info.parity["value_mean"] == pytest.approx(found.value_mean, rel=1e-3)
    assert info.dtype == ("float16" if variant == "fp16" else "float32")


def test_an_int8_answer_does_not_depend_on_its_neighbours(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_model(LengthValueModel.from_pretrained(tiny_checkpoint), tmp_path / "out", variant="int8", texts=texts())
    scorer = OnnxScorer(OnnxModel(tmp_path / "out", threads=1))
    rows = [ScoreRow(append=ids, candidates=[5, 6]) for ids, _ in texts(4)]
    together = scorer.score(rows)
    for row, answer in zip(rows, together, strict=True):
        (alone,) = scorer.score([row])
        np.testing.assert_allclose(alone.candidate_logits, answer.candidate_logits, atol=1e-5)


def test_products_with_outlier_tokens_stay_in_float32(tiny_checkpoint: Path) -> None:
    model = LengthValueModel.from_pretrained(tiny_checkpoint)
    sequences = texts()
    for ids, _ in sequences:
        ids[0] = 3
    with torch.no_grad():  # token 3 alone is huge inside the first feed-forward layer, in every channel
        layer = model.decoder.layers[0].mlp
        direction = model.decoder.embed_tokens.weight[3]
        for product in (layer.gate_proj, layer.up_proj):
            product.weight += 5 * direction / direction.norm()
    products = quantize(model, read_weights(model), [ids for ids, _ in sequences]).products
    assert (0, "down") not in products
    assert (0, "up") in products


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("bins", [LengthBins(cap=64), None], ids=["bins", "no-bins"])
def test_other_architectures_and_heads(kind: str, bins: Any, tiny_backbone: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (backbone / name).write_bytes((tiny_backbone / name).read_bytes())
    config = AutoConfig.for_model(
        kind,
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16 if kind == "qwen3" else 8,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_config(config)
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data.uniform_(0.5, 1.5)
        made.save_pretrained(backbone)
        head = HeadConfig(0 if bins is None else 8, bins, "value" if bins is None else "logit")
        model = LengthValueModel.create(
            backbone, name="other", head=head, gamma=0.99, generator=GeneratorRef("x", 0.7, 1.0, 64)
        )
        if bins is None:
            torch.nn.init.constant_(model.head.output.bias, -0.5)
    model.save_pretrained(tmp_path / "checkpoint")
    info = export_model(LengthValueModel.from_pretrained(tmp_path / "checkpoint"), tmp_path / "out", texts=texts())
    assert info.parity["value_max"] < 1e-5
    (state,) = OnnxScorer(OnnxModel(tmp_path / "out")).open([[5, 6, 7]])
    assert (state.bin_logprobs is None) == (bins is None)


def test_nothing_is_written_where_parity_fails(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LengthValueModel.from_pretrained(tiny_checkpoint)
    monkeypatch.setitem(LIMITS, "fp32", (1e-12, 1e-12))
    with pytest.raises(ParityError, match="fp32 graph differ") as error:
        export_model(model, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nan_is_no_parity() -> None:
    with pytest.raises(ParityError):
        check_parity("int8", Parity(3, float("nan"), float("nan"), 0.0, 0.0))


def test_what_is_refused(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LengthValueModel.from_pretrained(tiny_checkpoint)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(InvalidRequestError, match="not empty"):
        export_model(model, tmp_path / "full")
    with pytest.raises(InvalidRequestError, match="no variant"):
        export_model(model, tmp_path / "out", variant="int3")  # type: ignore[arg-type]
    model.decoder.config.rope_parameters = {"rope_type": "dynamic"}
    with pytest.raises(BackboneError, match="'dynamic'"):
        export_model(model, tmp_path / "out")
    model.decoder.config.model_type = "gpt2"
    with pytest.raises(BackboneError, match="'gpt2' cannot be exported"):
        export_model(model, tmp_path / "out")


def test_damaged_exports(tiny_export: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in tiny_export.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    cut = copy("cut")
    (cut / DATA_FILE).write_bytes((cut / DATA_FILE).read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data does not match"):
        OnnxModel(cut)
    for name, change in (
        ("version", {"format_version": 2}),
        ("negative", {"context": -1}),
        ("unknown", {"more": 1}),
        ("no-eos", {"eos_ids": []}),
    ):
        folder = copy(name)
        data = json.loads((folder / "export.json").read_text())
        (folder / "export.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(ArtifactError, match=r"export\.json"):
            OnnxModel(folder)
    (copy("half") / "export.json").unlink()
    with pytest.raises(ArtifactError, match="no ONNX export"):
        OnnxModel(tmp_path / "half")


def test_backends_go_by_the_folder(tiny_export: Path, tiny_checkpoint: Path) -> None:
    assert backend_of(tiny_export) == backend_of(tiny_export, "onnx") == "onnx"
    assert backend_of(tiny_checkpoint) == backend_of(tiny_checkpoint, "torch") == "torch"
    with pytest.raises(ArtifactError, match="lenvm export"):
        backend_of(tiny_checkpoint, "onnx")
    with pytest.raises(ArtifactError, match="is an ONNX export"):
        backend_of(tiny_export, "torch")
    with pytest.raises(ArtifactError, match="is an ONNX export"):
        LengthValueModel.from_pretrained(tiny_export)


def test_the_command_line(
    tiny_checkpoint: Path, tiny_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_checkpoint), "--out", str(tmp_path / "cli"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["value_mean"] < 1e-5
    answers = []
    for folder in (tiny_checkpoint, tiny_export):
        assert main(["predict", "Hello", "--model", str(folder), "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["predictions"][0])
        assert main(["score", "Hello", "--completion", "Hi.", "--eos", "--model", str(folder), "--json"]) == 0
        answers[-1]["values"] = json.loads(capsys.readouterr().out)["scores"][0]["values"]
    assert answers[0]["value"] == pytest.approx(answers[1]["value"], abs=1e-5)
    np.testing.assert_allclose(answers[0]["values"], answers[1]["values"], atol=1e-5)
