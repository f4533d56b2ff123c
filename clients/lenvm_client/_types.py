"""What goes over the wire, typed: inputs (what a row asks) and answers. Field names are the wire's own.

Lengths are remaining tokens ``l``, EOS included; ``generated`` counts content tokens, EOS not included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from lenvm_client.errors import ServiceError, service_error

__all__ = [
    "Accepted",
    "CandidateInput",
    "CandidateScorer",
    "CandidateScores",
    "CompletionInput",
    "DetokenizeResponse",
    "FeedbackItem",
    "FeedbackResponse",
    "Limits",
    "ModelCard",
    "ModelInfo",
    "ModelList",
    "ModelPredictions",
    "PredictInput",
    "PredictLengthResponse",
    "PredictModelsResponse",
    "Prediction",
    "RowError",
    "ScoreResponse",
    "ServiceInfo",
    "ServiceWarning",
    "Timings",
    "TokenScores",
    "TokenizeResponse",
]

Message: TypeAlias = Mapping[str, Any]
Objective: TypeAlias = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Inputs. None and an empty ``append`` count as not given; of prompt, messages, token_ids and session exactly one is.
@dataclass(frozen=True, kw_only=True)
class _Prefix:
    prompt: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    session: str | None = None
    append: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class PredictInput(_Prefix):
    """How much is still to come after this prefix? ``generated``: content tokens of the answer that it holds."""

    generated: int = 0


@dataclass(frozen=True, kw_only=True)
class CompletionInput:
    """Values at each token of a completion; ``eos``: the answer ends there."""

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    completion: str | None = None
    completion_ids: Sequence[int] | None = None
    eos: bool | None = None


@dataclass(frozen=True, kw_only=True)
class CandidateInput(_Prefix):
    """Values and log-weights of K possible next tokens.

    ``logprobs`` [K]: natural logs, full vocabulary, at the sampler's temperature. ``eos_ids`` end the answer beside the
    model's own EOS. ``objective`` in its wire form, e.g. ``{"kind": "equal_to", "target": 200}``. ``return_values``
    False: the log-weights alone are wanted, which makes the answer a third as long.
    """

    candidates: Sequence[int]
    logprobs: Sequence[float] | None = None
    generated: int = 0
    objective: Objective | None = None
    eos_ids: Sequence[int] = ()
    return_values: bool = True


@dataclass(frozen=True, kw_only=True)
class FeedbackItem:
    """How long an answer became. ``finish_reason``: "stop", or "length" where it was cut (censored)."""

    generated_tokens: int
    finish_reason: str
    prediction_id: str | None = None
    token_ids: Sequence[int] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Answers
@dataclass(frozen=True, kw_only=True)
class RowError:
    """One row (or one of several models) failed; its neighbours did not."""

    index: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    request_id: str | None = None
    retryable: bool = False
    retry_after_ms: float | None = None

    def to_exception(self) -> ServiceError:
        """The typed error, for whoever wants to raise it."""
        after = None if self.retry_after_ms is None else self.retry_after_ms / 1000.0
        return service_error(
            self.type,
            self.message,
            code=self.code,
            param=self.param,
            retryable=self.retryable,
            retry_after_s=after,
            request_id=self.request_id,
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is still to come after one prefix. With a model without a length distribution ``mean``, ``quantiles``,
    ``p_exceeds_max_tokens`` and ``saturated`` are None. ``rank_key`` orders work: lower means less is still to come."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    value: float
    horizon: float
    rank_key: float
    mean: float | None = None
    quantiles: Mapping[str, int] | None = None
    p_exceeds_max_tokens: float | None = None
    saturated: bool | None = None
    session: str | None = None
    prediction_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """A completion of T tokens: T + 1 values and horizons (s_0..s_T), T length shifts (positive = made it longer)."""

    index: int
    values: tuple[float, ...]
    horizons: tuple[float, ...]
    length_shifts: tuple[float, ...]
    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class CandidateScores:
    """K candidates, aligned with the request. ``values`` and ``horizons`` are empty where they were not wanted;
    ``log_weights`` is None without an objective; ``value`` and ``horizon`` are the prefix's own; ``objective`` is the
    tilt that a ``scale`` was resolved to, to be sent in later steps."""

    index: int
    values: tuple[float, ...]
    horizons: tuple[float, ...]
    log_weights: tuple[float, ...] | None = None
    session: str | None = None
    objective: Mapping[str, Any] | None = None
    value: float | None = None
    horizon: float | None = None
    prefix_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServiceWarning:
    """Something to know about the answer, e.g. code ``generator_mismatch``."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Milliseconds inside the service."""

    queue: float = 0.0
    inference: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PredictLengthResponse:
    """Predictions, aligned with the inputs."""

    model: str
    predictions: tuple[Prediction | RowError, ...]
    model_sha: str | None = None
    gamma: float | None = None
    cap: int | None = None
    warnings: tuple[ServiceWarning, ...] = ()
    timings_ms: Timings | None = None
    request_id: str | None = None

    def __iter__(self) -> Iterator[Prediction]:
        """The predictions; raises the typed error at the first row that failed."""
        for row in self.predictions:
            if isinstance(row, RowError):
                raise row.to_exception()
            yield row

    @property
    def prediction(self) -> Prediction:
        """The prediction of a call with one input; raises its error where it failed."""
        if len(self.predictions) != 1:
            raise ValueError(f"the answer has {len(self.predictions)} predictions: use .predictions")
        return next(iter(self))


