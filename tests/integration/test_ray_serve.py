"""The service on Ray Serve: two replicas and one Redis, as ``deploy/ray/serve.yaml`` runs them, on the tiny model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from lenvm_client import AsyncClient, Client, PredictInput, Prediction
from tests.support.client_contract import (  # noqa: F401 - the tests
    Run,
    Use,
    test_a_text_prompt_can_be_followed_and_sent_again,
    test_progressive_predictions_are_those_of_the_whole_prefix,
    test_rows_batches_and_feedback,
    test_several_models_in_one_call,
)
from tests.support.deploy_tools import find_tool
from tests.support.ray_cluster import ROOT, RayCluster, serve_config
from tests.support.redis_server import RedisServer, free_port

# Fractions of a core: the machine may have two, and a replica that takes another's place overlaps with it.
REPLICA = {"ray_actor_options": {"num_cpus": 0.5}, "health_check_period_s": 1}


class Served:
    """A node of Ray, a Redis, and the application with two replicas."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.redis = RedisServer(folder / "redis").start()
        environment = {
            "LENVM_SECRET": "0123456789abcdef",
            "LENVM_REDIS_URL": self.redis.url,
            # The budget is long: on a busy machine a late answer would make a hit a miss now and then.
            "LENVM_REDIS_LOOKUP_MS": "5000",
        }
        self.cluster = RayCluster(folder, environment=environment)
        self.port = free_port()
        self.args = {"model": [f"tiny={checkpoint}"], "cache_tokens": 4096}
        self.url = self.scale(2)

    def scale(self, replicas: int) -> str:
        """Deploy with so many replicas, and wait until it has them."""
        url = self.cluster.deploy(serve_config(self.port, self.args, num_replicas=replicas, **REPLICA))
        self.cluster.wait(lambda: len(self.ready()) == replicas, f"{replicas} replicas are ready")
        return url

    def ready(self) -> set[str]:
        """Replicas that say so: of those whose processes run."""
        found = {labels["replica"] for labels, value in self.cluster.samples("ray_lenvm_engine_ready") if value == 1}
        return found if len(self.cluster.replicas()) == len(found) else set()

    def close(self) -> None:
        self.cluster.close()
        self.redis.kill()


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("ray"), tiny_checkpoint)
    yield served
    served.close()


@pytest.fixture(scope="module")
def run(served: Served) -> Run:
    def call(use: Use) -> None:
        async def main() -> None:
            async with AsyncClient(served.url, max_retries=0, timeout=60.0) as client:
                await use(client)

        asyncio.run(main())

    return call


@pytest.fixture
def replicas() -> int:
    return 2


def test_every_replica_says_what_it_measures(served: Served) -> None:
    samples = served.cluster.samples("ray_lenvm_engine_ready")
    assert {(one["application"], one["deployment"], one["model"]) for one, _ in samples} == {("lenvm", "LenVM", "tiny")}
    assert len({one["replica"] for one, _ in samples}) == 2


def test_prometheus_finds_every_replica_under_our_own_names(
    served: Served, tmp_path: Path, real_parts_required: bool
) -> None:
    config = yaml.safe_load((ROOT / "deploy" / "ray" / "prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    # Ray writes such a file where its dashboard runs.
    (listed,) = job["file_sd_configs"]
    listed["files"] = [str(tmp_path / Path(listed["files"][0]).name)]
    target = f"127.0.0.1:{served.cluster.metrics_port}"
    Path(listed["files"][0]).write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [target]}]))
    config["global"] = {"scrape_interval": "1s"}
    config["rule_files"] = []
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    command = [find_tool("prometheus", required=real_parts_required), f"--config.file={tmp_path / 'prometheus.yaml'}"]
    command += [f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={url}"]
    with (tmp_path / "log").open("wb") as log:
        prometheus = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def found() -> list[dict[str, str]]:
        query = {"query": 'lenvm_engine_ready{job="lenvm"} == 1'}
        try:
            answer = httpx2.get(f"http://{url}/api/v1/query", params=query, timeout=10).raise_for_status()
        except httpx2.HTTPError:
            return []
        return [one["metric"] for one in answer.json()["data"]["result"]]

    try:
        served.cluster.wait(lambda: len(found()) == 2, "Prometheus has both replicas")
        names = {"__name__", "application", "deployment", "instance", "job", "model", "replica"}
        assert [set(one) for one in found()] == [names, names]
        assert {one["instance"] for one in found()} == served.ready()
    finally:
        prometheus.kill()
        prometheus.wait()


def test_a_session_goes_on_at_any_replica(served: Served) -> None:
    with Client(served.url, timeout=60, max_retries=0) as client:
        row: Any = client.predict_length(PredictInput(token_ids=list(range(3, 90)))).predictions[0]
        deadline = time.monotonic() + 60
        while not served.redis.client().exists(f"lenvm:s:{row.session}"):
            assert time.monotonic() < deadline, served.redis.client().keys("*")
            time.sleep(0.02)

        def resumed() -> float:
            return sum(
                value
                for labels, value in served.cluster.samples("ray_lenvm_shared_lookups_total")
                if labels["outcome"] == "session"
            )

        before, values = resumed(), []
        for token in range(3, 19):  # sixteen continuations: one replica computed the prefix, both are asked
            found: Any = client.predict_length(PredictInput(session=row.session, append=[token])).predictions[0]
            whole: Any = client.predict_length(PredictInput(token_ids=[*range(3, 90), token])).predictions[0]
            assert isinstance(found, Prediction)
            assert (found.session, found.value) == (whole.session, pytest.approx(whole.value, abs=1e-5))
            values.append(found.value)
        assert len(set(values)) > 8
        served.cluster.wait(lambda: resumed() > before, "a replica took the session from Redis")


@contextmanager
def load(url: str, *, callers: int = 6, max_retries: int) -> Iterator[Callable[[int], None]]:
    """Callers who ask, each for itself, until the block ends. Gives what waits until so many more calls were answered;
    an error of any call is raised at the end."""
    stop, answered = threading.Event(), [0] * callers

    def call(at: int) -> None:
        with Client(url, timeout=60, max_retries=max_retries) as client:
            while not stop.is_set():
                rows = [{"token_ids": [3 + (at + row) % 90] * (60 + row)} for row in range(24)]
                found = client.predict_length(rows)
                assert all(isinstance(row, Prediction) for row in found.predictions)
                answered[at] += 1

    with ThreadPoolExecutor(callers) as pool:
        calls = [pool.submit(call, at) for at in range(callers)]

        def more(count: int) -> None:
            wanted, end = sum(answered) + count, time.monotonic() + 120
            while sum(answered) < wanted and not any(one.done() for one in calls):
                assert time.monotonic() < end, "no answers come"
                time.sleep(0.02)

        try:
            yield more
        finally:
            stop.set()
        for one in calls:
            one.result()


def test_a_replica_killed_under_load_loses_no_request_and_is_replaced(served: Served) -> None:
    victim = served.cluster.replicas()[0]
    with load(served.url, max_retries=8) as more:
        more(12)
        victim.kill()
        more(24)
        served.cluster.wait(lambda: len(served.ready()) == 2 and not victim.is_running(), "the replica is replaced")
        more(12)


def test_a_replica_that_is_taken_away_answers_first(served: Served) -> None:
    with load(served.url, max_retries=0) as more:
        more(6)
        served.scale(1)
        more(12)
