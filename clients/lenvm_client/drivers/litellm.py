"""A LiteLLM proxy hook: predicts each request, sets its priority or limit, and feeds the realised length back.

In a module beside the proxy's ``config.yaml`` (``callbacks: my_hooks.hook`` under ``litellm_settings``)::

    from lenvm_client.drivers.litellm import LenVMHook
    hook = LenVMHook("http://127.0.0.1:8000", backend="vllm", ageing=50.0)

Written for the interface of litellm 1.110: ``CustomLogger.async_pre_call_hook`` and ``async_log_success_event``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from lenvm_client._types import FeedbackItem, Prediction
from lenvm_client.async_client import AsyncClient
from lenvm_client.errors import LenVMClientError
from lenvm_client.scheduling import Backend, BudgetPlanner, request_fields

__all__ = ["LenVMHook"]

logger = logging.getLogger(__name__)

PREDICTED = frozenset({"completion", "acompletion", "text_completion", "atext_completion"})
METADATA_KEY = "lenvm_prediction_id"
_STOPPED = frozenset({"stop", "tool_calls", "function_call"})


class LenVMHook(CustomLogger):
    """One prediction a request, at most ``timeout`` seconds of waiting for it, and never a failed request: whatever
    goes wrong leaves the request as it was and is counted in ``errors``.

    Args:
        client: an ``AsyncClient``, or the service's URL (then without retries).
        backend: who reads the priority. "litellm" is the router's own queue (``priority`` of the request); for another
            the field goes to the backend in ``extra_body``. None sets none. A priority that is there already stays.
        planner: sets ``max_tokens`` where the request has no limit; None sets none. Its quantile is asked for.
        ageing, uncertainty: see ``priority_for``.
        feedback: tell the service how long the answers became (of requests with one answer).
        eos_counted: the backend counts the end-of-sequence token among ``completion_tokens``, as vLLM does.
    """

    def __init__(
        self,
        client: AsyncClient | str = "http://127.0.0.1:8000",
        *,
        backend: Backend | None = "litellm",
        planner: BudgetPlanner | None = None,
        ageing: float = 0.0,
        uncertainty: float = 0.0,
        feedback: bool = True,
        eos_counted: bool = True,
        timeout: float = 0.4,
    ) -> None:
        super().__init__()
        self.client = AsyncClient(client, max_retries=0) if isinstance(client, str) else client
        self.backend = backend
        self.planner = planner
        self.ageing = ageing
        self.uncertainty = uncertainty
        self.feedback = feedback
        self.eos_counted = eos_counted
        self.timeout = timeout
        self.errors: Counter[str] = Counter()
        self._quantiles = sorted({0.5, 0.9, 0.95, *([] if planner is None else [planner.quantile])})
        self._started = time.monotonic()

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """LiteLLM calls it before the request is routed; returns ``data``, changed in place."""
        text = _text(data) if call_type in PREDICTED else None
        if text is None:
            return data
        try:
            answer = await self.client.predict_length(
                text,
                quantiles=self._quantiles,
                deadline_ms=1e3 * self.timeout,
                timeout=self.timeout,
            )
            self._apply(data, answer.prediction)
        except LenVMClientError as error:
            self._count("predict", error)
        return data

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """LiteLLM calls it when an answer is complete, a streamed one too."""
        item = self._realised(kwargs, response_obj) if self.feedback else None
        if item is None:
            return
        try:
            answer = await self.client.feedback(item)
        except LenVMClientError as error:
            self._count("feedback", error)
        else:
            if not answer.accepted:
                self.errors["feedback: refused"] += 1

    def _apply(self, data: dict[str, Any], prediction: Prediction) -> None:
        fields: dict[str, Any] = {}
        if self.backend is not None:
            arrived = time.monotonic() - self._started
            fields = request_fields(
                self.backend, prediction, uncertainty=self.uncertainty, ageing=self.ageing, arrived=arrived
            )
        limit = None if self.planner is None else self.planner.max_tokens(prediction)
        # From here on nothing can fail: a request is changed as a whole or not at all.
        if self.backend == "litellm":
            data.setdefault("priority", fields["priority"])
        elif fields:
            body = data["extra_body"] = dict(data.get("extra_body") or {})
            for name, value in fields.items():
                body.setdefault(name, value)
        if limit is not None and data.get("max_tokens") is None and data.get("max_completion_tokens") is None:
            data["max_tokens"] = limit
        if prediction.prediction_id is not None:
            if data.get("metadata") is None:
                data["metadata"] = {}
            data["metadata"][METADATA_KEY] = prediction.prediction_id  # in place: others may hold the proxy's mapping

    def _realised(self, kwargs: Any, response: Any) -> FeedbackItem | None:
        metadata = (kwargs.get("litellm_params") or {}).get("metadata") or {}
        identity = metadata.get(METADATA_KEY)
        usage, choices = _get(response, "usage"), _get(response, "choices") or []
        tokens = None if usage is None else _get(usage, "completion_tokens")
        if identity is None or tokens is None or len(choices) != 1:
            return None
        reason = _get(choices[0], "finish_reason")
        if reason == "length":
            return FeedbackItem(prediction_id=identity, generated_tokens=tokens, finish_reason="length")
        if reason not in _STOPPED:
            return None  # cut by a filter: neither the model's own end nor a limit
        content = max(0, tokens - 1) if self.eos_counted else tokens
        return FeedbackItem(prediction_id=identity, generated_tokens=content, finish_reason="stop")

    def _count(self, what: str, error: LenVMClientError) -> None:
        name = f"{what}: {getattr(error, 'type', type(error).__name__)}"
        self.errors[name] += 1
        if self.errors[name] == 1:  # the counter has the rest: a service that is down must not fill the proxy's log
            logger.warning("%s failed, the request goes on without (%s)", what, error)


def _text(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The request's text as an input; None for what the service cannot read (images, several prompts, token ids)."""
    messages, prompt = data.get("messages"), data.get("prompt")
    if messages:
        plain = [{"role": message.get("role"), "content": message.get("content")} for message in messages]
        return {"messages": plain} if all(isinstance(message["content"], str) for message in plain) else None
    return {"prompt": prompt} if isinstance(prompt, str) and prompt else None


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
