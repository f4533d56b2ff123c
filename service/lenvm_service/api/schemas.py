"""What may be sent. The same classes check requests and describe them in the OpenAPI document.

Numbers are strict: no text and no boolean for a number, nothing infinite. ``null`` counts as not given; a field that
is not listed is an error. Rows of ``inputs`` and ``items`` are checked one by one (see ``rows``): a bad one must not
fail its neighbours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from lenvm.errors import InvalidRequestError
from lenvm.guidance import Objective
from lenvm_service.api.errors import invalid

__all__ = [
    "CandidateInput",
    "CandidateScoreRequest",
    "DetokenizeRequest",
    "FeedbackItem",
    "FeedbackOptions",
    "FeedbackRequest",
    "GeneratorClaim",
    "Message",
    "PredictFlatRequest",
    "PredictInput",
    "PredictOptions",
    "PredictRequest",
    "RequestOptions",
    "ScoreOptions",
    "ScoreRequest",
    "TokenInput",
    "TokenScoreRequest",
    "TokenizeRequest",
]

MAX_ID = 2**31 - 1
MAX_GENERATED = 1_000_000_000
MAX_SESSION = 256
MAX_EOS_IDS = 64
_DAY_MS = 86_400_000


class Strict(BaseModel):
    """Base of everything that comes from outside."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, hide_input_in_errors=True)


TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_ID)]
# The first bad id of a list is enough: a list of 100,000 texts must not become 100,000 errors.
TokenIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
MaybeNoIds: TypeAlias = Annotated[list[TokenId], Field(fail_fast=True)]
Session: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_SESSION)]


def one_of(*names: str) -> dict[str, Any]:
    """JSON Schema for "exactly one of these"."""
    return {"oneOf": [{"required": [name]} for name in names]}


def _exactly_one(row: BaseModel, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(row, name) is not None]
    if len(given) != 1:
        wanted = f"{', '.join(names[:-1])} and {names[-1]}"
        found = f"not {' and '.join(given)}" if given else "none is there"
        raise PydanticCustomError("exactly_one", "{problem}", {"problem": f"give exactly one of {wanted}; {found}"})


class Message(Strict):
    """One message of a conversation."""

    role: str = Field(max_length=64)
    content: str


Messages: TypeAlias = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ObjectiveFields(Strict):
    """What length is wanted. Guidance checks which fields go with which kind; see ``lenvm.guidance.Objective``."""

    kind: Literal["equal_to", "at_most", "at_least", "tilt", "scale"]
    target: int | None = Field(None, ge=0, le=1_000_000, description="Content tokens: equal_to, at_most, at_least.")
    lambda_: float | None = Field(None, alias="lambda", description="Nats a token, > 0 shortens: tilt by posterior.")
    beta: float | None = Field(None, description="Below 0 shortens: tilt by paper.")
    factor: float | None = Field(None, gt=0, description="Of the mean length: scale, at the prompt boundary.")
    tolerance: float | None = Field(0.05, ge=0, description="Softness of a target, as a part of it.")
    method: Literal["posterior", "paper"] | None = "posterior"
    strength: float | None = Field(1.0, ge=0, description="Multiplies the log-weights.")
    space: Literal["value", "length"] | None = Field("value", description="Where equal_to by paper compares.")
    min_eos_prob: float | None = Field(0.0, ge=0, le=1, description="A less likely EOS is not offered: posterior.")


def _objective(value: Any) -> Objective | None:
    if value is None:
        return None
    try:
        return Objective.from_dict(value)
    except InvalidRequestError as error:
        where = {} if error.param in (None, "objective") else {"param": error.param}
        raise PydanticCustomError("objective", "{problem}", {"problem": str(error), **where}) from None


class GeneratorClaim(Strict):
    """The policy that the caller generates with, as far as it says."""

    backbone: Annotated[str, Field(max_length=512)] | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1, le=MAX_ID)


def _generator(value: Any) -> GeneratorClaim | None:
    if value is None:
        return None
    try:
        return GeneratorClaim.model_validate({"backbone": value} if isinstance(value, str) else value)
    except ValidationError as error:
        problem = invalid(error)
        where = {} if isinstance(value, str) or problem.param is None else {"param": problem.param}
        raise PydanticCustomError("generator", "{problem}", {"problem": str(problem), **where}) from None


