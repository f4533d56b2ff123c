"""Trackers, bulk calls and batches against the service's own app and engine on the tiny model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from lenvm_client import AsyncClient
from lenvm_service.api import create_app
from lenvm_service.engine import Engine, EngineOptions
from lenvm_service.metrics import Metrics
from lenvm_service.settings import Settings
from tests.support.client_contract import (  # noqa: F401 - the tests
    Run,
    Use,
    test_a_text_prompt_can_be_followed_and_sent_again,
    test_progressive_predictions_are_those_of_the_whole_prefix,
    test_rows_batches_and_feedback,
    test_several_models_in_one_call,
)


@pytest.fixture
def replicas() -> int:
    return 1


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path) -> Iterator[Run]:
    """Calls a coroutine function with a client of the app."""
    metrics = Metrics()
    engine = Engine("tiny", tiny_checkpoint, EngineOptions(secret=b"k" * 16), metrics.engine("tiny"))
    engine.start()
    end = time.monotonic() + 60.0
    while engine.state == "loading":
        assert time.monotonic() < end, "the tiny model did not load"
        time.sleep(0.01)
    assert engine.failure is None

    def call(use: Use) -> None:
        async def main() -> None:
            transport = httpx2.ASGITransport(create_app({"tiny": engine}, Settings(), metrics))
            async with AsyncClient(transport=transport, max_retries=0, timeout=60.0) as client:
                await use(client)

        asyncio.run(main())

    yield call
    engine.close()
