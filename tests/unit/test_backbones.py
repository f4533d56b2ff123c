"""Backbones: GGUF conversion on a tiny Llama, the cache, the wheel (from a local folder), checks, chat encoding."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lenvm.backbones import (
    KNOWN_BACKBONES,
    KnownBackbone,
    _gguf,
    _resolve,
    backbone_sha256,
    check_backbone,
    encode_chat,
    load_backbone,
    load_eos_ids,
    load_tokenizer,
    resolve_backbone,
    tokenizer_sha256,
    verify_backbone,
)
from lenvm.errors import BackboneError, CacheFolderError, InvalidRequestError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "1 2", "Ġ t"]
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with (GPT-2's table)."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def tiny_llama(*, tied: bool = True) -> LlamaForCausalLM:
    """A random Llama whose weights are exact in bf16, so that a conversion has nothing to round."""
    vocabulary = len(SPECIAL) + 256 + len(MERGES)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).to(torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():  # not model.to(bfloat16): that would round the RoPE frequencies too
            weight.copy_(weight.to(torch.bfloat16))
    return model


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to Q and K rows: within a head, row i and row i + d/2 become neighbours."""
    per_head = weight.shape[0] // heads
    order = [
        h * per_head + half * (per_head // 2) + i for h in range(heads) for i in range(per_head // 2) for half in (0, 1)
    ]
    return weight[order]


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", **extra: str) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    alphabet = byte_alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(extra.pop("split", "smollm"))
    writer.add_token_list([*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(alphabet) + len(MERGES)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), value)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if name.endswith("q_proj.weight"):
            weight = llama_cpp_order(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = llama_cpp_order(weight, config.num_key_value_heads)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LENVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LENVM_GGUF", raising=False)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def source(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny.gguf", model)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_backbone(source, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(converted, tmp_path / "backbone"))


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_undoes_the_permutation_exactly(tied: bool, tmp_path: Path) -> None:
    original = tiny_llama(tied=tied)
    folder = resolve_backbone(write_gguf(tmp_path / "m.gguf", original), progress=False)
    loaded = load_backbone(folder)
    assert not loaded.training
    assert loaded.config.tie_word_embeddings is tied
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_permutation_matters(model: LlamaForCausalLM) -> None:
    """The test above could not pass without the un-permutation."""
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    permuted = llama_cpp_order(weight, 4)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(_gguf._unpermute(permuted, 4), weight)


def test_bf16_rounding_is_torchs() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(size=4096), [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3e38, 1e-40]])
    ours = _gguf._to_bf16(values.astype(np.float32))
    theirs = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours, theirs)


def test_config_comes_from_the_metadata(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    expected = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 2}
    expected |= {"rope_theta": 100000.0, "rms_norm_eps": 1e-05, "max_position_embeddings": 128, "bos_token_id": 1}
    assert {key: config[key] for key in expected} == expected
    assert load_backbone(converted).config.rope_parameters["rope_theta"] == 100000.0


def test_conversion_is_the_same_every_time(source: Path, converted: Path, tmp_path: Path) -> None:
    again = resolve_backbone(source, cache_dir=tmp_path / "other", progress=False)
    for path in converted.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_tokenizer_splits_digits_and_round_trips(converted: Path) -> None:
    tokenizer = load_tokenizer(converted)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.tokenize("12 tell") == ["1", "2", "Ġt", "e", "ll"]  # the merge "1 2" exists and must not apply
    for text in ("", " hello  world\n", "naïve ☕ 2024\t日本", "a<|im_end|>b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>x<|im_end|>")[::2] == [1, 2]


def test_gpt2_split_keeps_numbers_whole(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = resolve_backbone(write_gguf(tmp_path / "m.gguf", model, split="gpt-2"), progress=False)
    assert load_tokenizer(folder).tokenize("12") == ["12"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "only 'llama' is converted"),
        ({"split": "llama-bpe"}, "tokenizers are not converted"),
        ({"llama__rope__scaling__type": "linear"}, "scales its RoPE"),
    ],
)
def test_what_is_not_converted_is_refused(
    options: dict[str, str], message: str, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, **options)
    with pytest.raises(BackboneError, match=message) as error:
        resolve_backbone(path, progress=False)
    one_line(error)
    assert not any(p.is_dir() for p in (tmp_path / "cache" / "backbones").iterdir())  # nothing half-made stays


