"""A real Prometheus with our configuration scrapes a real service with a tiny model, a Redis, and API keys."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lenvm_client import Client
from lenvm_service.keys import new_key
from tests.integration.conftest import ServiceProcess, start_service
from tests.support.deploy_tools import find_tool
from tests.support.redis_server import RedisServer, free_port

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "lenvm.json").read_text(encoding="utf-8"))
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    .replace("$__rate_interval", "1m")
    .replace("$model", ".*")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
INFINITE = "Break-even"  # where computing by the tiny model always is cheaper than to fetch


@dataclass
class Prometheus:
    """A running server. ``key``: of the service that it scrapes."""

    url: str
    key: str

    def query(self, expression: str) -> list[float]:
        """The values of an instant query."""
        body = urllib.parse.urlencode({"query": expression}).encode()
        with urllib.request.urlopen(f"{self.url}/api/v1/query", body, timeout=30) as answer:
            content = json.loads(answer.read())
        assert content["status"] == "success", content
        return [float(sample["value"][1]) for sample in content["data"]["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        with urllib.request.urlopen(f"{self.url}/api/v1/alerts", timeout=30) as answer:
            alerts = json.loads(answer.read())["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def until(condition: Callable[[], bool], what: Callable[[], object], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.kill()


@pytest.fixture
def keyed_service(tiny_checkpoint: Path, redis_server: RedisServer, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    key, table = new_key("tests", "tests")
    (tmp_path / "keys.toml").write_text(table)
    arguments = ["--model", str(tiny_checkpoint), "--redis-url", redis_server.url, "--secret", "0123456789abcdef"]
    service = start_service(tmp_path, *arguments, "--api-keys", str(tmp_path / "keys.toml"), wait=False)
    try:
        with Client(service.url, api_key=key, max_retries=0) as client:
            until(lambda: _ready(client), service.log.read_text)
        yield service, key
    finally:
        service.process.kill()
        service.process.wait()


def _ready(client: Client) -> bool:
    with contextlib.suppress(Exception):
        return client.ready()
    return False


@pytest.fixture
def prometheus(
    keyed_service: tuple[ServiceProcess, str], tmp_path: Path, real_parts_required: bool
) -> Iterator[Prometheus]:
    """With our configuration and rules, but that targets are named, and nothing takes minutes."""
    binary = find_tool("prometheus", required=real_parts_required)
    service, key = keyed_service
    folder = tmp_path / "prometheus"
    folder.mkdir()
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    (scrape,) = config["scrape_configs"]
    del scrape["dns_sd_configs"]
    scrape["scrape_timeout"] = scrape["scrape_interval"] = "1s"
    scrape["static_configs"] = [{"targets": [service.url.removeprefix("http://")]}]
    (folder / "key").write_text(key)
    scrape["authorization"] = {"credentials_file": str(folder / "key")}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    rules = (ROOT / "deploy/prometheus/rules.yaml").read_text(encoding="utf-8")
    (folder / "rules.yaml").write_text(re.sub(r"^( +for:) \S+$", r"\1 0s", rules, flags=re.MULTILINE))
    port = free_port()
    command = [binary, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    running = Prometheus(f"http://127.0.0.1:{port}", key)
    try:
        until(lambda: _answers(running), lambda: (folder / "log").read_text())
        yield running
    finally:
        process.kill()
        process.wait()


def _answers(server: Prometheus) -> bool:
    with contextlib.suppress(OSError):
        return server.query("vector(1)") == [1.0]
    return False


def traffic(client: Client, round_: int) -> None:
    """What each kind of caller sends: predictions and what became of them, guided rows, sessions."""
    prompt = f"Question {round_}: " + "why is the sky blue? " * 8
    answer = client.predict_length([prompt, prompt + "Say it shortly."], quantiles=[0.5, 0.9, 0.95])
    first, second = answer.predictions
    client.feedback({"prediction_id": first.prediction_id, "generated_tokens": 3, "finish_reason": "stop"})
    client.feedback({"prediction_id": second.prediction_id, "generated_tokens": 60, "finish_reason": "length"})
    row = {"session": first.session, "append": [5], "candidates": [5, 9, 2], "logprobs": [-1.0, -1.0, -2.0]}
    client.score_candidates([{**row, "generated": 1, "objective": {"kind": "at_most", "target": 20}}])


def wrong(server: Prometheus) -> set[str]:
    """Alerts that have no business here."""
    return {name for name in server.firing() if re.search("Down|Absent|NotReady|EngineFailing|Budget|Refus", name)}


def test_every_dashboard_query_returns_data_and_alerts_fire(
    prometheus: Prometheus, keyed_service: tuple[ServiceProcess, str], redis_server: RedisServer
) -> None:
    service, key = keyed_service
    waiting = dict(QUERIES)
    rounds = iter(range(10_000))

    def all_have_data() -> bool:
        traffic(client, next(rounds))
        for name, expression in list(waiting.items()):
            values = prometheus.query(expression)
            if any(math.isfinite(value) or name.startswith(INFINITE) for value in values):
                del waiting[name]
        return not waiting

    with Client(service.url, api_key=key, timeout=30, max_retries=0) as client:
        until(all_have_data, lambda: waiting)
    # Not at once: on a busy machine a scrape may come too late, and Redis may.
    until(lambda: prometheus.query('up{job="lenvm"}') == [1.0] and not wrong(prometheus), prometheus.firing)

    redis_server.kill()
    with Client(service.url, api_key=key, timeout=30, max_retries=0) as client:

        def redis_is_missed() -> bool:
            client.predict_length(f"Without Redis {next(rounds)}: " + "why? " * 40)
            return "LenVMSharedTierDown" in prometheus.firing()

        until(redis_is_missed, prometheus.firing)
    service.process.kill()
    until(lambda: {"LenVMDown", "LenVMAbsent"} <= prometheus.firing(), prometheus.firing)
