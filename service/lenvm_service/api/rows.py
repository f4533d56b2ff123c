"""From a JSON object to jobs of the engine, one row at a time: a bad row becomes its own error."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeAlias, TypeGuard, TypeVar, cast

from pydantic import BaseModel, ValidationError

from lenvm.backbones import encode_chat
from lenvm.errors import InvalidRequestError, LenVMError
from lenvm.guidance import Objective
from lenvm_service.api.body import check_fields, parse_object
from lenvm_service.api.errors import RequestError, invalid
from lenvm_service.api.schemas import (
    MAX_EOS_IDS,
    MAX_GENERATED,
    MAX_ID,
    MAX_SESSION,
    CandidateInput,
    FeedbackItem,
    FeedbackOptions,
    ModelChoice,
    PredictInput,
    PredictOptions,
    PrefixSource,
    ScoreOptions,
    StepColumns,
    TextSource,
    TokenInput,
    TokenizeRequest,
)
from lenvm_service.engine.jobs import DEFAULT_QUANTILES, CandidateJob, Job, PredictJob, Prefix, StepJob, TokenScoreJob
from lenvm_service.errors import InternalError, PayloadTooLargeError

__all__ = [
    "Call",
    "Row",
    "check",
    "encode_text",
    "estimated_tokens",
    "feedback_items",
    "predict_jobs",
    "read_feedback",
    "read_predict",
    "read_score",
    "score_jobs",
    "spread",
    "step_job",
    "step_jobs",
    "text_size",
]

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=ModelChoice)
ModelT = TypeVar("ModelT", bound=BaseModel)
Row: TypeAlias = Job | LenVMError
_PREDICT_FIELDS = frozenset(PredictInput.model_fields)
_ID_FIELDS = ("token_ids", "append", "completion_ids", "candidates")
_PLAIN_FIELDS = frozenset(
    ("session", "append", "candidates", "generated", "objective", "logprobs", "eos_ids", "return_values")
)
_TEXT_FIELDS = frozenset(("prompt", "completion", "messages"))
_CHARACTERS = 4  # of text a token, about
_SCORE_FIELDS = frozenset(TokenInput.model_fields) | frozenset(CandidateInput.model_fields)
_COLUMNS = tuple(StepColumns.model_fields)
_BESIDE = _SCORE_FIELDS | {"inputs"}
_EACH_ROW = ("session", "append", "candidates", "generated", "logprobs")


class _RowTooLargeError(PayloadTooLargeError):
    param = "candidates"  # the one field of a row that has a limit of its own


@dataclass(frozen=True)
class Call(Generic[OptionsT]):
    """A request body, its options checked and its rows not yet. ``flat``: one row that stood without ``inputs``.
    ``columns``: what stood there instead of rows, its form checked."""

    options: OptionsT
    rows: list[Any]
    flat: bool
    columns: dict[str, Any] | None = None


def check(model: type[ModelT], value: Any) -> ModelT:
    """``value`` as ``model``. Raises RequestError for the first problem."""
    check_fields(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error) from None


def read_predict(body: bytes, max_rows: int) -> Call[PredictOptions]:
    """The body of /predict_length. Raises RequestError, and PayloadTooLargeError for too many rows."""
    return _read(parse_object(body), PredictOptions, "inputs", _PREDICT_FIELDS, max_rows)


def read_score(body: bytes, max_rows: int) -> Call[ScoreOptions]:
    """The body of /score. Raises RequestError, and PayloadTooLargeError for too many rows."""
    given = parse_object(body)
    columns = given.pop("columns", None)
    if columns is None:
        return _read(given, ScoreOptions, "inputs", _SCORE_FIELDS, max_rows)
    other = next((name for name, value in given.items() if name in _BESIDE and value is not None), None)
    if other is not None:
        raise RequestError(
            f"{other} cannot stand beside columns: send either", reason="columns_and_inputs", param=other
        )
    options = {name: value for name, value in given.items() if name not in _BESIDE}
    _check_columns(columns, max_rows)
    return Call(check(ScoreOptions, options) if options else _unset(ScoreOptions), [], flat=False, columns=columns)


def _check_columns(columns: Any, max_rows: int) -> None:
    """Raise RequestError for what is no columns at all, or not of one length, and PayloadTooLargeError."""
    if not isinstance(columns, dict):
        problem = "columns must be an object: the fields of the rows, each a list"
        raise RequestError(problem, reason="dict_type", param="columns")
    unknown = next((name for name in columns if name not in _COLUMNS), None)
    if unknown is not None:
        problem = f"columns has no field {unknown:.40}: use {', '.join(_COLUMNS)}"
        raise RequestError(problem, reason="extra_forbidden", param="columns")
    sessions = columns.get("session")
    if not isinstance(sessions, list) or not sessions:
        problem = "columns.session must be a list with at least one row"
        raise RequestError(problem, reason="list_type", param="columns.session")
    if len(sessions) > max_rows:
        raise PayloadTooLargeError(f"columns has {len(sessions)} rows, {max_rows} are allowed: split the request")
    for name in (*_EACH_ROW, "objective"):
        value = columns.get(name)
        one_for_all = name == "objective" and not isinstance(value, list)
        if (value is None and name != "candidates") or one_for_all:
            continue
        if not isinstance(value, list) or len(value) != len(sessions):
            problem = f"columns.{name} must be a list with an entry for each of the {len(sessions)} sessions"
            raise RequestError(problem, reason="column_length", param=f"columns.{name}")


def spread(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that columns stand for."""
    count, objective = len(columns["session"]), columns.get("objective")
    each = {name: columns[name] for name in _EACH_ROW if columns.get(name) is not None}
    each["objective"] = objective if isinstance(objective, list) else [objective] * count
    for_all = {"eos_ids": columns.get("eos_ids"), "return_values": False}
    return [{**{name: values[at] for name, values in each.items()}, **for_all} for at in range(count)]


