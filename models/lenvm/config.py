"""``lenvm.json``: what a checkpoint is, on which backbone it stands, and for which generator it is valid."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lenvm.distribution import LengthBins
from lenvm.errors import ArtifactError, LenVMError
from lenvm.returns import check_gamma

__all__ = ["FORMAT_VERSION", "BackboneRef", "GeneratorRef", "HeadConfig", "LenVMConfig", "file_sha256"]

FORMAT_VERSION = 1
CONFIG_FILE = "lenvm.json"


@dataclass(frozen=True)
class BackboneRef:
    """The backbone under the head: a name that ``resolve_backbone`` takes, and the digest of its weights."""

    name: str
    sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class HeadConfig:
    """Two-layer SiLU MLP of ``width`` hidden units; ``bins`` None is the paper's value head alone."""

    width: int
    bins: LengthBins | None

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
    """Content of ``lenvm.json``. ``files``: weight file -> SHA-256; ``calibration`` is reserved for quantiles."""

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
        """Write ``lenvm.json`` into ``folder``."""
        data = asdict(self)
        data["head"]["bins"] = self.head.bins.to_dict() if self.head.bins else None
        (folder / CONFIG_FILE).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")

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
            head = data["head"]
            bins = LengthBins.from_dict(head["bins"]) if head["bins"] is not None else None
            return cls(
                name=str(data["name"]),
                backbone=BackboneRef(**data["backbone"]),
                head=HeadConfig(int(head["width"]), bins),
                gamma=check_gamma(data["gamma"]),
                generator=GeneratorRef(**data["generator"]),
                lora_scale=data["lora_scale"],
                files=dict(data["files"]),
                calibration=data["calibration"],
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
