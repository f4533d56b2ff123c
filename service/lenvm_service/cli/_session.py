"""Models in this process, for the commands that need them; every import of torch hides behind a check for the extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lenvm._extras import require
from lenvm.errors import InvalidRequestError
from lenvm_service.cli._options import parse_ids
from lenvm_service.cli._output import ProgressReporter

if TYPE_CHECKING:
    from lenvm.decoding import Candidates, Generation, Guide, Request, SamplingParams
    from lenvm.export.artifact import Backend
    from lenvm.modeling import LengthValueModel
    from lenvm.rollouts.sampling import LocalGenerator
    from lenvm.scoring import OnnxModel, Scorer, TorchScorer
    from lenvm_service.cli._backend import ModelFacts

__all__ = [
    "check_device",
    "encode_completion",
    "encode_prompt",
    "load_generator",
    "load_scorer",
    "load_value_model",
    "need",
    "need_model",
    "sample",
]

_NEEDED = {
    "onnx": ("onnxruntime", "transformers", "tokenizers", "numpy"),
    "serve": ("torch", "transformers", "tokenizers", "safetensors", "numpy"),
    "train": ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow"),
}


def need(extra: str) -> None:
    """Raise MissingExtraError where the modules of ``extra`` ("serve", "train" or "onnx") are not installed."""
    require(extra, *_NEEDED[extra])


def need_model(model: str, backend: str = "auto") -> Backend:
    """What runs a checkpoint or an export; raises MissingExtraError where that is not installed.

    Raises ArtifactError where there is no such model, or one for another backend.
    """
    require("serve", "numpy")
    from lenvm.config import find_checkpoint
    from lenvm.export import backend_of

    found = backend_of(find_checkpoint(model), backend)
    need("onnx" if found == "onnx" else "serve")
    return found


def check_device(device: str) -> str:
    """The device, if this machine has it. Raises InvalidRequestError otherwise."""
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InvalidRequestError(f"unknown device {device!r}: use cpu, cuda or cuda:N", param="device") from None
    if kind.type not in ("cpu", "cuda"):
        raise InvalidRequestError(f"device {device!r} is not supported: use cpu, cuda or cuda:N", param="device")
    if kind.type == "cuda" and (not torch.cuda.is_available() or (kind.index or 0) >= torch.cuda.device_count()):
        raise InvalidRequestError(f"this machine has no device {device!r}: use --device cpu", param="device")
    return device


def load_scorer(model: str, *, device: str = "cpu", dtype: str = "float32") -> tuple[LengthValueModel, TorchScorer]:
    """A checkpoint and its scorer."""
    import torch
    from transformers.utils import logging

    from lenvm.modeling import LengthValueModel
    from lenvm.scoring import TorchScorer

    logging.set_verbosity_error()  # its warnings (a long prompt) would stand beside our one line
    loaded = LengthValueModel.from_pretrained(model, device=check_device(device), dtype=getattr(torch, dtype))
    return loaded, TorchScorer(loaded)


def load_value_model(model: str, *, device: str = "cpu") -> tuple[LengthValueModel | OnnxModel, Scorer]:
    """A checkpoint or an export, and its scorer."""
    if need_model(model) == "torch":
        return load_scorer(model, device=device)
    from lenvm.scoring import OnnxModel, OnnxScorer

    exported = OnnxModel(model, device=device)
    return exported, OnnxScorer(exported)


def load_generator(
    facts: ModelFacts,
    backbone: str | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    max_rows: int | None = None,
) -> tuple[LocalGenerator, list[str]]:
    """The backbone that generates, and warnings about it.

    Raises InvalidRequestError where its token ids are not those of the model, which could not score its candidates.
    """
    from lenvm.backbones import resolve_backbone, tokenizer_sha256
    from lenvm.rollouts.sampling import LocalGenerator

    own = facts.backbone
    name = backbone or own
    if tokenizer_sha256(resolve_backbone(name)) != facts.tokenizer_sha256:
        raise InvalidRequestError(
            f"{name} has another tokenizer than the value model {facts.name}: use a backbone of the same family",
            param="backbone",
        )
    warnings = []
    if name != own:
        warnings.append(f"generator_mismatch: {facts.name} was trained on answers of {own}, not of {name}")
    return LocalGenerator(name, device=check_device(device), dtype=dtype, max_rows=max_rows), warnings


def sample(
    generator: LocalGenerator,
    requests: Sequence[Request],
    params: SamplingParams,
    guide: Guide | None = None,
    label: str = "Generating",
) -> list[Generation]:
    """All answers, with a progress bar: answers that ended and, where a guide hears of them, tokens so far."""
    done, ended_tokens, guided_tokens = 0, 0, 0
    with ProgressReporter() as progress:

        def show() -> None:
            progress.update(label, done, len(requests), {"tokens": max(ended_tokens, guided_tokens)})

        def on_done(_: int, answer: Generation) -> None:
            nonlocal done, ended_tokens
            done, ended_tokens = done + 1, ended_tokens + len(answer.token_ids)
            show()

        def on_tokens(count: int) -> None:
            nonlocal guided_tokens
            guided_tokens += count
            show()

        show()
        counted = None if guide is None else _CountedGuide(guide, on_tokens)
        return generator.sampler.generate(requests, params, guide=counted, on_done=on_done)


class _CountedGuide:
    """A guide that also reports how many tokens its rows took."""

    def __init__(self, inner: Guide, on_tokens: Callable[[int], None]) -> None:
        self._inner, self._on_tokens = inner, on_tokens
        self.start, self.finish = inner.start, inner.finish

    def log_weights(self, rows: Sequence[int], candidates: Candidates) -> Any:
        return self._inner.log_weights(rows, candidates)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self._inner.advance(rows, tokens)
        self._on_tokens(len(rows))


def encode_prompt(tokenizer: Any, text: str, *, token_ids: bool = False) -> list[int]:
    """Ids of a prompt up to where the answer begins. Raises InvalidRequestError for an empty or malformed one."""
    from lenvm.backbones import encode_chat

    if not token_ids:
        return encode_chat(tokenizer, _checked(text, "prompt"))
    ids = parse_ids(text)
    if not ids:
        raise InvalidRequestError("the prompt is empty: pass at least one token id", param="token_ids")
    return ids


def encode_completion(tokenizer: Any, text: str, *, token_ids: bool = False) -> list[int]:
    """Content tokens of a completion; may be none. Raises InvalidRequestError for a malformed one."""
    if token_ids:
        return parse_ids(text)
    return [int(token) for token in tokenizer.encode(_checked(text, "completion"), add_special_tokens=False)]


def _checked(text: str, param: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line that were no text
        raise InvalidRequestError(f"the {param} is not valid UTF-8: convert it first", param=param) from None
    return text