@dataclass(frozen=True, kw_only=True)
class ModelPredictions(PredictLengthResponse):
    """What one of several models answers. Its tokens are those of its own tokenizer: ``mean`` and ``quantiles`` compare
    with another model's once they are money or time (see ``compare_routes``), and as they are where the tokenizers are
    the same; ``rank_key``, ``value`` and ``horizon`` never do."""

    index: int


@dataclass(frozen=True, kw_only=True)
class PredictModelsResponse:
    """What each of ``models`` answers, aligned with them."""

    results: tuple[ModelPredictions | RowError, ...]
    timings_ms: Timings | None = None
    request_id: str | None = None

    def __iter__(self) -> Iterator[ModelPredictions]:
        """The models' answers; raises the typed error at the first model that failed."""
        for part in self.results:
            if isinstance(part, RowError):
                raise part.to_exception()
            yield part


@dataclass(frozen=True, kw_only=True)
class ScoreResponse:
    """Scores, aligned with the inputs."""

    model: str
    scores: tuple[TokenScores | CandidateScores | RowError, ...]
    model_sha: str | None = None
    gamma: float | None = None
    cap: int | None = None
    warnings: tuple[ServiceWarning, ...] = ()
    timings_ms: Timings | None = None
    request_id: str | None = None

    def __iter__(self) -> Iterator[TokenScores | CandidateScores]:
        """The scores; raises the typed error at the first row that failed."""
        for row in self.scores:
            if isinstance(row, RowError):
                raise row.to_exception()
            yield row

    @property
    def completion(self) -> TokenScores:
        """The scores of a call with one completion; raises its error where it failed, ValueError for other calls."""
        row = self._single()
        if not isinstance(row, TokenScores):
            raise ValueError("the input was no completion: use .candidates")
        return row

    @property
    def candidates(self) -> CandidateScores:
        """The scores of a call with one row of candidates; raises its error where it failed, ValueError for others."""
        row = self._single()
        if not isinstance(row, CandidateScores):
            raise ValueError("the input had no candidates: use .completion")
        return row

    def _single(self) -> TokenScores | CandidateScores:
        if len(self.scores) != 1:
            raise ValueError(f"the answer has {len(self.scores)} rows: use .scores")
        return next(iter(self))


@dataclass(frozen=True, kw_only=True)
class TokenizeResponse:
    """Token ids of the model's tokenizer."""

    model: str
    token_ids: tuple[int, ...]
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class DetokenizeResponse:
    """The text of token ids."""

    model: str
    text: str
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A feedback item that was taken."""

    index: int
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class FeedbackResponse:
    """``accepted``: how many items were taken; ``results`` are aligned with them."""

    accepted: int
    results: tuple[Accepted | RowError, ...] = ()
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """An entry of /v1/models; ``created`` in Unix seconds."""

    id: str
    object: str = "model"
    created: int | None = None
    owned_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelList:
    """What /v1/models lists."""

    data: tuple[ModelCard, ...]
    request_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One served model. ``generator``: the policy whose lengths it predicts; ``context`` in tokens."""

    name: str
    model_sha: str | None = None
    backbone: str | None = None
    backbone_sha256: str | None = None
    tokenizer_sha256: str | None = None
    gamma: float | None = None
    num_bins: int | None = None
    cap: int | None = None
    generator: Mapping[str, Any] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    context: int | None = None
    vocab_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    state: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one call may hold; None where the service did not say."""

    max_body_bytes: int | None = None
    max_batch_rows: int | None = None
    max_candidates: int | None = None
    max_queue_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServiceInfo:
    """What the service is and serves."""

    version: str
    models: tuple[ModelInfo, ...]
    limits: Limits = field(default_factory=Limits)
    request_id: str | None = None


class CandidateScorer(Protocol):
    """What ``GuidedDecoder`` needs: ``Client`` over HTTP, ``lenvm_service.local.LocalScorer`` in-process."""

    def score_candidates(self, rows: Sequence[CandidateInput]) -> list[CandidateScores | RowError]:
        """Answers aligned with ``rows``. Raises LenVMClientError where the call as a whole failed."""
