"""From JSON to the dataclasses of ``_types``: names on the wire are field names, unknown fields are ignored (a newer
service may send more), and whatever else does not fit is a BadAnswerError that names the JSON path."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from lenvm_client._types import RowError
from lenvm_client.errors import BadAnswerError

T = TypeVar("T")


def load_json(content: bytes) -> Any:
    """Strict JSON: NaN and infinities are no numbers of it. Raises BadAnswerError."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadAnswerError(f"the answer is not JSON ({error}): is base_url that of a LenVM service?") from error


def decode(cls: type[T], data: Any, path: str = "answer") -> T:
    """``data`` as ``cls``. Raises BadAnswerError."""
    if not isinstance(data, Mapping):
        raise _unfit(path, "an object", data)
    if cls is cast(Any, RowError) and isinstance(data.get("error"), Mapping):
        data = {**data["error"], "index": data.get("index")}
    values = {}
    for name, (hint, required) in _fields(cast(Any, cls)).items():
        value = data.get(name)
        if value is not None:
            values[name] = _convert(hint, value, f"{path}.{name}")
        elif required:
            raise BadAnswerError(f"{path} has no {name}: client and service versions may not fit")
    return cls(**values)


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(cls)
    }


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _union([kind for kind in arguments if kind is not type(None)], value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise _unfit(path, "a list", value)
        return tuple(_convert(arguments[0], item, f"{path}[{at}]") for at, item in enumerate(value))
    if origin is not None:  # Mapping[str, X]
        if not isinstance(value, dict):
            raise _unfit(path, "an object", value)
        return {key: _convert(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(cast(type[Any], hint), value, path)
    # A boolean is an int to Python, but no number to the contract.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is int and number and int(value) == value:
        return int(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _unfit(path, hint.__name__, value)


def _union(kinds: list[Any], value: Any, path: str) -> Any:
    """One of several row types: an error, or the first whose required fields are all there."""
    if len(kinds) == 1:
        return _convert(kinds[0], value, path)
    if not isinstance(value, Mapping):
        raise _unfit(path, "an object", value)
    if value.get("error") is not None:
        return decode(RowError, value, path)
    rows = [kind for kind in kinds if kind is not RowError]
    fitting = [
        kind
        for kind in rows
        if all(value.get(name) is not None for name, (_, required) in _fields(kind).items() if required)
    ]
    return decode((fitting or rows)[0], value, path)


def _unfit(path: str, wanted: str, value: Any) -> BadAnswerError:
    return BadAnswerError(f"{path} should be {wanted}, is {value!r:.80}: client and service versions may not fit")
