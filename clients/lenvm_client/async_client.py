"""The asynchronous client: the calls of ``_calls`` through the exchange of ``_wire``, as in ``client``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar, overload

import httpx2

from lenvm_client import _calls as calls
from lenvm_client._calls import Inputs, ScoreInputs
from lenvm_client._columns import step_call
from lenvm_client._http import Base, Headers, Timeout, reply_of, settings, too_slow, transport_error
from lenvm_client._types import (
    CandidateInput,
    CandidateScores,
    DetokenizeResponse,
    FeedbackItem,
    FeedbackResponse,
    Message,
    ModelList,
    PredictInput,
    PredictLengthResponse,
    PredictModelsResponse,
    RowError,
    ScoreResponse,
    ServiceInfo,
    TokenizeResponse,
)
from lenvm_client._wire import Call, Reply, RetryPolicy, Wait, candidate_inputs, candidate_scores
from lenvm_client.errors import InvalidRequestError, LenVMClientError
from lenvm_client.tracking import AsyncTracker

__all__ = ["AsyncClient"]

T = TypeVar("T")
Generator_: TypeAlias = str | Mapping[str, Any]


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
        headers: Headers | None = None,
    ) -> None:
        super().__init__(model, timeout, total_timeout, max_retries, retry_timeouts)
        self._http: httpx2.AsyncClient = httpx2.AsyncClient(transport=transport, **settings(base_url, api_key, headers))
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
        self,
        call: Call[T],
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
        policy: RetryPolicy | None = None,
    ) -> T:
        flow = self._exchange(call, policy)
        step = next(flow)
        while True:
            reply: Reply | None = None
            failure: LenVMClientError | None = None
            if isinstance(step, Wait):
                await self._sleep(step.seconds)
            else:
                request = self._request(call, step, request_id, timeout, headers)
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

    @overload
    async def predict_length(
        self,
        inputs: Inputs,
        *,
        model: str | None = None,
        models: None = None,
        max_tokens: int | None = None,
        quantiles: Sequence[float] | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> PredictLengthResponse: ...

    @overload
    async def predict_length(
        self,
        inputs: Inputs,
        *,
        model: str | None = None,
        models: Sequence[str],
        max_tokens: int | None = None,
        quantiles: Sequence[float] | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> PredictModelsResponse: ...

    async def predict_length(
        self,
        inputs: Inputs,
        *,
        model: str | None = None,
        models: Sequence[str] | None = None,
        max_tokens: int | None = None,
        quantiles: Sequence[float] | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> PredictLengthResponse | PredictModelsResponse:
        """See ``Client.predict_length``."""
        default = self.model if models is None else None
        options = calls.options(default, model, generator, deadline_ms, priority)
        call = calls.predict_length(inputs, options, max_tokens, quantiles, models)
        return await self._run(call, request_id, timeout, headers)

    def track(
        self,
        input: str | Mapping[str, Any] | PredictInput,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        quantiles: Sequence[float] | None = None,
        generator: Generator_ | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> AsyncTracker:
        """See ``Client.track``."""
        options = {
            **calls.options(None, model, generator, deadline_ms, priority),
            "max_tokens": max_tokens,
            "quantiles": quantiles,
            "timeout": timeout,
            "headers": headers,
        }
        return AsyncTracker(self, input, options)

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
        headers: Headers | None = None,
    ) -> ScoreResponse:
        """See ``Client.score``."""
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        call = calls.score(inputs, options, completion=completion, completion_ids=completion_ids, eos=eos)
        return await self._run(call, request_id, timeout, headers)

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
        headers: Headers | None = None,
    ) -> list[CandidateScores | RowError]:
        """See ``Client.score_candidates``."""
        if not rows:
            return []
        inputs = candidate_inputs(rows)
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        step = step_call(inputs, options) if self._columns else None
        if step is not None:
            with contextlib.suppress(InvalidRequestError):
                answers = await self._run(step, request_id, timeout, headers)
                return list(answers)
        answer = await self._run(calls.score(inputs, options), request_id, timeout, headers)
        self._columns = self._columns and step is None  # a service of before they were, which takes the rows
        return candidate_scores(answer.scores, inputs)

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> TokenizeResponse:
        """See ``Client.tokenize``."""
        return await self._run(calls.tokenize(prompt, messages, model or self.model), request_id, timeout, headers)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> DetokenizeResponse:
        """See ``Client.detokenize``."""
        return await self._run(calls.detokenize(token_ids, model or self.model), request_id, timeout, headers)

    async def feedback(
        self,
        items: FeedbackItem | Mapping[str, Any] | Iterable[FeedbackItem | Mapping[str, Any]],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> FeedbackResponse:
        """See ``Client.feedback``."""
        return await self._run(calls.feedback(items, model or self.model), request_id, timeout, headers)

    async def models(
        self, *, request_id: str | None = None, timeout: Timeout = None, headers: Headers | None = None
    ) -> ModelList:
        """See ``Client.models``."""
        return await self._run(calls.MODELS, request_id, timeout, headers)

    async def info(
        self, *, request_id: str | None = None, timeout: Timeout = None, headers: Headers | None = None
    ) -> ServiceInfo:
        """See ``Client.info``."""
        return await self._run(calls.INFO, request_id, timeout, headers)

    async def live(self, *, timeout: Timeout = None, headers: Headers | None = None) -> bool:
        """See ``Client.live``."""
        return await self._healthy(calls.LIVE, timeout, headers)

    async def ready(self, *, timeout: Timeout = None, headers: Headers | None = None) -> bool:
        """See ``Client.ready``."""
        return await self._healthy(calls.READY, timeout, headers)

    async def _healthy(self, call: Call[Any], timeout: Timeout, headers: Headers | None) -> bool:
        try:
            await self._run(call, None, timeout, headers, calls.ONCE)
        except LenVMClientError as error:
            if calls.is_unhealthy(error):
                return False
            raise
        return True
