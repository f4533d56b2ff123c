"""What the client's calls must do against the service's own engine on the tiny model, whatever stands in between: the
application itself, or Ray Serve with replicas. A test module imports these tests, and has two fixtures for them:
``run`` calls a coroutine function with a client, ``replicas`` is how many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import pytest

from lenvm_client import (
    AsyncClient,
    BudgetPlanner,
    FeedbackItem,
    ModelPredictions,
    Prediction,
    PredictionBatcher,
    Route,
    RowError,
    compare_routes_async,
    predict_rows_async,
    priority_for,
)

Use: TypeAlias = Callable[[AsyncClient], Coroutine[Any, Any, None]]
Run: TypeAlias = Callable[[Use], None]
PROMPT, ANSWER = [1, 30, 31, 32], [40, 41, 42, 43, 44, 45]


def close(a: Prediction, b: Prediction) -> bool:
    return a.session == b.session and a.value == pytest.approx(b.value, abs=2e-5) and a.quantiles == b.quantiles


def test_progressive_predictions_are_those_of_the_whole_prefix(run: Run, replicas: int) -> None:
    async def use(client: AsyncClient) -> None:
        tracker = client.track({"token_ids": PROMPT}, max_tokens=20)
        told = [await tracker.update(), await tracker.update(ANSWER[:1]), await tracker.update(ANSWER[1:])]
        for prediction, generated in zip(told, (0, 1, 6), strict=True):
            row = {"token_ids": [*PROMPT, *ANSWER[:generated]], "generated": generated}
            whole = (await client.predict_length(row, max_tokens=20)).prediction
            assert close(prediction, whole)
            assert prediction.p_exceeds_max_tokens == pytest.approx(whole.p_exceeds_max_tokens, abs=1e-4)
        assert told[2].cached_tokens > 0 or replicas > 1  # fewer tokens than a shared block
        assert close(await tracker.update(), told[2])  # nothing new: the same again
        # A handle that the service does not know: the whole prefix goes once more, without the caller's help.
        tracker._session = "gone"
        assert close(await tracker.update(), told[2])

    run(use)


def test_a_text_prompt_can_be_followed_and_sent_again(run: Run) -> None:
    async def use(client: AsyncClient) -> None:
        tracker = client.track("abc")
        await tracker.update()
        following = await tracker.update([40])
        tracker._session = "gone"
        assert close(await tracker.update(), following)

    run(use)


def test_several_models_in_one_call(run: Run) -> None:
    async def use(client: AsyncClient) -> None:
        alone = (await client.predict_length("ab")).prediction
        both = await client.predict_length(["ab", ""], models=["nobody", "tiny"])
        missing, found = both.results
        assert isinstance(missing, RowError)
        assert (missing.type, missing.param) == ("model_not_found", "models[0]")
        assert isinstance(found, ModelPredictions)
        assert isinstance(found.predictions[0], Prediction)
        assert close(found.predictions[0], alone)
        assert isinstance(found.predictions[1], RowError)
        routes = [Route(model="tiny", planner=BudgetPlanner(output_price=1e6)), Route(model="nobody")]
        known, unknown = await compare_routes_async(client, "ab", routes, budget_s=None)
        assert known.cost is not None
        assert known.cost.high == alone.quantiles["0.95"]  # type: ignore[index]
        assert (unknown.cost, isinstance(unknown.row, RowError)) == (None, True)

    run(use)


def test_rows_batches_and_feedback(run: Run, replicas: int) -> None:
    async def use(client: AsyncClient) -> None:
        inputs: list[Any] = ["ab", {"token_ids": [99_999]}, {"token_ids": PROMPT}, {"session": "no"}]
        rows = await predict_rows_async(client, inputs, budget_s=None, max_rows=3)
        assert [row.type if isinstance(row, RowError) else "ok" for row in rows] == [
            "ok",
            "invalid_request",
            "ok",
            "prefix_unknown",
        ]
        async with PredictionBatcher(client) as batcher:
            found = await asyncio.gather(batcher.predict("ab"), batcher.predict({"token_ids": PROMPT}))
        for row, again in zip((rows[0], rows[2]), found, strict=True):
            assert isinstance(row, Prediction)
            assert close(row, again)
            assert priority_for("vllm", again) == again.quantiles["0.5"]  # type: ignore[index]
            assert BudgetPlanner().max_tokens(again) == again.quantiles["0.95"]  # type: ignore[index]
            for _ in range(24 * (replicas - 1)):  # a prediction is remembered where it was made: let that be everywhere
                await client.predict_length(inputs[0] if row is rows[0] else inputs[2])
            item = FeedbackItem(prediction_id=again.prediction_id, generated_tokens=3, finish_reason="stop")
            assert (await client.feedback(item)).accepted == 1

    run(use)