def read_feedback(body: bytes, max_rows: int) -> Call[FeedbackOptions]:
    """The body of /feedback. Raises RequestError, and PayloadTooLargeError for too many items."""
    return _read(parse_object(body), FeedbackOptions, "items", frozenset(), max_rows)


@functools.cache
def _unset(options: type[OptionsT]) -> OptionsT:
    """What most requests ask for; nobody writes into it."""
    return check(options, {})


def _read(
    given: dict[str, Any], options: type[OptionsT], name: str, row_fields: frozenset[str], max_rows: int
) -> Call[OptionsT]:
    rows = given.pop(name, None)
    flat = {field: given.pop(field) for field in list(given) if field in row_fields}
    flat_given = any(value is not None for value in flat.values())
    checked = check(options, given) if given else _unset(options)
    if rows is None:
        if not flat_given:
            raise RequestError(f"{name} is missing: send a list with at least one row", reason="missing", param=name)
        return Call(checked, [flat], flat=True)
    if flat_given:
        field = next(field for field, value in flat.items() if value is not None)
        raise RequestError(
            f"{field} belongs inside the rows of {name}: move it there", reason="inputs_and_flat", param=field
        )
    if not isinstance(rows, list) or not rows:
        reason = "too_short" if isinstance(rows, list) else "list_type"
        raise RequestError(f"{name} must be a list with at least one row", reason=reason, param=name)
    if len(rows) > max_rows:
        raise PayloadTooLargeError(f"{name} has {len(rows)} rows, {max_rows} are allowed: split the request")
    return Call(checked, rows, flat=False)


def estimated_tokens(rows: Sequence[Any]) -> int:
    """About how many tokens rows will be, before anything is tokenised: by the ids that they list, and four characters
    of text a token."""
    return sum(max(1, _estimated(row)) for row in rows)


def text_size(rows: Sequence[Any]) -> int:
    """Characters of text in the rows."""
    return sum(len(text) for row in rows if isinstance(row, dict) for text in _texts(row))


def _estimated(row: Any) -> int:
    if not isinstance(row, dict):
        return 0  # an error before long
    tokens = 0
    for name in _ID_FIELDS:
        ids = row.get(name)
        if isinstance(ids, list):
            tokens += len(ids)
    for text in _texts(row):
        tokens += 1 + len(text) // _CHARACTERS
    return tokens


