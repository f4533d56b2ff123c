"""The LiteLLM hook: on the real package where it is installed, else on a base class of the published signatures."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lenvm_client import AsyncClient, BudgetPlanner, MockRequest, MockTransport, NotReadyError, OverloadedError

pytestmark = pytest.mark.filterwarnings("default")  # litellm's own
INSTALLED = importlib.util.find_spec("litellm") is not None
MESSAGES = [{"role": "user", "content": "Why?"}]


class CustomLogger:
    """What the hook builds on, as litellm 1.110 publishes it."""

    def __init__(self, turn_off_message_logging: bool = False, message_logging: bool = True, **kwargs: Any) -> None:
        self.message_logging = message_logging

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> Any:
        pass

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        pass


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The hook's module, on the real package or on the stand-in."""
    if not INSTALLED:
        parts = {
            "litellm": {},
            "litellm.integrations": {},
            "litellm.integrations.custom_logger": vars(sys.modules[__name__]),
        }
        for name, members in parts.items():
            module = ModuleType(name)
            vars(module).update({key: members[key] for key in members.keys() & {"CustomLogger"}})
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lenvm_client.drivers.litellm", raising=False)
    yield importlib.import_module("lenvm_client.drivers.litellm")
    sys.modules.pop("lenvm_client.drivers.litellm", None)


def before(hook: Any, call_type: str = "acompletion", **data: Any) -> dict[str, Any]:
    changed: dict[str, Any] = asyncio.run(hook.async_pre_call_hook(None, None, {"model": "m", **data}, call_type))
    return changed


def after(
    hook: Any, reason: str = "stop", tokens: int | None = 9, answers: int = 1, identity: str | None = "p"
) -> None:
    metadata = {} if identity is None else {"lenvm_prediction_id": identity}
    usage = None if tokens is None else SimpleNamespace(completion_tokens=tokens)
    response = SimpleNamespace(usage=usage, choices=[SimpleNamespace(finish_reason=reason)] * answers)
    asyncio.run(hook.async_log_success_event({"litellm_params": {"metadata": metadata}}, response, None, None))


def made(hooks: ModuleType, routes: Any = None, **options: Any) -> tuple[Any, MockTransport]:
    transport = MockTransport(routes)
    return hooks.LenVMHook(AsyncClient(transport=transport, max_retries=0), **options), transport


def test_the_methods_have_the_published_parameters(hooks: ModuleType) -> None:
    base = hooks.LenVMHook.__mro__[1]
    for name in ("async_pre_call_hook", "async_log_success_event"):
        ours, theirs = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (hooks.LenVMHook, base))
        assert ours == theirs
        assert inspect.iscoroutinefunction(getattr(hooks.LenVMHook, name))


def test_a_request_gets_priority_limit_and_id(hooks: ModuleType) -> None:
    hook, transport = made(hooks, planner=BudgetPlanner(quantile=0.8))
    data = before(hook, messages=MESSAGES, metadata={"mine": 1})
    (sent,) = transport.requests
    assert sent.body["messages"] == MESSAGES
    assert sent.body["quantiles"] == [0.5, 0.8, 0.9, 0.95]
    assert sent.body["deadline_ms"] == 400.0
    identity = data.pop("metadata")
    assert identity.pop("mine") == 1
    assert list(identity) == ["lenvm_prediction_id"]
    assert data == {"model": "m", "messages": MESSAGES, "priority": 100, "max_tokens": 100}


def test_what_the_caller_set_stays(hooks: ModuleType) -> None:
    hook, _ = made(hooks, planner=BudgetPlanner())
    data = before(hook, prompt="Why?", priority=3, max_completion_tokens=7)
    assert (data["priority"], data.get("max_tokens")) == (3, None)
    assert before(hook, prompt="Why?", max_tokens=7)["max_tokens"] == 7
    assert "priority" not in before(made(hooks, backend=None)[0], prompt="Why?")


def test_another_backend_reads_its_field_in_the_body(hooks: ModuleType) -> None:
    for backend, fields in (
        ("vllm", {"priority": 100}),
        ("sglang", {"priority": -100}),
        ("dynamo", {"nvext": {"agent_hints": {"priority": 2**30 - 100, "osl": 100}}}),
    ):
        data = before(made(hooks, backend=backend)[0], messages=MESSAGES, extra_body={"top_k": 5})
        assert data["extra_body"] == {"top_k": 5, **fields}
        assert "priority" not in data


