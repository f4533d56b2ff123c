"""The parts of the Ray Serve deployment that need no Ray: its options, its config files, the proxy's answer for a lost
replica, and the drain."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from starlette.types import Receive, Scope, Send

from lenvm.errors import InvalidRequestError
from lenvm_client import AsyncClient, NotReadyError
from lenvm_service.api import create_app
from lenvm_service.metrics import Metrics
from lenvm_service.ray_serve import build, proxy_middlewares
from lenvm_service.ray_serve.proxy import LostReplicaMiddleware
from lenvm_service.ray_serve.replica import drained
from lenvm_service.settings import Settings
from tests.support.fake_engine import FakeEngine

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ray.md"
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"port": 1}, "http_options.port"),
        ({"host": "::"}, "http_options.host"),
        ({"api_workers": 2}, "num_replicas"),
        ({"redis": "x"}, "no option redis"),
        ({"batch_tokens": 0}, "batch-tokens"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(args: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(said)):
        build(args)


def test_the_config_holds_options_of_the_service_and_leaves_time_to_drain() -> None:
    (application,) = yaml.safe_load((DEPLOY / "ray" / "serve.yaml").read_text(encoding="utf-8"))["applications"]
    settings = Settings(**application["args"])
    assert application["args"].keys() <= Settings.model_fields.keys()
    (deployment,) = application["deployments"]
    assert deployment["graceful_shutdown_timeout_s"] > settings.drain_timeout_s + 5
    # The proxy holds back what is beyond this: the replica's own admission must come first.
    assert deployment["max_ongoing_requests"] > deployment["autoscaling_config"]["target_ongoing_requests"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"


def test_the_documented_names_are_those_of_the_code() -> None:
    text = DOCS.read_text(encoding="utf-8")
    (middlewares,) = re.findall(r"IMPORT_PATH=(\S+)", text)
    assert middlewares == f"{proxy_middlewares.__module__}:{proxy_middlewares.__name__}"
    assert [made.cls for made in proxy_middlewares()] == [LostReplicaMiddleware]
    for path in re.findall(r"\b((?:deploy|benchmarks)/\S+?\.(?:yaml|py))", text):
        assert (DEPLOY.parent / path).is_file(), path
    variables = set(re.findall(r"\bLENVM_([A-Z_]+)", text))
    assert variables == {"SECRET", "REDIS_URL"}
    assert {name.lower() for name in variables} <= Settings.model_fields.keys()


async def _dies(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve's proxy does where the replica died."""


async def _answers_twice_named(scope: Scope, receive: Receive, send: Send) -> None:
    given = dict(scope["headers"])[b"x-request-id"]
    headers = [(b"x-request-id", given), (b"X-Request-ID", given), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": b"no"})


def test_a_lost_replica_is_an_error_that_the_client_may_retry() -> None:
    async def main() -> None:
        transport = httpx2.ASGITransport(LostReplicaMiddleware(_dies))
        async with AsyncClient(transport=transport, max_retries=0) as client:
            with pytest.raises(NotReadyError) as caught:
                await client.predict_length("hi", request_id="mine")
        assert (caught.value.retryable, caught.value.request_id, caught.value.status) == (True, "mine", 503)

    asyncio.run(main())


def test_an_answer_passes_and_names_its_request_once() -> None:
    async def main() -> None:
        transport = httpx2.ASGITransport(LostReplicaMiddleware(_answers_twice_named))
        async with httpx2.AsyncClient(transport=transport, base_url="http://any") as client:
            answer = await client.get("/", headers={"x-request-id": "mine"})
            assert (answer.status_code, answer.text, answer.headers["x-request-id"]) == (500, "no", "mine")
            assert len((await client.get("/")).headers["x-request-id"]) == 32  # one of its own

    asyncio.run(main())


@pytest.mark.parametrize("patient", [True, False])
def test_the_drain_answers_what_is_in_flight_or_tells_it_to_come_again(patient: bool) -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.hold = asyncio.Event()
        app = create_app({"fake": engine}, Settings(), Metrics())
        service = app.state.service
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://any", timeout=60) as client:
            asked = asyncio.create_task(client.post("/predict_length", json={"prompt": "hi"}))
            while not engine.calls:
                await asyncio.sleep(0.01)
            drain = asyncio.create_task(drained(service, 60.0 if patient else 0.0))
            await asyncio.sleep(0)
            refused = await client.post("/predict_length", json={"prompt": "hi"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "draining")
            if patient:
                assert not drain.done()
                engine.hold.set()
            answer = await asked
            assert (answer.status_code, service.abandoned) == ((200, False) if patient else (503, True))
            await drain

    asyncio.run(main())
