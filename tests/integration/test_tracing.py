"""Traces of a real ``lenvm serve``, as a collector receives them: from the caller's span to the forward."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lenvm_client import Client
from tests.integration.conftest import start_service
from tests.support.otlp_collector import Span, collector
from tests.support.redis_server import RedisServer

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize("api_workers", ["1", "2"])
def test_a_request_is_one_connected_trace(tiny_checkpoint: Path, tmp_path: Path, api_workers: str) -> None:
    redis = RedisServer(tmp_path / "redis").start()
    with collector() as found:
        arguments = ["--model", str(tiny_checkpoint), "--redis-url", redis.url, "--redis-lookup-ms", "5000"]
        arguments += ["--api-workers", api_workers]
        service = start_service(tmp_path, *arguments, "--otel-endpoint", found.url)
        try:
            with Client(service.url, timeout=60) as client:
                headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
                client.predict_length("a question of some length", headers=headers)
            texts = [f"{at} together" for at in range(24)]
            with ThreadPoolExecutor(8) as pool, Client(service.url, timeout=60) as client:
                list(pool.map(lambda text: client.predict_length(text), texts))
        finally:
            assert service.stop() == 0  # sends what waits
            redis.kill()
        spans = list(found.spans)
    _is_connected([span for span in spans if span.trace == TRACE])
    _batches_are_linked(spans)


def _is_connected(spans: list[Span]) -> None:
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans)
    request = by_name["POST /predict_length"]
    assert (request.parent, request.service) == (CALLER, "lenvm")
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/predict_length"
    assert {name: span.parent for name, span in by_name.items() if span is not request} == {
        "tokenize": request.id,
        "redis lookup": request.id,
        "queue": request.id,
        "inference": request.id,
        "batch": request.id,
        "forward": by_name["batch"].id,
    }
    assert by_name["inference"].links == (by_name["batch"].id,)
    order = ["tokenize", "redis lookup", "queue", "forward"]
    assert sorted(order, key=lambda name: by_name[name].begin) == order
    inside = [span for span in spans if request.begin <= span.begin <= span.end]
    assert len(inside) == len(spans)


def _batches_are_linked(spans: list[Span]) -> None:
    """Every request of the load knows its batch, and every batch its requests; probes leave no trace."""
    requests = {span.id for span in spans if span.name == "POST /predict_length"}
    assert len(requests) == 25
    batches = [span for span in spans if span.name == "batch"]
    told = [request for batch in batches for request in (batch.parent, *batch.links)]
    assert sorted(told) == sorted(requests)
    assert sum(span.attributes["rows"] for span in batches) == 25
    works = [span for span in spans if span.name == "inference"]
    assert {span.parent for span in works} == requests
    of_batch = {request: batch.id for batch in batches for request in (batch.parent, *batch.links)}
    assert all(span.links == (of_batch[span.parent],) for span in works)
    assert not [span.name for span in spans if "health" in span.name]
