"""``/v1/completions`` of an OpenAI-compatible server, as token ids and log-probs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from lenvm_client._http import transport_error
from lenvm_client.errors import BadAnswerError

__all__ = ["Choice", "Completions"]


@dataclass(frozen=True)
class Choice:
    ids: list[int]
    top: dict[int, float]  # of the first token
    ended: bool  # by EOS, which is not among the ids


class Completions:
    """``/completions`` of one server and model; close it, or use it in a ``with`` block. Raises
    ServiceUnreachableError, ServiceTimeoutError and BadAnswerError.

    Args:
        base_url: with the version, e.g. ``http://127.0.0.1:8080/v1``.
        decode: ids -> text, special tokens kept; for servers that take prompts as text alone. A text may be read back
            as other tokens than those that it was written with.
        token_id: text of a token -> its id (None: it has none); for servers that send no ids. The text of EOS is often
            empty.
        encode: text -> ids, no special tokens added; for servers that send no ids. Continuations are then read from
            their text, and no log-probs are asked for in the block loops.
        extra_body: sent with every request.
        http: an ``httpx2.Client`` of your own; it is not closed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        decode: Callable[[list[int]], str] | None = None,
        token_id: Callable[[str], int | None] | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        http: httpx2.Client | None = None,
    ) -> None:
        self.url, self.model = base_url.rstrip("/") + "/completions", model
        self.decode, self.token_id, self.encode = decode, token_id, encode
        self.extra_body = dict(extra_body or {})
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http, self._owned = http or httpx2.Client(timeout=timeout), http is None
        self._headers = headers

    def close(self) -> None:
        """Close the connections; those of ``http`` stay."""
        if self._owned:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, prefix: Sequence[int], ends: Sequence[int], **options: Any) -> list[Choice]:
        """The choices after a prefix."""
        prompt = list(prefix) if self.decode is None else self.decode(list(prefix))
        body = {"model": self.model, "prompt": prompt, **options, **self.extra_body}
        try:
            answer = self._http.post(self.url, json=body, headers=self._headers)
        except httpx2.HTTPError as error:
            raise transport_error(error) from error
        if answer.status_code != 200:
            raise BadAnswerError(f"the completions server says {answer.status_code}: {answer.text[:200]}")
        try:
            return [self._choice(choice, ends) for choice in answer.json()["choices"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadAnswerError(f"no answer of an OpenAI-compatible server: {error!r}") from error

    def _choice(self, choice: Mapping[str, Any], ends: Sequence[int]) -> Choice:
        logprobs = choice.get("logprobs") or {}
        content, given = logprobs.get("content"), choice.get("token_ids")
        if content is not None:  # as chat completions have it
            ids = [self._id(item["token"], item.get("id")) for item in content]
            first = content[0]["top_logprobs"] if content else []
            top = [(self._id(item["token"], item.get("id")), item["logprob"]) for item in first]
        else:
            ids = [self._id(token) for token in logprobs.get("tokens") or ()]
            first = (logprobs.get("top_logprobs") or [{}])[0] or {}
            top = [(self._id(token), logprob) for token, logprob in first.items()]
        if given is not None:
            ids = [int(token) for token in given]
        elif not ids and self.encode is not None:
            ids = [int(token) for token in self.encode(choice["text"])]
        ended = choice.get("finish_reason") == "stop"
        at = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        if any(token is None for token in ids[:at]):
            raise BadAnswerError("the server sends texts without ids: give token_id, or extra_body that asks for ids")
        known = {token: float(logprob) for token, logprob in top if token is not None and logprob is not None}
        return Choice([token for token in ids[:at] if token is not None], known, ended or at < len(ids))

    def _id(self, token: str, given: int | None = None) -> int | None:
        if given is not None:
            return int(given)
        name, _, number = token.partition(":")
        if name == "token_id" and number.isdigit():
            return int(number)
        return None if self.token_id is None else self.token_id(token)
