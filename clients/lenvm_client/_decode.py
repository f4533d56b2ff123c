"""From JSON to the dataclasses of ``_types``: names on the wire are field names, unknown fields are ignored (a newer
service may send more), and whatever else does not fit is a BadAnswerError that names the JSON path."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

from lenvm_client._types import CandidateScores, RowError
from lenvm_client.errors import BadAnswerError

T = TypeVar("T")
Path: TypeAlias = "str | tuple[Path, str | int]"
_PLAIN_ROW = {
    "index": int, "prefix_tokens": int, "cached_tokens": int, "value": float, "horizon": float, "values": list,
    "horizons": list, "log_weights": list, "session": str, "objective": type(None),
}  # fmt: skip
_PLAIN_NAMES, _PLAIN_TYPES = tuple(_PLAIN_ROW), tuple(_PLAIN_ROW.values())
_LARGE = 1e300  # numbers below are finite
Converter: TypeAlias = Callable[[Any, Path], Any]  # a JSON value and its path -> what the field holds


def load_json(content: bytes) -> Any:
    """Strict JSON: NaN and infinities are no numbers of it. Raises BadAnswerError."""

    def refuse(name: str) -> Any:
        raise _no_number(f"the answer is not JSON: it holds {name}")

    if (parse := _fast_parser()) is not None:
        # What it refuses is told by the parser that everyone has.
        with contextlib.suppress(ValueError):
            return parse(content)
    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadAnswerError(f"the answer is not JSON ({error}): is base_url that of a LenVM service?") from error


@functools.cache
def _fast_parser() -> Callable[[bytes], Any] | None:
    """pydantic's, several times as fast on lists of numbers, where it is installed anyway."""
    try:
        from pydantic_core import from_json
    except ImportError:
        return None
    return functools.partial(from_json, allow_inf_nan=False)


def decode(cls: type[T], data: Any, path: Path = "answer") -> T:
    """``data`` as ``cls``. Raises BadAnswerError."""
    if not isinstance(data, dict):
        raise _unfit(path, "an object", data)
    if cls is cast(Any, RowError) and isinstance(data.get("error"), dict):
        data = {**data["error"], "index": data.get("index")}
    fields, defaults, factories = _fields(cast(Any, cls))
    values = defaults.copy()
    for name, factory in factories:
        values[name] = factory()
    for name, convert, required, plain in fields:
        value = data.get(name)
        if value is None:
            if required:
                raise BadAnswerError(f"{_shown(path)} has no {name}: client and service versions may not fit")
        elif type(value) is plain and (plain is str or -_LARGE < value < _LARGE):  # nothing to look at
            values[name] = value
        else:
            values[name] = convert(value, (path, name))
    # What the __init__ of a frozen dataclass does, at once and not field by field: a third of a row's time.
    made = object.__new__(cls)
    made.__dict__.update(values)
    return made


def _shown(path: Path) -> str:
    """Paths are put together where one is to be told, and not for each of the thousands of numbers of a step."""
    if isinstance(path, str):
        return path
    before, at = path
    return f"{_shown(before)}[{at}]" if isinstance(at, int) else f"{_shown(before)}.{at}"


@functools.cache
def _fields(
    cls: Any,
) -> tuple[
    tuple[tuple[str, Converter, bool, type[Any] | None], ...],
    dict[str, Any],
    tuple[tuple[str, Callable[[], Any]], ...],
]:
    """Of each field: its name, what reads it, whether it must be there, and the type of a value that needs no
    reading; the defaults, and what makes those that are made."""
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    found = tuple(
        (
            field.name,
            _converter(hints[field.name]),
            field.default is missing and field.default_factory is missing,
            next((kind for kind in (str, int, float) if hints[field.name] in (kind, kind | None)), None),
        )
        for field in fields
    )
    return (
        found,
        {field.name: field.default for field in fields if field.default is not missing},
        tuple((field.name, field.default_factory) for field in fields if field.default_factory is not missing),
    )


