"""Typed errors of the client library."""

from __future__ import annotations

__all__ = ["LenVMClientError"]


class LenVMClientError(Exception):
    """Base of every error that this library raises on purpose. The message is one line and says what to do.

    ``retryable`` says whether the same call may go through later.
    """

    retryable: bool = False
