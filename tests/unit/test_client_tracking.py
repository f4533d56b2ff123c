"""Running requests: trackers that send new tokens alone, bulk calls that never raise, callers that share a call."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from lenvm_client import (
    AsyncClient,
    Client,
    InvalidRequestError,
    MockRequest,
    MockTransport,
    OverloadedError,
    PayloadTooLargeError,
    PredictInput,
    Prediction,
    PredictionBatcher,
    PrefixUnknownError,
    RowError,
    ServiceTimeoutError,
    ServiceUnreachableError,
    predict_rows,
    predict_rows_async,
)

Run = Callable[[Callable[[Any], Any], MockTransport], Any]


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    """Calls a function (a generator, for the asynchronous client awaited step by step) with a client."""

    def call(use: Callable[[Any], Any], transport: MockTransport) -> Any:
        if request.param == "sync":
            with Client(transport=transport, max_retries=0) as client:
                return _drive(use(client))

        async def main() -> Any:
            async with AsyncClient(transport=transport, max_retries=0) as client:
                return await _drive_async(use(client))

        return asyncio.run(main())

    return call


def _drive(steps: Any) -> Any:
    """``x = yield call``: of the blocking client the call is its result."""
    value: Any = None
    try:
        while True:
            value = steps.send(value)
    except StopIteration as stop:
        return stop.value


async def _drive_async(steps: Any) -> Any:
    value: Any = None
    try:
        while True:
            wanted = steps.send(value)
            try:
                value = await wanted if inspect.isawaitable(wanted) else wanted
            except Exception as error:
                wanted = steps.throw(error)
                value = await wanted if inspect.isawaitable(wanted) else wanted
    except StopIteration as stop:
        return stop.value


def bodies(transport: MockTransport, path: str = "/predict_length") -> list[Any]:
    return [request.body for request in transport.requests if request.path == path]


def test_only_new_tokens_are_sent(run: Run) -> None:
    transport = MockTransport()

    def use(client: Any) -> Any:
        tracker = client.track({"token_ids": [1, 2]}, max_tokens=50, quantiles=[0.5], model="m")
        assert (tracker.prediction, tracker.generated, transport.requests) == (None, 0, [])
        first = yield tracker.update()
        second = yield tracker.update([7, 8])
        third = yield tracker.update([9])
        assert (tracker.prediction, tracker.generated) == (third, 3)
        (whole,) = (yield client.predict_length([{"token_ids": [1, 2, 7, 8, 9]}])).predictions
        assert whole.session == third.session
        return [first.session, second.session]

    sessions = run(use, transport)
    options = {"model": "m", "max_tokens": 50, "quantiles": [0.5]}
    assert bodies(transport)[:3] == [
        {"token_ids": [1, 2], **options},
        {"session": sessions[0], "append": [7, 8], "generated": 2, **options},
        {"session": sessions[1], "append": [9], "generated": 3, **options},
    ]


def test_a_prefix_may_hold_part_of_the_answer(run: Run) -> None:
    transport = MockTransport()

    def use(client: Any) -> Any:
        tracker = client.track(PredictInput(token_ids=[1, 2, 3], generated=1))
        yield tracker.update([4])
        return tracker.generated

    assert run(use, transport) == 2
    assert bodies(transport) == [{"token_ids": [1, 2, 3, 4], "generated": 2}]


@pytest.mark.parametrize("text", [{"prompt": "hi"}, {"messages": [{"role": "user", "content": "hi"}]}])
def test_a_lost_session_is_sent_whole_once(run: Run, text: dict[str, Any]) -> None:
    lost = [False]

    def answer(request: MockRequest) -> Any:
        if request.path == "/predict_length" and "session" in request.body and lost[0]:
            return PrefixUnknownError("gone", status=404)
        return None

    transport = MockTransport(answer)

    def use(client: Any) -> Any:
        tracker = client.track(text, model="m")
        yield tracker.update()
        yield tracker.update([7])
        lost[0] = True
        again = yield tracker.update([8])
        lost[0] = False
        more = yield tracker.update([9])
        return again, more

    again, more = run(use, transport)
    assert isinstance(again, Prediction)
    ids = list(b"hi")  # the mock's tokens are bytes
    assert bodies(transport, "/tokenize") == [{**text, "model": "m"}]
    assert bodies(transport)[-2:] == [
        {"token_ids": [*ids, 7, 8], "generated": 2, "model": "m"},
        {"session": again.session, "append": [9], "generated": 3, "model": "m"},
    ]
    assert more.session != again.session


def test_what_cannot_be_sent_whole_raises(run: Run) -> None:
    transport = MockTransport({"/predict_length": PrefixUnknownError("gone", status=404)})

    def use(client: Any) -> Any:
        tracker = client.track({"session": "s", "append": [1]})
        with pytest.raises(PrefixUnknownError):
            yield tracker.update([2])

    run(use, transport)
    assert bodies(transport) == [{"session": "s", "append": [1, 2], "generated": 1}]
    with pytest.raises(InvalidRequestError, match="one tracker follows one request"):
        Client(transport=transport).track(["a", "b"])  # type: ignore[arg-type]


def test_a_failed_update_loses_no_tokens(run: Run) -> None:
    failures = [None, OverloadedError("full"), None]
    transport = MockTransport(lambda request: failures.pop(0))

    def use(client: Any) -> Any:
        tracker = client.track({"token_ids": [1]})
        yield tracker.update()
        with pytest.raises(OverloadedError):
            yield tracker.update([5])
        yield tracker.update([6])

    run(use, transport)
    assert [body.get("append") for body in bodies(transport)] == [None, [5], [5, 6]]


# ---------------------------------------------------------------------------------------------------------------------
def bulk(kind: str, transport: MockTransport, inputs: Any, **options: Any) -> list[Prediction | RowError]:
    if kind == "sync":
        with Client(transport=transport, max_retries=0) as client:
            return predict_rows(client, inputs, **options)

    async def main() -> list[Prediction | RowError]:
        async with AsyncClient(transport=transport, max_retries=0) as client:
            return await predict_rows_async(client, inputs, **options)

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_rows_in_bulk_are_aligned_whatever_fails(kind: str) -> None:
    def answer(request: MockRequest) -> Any:
        prompts = [row["prompt"] for row in request.body["inputs"]]
        if "down" in prompts:
            return ServiceUnreachableError("no route")
        if "full" in prompts:
            return OverloadedError("full", retry_after_s=2.0)
        if "slow" in prompts:
            return ServiceTimeoutError("too slow")
        return None

    transport = MockTransport(answer)
    bad = {"prompt": "x", "generated": float("nan")}
    inputs = ["a", bad, "b", "full", "c", "d", "e", "down", "slow"]
    rows = bulk(kind, transport, inputs, max_rows=2, budget_s=None, quantiles=[0.5])
    assert [row.index for row in rows] == list(range(9))
    kinds = [row.type if isinstance(row, RowError) else "ok" for row in rows]
    # Calls: a b | full c | d e | down slow
    wanted = ["ok", "invalid_request", "ok", "overloaded", "overloaded", "ok", "ok", "unreachable", "unreachable"]
    assert kinds == wanted
    assert isinstance(rows[4], RowError)
    assert (rows[4].retryable, rows[4].retry_after_ms) == (True, 2000.0)
    assert isinstance(rows[1], RowError)
    assert rows[1].code == "non_finite"
    assert all(body["quantiles"] == [0.5] and "deadline_ms" not in body for body in bodies(transport))
    (slow,) = bulk(kind, transport, ["slow"], budget_s=None)
    assert isinstance(slow, RowError)
    assert slow.type == "timeout"
    assert bulk(kind, transport, []) == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_row_error_keeps_its_place(kind: str) -> None:
    def answer(request: MockRequest) -> Any:
        error = {"index": 0, "error": {"type": "context_too_long", "message": "long", "retryable": False}}
        good = {"index": 1, "prompt_tokens": 1, "cached_tokens": 0, "value": -0.1, "horizon": 5.0, "rank_key": 5.0}
        return {"model": "m", "predictions": [error, good]}

    rows = bulk(kind, MockTransport(answer), ["a", "b", "c", "d"], max_rows=2, budget_s=None)
    assert [(type(row), row.index) for row in rows] == [(RowError, 0), (Prediction, 1), (RowError, 2), (Prediction, 3)]


def test_the_budget_bounds_all_calls() -> None:
    transport = MockTransport()
    rows = bulk("sync", transport, ["a"] * 4, max_rows=2, budget_s=1e-9)
    assert [row.type for row in rows if isinstance(row, RowError)] == ["timeout"] * 4
    assert transport.requests == []
    bulk("sync", transport, ["a"], budget_s=60.0)
    (body,) = bodies(transport)
    assert 0.0 < body["deadline_ms"] <= 60_000.0

    class Silent(MockTransport):
        async def handle_async_request(self, request: Any) -> Any:
            await asyncio.Event().wait()

    (late,) = bulk("async", Silent(), ["a"], budget_s=0.05)
    assert isinstance(late, RowError)
    assert late.type == "timeout"


# ---------------------------------------------------------------------------------------------------------------------
def batched(transport: MockTransport, use: Callable[[PredictionBatcher], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with (
            AsyncClient(transport=transport, max_retries=0) as client,
            PredictionBatcher(client, **options) as batcher,
        ):
            return await use(batcher)

    return asyncio.run(main())


def together(*inputs: Any) -> Callable[[PredictionBatcher], Any]:
    async def use(batcher: PredictionBatcher) -> Any:
        return await asyncio.gather(*map(batcher.predict, inputs), return_exceptions=True)

    return use


def test_concurrent_callers_share_a_call() -> None:
    transport = MockTransport()
    found = batched(transport, together("a", {"token_ids": [1]}, PredictInput(prompt="c")), quantiles=[0.5])
    (body,) = bodies(transport)
    assert body["quantiles"] == [0.5]
    assert [next(iter(row)) for row in body["inputs"]] == ["prompt", "token_ids", "prompt"]
    assert [row.prompt_tokens for row in found] == [1, 1, 1]
    assert len({row.session for row in found}) == 3


def test_a_full_batch_does_not_wait() -> None:
    transport = MockTransport()
    batched(transport, together(*"abcdefg"), max_rows=3, window_s=0.01)
    assert [len(body["inputs"]) for body in bodies(transport)] == [3, 3, 1]

    async def two(batcher: PredictionBatcher) -> Any:
        return await asyncio.gather(batcher.predict("a"), batcher.predict("b"))

    assert len(batched(MockTransport(), two, max_rows=2, window_s=3600.0)) == 2  # the window never ends


def test_each_caller_gets_its_own_error() -> None:
    def answer(request: MockRequest) -> Any:
        if any(row.get("prompt") == "down" for row in request.body["inputs"]):
            return OverloadedError("full")
        return None

    bad = {"prompt": "x", "generated": float("inf")}
    transport = MockTransport(answer)
    good, refused, several = batched(transport, together("a", bad, ["b", "c"]))
    assert isinstance(good, Prediction)
    assert isinstance(refused, InvalidRequestError)
    assert isinstance(several, InvalidRequestError)
    first, second = batched(transport, together("a", "down"))
    assert type(first) is type(second) is OverloadedError
    assert first is not second
    assert (first.type, first.retryable) == ("overloaded", True)


def test_a_row_error_is_raised_to_its_caller_alone() -> None:
    def answer(request: MockRequest) -> Any:
        rows: list[Any] = [
            {"index": at, "prompt_tokens": 1, "cached_tokens": 0, "value": -0.1, "horizon": 5.0, "rank_key": 5.0}
            for at in range(len(request.body["inputs"]))
        ]
        rows[1] = {"index": 1, "error": {"type": "prefix_unknown", "message": "gone"}}
        return {"model": "m", "predictions": rows}

    found = batched(MockTransport(answer), together("a", "b", "c"))
    assert [type(row) for row in found] == [Prediction, PrefixUnknownError, Prediction]


def test_too_large_a_body_is_halved() -> None:
    def answer(request: MockRequest) -> Any:
        rows = request.body["inputs"]
        too_large = len(rows) > 2 or any(row["prompt"] == "huge" for row in rows)
        return PayloadTooLargeError("too large") if too_large else None

    found = batched(MockTransport(answer), together("a", "b", "huge", "c", "d"))
    kinds = [type(row) for row in found]
    assert kinds == [Prediction, Prediction, PayloadTooLargeError, Prediction, Prediction]


def test_a_caller_that_gives_up_takes_its_row_along() -> None:
    transport = MockTransport()

    async def use(batcher: PredictionBatcher) -> Any:
        gone = asyncio.create_task(batcher.predict("gone"))
        stays = asyncio.create_task(batcher.predict("stays"))
        await asyncio.sleep(0)
        gone.cancel()
        await batcher.close()
        return await stays

    assert isinstance(batched(transport, use, window_s=3600.0), Prediction)
    assert bodies(transport) == [{"inputs": [{"prompt": "stays"}]}]


def test_closing_sends_what_waits() -> None:
    transport = MockTransport()

    async def use(batcher: PredictionBatcher) -> Any:
        task = asyncio.create_task(batcher.predict("a"))
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(InvalidRequestError, match="closed"):
            await batcher.predict("b")
        return await task

    assert isinstance(batched(transport, use, window_s=3600.0), Prediction)
    assert len(transport.requests) == 1
    for bad in ({"max_rows": 0}, {"window_s": -1.0}):
        with pytest.raises(InvalidRequestError):
            PredictionBatcher(None, **bad)  # type: ignore[arg-type]
