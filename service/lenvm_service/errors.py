"""Typed errors of the service, beside those of the library; ``api.errors`` maps every ``code`` to one HTTP answer."""

from __future__ import annotations

from lenvm.errors import InvalidRequestError, LenVMError

__all__ = [
    "DeadlineExceededError",
    "DrainingError",
    "InternalError",
    "ModelNotFoundError",
    "NotReadyError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PrefixUnknownError",
    "ServiceError",
    "UnauthorizedError",
]


class ServiceError(LenVMError):
    """Base of the service's own errors. ``retry_after_s``: when a retry makes sense, where the service can tell."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelNotFoundError(ServiceError):
    """The request names a model that this process does not serve."""

    code = "model_not_found"


class PayloadTooLargeError(ServiceError):
    """The body, the batch or a row is larger than the limits of ``/info``."""

    code = "payload_too_large"


class OverloadedError(ServiceError):
    """The queue, or the pool of prefix states, is full."""

    code = "overloaded"


class NotReadyError(ServiceError):
    """The model is still loading, or its engine is being checked after a failure."""

    code = "not_ready"


class DrainingError(ServiceError):
    """The process is shutting down and takes no new work."""

    code = "draining"


class DeadlineExceededError(ServiceError):
    """The request's deadline passed before its work was done."""

    code = "deadline_exceeded"


class UnauthorizedError(ServiceError):
    """No API key, or one that is not known. ``challenge``: how it may be sent."""

    code = "unauthorized"

    def __init__(self, message: str, *, challenge: str = "Bearer") -> None:
        super().__init__(message)
        self.challenge = challenge


class InternalError(ServiceError):
    """Something failed that should not have; the log has the cause, the caller gets none of it."""

    code = "internal"


class PrefixUnknownError(InvalidRequestError):
    """A session handle that this replica does not hold (never did, or dropped it): send the whole prefix."""

    code = "prefix_unknown"
