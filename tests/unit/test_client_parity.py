"""Blocking and asynchronous, one SDK: the same names, arguments, documents and requests."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import lenvm_client
from lenvm_client import (
    AsyncClient,
    AsyncGuidedDecoder,
    AsyncTracker,
    CandidateInput,
    Client,
    FeedbackItem,
    GuidedDecoder,
    GuidedRow,
    InvalidRequestError,
    MockTransport,
    Tracker,
    compare_routes,
    compare_routes_async,
    predict_rows,
    predict_rows_async,
)

PAIRS = [(Client, AsyncClient), (GuidedDecoder, AsyncGuidedDecoder), (Tracker, AsyncTracker)]
IDS = [first.__name__ for first, _ in PAIRS]
NO_IO = {"track", "report", "start", "generated"}

# Every call of a client once, all of its arguments given. A method that is missing here fails a test.
COMMON: dict[str, Any] = {"timeout": 3.0, "headers": {"TraceParent": "00-4bf9-00f0-01", "tracestate": "a=b"}}
WORK: dict[str, Any] = {"model": "m", "generator": "g", "deadline_ms": 9.0, "priority": 1, "request_id": "r"}
ROW = CandidateInput(token_ids=[1], candidates=[2])
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "predict_length": (("p",), {**WORK, "models": None, "max_tokens": 5, "quantiles": [0.5]}),
    "score": (("p",), {**WORK, "completion": "c", "completion_ids": None, "eos": True}),
    "score_candidates": (([ROW],), WORK),
    "tokenize": (("p",), {"messages": None, "model": "m", "request_id": "r"}),
    "detokenize": (([1],), {"model": "m", "request_id": "r"}),
    "feedback": (
        (FeedbackItem(prediction_id="s", generated_tokens=1, finish_reason="stop"),),
        {"model": "m", "request_id": "r"},
    ),
    "models": ((), {"request_id": "r"}),
    "info": ((), {"request_id": "r"}),
    "live": ((), {}),
    "ready": ((), {}),
}


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def shape(function: Callable[..., Any]) -> tuple[Any, ...]:
    """A signature with the names of asynchronous parts as those of blocking ones."""
    signature = inspect.signature(function)
    parameters = [(p.name, p.kind, p.default, _plain(p.annotation)) for p in signature.parameters.values()]
    return (parameters, _plain(signature.return_annotation))


def _plain(annotation: Any) -> str:
    return str(annotation).replace("Async", "")


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS, ids=IDS)
def test_names_signatures_and_documents(blocking: type, asynchronous: type) -> None:
    assert public(blocking) == public(asynchronous)
    ours, theirs = (list(inspect.signature(kind).parameters.values()) for kind in (blocking, asynchronous))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    assert blocking.__doc__
    assert f"``{blocking.__name__}``" in (asynchronous.__doc__ or "")
    for name in public(blocking):
        ours, theirs = getattr(blocking, name), getattr(asynchronous, name)
        assert inspect.getdoc(ours), name
        assert inspect.getdoc(theirs), name
        if not callable(ours):
            continue
        assert shape(ours) == shape(theirs), name
        assert not inspect.iscoroutinefunction(ours)
        assert inspect.iscoroutinefunction(theirs) == (name not in NO_IO), name
        if theirs is not ours and name != "close":
            assert inspect.getdoc(theirs) == f"See ``{blocking.__name__}.{name}``."


def test_the_functions_too() -> None:
    for blocking, asynchronous in ((predict_rows, predict_rows_async), (compare_routes, compare_routes_async)):
        assert shape(blocking) == shape(asynchronous)
        assert f"``{blocking.__name__}`` over an ``AsyncClient``" in (asynchronous.__doc__ or "")


@pytest.mark.parametrize("name", sorted(public(Client) - {"close", "track"}))
def test_both_send_the_same(name: str) -> None:
    arguments, options = CALLS[name]
    options = {**options, **COMMON}
    given = {p.name for p in inspect.signature(getattr(Client, name)).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert given == set(options) - {"messages"} | (given & {"messages"})  # every argument is exercised
    ours, theirs = MockTransport(), MockTransport()
    with Client(transport=ours) as client:
        answer = getattr(client, name)(*arguments, **options)

    async def run() -> Any:
        async with AsyncClient(transport=theirs) as client:
            return await getattr(client, name)(*arguments, **options)

    assert asyncio.run(run()) == answer
    assert [(r.method, r.path, r.body, r.headers) for r in ours.requests] == [
        (r.method, r.path, r.body, r.headers) for r in theirs.requests
    ]
    (sent,) = ours.requests
    assert sent.headers["traceparent"] == "00-4bf9-00f0-01"
    assert sent.headers["tracestate"] == "a=b"
    if "request_id" in options:
        assert sent.headers["x-request-id"] == "r"


def test_headers_of_a_call_replace_those_of_the_client_and_are_checked() -> None:
    transport = MockTransport()
    client = Client(transport=transport, headers={"X-Tenant": "a", "traceparent": "old"}, api_key="key")
    client.live(headers={"TRACEPARENT": "new"})
    client.live()
    first, second = (request.headers for request in transport.requests)
    assert (first["traceparent"], second["traceparent"]) == ("new", "old")
    assert first["x-tenant"] == second["x-tenant"] == "a"
    assert first["authorization"] == "Bearer key"
    for bad in ({"a": "line\nbreak"}, {"na\u00efve": "b"}, {"a": " b"}):
        with pytest.raises(InvalidRequestError):
            client.live(headers=bad)
    assert len(transport.requests) == 2


def test_a_guided_step_is_the_same_awaited() -> None:
    row = GuidedRow(prefix=[1, 2], candidates=[3, 4], logprobs=[-1.0, -0.5], objective={"kind": "tilt", "lambda": 0.1})
    blocking = GuidedDecoder(Client(transport=MockTransport()), [2]).step([row])

    async def run() -> Any:
        async with AsyncClient(transport=MockTransport()) as client:
            return await AsyncGuidedDecoder(client, [2]).step([row])

    assert asyncio.run(run()) == blocking


def test_importing_is_light() -> None:
    """What ``benchmarks/import_cost.py`` measures, as far as a test can tell without a clock: nothing heavy comes
    along, not even when every public name is used."""
    names = [name for name in lenvm_client.__all__ if name != "__version__"]
    code = (
        "import sys, httpx2; before = set(sys.modules); import lenvm_client\n"
        "first = set(sys.modules) - before\n"
        f"for name in {names!r}: getattr(lenvm_client, name)\n"
        "print(sorted({m.partition('.')[0] for m in first}))\n"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    first, everything = done.stdout.splitlines()
    assert first == everything == "['lenvm_client']"
