"""Typed errors of the client library: one class for each type of the service's error table, and three for the wire."""

from __future__ import annotations

import math

__all__ = [
    "BadAnswerError",
    "ContextTooLongError",
    "DeadlineExceededError",
    "DrainingError",
    "InternalServerError",
    "InvalidRequestError",
    "LenVMClientError",
    "ModelNotFoundError",
    "NotReadyError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PrefixUnknownError",
    "ServiceError",
    "ServiceTimeoutError",
    "ServiceUnreachableError",
    "UnauthorizedError",
    "service_error",
]


# Nobody waits longer because a server said so.
LONGEST_RETRY_AFTER_S = 3600.0


class LenVMClientError(Exception):
    """Base of every error that this library raises on purpose. The message is one line and says what to do.

    ``retryable`` says whether the same call may go through later, ``retry_after_s`` when, where the service told (0 to
    an hour). ``status`` is the HTTP status and ``request_id`` the service's name of the request, None where there was
    no answer. ``sent`` is False where it is certain that the request never left.
    """

    retryable: bool = False
    sent: bool = True

    def __init__(
        self,
        message: str = "",
        *,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        known = retry_after_s is not None and math.isfinite(retry_after_s)
        self.retry_after_s = min(max(retry_after_s or 0.0, 0.0), LONGEST_RETRY_AFTER_S) if known else None
        self.status = status
        self.request_id = request_id
        if retryable is not None:
            self.retryable = retryable


class ServiceError(LenVMClientError):
    """The service refused a request or a row. ``type`` is the wire's name of the class, ``code`` a finer reason (equal
    to ``type`` where there is none), ``param`` the JSON path at fault. ``status`` is None where a request was refused
    before it was sent, or where only one of its rows failed."""

    type: str = "unknown"

    def __init__(
        self,
        message: str = "",
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(
            message, retryable=retryable, retry_after_s=retry_after_s, status=status, request_id=request_id
        )
        if type is not None:
            self.type = type
        self.code = code or self.type
        self.param = param


class InvalidRequestError(ServiceError):
    """The request, or a row of it, is wrong; also raised before sending, for what JSON cannot carry (NaN, infinity)."""

    type = "invalid_request"


class UnauthorizedError(ServiceError):
    """The service wants a key, or another one: give ``api_key``."""

    type = "unauthorized"


class ModelNotFoundError(ServiceError):
    """The service does not serve the model that was named."""

    type = "model_not_found"


class PayloadTooLargeError(ServiceError):
    """The body, the batch or a row is larger than the limits of ``info()``."""

    type = "payload_too_large"


class ContextTooLongError(ServiceError):
    """The prefix is longer than the model's context."""

    type = "context_too_long"


class PrefixUnknownError(ServiceError):
    """No replica holds this session: send the whole prefix. ``GuidedDecoder`` does so by itself."""

    type = "prefix_unknown"


class OverloadedError(ServiceError):
    """The service's queue is full."""

    type = "overloaded"
    retryable = True


class NotReadyError(ServiceError):
    """The model is loading, or its engine recovers from a failure."""

    type = "not_ready"
    retryable = True


class DrainingError(ServiceError):
    """The service shuts down and takes no new work."""

    type = "draining"
    retryable = True


class DeadlineExceededError(ServiceError):
    """The request's ``deadline_ms`` passed before its work was done."""

    type = "deadline_exceeded"
    retryable = True


class InternalServerError(ServiceError):
    """Something failed inside the service; its log has the cause under ``request_id``."""

    type = "internal"


class ServiceUnreachableError(LenVMClientError, ConnectionError):
    """No connection, or it broke before the answer was complete, or a proxy says so (then ``status`` is set)."""

    retryable = True


class ServiceTimeoutError(LenVMClientError, TimeoutError):
    """No answer within the time-out."""

    retryable = True


class BadAnswerError(LenVMClientError):
    """What came back is not an answer of the wire contract: another server, or a version that does not fit."""


_BY_TYPE: dict[str, type[ServiceError]] = {
    error.type: error
    for error in (
        InvalidRequestError,
        UnauthorizedError,
        ModelNotFoundError,
        PayloadTooLargeError,
        ContextTooLongError,
        PrefixUnknownError,
        OverloadedError,
        NotReadyError,
        DrainingError,
        DeadlineExceededError,
        InternalServerError,
    )
}


def service_error(
    type: str,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    retryable: bool | None = None,
    retry_after_s: float | None = None,
    status: int | None = None,
    request_id: str | None = None,
) -> ServiceError:
    """The exception of a wire type; a plain ``ServiceError`` for a type that this version does not know."""
    return _BY_TYPE.get(type, ServiceError)(
        message,
        type=type,
        code=code,
        param=param,
        retryable=retryable,
        retry_after_s=retry_after_s,
        status=status,
        request_id=request_id,
    )