class ModelChoice(Strict):
    """Which model is asked."""

    model: str | None = Field(None, max_length=512, description="As in /v1/models; default: the first one.")


class RequestOptions(ModelChoice):
    """What holds for a whole request."""

    generator: Annotated[
        GeneratorClaim | None, PlainValidator(_generator, json_schema_input_type=str | GeneratorClaim | None)
    ] = Field(None, description="The caller's generator. Answers warn where the model was trained for another.")
    deadline_ms: float | None = Field(None, gt=0, le=_DAY_MS, description="From arrival; 504 when it passes.")
    priority: int | None = Field(0, ge=-1000, le=1000, description="Lower is served earlier.")


class PredictOptions(RequestOptions):
    """What holds for all rows of /predict_length."""

    max_tokens: int | None = Field(
        None,
        ge=0,
        le=MAX_GENERATED,
        description="Limit on generated tokens, EOS included, asked about in p_exceeds_max_tokens.",
    )
    quantiles: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=64)] | None = Field(
        [0.5, 0.9, 0.95], description="Levels, each between 0 and 1."
    )
    models: Annotated[list[Annotated[str, Field(max_length=512)]], Field(min_length=1, max_length=64)] | None = Field(
        None,
        description="Instead of model: each is asked, and answers in results.",
        json_schema_extra={"uniqueItems": True},
    )

    @model_validator(mode="after")
    def _models_once(self) -> PredictOptions:
        problem = None
        if self.models is not None and self.model is not None:
            problem = "give model or models, not both"
        elif self.models is not None and len(set(self.models)) < len(self.models):
            problem = "models names a model twice: name each once"
        if problem is not None:
            raise PydanticCustomError("models", "{problem}", {"problem": problem, "param": "models"})
        return self


class ScoreOptions(RequestOptions):
    """What holds for all rows of /score."""


class TextSource(Strict):
    """A text in one of three forms; the service applies the backbone's chat template to the first two."""

    messages: Messages | None = None
    prompt: str | None = Field(None, description="One user message.")
    token_ids: TokenIds | None = Field(None, description="Ids of the model's tokenizer, taken as they are.")


class PrefixSource(TextSource):
    """A prefix: a text, or a session and the tokens that came since."""

    session: Session | None = Field(None, description="A handle from an earlier answer.")
    append: MaybeNoIds | None = Field(None, description="With session only: tokens that came since.")
    generated: int | None = Field(0, ge=0, le=MAX_GENERATED, description="Content tokens of the answer in the prefix.")

    @model_validator(mode="after")
    def _one_prefix(self) -> PrefixSource:
        _exactly_one(self, ("messages", "prompt", "token_ids", "session"))
        if self.append is not None and self.session is None:
            raise PydanticCustomError("append_without_session", "append goes with session; send the whole prefix")
        return self


class PredictInput(PrefixSource):
    """A prefix whose remaining length is asked for."""

    model_config = ConfigDict(json_schema_extra=one_of("messages", "prompt", "token_ids", "session"))


