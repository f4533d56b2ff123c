"""What is answered: for the OpenAPI document and for tests. Answers themselves are written without another check."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, Field

__all__ = [
    "CandidateScores",
    "DetokenizeResponse",
    "ErrorBody",
    "ErrorResponse",
    "FeedbackResponse",
    "InfoResponse",
    "LiveResponse",
    "ModelsResponse",
    "PredictModelsResponse",
    "PredictResponse",
    "Prediction",
    "ReadyResponse",
    "RowError",
    "ScoreResponse",
    "TokenScores",
    "TokenizeResponse",
]

ErrorType: TypeAlias = Literal[
    "invalid_request",
    "unauthorized",
    "model_not_found",
    "payload_too_large",
    "context_too_long",
    "prefix_unknown",
    "overloaded",
    "not_ready",
    "draining",
    "deadline_exceeded",
    "internal",
]


class ErrorBody(BaseModel):
    """What went wrong, and whether to try again."""

    type: ErrorType
    message: str = Field(description="One line for people.")
    code: str = Field(description="Finer than type where there is more to say, else equal to it.")
    param: str | None = Field(description="Path of the field at fault, like inputs[3].token_ids.")
    request_id: str
    retryable: bool
    retry_after_ms: int | None


class ErrorResponse(BaseModel):
    """The one error body of all routes."""

    error: ErrorBody


class RowError(BaseModel):
    """A row that failed; its neighbours did not."""

    index: int
    error: ErrorBody


class Warning(BaseModel):
    """Something that the caller should know."""

    code: Literal["generator_mismatch"]
    message: str


class Timings(BaseModel):
    """Milliseconds: until the first batch began, in batches, and in all."""

    queue: float
    inference: float
    total: float


class Answered(BaseModel):
    """What every answer of a model says of itself."""

    model: str
    model_sha: str = Field(description="Digest of everything that the numbers depend on.")
    gamma: float
    cap: int | None = Field(description="Longest length that the distribution tells apart; null without one.")
    warnings: list[Warning]
    timings_ms: Timings


class Prediction(BaseModel):
    """Remaining tokens l, the end-of-sequence token included. Fields of the distribution are null without one."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    value: float
    horizon: float
    mean: float | None
    quantiles: dict[str, int] | None
    p_exceeds_max_tokens: float | None
    rank_key: float
    saturated: bool | None
    session: str
    prediction_id: str


class PredictResponse(Answered):
    """One prediction for each input, in order."""

    predictions: list[Prediction | RowError]


class ModelPredictions(PredictResponse):
    """What one of several models says."""

    index: int


class ModelError(RowError):
    """A model that is missing or failed; the others answered."""

    model: str


class PredictModelsResponse(BaseModel):
    """An entry for each of `models`, in order. Its times are its own; those of the answer are the longest of them."""

    results: list[ModelPredictions | ModelError]
    timings_ms: Timings


class TokenScores(BaseModel):
    """A completion of T tokens: T + 1 values and horizons, T length shifts."""

    index: int
    prompt_tokens: int
    token_ids: list[int]
    tokens: list[str]
    values: list[float]
    horizons: list[float]
    length_shifts: list[float]


class ResolvedObjective(BaseModel):
    """The tilt that a scale became: send it in later steps."""

    kind: Literal["equal_to", "at_most", "at_least", "tilt", "scale"]
    target: int | None = None
    lambda_: float | None = Field(None, alias="lambda")
    beta: float | None = None
    factor: float | None = None
    tolerance: float
    method: Literal["posterior", "paper"]
    strength: float
    space: Literal["value", "length"]
    min_eos_prob: float


class CandidateScores(BaseModel):
    """The prefix's own value and horizon, and those after each of K candidates (none with `return_values` false)."""

    index: int
    prefix_tokens: int
    cached_tokens: int
    value: float
    horizon: float
    values: list[float]
    horizons: list[float]
    log_weights: list[float] | None = Field(description="Null without an objective.")
    session: str
    objective: ResolvedObjective | None = Field(description="Non-null where a scale was resolved to a tilt.")


class ScoreResponse(Answered):
    """One entry for each input, in order."""

    scores: list[TokenScores | CandidateScores | RowError]


class CandidateColumns(BaseModel):
    """The fields of `CandidateScores`, each a list with an entry for each row, null where the row has an error."""

    prefix_tokens: list[int | None]
    cached_tokens: list[int | None]
    value: list[float | None]
    horizon: list[float | None]
    log_weights: list[list[float] | None] = Field(description="Null without an objective.")
    session: list[str | None]
    objective: list[ResolvedObjective | None]


class StepResponse(Answered):
    """The answer to `columns`: columns, and the errors of rows that failed."""

    columns: CandidateColumns
    errors: list[RowError]


class TokenizeResponse(BaseModel):
    """Ids of the model's tokenizer."""

    model: str
    token_ids: list[int]


class DetokenizeResponse(BaseModel):
    """Decoded text."""

    model: str
    text: str


class FeedbackAccepted(BaseModel):
    """An item that was taken."""

    index: int
    accepted: Literal[True]


class FeedbackResponse(BaseModel):
    """One result for each item, in order."""

    accepted: int
    results: list[FeedbackAccepted | RowError]


class ModelEntry(BaseModel):
    """A model, as OpenAI's list has it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["lenvm"]


class ModelsResponse(BaseModel):
    """The models that requests may name."""

    object: Literal["list"]
    data: list[ModelEntry]


class Generator(BaseModel):
    """The policy whose lengths a model predicts."""

    backbone: str
    temperature: float
    top_p: float
    max_new_tokens: int


class ModelInfo(BaseModel):
    """A model. What is only known after loading is left out before."""

    name: str
    state: Literal["loading", "ready", "recovering", "failed", "stopped"]
    device: str | None = None
    dtype: str | None = None
    model_sha: str | None = None
    backbone: str | None = None
    backbone_sha256: str | None = None
    tokenizer_sha256: str | None = None
    gamma: float | None = None
    num_bins: int | None = None
    cap: int | None = None
    generator: Generator | None = None
    eos_ids: list[int] | None = None
    stop_ids: list[int] | None = None
    context: int | None = None
    vocab_size: int | None = None


class Limits(BaseModel):
    """What is refused as too large."""

    max_body_bytes: int
    max_batch_rows: int
    max_candidates: int
    max_queue_tokens: int


class InfoResponse(BaseModel):
    """Release, models and limits."""

    version: str
    models: list[ModelInfo]
    limits: Limits


class LiveResponse(BaseModel):
    """Every engine's heart beats."""

    status: Literal["live"]


class ReadyResponse(BaseModel):
    """Every model takes work."""

    status: Literal["ready"]
    models: dict[str, str]
