"""``export.json``: what an exported graph is, beside ``lenvm.json`` in its folder. Needs neither torch nor onnx."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lenvm.config import GRAPH_FILE
from lenvm.errors import ArtifactError

__all__ = ["DATA_FILE", "INFO_FILE", "VARIANTS", "Backend", "ExportInfo", "Variant", "backend_of"]

INFO_FILE = "export.json"
DATA_FILE = "model.onnx.data"  # the weights: a graph file alone may have 2 GiB at most
FORMAT_VERSION = 1
Variant = Literal["fp32", "fp16", "int8"]
Backend = Literal["torch", "onnx"]
VARIANTS: tuple[Variant, ...] = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class ExportInfo:
    """Content of ``export.json``.

    Attributes:
        variant: precision of the graph.
        dtype: of keys and values.
        int8_products: those that an int8 graph computes in int8, such as ``11.up``.
        checkpoint_files: digests of the checkpoint's weight files.
        parity: errors against torch in float32, measured before the folder was written.
    """

    variant: Variant
    dtype: Literal["float32", "float16"]
    context: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    eos_ids: tuple[int, ...]
    int8_products: tuple[str, ...] = ()
    checkpoint_files: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one token takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (2 if self.dtype == "float16" else 4)

    def save(self, folder: Path) -> None:
        """Write ``export.json`` into ``folder``."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False)
        (folder / INFO_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ExportInfo:
        """Read ``folder/export.json``.

        Raises:
            ArtifactError: missing, damaged, or of another format version.
        """
        path = folder / INFO_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder} is no ONNX export: it has no {INFO_FILE}; make one with lenvm export"
            ) from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}): export the checkpoint again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format version {version!r}; this release reads {FORMAT_VERSION}")
        try:
            info = cls(**{**data, **{name: tuple(data[name]) for name in ("eos_ids", "int8_products")}})
            sizes = (info.context, info.vocab_size, info.layers, info.kv_heads, info.head_dim, *info.eos_ids)
            wrong = [size for size in sizes if not isinstance(size, int) or isinstance(size, bool) or size < 0]
            if wrong or info.variant not in VARIANTS or info.dtype not in ("float32", "float16"):
                raise ValueError("a field is out of range")
            if not info.eos_ids:
                raise ValueError("eos_ids is empty")
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): export the checkpoint again") from None
        return info


def backend_of(folder: str | Path, wanted: str = "auto") -> Backend:
    """What runs a checkpoint folder: ONNX Runtime an export, torch any other.

    Raises:
        ArtifactError: ``wanted`` ("auto", "torch" or "onnx") is the other one.
    """
    exported = any((Path(folder) / name).is_file() for name in (INFO_FILE, GRAPH_FILE))
    found: Backend = "onnx" if exported else "torch"
    if wanted in ("auto", found):
        return found
    if exported:
        raise ArtifactError(f"{folder} is an ONNX export: use --backend onnx, or pass the checkpoint")
    raise ArtifactError(f"{folder} is no ONNX export: make one with lenvm export, or use --backend torch")
