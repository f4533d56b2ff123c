"""Typed errors of the library. The service maps each ``code`` to one HTTP answer; the CLI prints the message."""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BackboneError",
    "CacheFolderError",
    "ContextTooLongError",
    "DataError",
    "EndpointAuthError",
    "EndpointError",
    "EndpointUnavailableError",
    "InvalidRequestError",
    "LenVMError",
    "MissingExtraError",
    "ParityError",
    "PoolExhaustedError",
    "PromptRefusedError",
    "StateClosedError",
]


class LenVMError(Exception):
    """Base of every error that this library raises on purpose. The message is one line and says what to do."""

    code: str = "internal"


class InvalidRequestError(LenVMError, ValueError):
    """The caller's input is wrong: an empty prompt, an id out of range, a NaN target, an unknown objective."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLongError(InvalidRequestError):
    """The prefix does not fit in the model's context window."""

    code = "context_too_long"


class StateClosedError(LenVMError):
    """A prefix state was used after ``close``."""

    code = "prefix_unknown"


class ArtifactError(LenVMError):
    """A checkpoint folder is missing a file, truncated, tampered with, or of another format version."""

    code = "artifact_invalid"


class ParityError(ArtifactError):
    """An exported graph does not give what the checkpoint gives."""

    code = "parity_failed"


class BackboneError(LenVMError):
    """A backbone cannot be fetched, read or used (no network, wrong checksum, unsupported architecture)."""

    code = "backbone_unavailable"


class CacheFolderError(BackboneError):
    """The cache folder cannot be created or written."""

    code = "cache_unwritable"


class PoolExhaustedError(LenVMError):
    """The pool of prefix states has no free block left."""

    code = "overloaded"


class DataError(LenVMError):
    """A data, rollout or recipe file is missing or malformed."""

    code = "data_invalid"


class EndpointError(LenVMError):
    """A generator behind HTTP answers what no retry can mend (no such model or path, no quota, no token ids)."""

    code = "endpoint_failed"


class EndpointAuthError(EndpointError):
    """The generator's endpoint refuses the credentials, or wants some."""

    code = "endpoint_unauthorized"


class EndpointUnavailableError(EndpointError):
    """The generator's endpoint could not be reached, was overloaded or gave unreadable answers, at every attempt."""

    code = "endpoint_unavailable"


class PromptRefusedError(EndpointError):
    """The generator's endpoint refuses this one prompt (too long, malformed, filtered)."""

    code = "prompt_refused"


class MissingExtraError(LenVMError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    code = "missing_extra"