class TokenInput(TextSource):
    """A prompt and its completion, scored token by token."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [one_of("messages", "prompt", "token_ids"), one_of("completion", "completion_ids")],
        }
    )

    completion: str | None = Field(None, description="Encoded without special tokens.")
    completion_ids: MaybeNoIds | None = None
    eos: bool | None = Field(False, description="The answer ends there: score its end-of-sequence token too.")

    @model_validator(mode="after")
    def _one_each(self) -> TokenInput:
        _exactly_one(self, ("messages", "prompt", "token_ids"))
        _exactly_one(self, ("completion", "completion_ids"))
        return self


class CandidateInput(PrefixSource):
    """A prefix and possible next tokens."""

    model_config = ConfigDict(json_schema_extra=one_of("messages", "prompt", "token_ids", "session"))

    candidates: TokenIds = Field(description="Ids of possible next tokens; /info has the limit.")
    logprobs: Annotated[list[float], Field(fail_fast=True)] | None = Field(
        None, description="Natural logs, full vocabulary, at the sampler's temperature, one for each candidate."
    )
    objective: Annotated[
        Objective | None, PlainValidator(_objective, json_schema_input_type=ObjectiveFields | None)
    ] = Field(None, description="Without one there are no log-weights.")
    eos_ids: Annotated[list[TokenId], Field(max_length=MAX_EOS_IDS)] | None = Field(
        None, description="Ids that end the answer, beside the model's own."
    )
    return_values: bool | None = Field(
        None, description="False: the answer's `values` and `horizons` stay empty, and it is a third as long."
    )

    @model_validator(mode="after")
    def _one_logprob_each(self) -> CandidateInput:
        if self.logprobs is not None and len(self.logprobs) != len(self.candidates):
            problem = f"{len(self.logprobs)} logprobs for {len(self.candidates)} candidates: send one for each"
            raise PydanticCustomError("logprobs_length", "{problem}", {"problem": problem, "param": "logprobs"})
        return self


class StepColumns(Strict):
    """A decoding step: rows of candidates field by field, each a list with an entry for each row. Values are not
    given."""

    session: list[Session] = Field(min_length=1, description="Handles from the step before.")
    append: list[MaybeNoIds] | None = Field(None, description="Tokens that came since.")
    candidates: list[TokenIds] = Field(description="Ids of possible next tokens; /info has the limit.")
    generated: list[Annotated[int, Field(ge=0, le=MAX_GENERATED)]] | None = Field(
        None, description="Content tokens of each answer in its prefix."
    )
    logprobs: list[list[float]] | None = Field(None, description="As in a row.")
    objective: ObjectiveFields | list[ObjectiveFields | None] | None = Field(
        None, description="One for all rows, or a list."
    )
    eos_ids: Annotated[list[TokenId], Field(max_length=MAX_EOS_IDS)] | None = Field(
        None, description="Ids that end any of the answers, beside the model's own."
    )


# The forms of whole bodies are for the document alone: `rows` takes them apart before anything is checked.
class PredictRequest(PredictOptions):
    """Up to max_batch_rows prefixes; see /info for the limit."""

    inputs: list[PredictInput] = Field(min_length=1)


class PredictFlatRequest(PredictOptions, PredictInput):
    """One prefix without ``inputs`` around it: its error is the error of the request."""


class ScoreRequest(ScoreOptions):
    """Rows of both kinds may stand beside each other; a row with ``candidates`` is scored over those."""

    inputs: list[TokenInput | CandidateInput] = Field(min_length=1)


class StepRequest(ScoreOptions):
    """The rows of a decoding step as columns: what ``inputs`` would say, in half of the time."""

    columns: StepColumns


class TokenScoreRequest(ScoreOptions, TokenInput):
    """One completion without ``inputs`` around it."""


class CandidateScoreRequest(ScoreOptions, CandidateInput):
    """One set of candidates without ``inputs`` around it."""


class TokenizeRequest(ModelChoice):
    """A text to encode with the backbone's chat template."""

    model_config = ConfigDict(json_schema_extra=one_of("messages", "prompt"))

    messages: Messages | None = None
    prompt: str | None = Field(None, description="One user message.")

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        _exactly_one(self, ("messages", "prompt"))
        return self


class DetokenizeRequest(ModelChoice):
    """Ids to decode; special tokens are kept."""

    token_ids: MaybeNoIds


class FeedbackOptions(ModelChoice):
    """What holds for all items of /feedback."""


class FeedbackItem(Strict):
    """How long an answer really became."""

    model_config = ConfigDict(json_schema_extra=one_of("prediction_id", "token_ids"))

    prediction_id: Session | None = None
    token_ids: TokenIds | None = Field(None, description="The prefix that was predicted for.")
    generated_tokens: int = Field(ge=0, le=MAX_GENERATED, description="Content tokens of the whole answer.")
    finish_reason: Literal["stop", "length"] = Field(description='"length": the answer was cut (censored).')

    @model_validator(mode="after")
    def _one_prefix(self) -> FeedbackItem:
        _exactly_one(self, ("prediction_id", "token_ids"))
        return self


class FeedbackRequest(FeedbackOptions):
    """Realised lengths; up to max_batch_rows items."""

    items: list[FeedbackItem] = Field(min_length=1)
