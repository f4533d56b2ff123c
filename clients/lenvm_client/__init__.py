"""The HTTP client of the LenVM service. Importing it needs neither torch nor NumPy, and is quick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lenvm_client.errors import LenVMClientError

if TYPE_CHECKING:
    __version__: str

__all__ = ["LenVMClientError", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # The client must not import lenvm, and importlib.metadata costs more than the rest of this package: asked late.
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lenvm")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
