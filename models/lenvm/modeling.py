"""The Length Value Model: any Hugging Face decoder and a small head on its last hidden state (paper section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lenvm.backbones import backbone_sha256, load_tokenizer, resolve_backbone, tokenizer_sha256
from lenvm.backbones._files import file_sha256
from lenvm.config import (
    ADAPTER_FILE,
    DEFAULT_MODEL,
    GRAPH_FILE,
    HEAD_FILE,
    WEIGHTS_FILE,
    BackboneRef,
    GeneratorRef,
    HeadConfig,
    LenVMConfig,
    find_checkpoint,
)
from lenvm.errors import ArtifactError
from lenvm.lora import merge, save_adapter
from lenvm.paged import use_paged_attention

__all__ = ["DEFAULT_MODEL", "HeadOutput", "LengthValueModel", "ValueHead", "find_checkpoint"]

VALUE_EPS = 1e-6  # a head that gives V is clamped this far from -1 and 0, where its logit would be infinite


@dataclass(frozen=True)
class HeadOutput:
    """``logits``: value logit z, float32 ``[N]`` (V = -sigmoid(z)); ``bin_logprobs``: float32 ``[N, n]`` or None."""

    logits: torch.Tensor
    bin_logprobs: torch.Tensor | None


class ValueHead(nn.Module):
    """Two-layer SiLU MLP on the last hidden state, in float32; the outputs are ``[z, bin logits]``.

    With ``config.width`` 0 it is one linear layer; with ``config.output`` "value" its first output is V, not z.
    """

    def __init__(self, hidden_size: int, config: HeadConfig) -> None:
        super().__init__()
        self.input = nn.Linear(hidden_size, config.width) if config.width else None
        self.output = nn.Linear(config.width or hidden_size, 1 + config.num_bins)
        self.gives_value = config.output == "value"

    def forward(self, hidden: torch.Tensor) -> HeadOutput:
        """``[N, hidden] -> z [N], log-probabilities [N, n]``."""
        hidden = hidden.float()
        out = self.output(nn.functional.silu(self.input(hidden)) if self.input is not None else hidden)
        logits, bins = out[:, 0], out[:, 1:]
        if self.gives_value:
            logits = torch.logit(-logits, eps=VALUE_EPS)
        return HeadOutput(logits, torch.log_softmax(bins, dim=-1) if bins.shape[1] else None)


class LengthValueModel(nn.Module):
    """A decoder without its language-model head, and a :class:`ValueHead`.

    Make one with :meth:`from_pretrained` (a checkpoint) or :meth:`create` (to train).
    """

    def __init__(self, decoder: Any, head: ValueHead, config: LenVMConfig, backbone_dir: Path) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head
        self.config = config
        self.backbone_dir = backbone_dir
        self.own_weights = False  # True where the decoder is no longer the backbone's (full fine-tuning)
        self._tokenizer: Any = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the decoder; the head is always float32."""
        dtype: torch.dtype = next(self.decoder.parameters()).dtype
        return dtype

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.backbone_dir)
        return self._tokenizer

    @property
    def context(self) -> int:
        """Longest sequence that the backbone takes, in tokens."""
        return int(self.decoder.config.max_position_embeddings)

    @classmethod
    def create(
        cls,
        backbone: str | Path,
        *,
        name: str,
        head: HeadConfig,
        gamma: float,
        generator: GeneratorRef,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LengthValueModel:
        """A new model: the pretrained decoder and a fresh head whose first prediction is the middle of the range."""
        folder = resolve_backbone(str(backbone))
        decoder = _load_decoder(folder, device=device, dtype=dtype)
        config = LenVMConfig(
            name=name,
            backbone=BackboneRef(str(backbone), backbone_sha256(folder), tokenizer_sha256(folder)),
            head=head,
            gamma=gamma,
            generator=generator,
        )
        return cls(decoder, ValueHead(decoder.config.hidden_size, head).to(device), config, folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        backbone: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LengthValueModel:
        """Load a checkpoint: backbone, adapter merged into it, head. Ready for scoring (eval mode, paged attention).

        Args:
            name_or_path: a checkpoint folder or a name in the zoo.
            backbone: take the backbone from here instead of the name in the checkpoint (its digest must match).

        Raises:
            ArtifactError: the checkpoint is damaged or does not fit the backbone.
            BackboneError: the backbone cannot be fetched.
        """
        folder = find_checkpoint(name_or_path)
        config = LenVMConfig.load(folder)
        if GRAPH_FILE in config.files:
            raise ArtifactError(f"{folder} is an ONNX export: serve it with --backend onnx, or pass its checkpoint")
        config.verify_files(folder)
        backbone_dir = resolve_backbone(str(backbone or config.backbone.name))
        for kind, found, expected in (
            ("weights", backbone_sha256(backbone_dir), config.backbone.sha256),
            ("tokenizer", tokenizer_sha256(backbone_dir), config.backbone.tokenizer_sha256),
        ):
            if found != expected:
                raise ArtifactError(
                    f"checkpoint {config.name!r} was trained on other backbone {kind} than those in {backbone_dir} "
                    f"(sha256 {expected[:12]}, found {found[:12]}): pass the backbone that it names"
                )
        # Merged in float32 whatever the serving precision: small deltas vanish in bfloat16.
        decoder = _load_decoder(backbone_dir, device=device, dtype=torch.float32)
        own_weights = WEIGHTS_FILE in config.files
        if own_weights:
            _replace_weights(decoder, folder / WEIGHTS_FILE)
        if config.lora_scale is not None:
            merge(decoder, folder, config.lora_scale)
        head = ValueHead(decoder.config.hidden_size, config.head)
        try:
            head.load_state_dict(load_file(folder / HEAD_FILE))
        except (OSError, SafetensorError, RuntimeError) as error:  # torch's own message takes many lines
            raise ArtifactError(
                f"{folder / HEAD_FILE} is damaged or does not fit: fetch the checkpoint again"
            ) from error
        for parameter in decoder.parameters():
            # Parameters alone: ``decoder.to`` would round the rotary frequencies as well and move every position.
            parameter.data = parameter.data.to(dtype)
        model = cls(decoder, head.to(device), config, backbone_dir).eval().requires_grad_(False)
        model.own_weights = own_weights
        use_paged_attention(model.decoder)
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Write head, adapter or whole weights (where there are such) and ``lenvm.json`` with the digests of all."""
        from lenvm.lora import LoRALinear

        folder.mkdir(parents=True, exist_ok=True)
        adapters = [module for module in self.decoder.modules() if isinstance(module, LoRALinear)]
        names = [HEAD_FILE]
        if adapters:
            save_adapter(self.decoder, folder, base_model=self.config.backbone.name)
            names.append(ADAPTER_FILE)
        if self.own_weights:
            weights = {
                key: value.detach().to("cpu", torch.bfloat16, copy=True).contiguous()
                for key, value in self.decoder.state_dict().items()
            }
            save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            names.append(WEIGHTS_FILE)
        state = {key: value.detach().float().cpu().contiguous() for key, value in self.head.state_dict().items()}
        save_file(state, folder / HEAD_FILE)
        scale = adapters[0].scale if adapters else None
        files = {name: file_sha256(folder / name) for name in names}
        # A calibration belongs to the weights that it was fitted on.
        calibration = self.config.calibration if files == self.config.files else None
        self.config = replace(self.config, lora_scale=scale, files=files, calibration=calibration)
        self.config.save(folder)


def _replace_weights(decoder: Any, path: Path) -> None:
    """Load the whole weights of a fully fine-tuned decoder. Raises ArtifactError where they do not fit it."""
    try:
        decoder.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:  # torch's own message takes many lines
        raise ArtifactError(f"{path} is damaged or does not fit: fetch the checkpoint again") from error


def _load_decoder(folder: Path, *, device: str, dtype: torch.dtype) -> Any:
    from lenvm.backbones import load_backbone

    return load_backbone(folder, dtype=dtype, device=device).get_decoder()
