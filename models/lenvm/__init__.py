"""Length Value Models: how much is still to come, and how to steer it.

Importing this package is cheap and needs neither torch nor NumPy: the names below are imported from their modules at
their first use. Where the optional dependencies are absent, that use raises :class:`MissingExtraError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lenvm import _extras
from lenvm._version import __version__
from lenvm.errors import (
    ArtifactError,
    BackboneError,
    CacheFolderError,
    ContextTooLongError,
    DataError,
    InvalidRequestError,
    LenVMError,
    MissingExtraError,
    PoolExhaustedError,
    StateClosedError,
)

if TYPE_CHECKING:
    from lenvm.backbones import resolve_backbone
    from lenvm.config import LenVMConfig
    from lenvm.decoding import Generation, Sampler, SamplingParams
    from lenvm.distribution import LengthBins
    from lenvm.guidance import Objective, log_weights
    from lenvm.modeling import LengthValueModel
    from lenvm.scoring import TorchScorer

__all__ = [
    "ArtifactError",
    "BackboneError",
    "CacheFolderError",
    "ContextTooLongError",
    "DataError",
    "Generation",
    "InvalidRequestError",
    "LenVMConfig",
    "LenVMError",
    "LengthBins",
    "LengthValueModel",
    "MissingExtraError",
    "Objective",
    "PoolExhaustedError",
    "Sampler",
    "SamplingParams",
    "StateClosedError",
    "TorchScorer",
    "__version__",
    "log_weights",
    "resolve_backbone",
]

# The home of each name that is imported at its first use.
_LAZY = {
    "Generation": "lenvm.decoding",
    "LenVMConfig": "lenvm.config",
    "LengthBins": "lenvm.distribution",
    "LengthValueModel": "lenvm.modeling",
    "Objective": "lenvm.guidance",
    "Sampler": "lenvm.decoding",
    "SamplingParams": "lenvm.decoding",
    "TorchScorer": "lenvm.scoring",
    "log_weights": "lenvm.guidance",
    "resolve_backbone": "lenvm.backbones",
}


def __getattr__(name: str) -> Any:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        extra = _extras.extra_of(error.name or "")
        if extra is None:
            raise
        raise _extras.missing_extra(extra, error.name or "") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