def _texts(row: dict[str, Any]) -> list[str]:
    if _TEXT_FIELDS.isdisjoint(row):
        return []
    texts = [row[name] for name in ("prompt", "completion") if name in row]
    messages = row.get("messages")
    if isinstance(messages, list):
        texts += [message.get("content") for message in messages if isinstance(message, dict)]
    return [text for text in texts if isinstance(text, str)]


def predict_jobs(call: Call[PredictOptions], tokenizer: Any, tenant: str = "", *, text_only: bool = False) -> list[Row]:
    """A job or an error for each row of /predict_length. ``text_only``: ids would mean something else to another of the
    models that are asked."""
    options = call.options
    levels = tuple(dict.fromkeys(DEFAULT_QUANTILES if options.quantiles is None else options.quantiles))

    def job(row: Any) -> Job:
        found = check(PredictInput, row)
        if text_only and (found.token_ids is not None or found.session is not None):
            problem = "the models have different tokenizers: send prompt or messages, which mean the same to all"
            raise InvalidRequestError(problem, param="token_ids" if found.session is None else "session")
        return PredictJob(
            _prefix(found, tokenizer, tenant),
            quantiles=levels,
            max_tokens=options.max_tokens,
            generated=found.generated or 0,
        )

    return [_guarded(job, row) for row in call.rows]


def score_jobs(call: Call[ScoreOptions], tokenizer: Any, max_candidates: int, tenant: str = "") -> list[Row]:
    """A job or an error for each row of /score. ``candidates`` tells the two kinds apart."""

    def job(row: Any) -> Job:
        ids = list[Any]()
        if (plain := _plain_candidate_job(row, max_candidates, tenant, ids)) is not None and _are_ids(ids):
            return plain
        if isinstance(row, Mapping):
            # Null is "not given", also for a field of the other kind of row.
            row = {name: value for name, value in row.items() if value is not None or name not in _SCORE_FIELDS}
            if "candidates" in row:
                return _candidate_job(row, tokenizer, max_candidates, tenant)
        return _token_job(check(TokenInput, row), tokenizer)

    return [_guarded(job, row) for row in call.rows]


def step_jobs(call: Call[ScoreOptions], max_candidates: int, tenant: str = "") -> list[CandidateJob] | None:
    """``score_jobs`` for a decoding step whose every row is plainly as it should be; None for all else."""
    jobs, ids = list[CandidateJob](), list[Any]()
    for row in call.rows:
        if (job := _plain_candidate_job(row, max_candidates, tenant, ids)) is None:
            return None
        jobs.append(job)
    return jobs if _are_ids(ids) else None


def step_job(columns: dict[str, Any], max_candidates: int, tenant: str = "") -> StepJob | None:
    """The job of columns (``read_score``) whose every row is plainly as it should be; None for all else, which rows
    tell one by one."""
    given, count = columns.get, len(columns["session"])
    sessions, candidates, objective = columns["session"], columns["candidates"], given("objective")
    appended = given("append") or [()] * count
    generated = given("generated") or [0] * count
    logprobs, ends = given("logprobs"), cast(Any, given("eos_ids"))
    ends = [] if ends is None else ends
    others = [ends] if given("append") is None else [*appended, ends]
    if not (
        set(map(type, sessions)) == {str}
        and 0 < min(map(len, sessions)) <= max(map(len, sessions)) <= MAX_SESSION
        and set(map(type, chain(candidates, others))) == {list}
        and 0 < min(map(len, candidates)) <= max(map(len, candidates)) <= max_candidates
        and len(ends) <= MAX_EOS_IDS
        and set(map(type, generated)) == {int}
        and 0 <= min(generated) <= max(generated) <= MAX_GENERATED
        and set(map(type, chain.from_iterable(candidates))) == {int}
        and (not any(others) or _are_ids([*chain.from_iterable(others)]))
        and (logprobs is None or all(map(_are_numbers, logprobs, map(len, candidates))))
    ):
        return None
    try:
        if isinstance(objective, list):
            objectives = [None if each is None else Objective.from_dict(each) for each in objective]
        else:
            objectives = [None if objective is None else Objective.from_dict(objective)] * count
    except InvalidRequestError:
        return None
    job = StepJob(sessions, appended, candidates, generated, objectives, logprobs, ends, tenant)
    packed = job.packed()
    return None if packed is None or packed.min() < 0 else job


