"""The service around Length Value Models: the HTTP service and the ``lenvm`` command line."""

from __future__ import annotations

from lenvm import __version__

__all__ = ["__version__"]
