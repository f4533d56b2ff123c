"""Checkpoints: what was saved is what loads, adapters merge exactly, and damage is one clear line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm.backbones import load_backbone
from lenvm.config import GeneratorRef, HeadConfig, LenVMConfig
from lenvm.distribution import LengthBins
from lenvm.errors import ArtifactError, BackboneError, LenVMError
from lenvm.lora import LoRALinear, inject, merge, save_adapter
from lenvm.modeling import LengthValueModel, find_checkpoint
from lenvm.paged import use_paged_attention


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "lenvm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(LenVMError, match=match) as caught:
        LengthValueModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_config_round_trip(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = LenVMConfig.load(tiny_checkpoint)
    config.save(tmp_path)
    assert LenVMConfig.load(tmp_path) == config
    value_only = replace(config, head=HeadConfig(8, None))
    value_only.save(tmp_path)
    assert LenVMConfig.load(tmp_path).head.num_bins == 0


def test_adapters_merge_into_the_function_that_was_trained(tiny_backbone: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    decoder = load_backbone(tiny_backbone).get_decoder()
    before = decoder(ids).last_hidden_state
    parameters = inject(decoder, rank=3, scale=1.7)
    assert all(p.requires_grad for p in parameters)
    assert {type(m) for n, m in decoder.named_modules() if n.endswith("_proj")} == {LoRALinear}
    torch.testing.assert_close(decoder(ids).last_hidden_state, before)  # B = 0: nothing changes at the start
    draw = torch.Generator().manual_seed(2)
    for p in parameters:
        # Values that bfloat16 holds exactly, so that the file loses nothing.
        p.data = torch.randn(p.shape, generator=draw).mul(0.1).bfloat16().float()
    trained = decoder(ids).last_hidden_state
    save_adapter(decoder, tmp_path, base_model="tiny")
    fresh = load_backbone(tiny_backbone).get_decoder()
    merge(fresh, tmp_path, 1.7)
    torch.testing.assert_close(fresh(ids).last_hidden_state, trained, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(trained, before, atol=1e-2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(1.7 * 3)


def test_an_adapter_for_another_backbone_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    decoder = load_backbone(tiny_backbone).get_decoder()
    inject(decoder, rank=2, scale=1.0)
    save_adapter(decoder, tmp_path, base_model="tiny")
    other = load_backbone(tiny_backbone).get_decoder()
    del other.layers[1]
    with pytest.raises(ArtifactError, match="does not have"):
        merge(other, tmp_path, 1.0)


def test_tampered_truncated_and_missing_files(copy: Path) -> None:
    head = copy / "head.safetensors"
    data = head.read_bytes()
    head.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(copy, "SHA-256")
    head.write_bytes(data[: len(data) // 2])
    refused(copy, "SHA-256")
    head.unlink()
    refused(copy, "lacks head")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"gamma": 1.5}, "damaged"),
        ({"gamma": float("nan")}, "damaged"),
        ({"head": {"width": 16}}, "damaged"),
        ({"head": {"width": 16, "bins": {"cap": -1}}}, "damaged"),
        ({"head": {"width": 99, "bins": LengthBins(cap=64).to_dict()}}, "does not fit"),
        ({"generator": None}, "damaged"),
        ({"head": {"width": -1, "bins": None}}, "damaged"),
        ({"backbone": {"name": "x", "sha256": 5, "tokenizer_sha256": ""}}, "damaged"),
        ({"files": {}}, "damaged"),
        ({"files": {"../head.safetensors": "0", "head.safetensors": "0"}}, "damaged"),
    ],
)
def test_a_wrong_config(copy: Path, changes: dict[str, Any], match: str) -> None:
    edit(copy, **changes)
    refused(copy, match)


def test_a_config_that_is_no_json_or_no_checkpoint(copy: Path, tmp_path: Path) -> None:
    (copy / "lenvm.json").write_text("{")
    refused(copy, "cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no LenVM checkpoint")
    with pytest.raises(ArtifactError, match="neither a folder nor"):
        find_checkpoint("no-such-model")


def test_another_backbone_under_the_checkpoint(copy: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_backbone, tmp_path / "other"))
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="other backbone weights"):
        LengthValueModel.from_pretrained(copy, backbone=other)


def test_lower_precision_keeps_rotary_frequencies_and_the_head(tiny_checkpoint: Path) -> None:
    full = LengthValueModel.from_pretrained(tiny_checkpoint)
    half = LengthValueModel.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.head.input.weight.dtype == torch.float32
    assert torch.equal(half.decoder.rotary_emb.inv_freq, full.decoder.rotary_emb.inv_freq)


def test_a_backbone_that_cannot_be_paged_is_refused() -> None:
    from transformers import AutoModel, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    with pytest.raises(BackboneError, match="sliding"):
        use_paged_attention(AutoModel.from_config(config))


def test_other_architectures_score_as_their_full_forward() -> None:
    """Nothing here is Llama's alone: Qwen2 (biased projections) and Qwen3 (normalised queries and keys)."""
    from copy import deepcopy

    from transformers import AutoModel, Qwen2Config, Qwen3Config

    from lenvm.config import BackboneRef
    from lenvm.modeling import ValueHead
    from lenvm.scoring import ScoreRow, TorchScorer

    size: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    }  # fmt: skip
    for kind in (Qwen2Config, Qwen3Config):
        torch.manual_seed(0)
        reference = AutoModel.from_config(kind(**size), attn_implementation="eager").eval()
        decoder = AutoModel.from_config(deepcopy(reference.config)).eval()
        decoder.load_state_dict(reference.state_dict())
        use_paged_attention(decoder)
        head_config = HeadConfig(8, LengthBins(cap=32))
        config = LenVMConfig("t", BackboneRef("t", "", ""), head_config, 0.99, GeneratorRef("t", 1.0, 1.0, 32))
        model = LengthValueModel(decoder, ValueHead(32, head_config), config, Path()).eval()
        scorer = TorchScorer(model, block_size=4)
        (state,) = scorer.open([[5, 6, 7, 8, 9, 10]])
        (answer,) = scorer.score([ScoreRow(state, [11, 12], [13, 14])])
        for k, candidate in enumerate((13, 14)):
            with torch.no_grad():
                hidden = reference(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, candidate]])).last_hidden_state[0]
                want = model.head(hidden).logits[-1]
            assert answer.candidate_logits[k] == pytest.approx(float(want), abs=2e-5)