def test_missing_layer_is_refused(source: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    short = tiny_llama()
    short.config.num_hidden_layers = 3
    with pytest.raises(BackboneError, match="whole Llama") as error:
        resolve_backbone(write_gguf(tmp_path / "m.gguf", short), progress=False)
    one_line(error)


@pytest.mark.parametrize("keep", [0, 3, 100, 5_000, 40_000, -1])
def test_truncated_gguf_is_one_clear_line(keep: int, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(BackboneError, match="truncated or not a GGUF") as error:
        resolve_backbone(path, progress=False)
    one_line(error)


def test_random_bytes_are_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(np.random.default_rng(1).bytes(10_000))
    with pytest.raises(BackboneError, match="truncated or not a GGUF"):
        resolve_backbone(path, progress=False)


# --- the cache -------------------------------------------------------------------------------------------------------


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []
    convert: Callable[..., None] = _gguf.convert_gguf

    def counted(source: Path, folder: Path, **options: Any) -> None:
        calls.append(source)
        convert(source, folder, **options)

    monkeypatch.setattr(_gguf, "convert_gguf", counted)
    return calls


def test_second_call_uses_the_cache_and_racing_calls_convert_once(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_conversions(monkeypatch)
    with ThreadPoolExecutor(4) as pool:  # flock holds between open files, so threads stand for processes
        folders = set(pool.map(lambda _: resolve_backbone(source, progress=False), range(4)))
    assert len(folders) == len(calls) == 1
    assert {resolve_backbone(source, progress=False)} == folders
    assert len(calls) == 1
    verify_backbone(folders.pop())


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "lenvm-backbone.json"])
def test_a_damaged_cache_is_built_again(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = resolve_backbone(source, progress=False)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-2])
    calls = count_conversions(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert resolve_backbone(source, progress=False) == folder
    assert len(calls) == 1
    assert "building it again" in caplog.text
    verify_backbone(folder)


def test_an_older_converters_folder_is_built_again(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_backbone(source, progress=False)
    monkeypatch.setattr(_resolve, "_CONVERTER", 99)
    calls = count_conversions(monkeypatch)
    resolve_backbone(source, progress=False)
    assert len(calls) == 1


def test_leftovers_of_a_killed_process_do_no_harm(source: Path, tmp_path: Path) -> None:
    folder = resolve_backbone(source, progress=False)
    (folder.parent / f".{folder.name}.partial" / "new").mkdir(parents=True)
    shutil.rmtree(folder)
    verify_backbone(resolve_backbone(source, progress=False))
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_unwritable_cache(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # below a file, since root may write anywhere else
    with pytest.raises(CacheFolderError, match="LENVM_CACHE") as error:
        resolve_backbone(source, cache_dir=tmp_path / "file" / "x", progress=False)
    one_line(error)


def test_progress_goes_to_stderr(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve_backbone(source)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Converting to bf16" in captured.err


# --- known names: the wheel ------------------------------------------------------------------------------------------


@pytest.fixture
def known(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownBackbone:
    """The name ``tiny``, whose wheel lies in a local folder that is pip's only source."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, "tiny_gguf/Tiny.gguf")
        archive.writestr("tiny_gguf-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
        archive.writestr(
            "tiny_gguf-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_gguf-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    entry = KnownBackbone("tiny-gguf==1.0", "tiny_gguf/Tiny.gguf", digest, wheel.stat().st_size)
    monkeypatch.setitem(KNOWN_BACKBONES, "tiny", entry)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return entry


def test_known_name_comes_from_its_wheel(known: KnownBackbone, converted: Path) -> None:
    folder = resolve_backbone("tiny", progress=False)
    assert folder.name == "tiny"
    assert backbone_sha256(folder) == backbone_sha256(converted)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["tiny"]


def test_wheel_with_another_gguf_is_refused(known: KnownBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    other = KnownBackbone(known.requirement, known.member, "0" * 64, known.wheel_bytes)
    monkeypatch.setitem(KNOWN_BACKBONES, "tiny", other)
    with pytest.raises(BackboneError, match="expected 0000") as error:
        resolve_backbone("tiny", progress=False)
    one_line(error)


def test_wheel_without_the_member_is_refused(known: KnownBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    other = KnownBackbone(known.requirement, "tiny_gguf/Other.gguf", known.gguf_sha256, known.wheel_bytes)
    monkeypatch.setitem(KNOWN_BACKBONES, "tiny", other)
    with pytest.raises(BackboneError, match=r"holds no tiny_gguf/Other\.gguf"):
        resolve_backbone("tiny", progress=False)


def test_no_index_is_one_clear_line(known: KnownBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(BackboneError, match=r"LENVM_GGUF to a copy of Tiny\.gguf") as error:
        resolve_backbone("tiny", progress=False)
    assert "No matching distribution" in one_line(error)


def test_no_pip_is_one_clear_line(known: KnownBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_resolve.importlib.util, "find_spec", lambda name: None if name == "pip" else object())
    monkeypatch.setattr(_resolve, "require", lambda *_: None)
    with pytest.raises(BackboneError, match="ensurepip") as error:
        resolve_backbone("tiny", progress=False)
    one_line(error)


def test_carried_gguf_replaces_the_download(
    known: KnownBackbone, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    verify_backbone(resolve_backbone("tiny", progress=False, gguf=source))
    monkeypatch.setenv("LENVM_GGUF", str(source))
    verify_backbone(resolve_backbone("tiny", cache_dir=tmp_path / "other", progress=False))


def test_carried_gguf_must_match_the_checksum(known: KnownBackbone, source: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(BackboneError, match="SHA-256") as error:
        resolve_backbone("tiny", progress=False, gguf=cut)
    one_line(error)
    with pytest.raises(BackboneError, match="cannot read"):
        resolve_backbone("tiny", progress=False, gguf=tmp_path / "absent.gguf")


# --- folders, hub ids, names -----------------------------------------------------------------------------------------


def test_local_folder_is_returned_as_it_is(tiny_backbone: Path) -> None:
    assert resolve_backbone(str(tiny_backbone)) == tiny_backbone
    assert not (tiny_backbone / "lenvm-backbone.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled .bin weights are refused"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), "truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 3000), "truncated"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_type": "lla'), "truncated or not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "model_type"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
    ids=["pickle", "one-byte", "cut", "no-config", "cut-config", "empty-config", "no-tokenizer"],
)
def test_broken_folders_are_one_clear_line(damage: Callable[[Path], object], message: str, folder: Path) -> None:
    (folder / "lenvm-backbone.json").unlink()
    damage(folder)
    for load in (resolve_backbone, load_backbone, load_tokenizer):
        with pytest.raises(BackboneError, match=message) as error:
            load(folder)
        one_line(error)


def test_tampering_is_found(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-7] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(BackboneError, match="was changed") as error:
        verify_backbone(folder)
    one_line(error)


def test_a_small_file_is_checked_at_every_load(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("100000.0", "100001.0"))
    with pytest.raises(BackboneError, match="was changed"):
        load_backbone(folder)


def test_sharded_folder(folder: Path) -> None:
    model = load_backbone(folder)
    for name in ("lenvm-backbone.json", "model.safetensors"):
        (folder / name).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    check_backbone(folder)
    assert len(backbone_sha256(folder)) == 64
    shards[1].unlink()
    with pytest.raises(BackboneError, match="missing, truncated"):
        check_backbone(folder)


@pytest.mark.parametrize("name", ["", "smollm", "/no/such/folder", "./no/such", "no/such.gguf", "a b/c", "x" * 5000])
def test_unknown_names(name: str) -> None:
    with pytest.raises(BackboneError, match="smollm2-135m-instruct"):
        resolve_backbone(name)


def test_a_plain_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"a \.gguf file"):
        resolve_backbone(tmp_path / "model.bin")


class FakeHub:
    """Stands for huggingface_hub: knows one commit, or is out of reach."""

    def __init__(self, folder: Path | None, *, reachable: bool) -> None:
        self.folder, self.reachable = folder, reachable
        self.asked: dict[str, Any] = {}

    def repo_info(self, repo: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        assert timeout <= 10
        if not self.reachable:
            raise ConnectionError("Name or service not known\nmany\nmore lines")
        return SimpleNamespace(sha=f"sha-of-{revision}")

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.asked = {"repo": repo, **options}
        if self.folder is None:
            raise FileNotFoundError("not in the cache")
        return str(self.folder)


@pytest.fixture
def hub(converted: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    fake = FakeHub(converted, reachable=True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_hub_id_asks_for_safetensors_only(hub: FakeHub, converted: Path) -> None:
    assert resolve_backbone("some/model@v1.0", progress=False) == converted
    assert (hub.asked["repo"], hub.asked["revision"]) == ("some/model", "sha-of-v1.0")
    assert not hub.asked["local_files_only"]
    assert not any("bin" in pattern or "py" in pattern for pattern in hub.asked["allow_patterns"])


def test_hub_id_without_network_uses_an_earlier_download(hub: FakeHub, converted: Path) -> None:
    hub.reachable = False
    assert resolve_backbone("some/model", progress=False) == converted
    assert hub.asked["local_files_only"]


def test_hub_id_without_network_and_without_cache(hub: FakeHub) -> None:
    hub.reachable, hub.folder = False, None
    with pytest.raises(BackboneError, match="HF_HUB_OFFLINE") as error:
        resolve_backbone("some/model", progress=False)
    assert "local folder" in one_line(error)
    assert "Name or service not known" in str(error.value)


# --- identity, loading, chat -----------------------------------------------------------------------------------------


def test_identity_is_weights_and_config(folder: Path, converted: Path) -> None:
    digest = backbone_sha256(converted)
    (folder / "lenvm-backbone.json").unlink()
    assert backbone_sha256(folder) == digest  # with and without a manifest
    assert backbone_sha256(folder) == digest  # and from the store of digests
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "dtype": "float32"}))
    assert backbone_sha256(folder) == digest
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    assert backbone_sha256(folder) != digest
    (folder / "config.json").write_text(json.dumps(config))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert backbone_sha256(folder) != digest


def test_tokenizer_identity_includes_the_template(folder: Path) -> None:
    digest = tokenizer_sha256(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 5}))
    assert tokenizer_sha256(folder) == digest
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "x"}))
    assert tokenizer_sha256(folder) != digest
    # transformers 5 saves the same template in a file of its own
    (folder / "chat_template.jinja").write_text(settings["chat_template"])
    assert tokenizer_sha256(folder) == digest


def test_load_backbone_is_quiet_and_takes_dtypes(converted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_backbone(converted, dtype="bfloat16").dtype == torch.bfloat16
    model = load_backbone(converted, dtype=torch.float32, device="cpu", attn_implementation="eager")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert capfd.readouterr() == ("", "")


def test_load_backbone_refuses(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="dtype") as error:
        load_backbone(folder, dtype="int8")
    assert error.value.param == "dtype"
    (folder / "lenvm-backbone.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(BackboneError, match="cannot load") as failure:
        load_backbone(folder)
    one_line(failure)


def test_encode_chat(converted: Path) -> None:
    tokenizer = load_tokenizer(converted)
    ids = encode_chat(tokenizer, "hello 12")
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nhello 12<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_chat(tokenizer, [{"role": "user", "content": "hello 12"}]) == ids
    system = encode_chat(tokenizer, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    assert "Be good" not in tokenizer.decode(system)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("", "prompt"),
        (" \n\t", "prompt"),
        ([], "messages"),
        ([{"role": "user", "content": " "}], "messages"),
        ([{"role": "user"}], "messages"),
        ([{"role": "user", "content": 3}], "messages"),
        (["hello"], "messages"),
    ],
)
def test_encode_chat_refuses(messages: Any, param: str, converted: Path) -> None:
    with pytest.raises(InvalidRequestError) as error:
        encode_chat(load_tokenizer(converted), messages)
    assert error.value.param == param
    one_line(error)


def test_encode_chat_without_a_template(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    assert encode_chat(tokenizer, "hello") == tokenizer.encode("hello")
    with pytest.raises(InvalidRequestError, match="no chat template"):
        encode_chat(tokenizer, [{"role": "user", "content": "hello"}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        encode_chat(tokenizer, "hello")


def test_importing_and_resolving_need_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from lenvm.backbones import resolve_backbone, backbone_sha256\n"
        "print(backbone_sha256(resolve_backbone(sys.argv[1], progress=False)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) == 64


def test_every_eos_id_has_one_source(tiny_backbone: Path, tmp_path: Path) -> None:
    """The generator, the service and the command line must agree on what ends an answer."""
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    assert load_eos_ids(folder) == (2,)
    config = folder / "generation_config.json"
    config.write_text('{"eos_token_id": [7, 2]}')
    assert load_eos_ids(folder) == (7, 2)
    config.write_text("{}")
    assert load_eos_ids(folder) == (2,)  # of config.json
    config.unlink()
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | {"eos_token_id": None}))
    assert load_eos_ids(folder) == (2,)  # the tokenizer's
    config.write_text("[]")
    with pytest.raises(BackboneError, match=r"generation_config\.json"):
        load_eos_ids(folder)
