"""From the socket to a checked JSON object: never more than the limit in memory, and every refusal typed."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json
from starlette.requests import Request

from lenvm_service.api.errors import RequestError
from lenvm_service.errors import PayloadTooLargeError

__all__ = ["check_fields", "parse_object", "read_body"]

_MOST_FIELDS = 64


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most ``limit`` bytes.

    Raises PayloadTooLargeError as soon as that is clear (from Content-Length, or while reading), and starlette's
    ClientDisconnect when the caller goes.
    """
    problem = f"the body is larger than {limit} bytes: send fewer rows a request"
    declared = request.headers.get("content-length", "")
    # Compared by length first: int() refuses a number of thousands of digits.
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise PayloadTooLargeError(problem)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise PayloadTooLargeError(problem)
        chunks.append(chunk)
    return b"".join(chunks)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``. Raises RequestError: 400 for what is no JSON text, 422 for another kind of value.

    NaN, Infinity, unpaired surrogates and nesting deeper than 200 are no JSON here.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the body is not UTF-8 (byte {error.start}): encode it as UTF-8", reason="not_utf8", status=400
        ) from None
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON ({error})", reason="json_invalid", status=400) from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", reason="not_an_object")
    check_fields(value)
    return value


def check_fields(value: Any) -> None:
    """Raise RequestError for an object with far more fields than any of ours has: naming each would take seconds."""
    if isinstance(value, dict) and len(value) > _MOST_FIELDS:
        raise RequestError(f"the object has {len(value)} fields: send those of the contract", reason="too_many_fields")
