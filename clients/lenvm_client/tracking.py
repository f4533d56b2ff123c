"""Predictions for a request that is running: each update sends the new tokens alone, on the session of the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lenvm_client._types import PredictInput, Prediction, TokenizeResponse
from lenvm_client._wire import input_rows
from lenvm_client.errors import InvalidRequestError, PrefixUnknownError

if TYPE_CHECKING:
    from lenvm_client.async_client import AsyncClient
    from lenvm_client.client import Client

__all__ = ["AsyncTracker", "Tracker"]


class _Core:
    """All of a tracker but the calls."""

    def __init__(self, input: str | Mapping[str, Any] | PredictInput, options: Mapping[str, Any]) -> None:
        row = input_rows(input, PredictInput)
        if "inputs" in row:
            raise InvalidRequestError("one tracker follows one request: give a single input", param="inputs")
        self.prediction: Prediction | None = None
        self._first = row
        self._options = options
        self._before = int(row.get("generated") or 0)
        self._prompt_ids: list[int] | None = None if row.get("token_ids") is None else list(row["token_ids"])
        self._answer: list[int] = []
        self._session: str | None = None
        self._sent = 0  # of the answer's tokens, those that the session has

    @property
    def generated(self) -> int:
        """Content tokens of the answer so far."""
        return self._before + len(self._answer)

    def _next_row(self) -> dict[str, Any]:
        if self._session is not None:
            return {"session": self._session, "append": self._answer[self._sent :], "generated": self.generated}
        if not self._answer:
            return dict(self._first)
        if self._first.get("session") is not None:
            append = [*self._first.get("append", ()), *self._answer]
            return {"session": self._first["session"], "append": append, "generated": self.generated}
        assert self._prompt_ids is not None
        return {"token_ids": [*self._prompt_ids, *self._answer], "generated": self.generated}

    @property
    def _needs_ids(self) -> bool:
        """Only text is known of the prompt, and tokens must follow it."""
        texts = self._prompt_ids is None and self._first.get("session") is None
        return self._session is None and texts and bool(self._answer)

    def _text(self) -> dict[str, Any]:
        names = ("prompt", "messages")
        return {name: self._first[name] for name in names if self._first.get(name) is not None}

    def _learn(self, answer: TokenizeResponse) -> None:
        self._prompt_ids = list(answer.token_ids)

    def _take(self, prediction: Prediction) -> Prediction:
        self.prediction, self._session, self._sent = prediction, prediction.session, len(self._answer)
        return prediction

    def _forget(self) -> bool:
        """After ``prefix_unknown``: is there another form to send?"""
        known, self._session = self._session is not None, None
        return known and self._first.get("session") is None


class Tracker(_Core):
    """``Client.track`` makes it. Not thread-safe; one for each running request.

    ``prediction`` is the last answer, ``generated`` the content tokens so far. An update that fails loses nothing: its
    tokens go with the next one. A session that the service no longer holds is replaced by the whole prefix, once.
    """

    def __init__(
        self, client: Client, input: str | Mapping[str, Any] | PredictInput, options: Mapping[str, Any]
    ) -> None:
        super().__init__(input, options)
        self._client = client

    def update(self, new_token_ids: Sequence[int] = ()) -> Prediction:
        """What is still to come after ``new_token_ids`` (content tokens since the last update; none: at the prompt).

        Raises the errors of ``Client.predict_length``."""
        self._answer.extend(int(token) for token in new_token_ids)
        try:
            return self._ask()
        except PrefixUnknownError:
            if not self._forget():
                raise
        return self._ask()

    def _ask(self) -> Prediction:
        if self._needs_ids:
            self._learn(self._client.tokenize(**self._text(), model=self._options.get("model")))
        return self._take(self._client.predict_length(self._next_row(), **self._options).prediction)


class AsyncTracker(_Core):
    """``Tracker`` over an ``AsyncClient``: ``update`` is awaited."""

    def __init__(
        self, client: AsyncClient, input: str | Mapping[str, Any] | PredictInput, options: Mapping[str, Any]
    ) -> None:
        super().__init__(input, options)
        self._client = client

    async def update(self, new_token_ids: Sequence[int] = ()) -> Prediction:
        """See ``Tracker.update``."""
        self._answer.extend(int(token) for token in new_token_ids)
        try:
            return await self._ask()
        except PrefixUnknownError:
            if not self._forget():
                raise
        return await self._ask()

    async def _ask(self) -> Prediction:
        if self._needs_ids:
            self._learn(await self._client.tokenize(**self._text(), model=self._options.get("model")))
        return self._take((await self._client.predict_length(self._next_row(), **self._options)).prediction)