def _candidate_job(row: Mapping[str, Any], tokenizer: Any, max_candidates: int, tenant: str) -> Job:
    ids = row["candidates"]
    if isinstance(ids, list) and len(ids) > max_candidates:
        raise _RowTooLargeError(f"{len(ids)} candidates, {max_candidates} are allowed: send the likeliest ones")
    found = check(CandidateInput, row)
    return CandidateJob(
        _prefix(found, tokenizer, tenant),
        candidates=found.candidates,
        generated=found.generated or 0,
        objective=found.objective,
        logprobs=found.logprobs,
        eos_ids=tuple(found.eos_ids or ()),
        return_values=found.return_values is not False,
    )


def _plain_candidate_job(row: Any, max_candidates: int, tenant: str, seen: list[Any]) -> CandidateJob | None:
    """What a decoding loop sends for each row of each step, if it is plainly as it should be: a fifth of the schema's
    time. None for all else, which the schema accepts or refuses by name. ``seen``: takes all that must be ids."""
    if type(row) is not dict or not row.keys() <= _PLAIN_FIELDS:
        return None
    given = row.get
    session, append, ids, ends = given("session"), given("append", []), given("candidates"), given("eos_ids", [])
    generated, logprobs, values = given("generated", 0), given("logprobs"), given("return_values", True)
    if not (
        type(session) is str
        and 0 < len(session) <= MAX_SESSION
        and type(append) is list
        and type(ids) is list
        and 0 < len(ids) <= max_candidates
        and type(ends) is list
        and len(ends) <= MAX_EOS_IDS
        and type(generated) is int
        and 0 <= generated <= MAX_GENERATED
        and (values is True or values is False)
        and (logprobs is None or _are_numbers(logprobs, len(ids)))
    ):
        return None
    objective = given("objective")
    try:
        wanted = None if objective is None else Objective.from_dict(objective)
    except InvalidRequestError:
        return None
    seen += ids
    seen += append
    seen += ends
    prefix = Prefix(append, session=session, tenant=tenant)
    return CandidateJob(prefix, ids, generated, wanted, logprobs, tuple(ends), values)


def _are_ids(values: list[Any]) -> TypeGuard[list[int]]:
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_ID


def _are_numbers(value: Any, count: int) -> bool:
    # 1e999 is JSON, and infinite.
    return (
        type(value) is list
        and len(value) == count
        and set(map(type, value)) == {float}
        and all(map(math.isfinite, value))
    )


def _token_job(row: TokenInput, tokenizer: Any) -> Job:
    if row.completion is not None:
        ids = [int(token) for token in tokenizer.encode(row.completion, add_special_tokens=False)]
    else:
        ids = list(row.completion_ids or ())
    if not ids and not row.eos:
        param = "completion" if row.completion is not None else "completion_ids"
        raise InvalidRequestError("the completion is empty: send some of it, or eos true", param=param)
    return TokenScoreJob(encode_text(row, tokenizer), ids, eos=bool(row.eos))


def _prefix(row: PrefixSource, tokenizer: Any, tenant: str) -> Prefix:
    if row.session is not None:
        return Prefix(row.append or (), session=row.session, tenant=tenant)
    return Prefix(encode_text(row, tokenizer), tenant=tenant)


def encode_text(row: TextSource | TokenizeRequest, tokenizer: Any) -> list[int]:
    """Ids of a row's text. Raises InvalidRequestError for an empty or malformed one."""
    ids = getattr(row, "token_ids", None)
    if ids is not None:
        return list(ids)
    if row.messages is not None:
        return encode_chat(tokenizer, [message.model_dump() for message in row.messages])
    return encode_chat(tokenizer, row.prompt or "")


def feedback_items(call: Call[FeedbackOptions]) -> list[FeedbackItem | LenVMError]:
    """Each item, or its error."""
    return [_guarded(lambda item: check(FeedbackItem, item), item) for item in call.rows]


T = TypeVar("T")


def _guarded(make: Callable[[Any], T], row: Any) -> T | LenVMError:
    """``make(row)``, or the error that the row gets instead. What nobody foresaw fails this row alone, too."""
    try:
        return make(row)
    except LenVMError as error:
        return error
    except Exception:
        logger.exception("a row could not be read")
        return InternalError("a row could not be read")
