"""The blocking client: the calls of ``_calls`` through the exchange of ``_wire``. Its twin is ``async_client``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar, overload

import httpx2

from lenvm_client import _calls as calls
from lenvm_client._calls import Inputs, ScoreInputs
from lenvm_client._columns import step_call
from lenvm_client._http import Base, Headers, Timeout, reply_of, settings, too_slow, transport_error
from lenvm_client._transport import MEANWHILE, direct, request_head
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
from lenvm_client._wire import Call, Reply, RetryPolicy, Send, Wait, candidate_inputs, candidate_scores
from lenvm_client.errors import InvalidRequestError, LenVMClientError
from lenvm_client.tracking import Tracker

__all__ = ["Client"]

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
        transport: an ``httpx2`` transport, e.g. ``MockTransport``. By default plain http without proxies goes through a
            quicker one than the library's, where ``httptools`` is installed (what serving takes brings it).
        headers: sent with every request; printable ASCII.

    Every call takes ``request_id`` (sent as ``x-request-id``; the answer's own is in ``answer.request_id``) and, for
    this call alone, ``timeout`` and ``headers``, which replace the client's: ``traceparent`` and ``tracestate``, as
    OpenTelemetry's ``inject`` fills them in, say. All raise the errors of ``lenvm_client.errors``.
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
        headers: Headers | None = None,
    ) -> None:
        super().__init__(model, timeout, total_timeout, max_retries, retry_timeouts)
        given = settings(base_url, api_key, headers)
        self._direct = direct(given["base_url"]) if transport is None else None
        self._http: httpx2.Client = httpx2.Client(transport=transport or self._direct, **given)
        self._heads: dict[tuple[str, str], bytes] = {}
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
        self,
        call: Call[T],
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
        policy: RetryPolicy | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> T:
        flow = self._exchange(call, policy)
        step = next(flow)
        while True:
            reply: Reply | None = None
            failure: LenVMClientError | None = None
            if isinstance(step, Wait):
                self._sleep(step.seconds)
            else:
                also, meanwhile = meanwhile, None
                try:
                    if request_id is None and timeout is None and not headers:
                        reply = self._exchange_directly(call, step, also)
                    if reply is None:
                        request = self._request(call, step, request_id, timeout, headers)
                        if also is not None:
                            request["extensions"] = {MEANWHILE: also}
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

    def _exchange_directly(self, call: Call[Any], step: Send, meanwhile: Callable[[], None] | None) -> Reply | None:
        """A call without headers of its own past the library, which takes as long over it as the network; None where
        the library is needed: for another transport, credentials in the URL, and once a server has set a cookie."""
        direct, cookies = self._direct, self._http.cookies
        url = self._url(call.path)
        if direct is None or self._http.is_closed or len(cookies.jar) or url.userinfo:
            return None
        head = self._heads.get((call.method, call.path))
        if head is None:
            # Nothing is decoded here, so that the answer must come as it is.
            plain = {"accept-encoding": "identity"}
            made = self._http.build_request(call.method, url, headers=plain, content=b"")
            head = self._heads[call.method, call.path] = request_head(made)
        data = head + b"\r\n"
        if (content := call.content) is not None:
            data = b"%scontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (head, len(content), content)
        started = self._clock()

        def late() -> bool:
            return step.left_s is not None and self._clock() - started > step.left_s

        limits = self._limits(step, None)
        found = direct.exchange((url.raw_host.decode("ascii"), url.port or 80), data, limits, meanwhile, late)
        if found is None:
            raise too_slow()
        status, fields, body = found
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in fields}
        if "set-cookie" in headers or "content-encoding" in headers:
            stream = httpx2.ByteStream(body)
            request = httpx2.Request(call.method, url)
            response = httpx2.Response(status, headers=fields, stream=stream, request=request)
            cookies.extract_cookies(response)
            return reply_of(response, response.read())
        return Reply(status, headers, body)

    def _send(self, step: Send, request: dict[str, Any]) -> Reply:
        # A server that sends a byte now and then keeps every phase short: only this clock ends it.
        started, parts = self._clock(), []
        with self._http.stream(**request) as response:
            for part in response.iter_bytes():
                parts.append(part)
                if step.left_s is not None and self._clock() - started > step.left_s:
                    raise too_slow()
        return reply_of(response, b"".join(parts))

    @overload
    def predict_length(
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
    def predict_length(
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

    def predict_length(
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
        """How many tokens are still to come? One input (a prompt, a mapping or a ``PredictInput``) or several.

        A single input's error is raised; of several, a bad one comes back as a ``RowError`` in ``predictions``.
        A conversation is one input: ``{"messages": [...]}``. With ``models`` (instead of ``model``) each of them is
        asked at once; one that fails is a ``RowError`` in ``results``, and where none answers its error is raised.
        """
        default = self.model if models is None else None
        options = calls.options(default, model, generator, deadline_ms, priority)
        call = calls.predict_length(inputs, options, max_tokens, quantiles, models)
        return self._run(call, request_id, timeout, headers)

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
    ) -> Tracker:
        """Follow a running request: ``tracker.update(new_token_ids)`` predicts again, by sessions that only grow.

        ``input`` is its prompt (or a prefix, with ``generated``). Sends nothing yet."""
        options = {
            **calls.options(None, model, generator, deadline_ms, priority),
            "max_tokens": max_tokens,
            "quantiles": quantiles,
            "timeout": timeout,
            "headers": headers,
        }
        return Tracker(self, input, options)

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
        headers: Headers | None = None,
    ) -> ScoreResponse:
        """Values per token of completions, or of candidates: ``score("Why?", completion="Because.")`` or inputs."""
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        call = calls.score(inputs, options, completion=completion, completion_ids=completion_ids, eos=eos)
        return self._run(call, request_id, timeout, headers)

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
        headers: Headers | None = None,
    ) -> list[CandidateScores | RowError]:
        """One answer or row error for each row, aligned: the ``CandidateScorer`` of guided decoding."""
        if not rows:
            return []
        inputs = candidate_inputs(rows)
        options = calls.options(self.model, model, generator, deadline_ms, priority)
        return list(self._candidates(inputs, options, request_id, timeout, headers))

    def _candidates(
        self,
        inputs: Sequence[CandidateInput],
        options: Mapping[str, Any],
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Sequence[CandidateScores | RowError]:
        step = step_call(inputs, options) if self._columns else None
        if step is not None:
            try:
                return self._run(step, request_id, timeout, headers, meanwhile=meanwhile)
            except InvalidRequestError:
                meanwhile = None
        answer = self._run(calls.score(inputs, options), request_id, timeout, headers, meanwhile=meanwhile)
        self._columns = self._columns and step is None  # a service of before they were, which takes the rows
        return candidate_scores(answer.scores, inputs)

    @property
    def _overlaps(self) -> bool:
        """Whether ``GuidedDecoder`` may call ``_score_overlapped``: a subclass may have its own call."""
        own = type(self).score_candidates is not Client.score_candidates or "score_candidates" in self.__dict__
        return not own

    def _score_overlapped(
        self, rows: Sequence[CandidateInput], meanwhile: Callable[[], None]
    ) -> Sequence[CandidateScores | RowError]:
        """``score_candidates`` for ``GuidedDecoder``. ``meanwhile`` is called at most once, while the answer is
        awaited; not where another transport than the client's own sends the request."""
        return self._candidates(rows, calls.options(self.model, None, None, None, None), meanwhile=meanwhile)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> TokenizeResponse:
        """Token ids of a prompt or of messages, with the backbone's chat template."""
        return self._run(calls.tokenize(prompt, messages, model or self.model), request_id, timeout, headers)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> DetokenizeResponse:
        """The text of token ids."""
        return self._run(calls.detokenize(token_ids, model or self.model), request_id, timeout, headers)

    def feedback(
        self,
        items: FeedbackItem | Mapping[str, Any] | Iterable[FeedbackItem | Mapping[str, Any]],
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: Timeout = None,
        headers: Headers | None = None,
    ) -> FeedbackResponse:
        """Tell how long answers became."""
        return self._run(calls.feedback(items, model or self.model), request_id, timeout, headers)

    def models(
        self, *, request_id: str | None = None, timeout: Timeout = None, headers: Headers | None = None
    ) -> ModelList:
        """The models, as OpenAI's list."""
        return self._run(calls.MODELS, request_id, timeout, headers)

    def info(
        self, *, request_id: str | None = None, timeout: Timeout = None, headers: Headers | None = None
    ) -> ServiceInfo:
        """Version, models and limits."""
        return self._run(calls.INFO, request_id, timeout, headers)

    def live(self, *, timeout: Timeout = None, headers: Headers | None = None) -> bool:
        """Is the process up? False also where nothing answers; asked once."""
        return self._healthy(calls.LIVE, timeout, headers)

    def ready(self, *, timeout: Timeout = None, headers: Headers | None = None) -> bool:
        """Are the models ready? False also where nothing answers; asked once."""
        return self._healthy(calls.READY, timeout, headers)

    def _healthy(self, call: Call[Any], timeout: Timeout, headers: Headers | None) -> bool:
        try:
            self._run(call, None, timeout, headers, calls.ONCE)
        except LenVMClientError as error:
            if calls.is_unhealthy(error):
                return False
            raise
        return True
