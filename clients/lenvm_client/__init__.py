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
        ModelPredictions,
        PredictInput,
        Prediction,
        PredictLengthResponse,
        PredictModelsResponse,
        RowError,
        ScoreResponse,
        ServiceInfo,
        TokenScores,
    )
    from lenvm_client.async_client import AsyncClient
    from lenvm_client.batching import (
        PredictionBatcher,
        predict_rows,
        predict_rows_async,
    )
    from lenvm_client.client import Client
    from lenvm_client.guided import AsyncGuidedDecoder, GuidedDecoder
    from lenvm_client.mock import MockRequest, MockTransport
    from lenvm_client.resampling import Resampled, resample
    from lenvm_client.routing import (
        Route,
        RouteEstimate,
        best_route,
        compare_routes,
        compare_routes_async,
    )
    from lenvm_client.scheduling import (
        Admission,
        BudgetPlanner,
        Estimate,
        Reservation,
        TokenBudget,
        predicted_tokens,
        prediction_headers,
        priority_for,
        request_fields,
    )
    from lenvm_client.tracking import (
        AsyncTracker,
        Tracker,
    )

    __version__: str

__all__ = [
    "Admission",
    "AsyncClient",
    "AsyncGuidedDecoder",
    "AsyncTracker",
    "BadAnswerError",
    "BudgetPlanner",
    "CandidateInput",
    "CandidateScorer",
    "CandidateScores",
    "Client",
    "CompletionInput",
    "ContextTooLongError",
    "DeadlineExceededError",
    "DrainingError",
    "Estimate",
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
    "ModelPredictions",
    "NotReadyError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PredictInput",
    "PredictLengthResponse",
    "PredictModelsResponse",
    "Prediction",
    "PredictionBatcher",
    "PrefixUnknownError",
    "Resampled",
    "Reservation",
    "Route",
    "RouteEstimate",
    "RowError",
    "RowReport",
    "ScoreResponse",
    "ServiceError",
    "ServiceInfo",
    "ServiceTimeoutError",
    "ServiceUnreachableError",
    "TextAdapter",
    "TokenBudget",
    "TokenScores",
    "Tracker",
    "UnauthorizedError",
    "WeightedRow",
    "__version__",
    "best_route",
    "compare_routes",
    "compare_routes_async",
    "predict_rows",
    "predict_rows_async",
    "predicted_tokens",
    "prediction_headers",
    "priority_for",
    "request_fields",
    "resample",
]

# The home of each name that is imported at its first use.
_LAZY = {
    "Admission": "lenvm_client.scheduling",
    "AsyncClient": "lenvm_client.async_client",
    "AsyncGuidedDecoder": "lenvm_client.guided",
    "AsyncTracker": "lenvm_client.tracking",
    "BudgetPlanner": "lenvm_client.scheduling",
    "CandidateInput": "lenvm_client._types",
    "CandidateScorer": "lenvm_client._types",
    "CandidateScores": "lenvm_client._types",
    "Client": "lenvm_client.client",
    "CompletionInput": "lenvm_client._types",
    "Estimate": "lenvm_client.scheduling",
    "FeedbackItem": "lenvm_client._types",
    "FeedbackResponse": "lenvm_client._types",
    "GuidanceReport": "lenvm_client._steps",
    "GuidedDecoder": "lenvm_client.guided",
    "GuidedRow": "lenvm_client._steps",
    "MockRequest": "lenvm_client.mock",
    "MockTransport": "lenvm_client.mock",
    "ModelInfo": "lenvm_client._types",
    "ModelList": "lenvm_client._types",
    "ModelPredictions": "lenvm_client._types",
    "PredictInput": "lenvm_client._types",
    "PredictLengthResponse": "lenvm_client._types",
    "PredictModelsResponse": "lenvm_client._types",
    "Prediction": "lenvm_client._types",
    "PredictionBatcher": "lenvm_client.batching",
    "Resampled": "lenvm_client.resampling",
    "Reservation": "lenvm_client.scheduling",
    "Route": "lenvm_client.routing",
    "RouteEstimate": "lenvm_client.routing",
    "RowError": "lenvm_client._types",
    "RowReport": "lenvm_client._steps",
    "ScoreResponse": "lenvm_client._types",
    "ServiceInfo": "lenvm_client._types",
    "TextAdapter": "lenvm_client._text",
    "TokenBudget": "lenvm_client.scheduling",
    "TokenScores": "lenvm_client._types",
    "Tracker": "lenvm_client.tracking",
    "WeightedRow": "lenvm_client._steps",
    "best_route": "lenvm_client.routing",
    "compare_routes": "lenvm_client.routing",
    "compare_routes_async": "lenvm_client.routing",
    "predict_rows": "lenvm_client.batching",
    "predict_rows_async": "lenvm_client.batching",
    "predicted_tokens": "lenvm_client.scheduling",
    "prediction_headers": "lenvm_client.scheduling",
    "priority_for": "lenvm_client.scheduling",
    "request_fields": "lenvm_client.scheduling",
    "resample": "lenvm_client.resampling",
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
