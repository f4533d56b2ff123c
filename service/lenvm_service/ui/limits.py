"""What one visitor of the playground may ask for: bounds that keep it beside the service, and not in its way."""

from __future__ import annotations

from lenvm.errors import ContextTooLongError, InvalidRequestError

__all__ = [
    "MAX_CHARACTERS",
    "MAX_NEW_TOKENS",
    "MAX_PROMPT_TOKENS",
    "MAX_SEED",
    "MAX_WAITING",
    "check_text",
    "check_tokens",
    "whole",
]

MAX_CHARACTERS = 8_000  # of a prompt, and of a completion
MAX_PROMPT_TOKENS = 1_024
MAX_NEW_TOKENS = 512
MAX_SEED = 2**31 - 1
MAX_WAITING = 32  # events in the playground's queue; more are refused


def check_text(text: object, name: str, *, empty: bool = False) -> str:
    """The text, where it is one and not too long. Raises InvalidRequestError; ``empty``: it may be."""
    if not isinstance(text, str) or (not text.strip() and not empty):
        raise InvalidRequestError(f"the {name} is empty: type some text", param=name)
    if len(text) > MAX_CHARACTERS:
        raise InvalidRequestError(
            f"the {name} has {len(text):,} characters; the playground takes {MAX_CHARACTERS:,}: shorten it", param=name
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: JSON can carry it
        raise InvalidRequestError(f"the {name} is no valid Unicode text", param=name) from None
    return text


def check_tokens(count: int, name: str, most: int) -> None:
    """Raises ContextTooLongError for more than ``most`` tokens."""
    if count > most:
        raise ContextTooLongError(
            f"the {name} has {count:,} tokens; the playground takes {most:,}: shorten it", param=name
        )


def whole(value: object, name: str, low: int, high: int) -> int:
    """A whole number in ``[low, high]``, which a browser may send as 3.0. Raises InvalidRequestError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not low <= value <= high:
        raise InvalidRequestError(f"the {name} must be a whole number from {low} to {high:,}", param=name)
    if value != int(value):
        raise InvalidRequestError(f"the {name} must be a whole number, not {value:g}", param=name)
    return int(value)
