"""The blocking and the asynchronous client. Both run the calls of ``_calls`` through the exchange of ``_wire``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import httpx2

from lenvm_client import _calls as calls
from lenvm_client._calls import Inputs, ScoreInputs
from lenvm_client._http import Base, Timeout, reply_of, settings, too_slow, transport_error
from lenvm_client._types import (
    CandidateInput,
    CandidateScores,
    DetokenizeResponse,
    FeedbackItem,
    FeedbackResponse,
    Message,
    ModelList,
    PredictLengthResponse,
    RowError,
    ScoreResponse,
    ServiceInfo,
    TokenizeResponse,
)
from lenvm_client._wire import Call, Reply, RetryPolicy, Send, Wait, candidate_inputs, candidate_scores
from lenvm_client.errors import LenVMClientError

__all__ = ["AsyncClient", "Client"]

T = TypeVar("T")
Generator_: TypeAlias = str | Mapping[str, Any]


class Client(Base):
    """A blocking client of one service. Thread-safe; close it, or use it in a ``with`` block.

    Args:
        base_url: where the service answers, e.g. ``http://127.0.0.1:8000``; a path in it is kept.
        model: name of the model for every call; None is the service's first.
        api_key: sent as ``Authorization: Bearer``.
        timeout: seconds for each phase (connect, write, read, pool) of one attempt, or an ``httpx2.Timeout``.
        total_timeout: seconds for all attempts and waits of a call; None is no bound. ``Client`` looks at the clock
            whenever a piece of the answer's body came, so that one more silent read may be added (at most ``timeout``);
            ``AsyncClient`` is exact.
        max_retries: further attempts after a failure that may pass: connection failed or broken, and 429, 502, 503, 504
            that are marked ``retryable``. ``feedback`` counts twice what it is told twice: it is made again only where
            nothing was sent, or after 429 and 503.
        retry_timeouts: also after a time-out.
        transport: an ``httpx2`` transport, e.g. ``MockTransport``.
        headers: sent with every request; printable ASCII.

    Every call takes ``request_id`` (sent as ``x-request-id``; the answer's own is in ``answer.request_id``) and
    ``timeout`` (for this call). All raise the errors of ``lenvm_client.errors``.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout = 30.0,
        total_timeout: float | None = 60.0,
        max_retries: int = 2,
        retry_timeouts: bool = False,
        transport: httpx2.BaseTransport | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, timeout, total_timeout, max_retries, retry_timeouts)
        self._http = httpx2.Client(transport=transport, **settings(base_url, api_key, headers))
        self._sleep = time.sleep

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, call: Call[T], request_id: str | None = None, timeout: Timeout = None, policy: RetryPolicy | None = None
    ) -> T:
        flow = self._exchange(call, policy)
        step = next(flow)
        while True:
            reply: Reply | None = None
            failure: LenVMClientError | None = None
            if isinstance(step, Wait):
                self._sleep(step.seconds)
            else:
                request = self._request(call, step, request_id, timeout)
                try:
                    reply = self._send(step, request)
                except httpx2.HTTPError as error:
                    failure = transport_error(error)
                except LenVMClientError as error:
                    failure = error
            try:
                step = flow.send(reply) if failure is None else flow.throw(failure)
            except StopIteration as stop:
                answer: T = stop.value
                return answer

    def _send(self, step: Send, request: dict[str, Any]) -> Reply:
        # A server that sends a byte now and then keeps every phase short: only this clock ends it.
        started, parts = self._clock(), []
        with self._http.stream(**request) as response:
            for part in response.iter_bytes():
                parts.append(part)
                if step.left_s is not None and self._clock() - started > step.left_s:
                    raise too_slow()
        return reply_of(response, b"".join(parts))

    def predict_length(
        self,
        inputs: Inputs,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        quantiles: Sequence[float] | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> PredictLengthResponse:
        """How many tokens are still to come? One input (a prompt, a mapping or a ``PredictInput``) or several.

        A single input's error is raised; of several, a bad one comes back as a ``RowError`` in ``predictions``.
        A conversation is one input: ``{"messages": [...]}``.
        """
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        call = calls.predict_length(inputs, options, max_tokens, quantiles)
        return self._run(call, request_id, timeout)

    def score(
        self,
        inputs: ScoreInputs,
        *,
        completion: str | None = None,
        completion_ids: Sequence[int] | None = None,
        eos: bool | None = None,
        model: str | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> ScoreResponse:
        """Values per token of completions, or of candidates: ``score("Why?", completion="Because.")`` or inputs."""
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        call = calls.score(inputs, options, completion=completion, completion_ids=completion_ids, eos=eos)
        return self._run(call, request_id, timeout)

    def score_candidates(
        self,
        rows: Sequence[CandidateInput | Mapping[str, Any]],
        *,
        model: str | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> list[CandidateScores | RowError]:
        """One answer or row error for each row, aligned: the ``CandidateScorer`` of guided decoding."""
        if not rows:
            return []
        inputs = candidate_inputs(rows)
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        return candidate_scores(self._run(calls.score(inputs, options), request_id, timeout), inputs)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> TokenizeResponse:
        """Token ids of a prompt or of messages, with the backbone's chat template."""
        return self._run(calls.tokenize(prompt, messages, model or self.model), request_id, timeout)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> DetokenizeResponse:
        """The text of token ids."""
        return self._run(calls.detokenize(token_ids, model or self.model), request_id, timeout)

    def feedback(
        self,
        items: FeedbackItem | Mapping[str, Any] | Iterable[FeedbackItem | Mapping[str, Any]],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> FeedbackResponse:
        """Tell how long answers became."""
        return self._run(calls.feedback(items, model or self.model), request_id, timeout)

    def models(self, *, request_id: str | None = None, timeout: Timeout = None) -> ModelList:
        """The models, as OpenAI's list."""
        return self._run(calls.MODELS, request_id, timeout)

    def info(self, *, request_id: str | None = None, timeout: Timeout = None) -> ServiceInfo:
        """Version, models and limits."""
        return self._run(calls.INFO, request_id, timeout)

    def live(self, *, timeout: Timeout = None) -> bool:
        """Is the process up? False also where nothing answers; asked once."""
        return self._healthy(calls.LIVE, timeout)

    def ready(self, *, timeout: Timeout = None) -> bool:
        """Are the models ready? False also where nothing answers; asked once."""
        return self._healthy(calls.READY, timeout)

    def _healthy(self, call: Call[Any], timeout: Timeout) -> bool:
        try:
            self._run(call, None, timeout, calls.ONCE)
        except LenVMClientError as error:
            if calls.is_unhealthy(error):
                return False
            raise
        return True


class AsyncClient(Base):
    """The asynchronous twin of ``Client`` (asyncio): same arguments, same calls, awaited."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float | httpx2.Timeout = 30.0,
        total_timeout: float | None = 60.0,
        max_retries: int = 2,
        retry_timeouts: bool = False,
        transport: httpx2.AsyncBaseTransport | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(model, timeout, total_timeout, max_retries, retry_timeouts)
        self._http = httpx2.AsyncClient(transport=transport, **settings(base_url, api_key, headers))
        self._sleep = asyncio.sleep

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self, call: Call[T], request_id: str | None = None, timeout: Timeout = None, policy: RetryPolicy | None = None
    ) -> T:
        flow = self._exchange(call, policy)
        step = next(flow)
        while True:
            reply: Reply | None = None
            failure: LenVMClientError | None = None
            if isinstance(step, Wait):
                await self._sleep(step.seconds)
            else:
                request = self._request(call, step, request_id, timeout)
                try:
                    async with asyncio.timeout(step.left_s):
                        response = await self._http.request(**request)
                    reply = reply_of(response, response.content)
                except TimeoutError:
                    failure = too_slow()
                except httpx2.HTTPError as error:
                    failure = transport_error(error)
            try:
                step = flow.send(reply) if failure is None else flow.throw(failure)
            except StopIteration as stop:
                answer: T = stop.value
                return answer

    async def predict_length(
        self,
        inputs: Inputs,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        quantiles: Sequence[float] | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> PredictLengthResponse:
        """See ``Client.predict_length``."""
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        call = calls.predict_length(inputs, options, max_tokens, quantiles)
        return await self._run(call, request_id, timeout)

    async def score(
        self,
        inputs: ScoreInputs,
        *,
        completion: str | None = None,
        completion_ids: Sequence[int] | None = None,
        eos: bool | None = None,
        model: str | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> ScoreResponse:
        """See ``Client.score``."""
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        call = calls.score(inputs, options, completion=completion, completion_ids=completion_ids, eos=eos)
        return await self._run(call, request_id, timeout)

    async def score_candidates(
        self,
        rows: Sequence[CandidateInput | Mapping[str, Any]],
        *,
        model: str | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> list[CandidateScores | RowError]:
        """See ``Client.score_candidates``."""
        if not rows:
            return []
        inputs = candidate_inputs(rows)
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        return candidate_scores(await self._run(calls.score(inputs, options), request_id, timeout), inputs)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> TokenizeResponse:
        """See ``Client.tokenize``."""
        return await self._run(calls.tokenize(prompt, messages, model or self.model), request_id, timeout)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> DetokenizeResponse:
        """See ``Client.detokenize``."""
        return await self._run(calls.detokenize(token_ids, model or self.model), request_id, timeout)

    async def feedback(
        self,
        items: FeedbackItem | Mapping[str, Any] | Iterable[FeedbackItem | Mapping[str, Any]],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
    ) -> FeedbackResponse:
        """See ``Client.feedback``."""
        return await self._run(calls.feedback(items, model or self.model), request_id, timeout)

    async def models(self, *, request_id: str | None = None, timeout: Timeout = None) -> ModelList:
        """See ``Client.models``."""
        return await self._run(calls.MODELS, request_id, timeout)

    async def info(self, *, request_id: str | None = None, timeout: Timeout = None) -> ServiceInfo:
        """See ``Client.info``."""
        return await self._run(calls.INFO, request_id, timeout)

    async def live(self, *, timeout: Timeout = None) -> bool:
        """See ``Client.live``."""
        return await self._healthy(calls.LIVE, timeout)

    async def ready(self, *, timeout: Timeout = None) -> bool:
        """See ``Client.ready``."""
        return await self._healthy(calls.READY, timeout)

    async def _healthy(self, call: Call[Any], timeout: Timeout) -> bool:
        try:
            await self._run(call, None, timeout, calls.ONCE)
        except LenVMClientError as error:
            if calls.is_unhealthy(error):
                return False
            raise
        return True
