"""The HTTP client of the LenVM service. Importing it needs neither torch nor NumPy, and is quick: names are imported
from their modules at their first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lenvm_client.errors import (
    BadAnswerError,
    ContextTooLongError,
    DeadlineExceededError,
    DrainingError,
    InternalServerError,
    InvalidRequestError,
    LenVMClientError,
    ModelNotFoundError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
    PrefixUnknownError,
    ServiceError,
    ServiceTimeoutError,
    ServiceUnreachableError,
    UnauthorizedError,
)

if TYPE_CHECKING:
    from lenvm_client._steps import GuidanceReport, GuidedRow, RowReport, WeightedRow
    from lenvm_client._text import TextAdapter
    from lenvm_client._types import (
        CandidateInput,
        CandidateScorer,
        CandidateScores,
        CompletionInput,
        FeedbackItem,
        FeedbackResponse,
        ModelInfo,
        ModelList,
        PredictInput,
        Prediction,
        PredictLengthResponse,
        RowError,
        ScoreResponse,
        ServiceInfo,
        TokenScores,
    )
    from lenvm_client.client import AsyncClient, Client
    from lenvm_client.guided import AsyncGuidedDecoder, GuidedDecoder
    from lenvm_client.mock import MockRequest, MockTransport

    __version__: str

__all__ = [
    "AsyncClient",
    "AsyncGuidedDecoder",
    "BadAnswerError",
    "CandidateInput",
    "CandidateScorer",
    "CandidateScores",
    "Client",
    "CompletionInput",
    "ContextTooLongError",
    "DeadlineExceededError",
    "DrainingError",
    "FeedbackItem",
    "FeedbackResponse",
    "GuidanceReport",
    "GuidedDecoder",
    "GuidedRow",
    "InternalServerError",
    "InvalidRequestError",
    "LenVMClientError",
    "MockRequest",
    "MockTransport",
    "ModelInfo",
    "ModelList",
    "ModelNotFoundError",
    "NotReadyError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PredictInput",
    "PredictLengthResponse",
    "Prediction",
    "PrefixUnknownError",
    "RowError",
    "RowReport",
    "ScoreResponse",
    "ServiceError",
    "ServiceInfo",
    "ServiceTimeoutError",
    "ServiceUnreachableError",
    "TextAdapter",
    "TokenScores",
    "UnauthorizedError",
    "WeightedRow",
    "__version__",
]

# The home of each name that is imported at its first use.
_LAZY = {
    "AsyncClient": "lenvm_client.client",
    "AsyncGuidedDecoder": "lenvm_client.guided",
    "CandidateInput": "lenvm_client._types",
    "CandidateScorer": "lenvm_client._types",
    "CandidateScores": "lenvm_client._types",
    "Client": "lenvm_client.client",
    "CompletionInput": "lenvm_client._types",
    "FeedbackItem": "lenvm_client._types",
    "FeedbackResponse": "lenvm_client._types",
    "GuidanceReport": "lenvm_client._steps",
    "GuidedDecoder": "lenvm_client.guided",
    "GuidedRow": "lenvm_client._steps",
    "MockRequest": "lenvm_client.mock",
    "MockTransport": "lenvm_client.mock",
    "ModelInfo": "lenvm_client._types",
    "ModelList": "lenvm_client._types",
    "PredictInput": "lenvm_client._types",
    "PredictLengthResponse": "lenvm_client._types",
    "Prediction": "lenvm_client._types",
    "RowError": "lenvm_client._types",
    "RowReport": "lenvm_client._steps",
    "ScoreResponse": "lenvm_client._types",
    "ServiceInfo": "lenvm_client._types",
    "TextAdapter": "lenvm_client._text",
    "TokenScores": "lenvm_client._types",
    "WeightedRow": "lenvm_client._steps",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # The client must not import lenvm, and importlib.metadata costs more than the rest of this package: asked late.
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lenvm")
        except PackageNotFoundError:  # run from a source tree that is not installed
            return "0+source"
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
