"""``lenvm.json``: what a checkpoint is, on which backbone it stands, and for which generator it is valid."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lenvm._resources import zoo_dir
from lenvm.backbones._files import file_sha256
from lenvm.calibration import Calibration
from lenvm.distribution import LengthBins
from lenvm.errors import ArtifactError, LenVMError
from lenvm.returns import check_gamma

__all__ = [
    "ADAPTER_FILE",
    "CONFIG_FILE",
    "DEFAULT_MODEL",
    "FORMAT_VERSION",
    "GRAPH_FILE",
    "HEAD_FILE",
    "WEIGHTS_FILE",
    "BackboneRef",
    "GeneratorRef",
    "HeadConfig",
    "LenVMConfig",
    "find_checkpoint",
]

FORMAT_VERSION = 1
CONFIG_FILE = "lenvm.json"
HEAD_FILE = "head.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
WEIGHTS_FILE = "model.safetensors"  # the whole decoder, where all of it was trained
GRAPH_FILE = "model.onnx"  # an export: the folder holds a graph with all weights, and none of the files above
DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class BackboneRef:
    """The backbone under the head: a name that ``resolve_backbone`` takes, and the digest of its weights."""

    name: str
    sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class HeadConfig:
    """Two-layer SiLU MLP of ``width`` hidden units (0: one linear layer); ``bins`` None is the paper's value head.

    ``output``: what the head's first number is. ``logit``: z, with V = -sigmoid(z). ``value``: V itself, as some
    foreign checkpoints have it; it is clamped into (-1, 0) and read back as a logit.
    """

    width: int
    bins: LengthBins | None
    output: Literal["logit", "value"] = "logit"

    @property
    def num_bins(self) -> int:
        """Bin logits that the head gives, overflow included."""
        return self.bins.size if self.bins else 0


@dataclass(frozen=True)
class GeneratorRef:
    """The policy whose lengths the model predicts: backbone and sampling parameters."""

    backbone: str
    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class LenVMConfig:
    """Content of ``lenvm.json``. ``files``: weight file -> SHA-256; ``calibration``: see
    ``lenvm.calibration``; None leaves the quantiles as the network gives them."""

    name: str
    backbone: BackboneRef
    head: HeadConfig
    gamma: float
    generator: GeneratorRef
    lora_scale: float | None = None  # None: the folder carries no adapter
    files: dict[str, str] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write ``lenvm.json`` into ``folder``, whole or not at all: a service may load it at any moment."""
        data = asdict(self)
        data["head"]["bins"] = self.head.bins.to_dict() if self.head.bins else None
        temporary = folder / f".{CONFIG_FILE}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(folder / CONFIG_FILE)

    @classmethod
    def load(cls, folder: Path) -> LenVMConfig:
        """Read and check ``folder/lenvm.json``.

        Raises:
            ArtifactError: missing, not JSON, of another format version, or with a field missing or out of range.
        """
        path = folder / CONFIG_FILE
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise ArtifactError(f"{folder} is no LenVM checkpoint: it has no {CONFIG_FILE}") from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}): fetch the checkpoint again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path} has format version {version!r}; this release reads {FORMAT_VERSION}")
        try:
            head, scale = data["head"], data["lora_scale"]
            bins = LengthBins.from_dict(head["bins"]) if head["bins"] is not None else None
            return cls(
                name=_checked(data, "name", str),
                backbone=BackboneRef(
                    **{name: _checked(data["backbone"], name, str) for name in ("name", "sha256", "tokenizer_sha256")}
                ),
                head=HeadConfig(_checked(head, "width", int, low=0), bins, _checked_output(head)),
                gamma=check_gamma(data["gamma"]),
                generator=GeneratorRef(
                    backbone=_checked(data["generator"], "backbone", str),
                    temperature=_checked(data["generator"], "temperature", float, low=0),
                    top_p=_checked(data["generator"], "top_p", float, low=0),
                    max_new_tokens=_checked(data["generator"], "max_new_tokens", int, low=1),
                ),
                lora_scale=None if scale is None else _checked(data, "lora_scale", float),
                files=_checked_files(data["files"], adapter=scale is not None),
                calibration=_checked_calibration(data["calibration"]),
            )
        except (KeyError, TypeError, ValueError, LenVMError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): fetch the checkpoint again") from None

    def verify_files(self, folder: Path) -> None:
        """Compare every weight file with its digest.

        Raises:
            ArtifactError: a file is missing, truncated or was changed.
        """
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{folder} lacks {name}: fetch the checkpoint again")
            if file_sha256(path) != expected:
                raise ArtifactError(f"{path} does not match its SHA-256 in {CONFIG_FILE}: fetch the checkpoint again")


def find_checkpoint(name_or_path: str | Path) -> Path:
    """A checkpoint folder: a path, or the name of one shipped in the zoo.

    Raises:
        ArtifactError: there is neither.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    shipped = zoo_dir() / str(name_or_path)
    if shipped.is_dir():
        return shipped
    names = ", ".join(sorted(p.name for p in zoo_dir().iterdir() if p.is_dir())) or "none"
    raise ArtifactError(
        f"no checkpoint {str(name_or_path)!r}: it is neither a folder nor one of the shipped ones ({names})"
    )


def _checked(data: Mapping[str, Any], name: str, kind: type, *, low: float | None = None) -> Any:
    value: Any = data[name]
    wanted = (int, float) if kind is float else kind
    is_kind = isinstance(value, wanted) and not isinstance(value, bool)
    if not is_kind or (low is not None and not data[name] >= low):
        raise ValueError(f"{name} is {value!r}")
    return value


def _checked_output(head: Mapping[str, Any]) -> Literal["logit", "value"]:
    """What the head gives; artifacts of earlier releases do not say so and mean a logit."""
    output = head.get("output", "logit")
    if output not in ("logit", "value"):
        raise ValueError(f"output is {output!r}")
    return "value" if output == "value" else "logit"


def _checked_calibration(data: Any) -> dict[str, Any] | None:
    """A calibration that this release cannot apply must not be passed over in silence."""
    Calibration.from_dict(data)
    return None if data is None else dict(data)


def _checked_files(files: Any, *, adapter: bool) -> dict[str, str]:
    """An artifact that names no weights would switch the check of its weights off."""
    needed = {HEAD_FILE, ADAPTER_FILE} if adapter else {HEAD_FILE}
    if isinstance(files, dict) and GRAPH_FILE in files:
        needed = {GRAPH_FILE}
    if not isinstance(files, dict) or not needed <= set(files):
        raise ValueError(f"files must name {', '.join(sorted(needed))}")
    for name, digest in files.items():
        if Path(name).name != name or not isinstance(digest, str):
            raise ValueError(f"files names {name!r}")
    return dict(files)
