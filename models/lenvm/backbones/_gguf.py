"""Convert a llama.cpp GGUF file of the Llama architecture into a Hugging Face folder. NumPy only: torch is not needed.

``transformers`` reads a GGUF but refuses to save it, and reads it anew at every load; this runs once and leaves a bf16
folder. The files are written byte for byte the same on every machine: a LenVM checkpoint names its backbone by digest.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lenvm._extras import require
from lenvm.errors import BackboneError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["convert_gguf"]

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# llama.cpp names the split rule only; each rule is spelled out in the Hugging Face form here.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "gpt-2": _BYTE_LEVEL,
}
_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # llama.cpp's LLAMA_TOKEN_TYPE


def convert_gguf(source: Path, folder: Path, *, on_bytes: Callable[[int], None] | None = None) -> None:
    """Write ``source`` into the existing ``folder`` as safetensors (bf16), config and tokenizer files.

    ``on_bytes`` hears how many bytes of ``source`` are done since its last call; they add up to its size.
    Raises BackboneError for a truncated file, another architecture, or a tensor or tokenizer that a Llama has not;
    OSError when ``folder`` cannot be written.
    """
    reader = _open(source)
    try:
        config = _config(reader, source)
        tokenizer = _tokenizer_files(reader, source, config)
        plan = _tensor_plan(reader, source, config)
    except (KeyError, IndexError, TypeError, UnicodeDecodeError) as exc:
        raise BackboneError(f"{source} lacks metadata that a Llama GGUF must have ({exc}): use another file") from exc
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    for name, content in tokenizer.items():
        _write_json(folder / name, content)
    on_bytes = on_bytes or (lambda _: None)
    on_bytes(source.stat().st_size - sum(int(tensor.n_bytes) for _, tensor in plan))
    _write_safetensors(folder / "model.safetensors", plan, config, on_bytes)


def _open(source: Path) -> GGUFReader:
    require("serve", "gguf")
    from gguf import GGUFReader

    try:
        return GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as exc:
        raise BackboneError(f"{source} is truncated or not a GGUF file: delete it and fetch it again") from exc
    except OSError as exc:
        raise BackboneError(f"cannot read {source} ({exc.strerror}): check the path") from exc


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key; KeyError where it is absent and no default is given."""
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise KeyError(key)
        return default
    return field.contents()


def _config(reader: GGUFReader, source: Path) -> dict[str, Any]:
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise BackboneError(
            f"{source} is a {architecture!r} GGUF, only 'llama' is converted: pass a Hugging Face folder"
        )
    if _value(reader, "llama.rope.scaling.type", "none") != "none":
        raise BackboneError(f"{source} scales its RoPE, which is not converted: pass a Hugging Face folder")
    hidden, heads = _value(reader, "llama.embedding_length"), _value(reader, "llama.attention.head_count")
    eos = _value(reader, "tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id", eos),
        "dtype": "bfloat16",
        "eos_token_id": eos,
        "head_dim": _value(reader, "llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv", heads),
        "pad_token_id": _value(reader, "tokenizer.ggml.padding_token_id", eos),
        "rms_norm_eps": _shortest(_value(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(_value(reader, "llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "vocab_size": len(_value(reader, "tokenizer.ggml.tokens")),
    }


def _shortest(value: float) -> float:
    """GGUF keeps float32; take the shortest decimal that it stands for (1e-05, not 9.999999747378752e-06)."""
    return float(str(np.float32(value)))


def _tokenizer_files(reader: GGUFReader, source: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name -> content of tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    kind, split = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in _PRE_TOKENIZERS:
        raise BackboneError(f"{source}: {kind}/{split} tokenizers are not converted: pass a Hugging Face folder")
    tokens, types = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    added = [
        {"id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": types[index] == _CONTROL_TOKEN}
        for index in range(len(tokens))
        if types[index] in (_CONTROL_TOKEN, _USER_TOKEN)
    ]
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "fuse_unk": False,
    }
    model |= {"end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": {token: index for index, token in enumerate(tokens)}}
    model |= {"merges": _value(reader, "tokenizer.ggml.merges")}
    special = {name: tokens[config[f"{name}_id"]] for name in ("bos_token", "eos_token", "pad_token")}
    special["unk_token"] = tokens[_value(reader, "tokenizer.ggml.unknown_token_id", config["eos_token_id"])]
    # Not "GPT2Tokenizer": transformers 5 would rebuild that class's own split rule and lose the digits.
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": config["max_position_embeddings"], "add_prefix_space": False} | special
    template = _value(reader, "tokenizer.chat_template", "")
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": _PRE_TOKENIZERS[split],
            "post_processor": None,
            "decoder": _BYTE_LEVEL,
            "model": model,
        },
        "tokenizer_config.json": settings | ({"chat_template": template} if template else {}),
        "special_tokens_map.json": special,
    }


def _tensor_plan(reader: GGUFReader, source: Path, config: dict[str, Any]) -> list[tuple[str, ReaderTensor]]:
    """(Hugging Face name, GGUF tensor) sorted by name; every layer must be whole and nothing may be left over."""
    plan: dict[str, ReaderTensor] = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        name = _TOP_TENSORS.get(tensor.name)
        if match and match[2] in _LAYER_TENSORS:
            name = f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.weight"
        if name is None:
            raise BackboneError(f"{source}: a plain Llama has no tensor {tensor.name!r}: pass a Hugging Face folder")
        plan[name] = tensor
    missing = set(_expected_shapes(config)) ^ set(plan)
    if missing:
        raise BackboneError(f"{source} does not hold a whole Llama (see {min(missing)}): use another file")
    for name, shape in _expected_shapes(config).items():
        found = tuple(int(n) for n in reversed(plan[name].shape))  # GGUF lists the fastest dimension first
        if found != shape:
            raise BackboneError(f"{source}: {name} has shape {found}, its metadata says {shape}: use another file")
    return sorted(plan.items())


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    shapes |= {"model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def _write_safetensors(
    path: Path, plan: list[tuple[str, ReaderTensor]], config: dict[str, Any], on_bytes: Callable[[int], None]
) -> None:
    """Stream the tensors as bf16. By hand: NumPy has no bf16, and the bytes must not hang on a library's version."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in plan:
        end = offset + 2 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in plan:
            file.write(_to_bf16(_dequantised(name, tensor, config)).tobytes())
            on_bytes(int(tensor.n_bytes))


def _dequantised(name: str, tensor: ReaderTensor, config: dict[str, Any]) -> NDArray[np.float32]:
    """The tensor as float32 [rows, columns] (or [columns]) in Hugging Face's row order."""
    from gguf.quants import dequantize

    shape = tuple(int(n) for n in reversed(tensor.shape))
    try:
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
    except NotImplementedError as exc:
        raise BackboneError(
            f"{tensor.tensor_type.name} tensors are not converted: use a Q4_1, Q8_0 or F16 GGUF"
        ) from exc
    if name.endswith("q_proj.weight"):
        return _unpermute(weight, config["num_attention_heads"])
    return _unpermute(weight, config["num_key_value_heads"]) if name.endswith("k_proj.weight") else weight


def _unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order: it rotates neighbours (2i, 2i + 1) of a head, Hugging Face rotates (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _to_bf16(weight: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bf16 bit patterns, ties to even (as torch does). Finite input."""
    bits = np.ascontiguousarray(weight, dtype="<f4").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