def _converter(hint: Any) -> Converter:
    """Type hints are taken apart once, not for each of the thousands of numbers of a step."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _anything
    if origin in (types.UnionType, typing.Union):
        kinds = [kind for kind in arguments if kind is not type(None)]
        return _converter(kinds[0]) if len(kinds) == 1 else functools.partial(_union, kinds)
    if origin is tuple:
        return functools.partial(_tuple, arguments[0], _converter(arguments[0]))
    if origin is not None:  # Mapping[str, X]
        return functools.partial(_mapping, _converter(arguments[1]))
    if dataclasses.is_dataclass(hint):
        return functools.partial(decode, cast(type[Any], hint))
    return functools.partial(_number if hint in (int, float) else _plain, hint)


def _tuple(kind: Any, convert: Converter, value: Any, path: Path) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unfit(path, "a list", value)
    if not value:
        return ()
    if kind in (int, float) and set(map(type, value)) == {kind}:
        try:
            # No sum is finite that holds what is not; where finite numbers have none, each is looked at.
            finite = math.isfinite(sum(value)) or all(map(math.isfinite, value))
        except OverflowError:  # an integer that no float can hold: refused below, by its place
            finite = False
        if finite:
            return tuple(value)
    return tuple(convert(item, (path, at)) for at, item in enumerate(value))


def _mapping(convert: Converter, value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unfit(path, "an object", value)
    return {key: convert(item, (path, key)) for key, item in value.items()}


def _number(kind: type[int] | type[float], value: Any, path: Path) -> int | float:
    # A boolean is an int to Python, but no number to the contract.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unfit(path, kind.__name__, value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise _no_number(f"{_shown(path)} is not a finite number")
    if kind is int and int(value) != value:
        raise _unfit(path, "int", value)
    return kind(value)


def _plain(kind: type[Any], value: Any, path: Path) -> Any:
    if not isinstance(value, kind):
        raise _unfit(path, kind.__name__, value)
    return value


def _anything(value: Any, path: Path) -> Any:
    """Any JSON whose numbers are finite: some of it is sent back (a resolved objective)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        _number(float, value, path)
    for key, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        _anything(item, (path, key))
    return value


def _union(kinds: list[Any], value: Any, path: Path) -> Any:
    """One of several row types: an error, or the first whose required fields are all there."""
    if not isinstance(value, Mapping):
        raise _unfit(path, "an object", value)
    if value.get("error") is not None:
        return decode(RowError, value, path)
    rows = [kind for kind in kinds if kind is not RowError]
    if (scores := _plain_scores(value)) is not None:
        return scores
    for kind in rows:
        for name in _required(kind):
            if value.get(name) is None:
                break
        else:
            return decode(kind, value, path)
    return decode(rows[0], value, path)


def _plain_scores(row: Mapping[str, Any]) -> CandidateScores | None:
    """A step's row without values, if it is just as the service sends it: a third of the time. None for all else."""
    if tuple(map(type, row.values())) != _PLAIN_TYPES or tuple(row) != _PLAIN_NAMES or row["values"] or row["horizons"]:
        return None
    weights = tuple(row["log_weights"])
    if set(map(type, weights)) != {float} or not math.isfinite(sum(weights) + row["value"] + row["horizon"]):
        return None
    made = object.__new__(CandidateScores)
    made.__dict__.update(row, values=(), horizons=(), log_weights=weights)
    return made


@functools.cache
def _required(cls: Any) -> tuple[str, ...]:
    return tuple(name for name, _, required, _ in _fields(cls)[0] if required)


def _unfit(path: Path, wanted: str, value: Any) -> BadAnswerError:
    return BadAnswerError(
        f"{_shown(path)} should be {wanted}, is {value!r:.80}: client and service versions may not fit"
    )


def _no_number(what: str) -> BadAnswerError:
    # Such an answer is of the contract but for its numbers: the right service, in trouble that may pass.
    return BadAnswerError(f"{what}: the service has a numerical problem", retryable=True)
