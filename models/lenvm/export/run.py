"""``lenvm export``: build the graph, compare it with torch, and only then write the folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from lenvm.backbones import load_eos_ids
from lenvm.backbones._files import file_sha256
from lenvm.config import GRAPH_FILE
from lenvm.errors import ArtifactError, InvalidRequestError
from lenvm.export.artifact import DATA_FILE, VARIANTS, ExportInfo, Variant
from lenvm.export.graph import build_graph
from lenvm.export.parity import check_parity, compare
from lenvm.export.quantize import Quantization, quantize
from lenvm.export.samples import sample_ids
from lenvm.export.weights import GraphWeights, read_weights
from lenvm.modeling import LengthValueModel
from lenvm.scoring import OnnxModel, OnnxScorer, TorchScorer

__all__ = ["export_model"]

# What a tokenizer and the ids that end an answer are read from.
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_LONGEST = 512  # tokens of a sample
_SMALL = 1024  # bytes of a weight from which on it is kept beside the graph

Text = tuple[Sequence[int], int]  # token ids, and how many of them are the prompt


def export_model(
    model: LengthValueModel, out: Path, *, variant: Variant = "fp32", texts: Sequence[Text] | None = None
) -> ExportInfo:
    """Write ``out``: graph, weights, tokenizer files, ``lenvm.json`` and ``export.json``; whole or not at all.

    Args:
        model: a checkpoint as ``LengthValueModel.from_pretrained`` gives it, in float32 on the CPU.
        texts: what parity is measured on, and int8 scaled by; default: the samples that come with this package.

    Raises:
        InvalidRequestError: ``out`` holds something, or there is no such variant.
        BackboneError: no graph can be written for this architecture.
        ParityError: the graph does not give what torch gives. Nothing is left behind then.
    """
    if variant not in VARIANTS:
        raise InvalidRequestError(f"there is no variant {variant!r}: take {', '.join(VARIANTS)}", param="variant")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequestError(f"{out} is not empty: choose another --out", param="out")
    if texts is None:
        texts = sample_ids(model.tokenizer, longest=min(_LONGEST, model.context))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            made = Path(scratch) / "export"
            made.mkdir()
            info = _write(model, made, variant, texts)
            found = compare(TorchScorer(model), OnnxScorer(OnnxModel(made)), texts)
            check_parity(variant, found)
            info = replace(info, parity=found.to_dict())
            info.save(made)
            if out.exists():
                out.rmdir()  # empty, as was checked
            made.rename(out)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    return info


def _write(model: LengthValueModel, folder: Path, variant: Variant, texts: Sequence[Text]) -> ExportInfo:
    weights = read_weights(model)
    quantization: Quantization | None = None
    if variant == "int8":
        quantization = quantize(model, weights, [ids for ids, _ in texts])
        weights = quantization.weights
    _write_graph(folder, weights, variant, quantization)
    for name in _COPIED:
        if (model.backbone_dir / name).is_file():
            shutil.copyfile(model.backbone_dir / name, folder / name)
    files = {name: file_sha256(folder / name) for name in (GRAPH_FILE, DATA_FILE)}
    # The adapter is merged: the folder's weights are those of its graph.
    replace(model.config, lora_scale=None, files=files).save(folder)
    info = ExportInfo(
        variant=variant,
        dtype="float16" if variant == "fp16" else "float32",
        context=weights.context,
        vocab_size=len(weights.embedding),
        layers=len(weights.layers),
        kv_heads=weights.spec.kv_heads,
        head_dim=weights.spec.head_dim,
        eos_ids=load_eos_ids(model.backbone_dir),
        int8_products=tuple(f"{layer}.{kind}" for layer, kind in quantization.products) if quantization else (),
        checkpoint_files=model.config.files,
    )
    info.save(folder)
    return info


def _write_graph(folder: Path, weights: GraphWeights, variant: Variant, quantization: Quantization | None) -> None:
    graph = build_graph(
        weights,
        precision="float16" if variant == "fp16" else "float32",
        quantized=quantization.products if quantization else None,
    )
    onnx.save_model(graph, folder / GRAPH_FILE, save_as_external_data=True, location=DATA_FILE, size_threshold=_SMALL)
    (folder / DATA_FILE).chmod((folder / GRAPH_FILE).stat().st_mode & 0o777)  # onnx keeps it to its owner