def test_later_requests_wait_where_ageing_is_on(hooks: ModuleType) -> None:
    hook, _ = made(hooks, ageing=1000.0)
    hook._started -= 10.0
    assert before(hook, messages=MESSAGES)["priority"] >= 100 + 10_000


@pytest.mark.parametrize(
    ("call_type", "data"),
    [
        ("aembedding", {"input": "a"}),
        ("acompletion", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("atext_completion", {"prompt": ["a", "b"]}),
        ("acompletion", {}),
    ],
)
def test_what_cannot_be_predicted_goes_through(hooks: ModuleType, call_type: str, data: dict[str, Any]) -> None:
    hook, transport = made(hooks)
    assert before(hook, call_type, **data) == {"model": "m", **data}
    assert transport.requests == []


def test_a_failing_service_fails_no_request(hooks: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    hook, _ = made(hooks, {"/predict_length": OverloadedError("full"), "/feedback": NotReadyError("loading")})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert before(hook, messages=MESSAGES) == {"model": "m", "messages": MESSAGES}
        after(hook)
    assert hook.errors == {"predict: overloaded": 3, "feedback: not_ready": 1}
    assert len(caplog.records) == 2  # the first of each kind

    def no_quantiles(request: MockRequest) -> Any:
        row = {"index": 0, "prompt_tokens": 1, "cached_tokens": 0, "value": -0.1, "horizon": 5.0, "rank_key": 5.0}
        return {"model": "m", "predictions": [row]}

    hook, _ = made(hooks, no_quantiles, planner=BudgetPlanner())
    assert before(hook, messages=MESSAGES) == {"model": "m", "messages": MESSAGES}  # as a whole or not at all
    assert hook.errors == {"predict: invalid_request": 1}


def test_realised_lengths_are_fed_back(hooks: ModuleType) -> None:
    hook, transport = made(hooks)
    after(hook)
    after(hook, "tool_calls")
    after(hook, "length")
    hook.eos_counted = False
    after(hook)
    items = [request.body["items"][0] for request in transport.requests]
    assert [(item["generated_tokens"], item["finish_reason"]) for item in items] == [
        (8, "stop"),
        (8, "stop"),
        (9, "length"),
        (9, "stop"),
    ]
    assert {item["prediction_id"] for item in items} == {"p"}
    for options in ({"reason": "content_filter"}, {"answers": 2}, {"identity": None}, {"tokens": None}):
        after(hook, **options)
    hook.feedback = False
    after(hook)
    assert len(transport.requests) == 4
    refusing = {"accepted": 0, "results": [{"index": 0, "error": {"type": "prefix_unknown", "message": "gone"}}]}
    hook, _ = made(hooks, {"/feedback": refusing})
    after(hook)
    assert hook.errors == {"feedback: refused": 1}


@pytest.mark.skipif(
    not INSTALLED, reason="litellm is not installed (pip install litellm==1.110.2, best in its own venv)"
)
def test_through_the_real_router(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = importlib.import_module("litellm")
    hook, transport = made(hooks, planner=BudgetPlanner())

    async def run() -> None:
        # httpx2 connections and litellm's workers belong to this event loop.
        monkeypatch.setattr(litellm, "callbacks", [hook])
        parameters = {"model": "openai/x", "api_key": "k", "mock_response": "one two three"}
        router = litellm.Router(model_list=[{"model_name": "m", "litellm_params": parameters}])
        for stream in (False, True):
            data = await hook.async_pre_call_hook(None, None, {"model": "m", "messages": MESSAGES}, "acompletion")
            answer = await router.acompletion(**data, stream=stream)
            if stream:
                async for _ in answer:
                    pass
        for _ in range(600):  # logged in the background
            if sum(request.path == "/feedback" for request in transport.requests) == 2:
                break
            await asyncio.sleep(0.1)

    asyncio.run(run())
    items = [request.body["items"][0] for request in transport.requests if request.path == "/feedback"]
    assert len(items) == 2
    assert all(item["prediction_id"].startswith("s-mock-") and item["finish_reason"] == "stop" for item in items)
    assert not hook.errors
