"""Load a backbone folder with transformers, and turn prompts and messages into token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenvm._extras import require
from lenvm.backbones._files import check_backbone
from lenvm.errors import BackboneError, InvalidRequestError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["encode_chat", "load_backbone", "load_eos_ids", "load_tokenizer"]

_DTYPES = ("bfloat16", "float16", "float32")


def load_tokenizer(folder: Path, *, weights: bool = True) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a backbone folder, which without ``weights`` need not hold any (an ONNX export).

    Raises BackboneError, or MissingExtraError without transformers.
    """
    check_backbone(folder, weights=weights)
    require("serve", "transformers", "tokenizers")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as exc:  # the Rust tokenizer raises bare Exception for a malformed file
        raise BackboneError(f"cannot load the tokenizer of {folder} ({_line(exc)}): fetch the backbone again") from exc
    return tokenizer


def load_eos_ids(folder: Path) -> tuple[int, ...]:
    """Ids that end an answer of a backbone: those of its generation config, else of its config, else the tokenizer's.

    The first is the one that is shown. Raises BackboneError where none is named.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as exc:
            raise BackboneError(f"cannot read {folder / name} ({_line(exc)}): fetch the backbone again") from exc
        ids = named if isinstance(named, list) else [named]
        if found := tuple(int(token) for token in ids if token is not None):
            return found
    token: Any = load_tokenizer(folder).eos_token_id
    if token is None:
        raise BackboneError(f"the backbone in {folder} names no end-of-sequence token: its answers would never end")
    return (int(token),)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation up to the point where the assistant begins to answer.

    ``messages``: a prompt (one user message), or messages with ``role`` and ``content``. The chat template adds what it
    wants (SmolLM2: a default system prompt); a tokenizer without a template encodes a prompt as plain text.
    Raises InvalidRequestError for an empty prompt, malformed messages, or messages where there is no template.
    """
    if isinstance(messages, str):
        if not messages.strip():
            raise InvalidRequestError("the prompt is empty: pass some text", param="prompt")
        if not tokenizer.chat_template:
            return [int(token) for token in tokenizer.encode(messages)]
        messages = [{"role": "user", "content": messages}]
    elif not messages:
        raise InvalidRequestError("messages is empty: pass at least one message", param="messages")
    for message in messages:
        untrusted: Any = message  # from a caller's JSON: the annotation is only a wish
        fields = [untrusted.get("role"), untrusted.get("content")] if isinstance(untrusted, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise InvalidRequestError("each message needs the strings 'role' and 'content'", param="messages")
    if not any(message["content"].strip() for message in messages):
        raise InvalidRequestError("every message is empty: pass some text", param="messages")
    if not tokenizer.chat_template:
        raise InvalidRequestError("this backbone has no chat template: pass a prompt or token ids", param="messages")
    try:
        ids: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as exc:  # jinja2.TemplateError: a template may refuse roles or their order
        raise InvalidRequestError(f"the chat template refuses these messages ({_line(exc)})", param="messages") from exc
    return [int(token) for token in ids]


def load_backbone(
    folder: Path,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The causal language model of a backbone folder, in eval mode, on ``device``. Code from the folder never runs.

    ``dtype``: float32, bfloat16 or float16. ``attn_implementation``: None is what transformers takes by itself.
    Raises BackboneError, InvalidRequestError (dtype), or MissingExtraError without torch and transformers.
    """
    check_backbone(folder)
    require("serve", "torch", "transformers")
    import torch
    from transformers import AutoModelForCausalLM

    if str(dtype).removeprefix("torch.") not in _DTYPES:
        raise InvalidRequestError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}", param="dtype")
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        with _quiet_transformers():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, str(dtype).removeprefix("torch.")),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
    except Exception as exc:  # transformers raises OSError, ValueError, KeyError, ImportError, SafetensorError, ...
        raise BackboneError(f"cannot load the backbone in {folder} ({_line(exc)}): check it or fetch it again") from exc
    model.to(device)
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' own loading bar; ours is the only one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)[:160]
