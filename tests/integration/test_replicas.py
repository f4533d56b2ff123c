"""Two ``lenvm serve`` processes, one Redis, keys for two tenants: what one has begun the other goes on with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm.backbones import load_backbone
from lenvm_client import Client, PredictInput, PrefixUnknownError, UnauthorizedError
from lenvm_client.drivers.hf import generate
from lenvm_service.keys import new_key
from tests.integration.conftest import ServiceProcess, start_service
from tests.support.redis_server import Line, RedisServer

EOS = 2


class Pair:
    """Two replicas behind one line, which goes to the first."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        (self.key, first), (self.other_key, second) = new_key("a", "team-a"), new_key("b", "team-b")
        keys = folder / "keys.toml"
        keys.write_text(first + second)
        self.redis = RedisServer(folder / "redis").start()
        # The budget is long: on a busy machine a late answer would make a hit a miss now and then.
        arguments = ["--model", str(checkpoint), "--redis-url", self.redis.url, "--redis-lookup-ms", "5000"]
        arguments += ["--secret", "0123456789abcdef", "--api-keys", str(keys)]
        self.first, self.second = self._start(folder / "1", arguments), self._start(folder / "2", arguments)
        self.line = Line(int(self.first.url.rpartition(":")[2]))
        self.url = f"http://127.0.0.1:{self.line.port}"

    def _start(self, folder: Path, arguments: list[str]) -> ServiceProcess:
        folder.mkdir()
        service = start_service(folder, *arguments, wait=False)
        with Client(service.url, api_key=self.key, timeout=5, max_retries=0) as client:
            end = time.monotonic() + 120
            while not _ready(client):
                assert service.process.poll() is None, service.log.read_text()
                assert time.monotonic() < end, service.log.read_text()
                time.sleep(0.05)
        return service

    def close(self) -> None:
        for service in (self.first, self.second):
            service.process.kill()
            service.process.wait()
        self.line.close()
        self.redis.kill()


def _ready(client: Client) -> bool:
    from lenvm_client import LenVMClientError

    try:
        return client.ready()
    except LenVMClientError:
        return False


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("replicas"), tiny_checkpoint)
    yield pair
    pair.close()


def test_a_session_of_one_replica_goes_on_at_the_other_and_for_its_tenant_alone(pair: Pair) -> None:
    with (
        Client(pair.first.url, api_key=pair.key) as here,
        Client(pair.second.url, api_key=pair.key, max_retries=0) as there,
        Client(pair.second.url, api_key=pair.other_key, max_retries=0) as other,
        Client(pair.second.url, api_key="wrong", max_retries=0) as nobody,
    ):
        row: Any = here.predict_length(PredictInput(token_ids=list(range(3, 90)))).predictions[0]
        step = PredictInput(session=row.session, append=[5])
        wanted: Any = here.predict_length(step).predictions[0]
        deadline = time.monotonic() + 60
        while len(pair.redis.client().keys("lenvm:s:*")) < 2:  # type: ignore[arg-type]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        found: Any = there.predict_length(step).predictions[0]
        assert found.session == wanted.session
        assert found.value == pytest.approx(wanted.value, abs=1e-6)
        with pytest.raises(PrefixUnknownError):
            other.predict_length(step)
        with pytest.raises(UnauthorizedError):
            nobody.predict_length(step)


def test_guided_generation_goes_on_when_its_replica_is_killed(pair: Pair, tiny_backbone: Path) -> None:
    model = load_backbone(tiny_backbone)
    prompt = torch.tensor([list(range(10, 60))])

    def run(die_at: int | None) -> tuple[list[int], int]:
        steps = 0

        class Counting(Client):
            def score_candidates(self, rows: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == die_at:
                    pair.line.target = int(pair.second.url.rpartition(":")[2])
                    pair.first.process.kill()
                    pair.first.process.wait()
                return super().score_candidates(rows)

        with Counting(pair.url, api_key=pair.key, timeout=60, max_retries=5) as client:
            sequences, _ = generate(
                model,
                client,
                prompt,
                objectives={"kind": "equal_to", "target": 30},
                temperature=0,
                max_new_tokens=40,
                eos_token_id=EOS,
                pad_token_id=0,
                on_error="raise",
            )
        return sequences[0, prompt.shape[1] :].tolist(), steps

    wanted, steps = run(None)
    assert steps > 12
    again, _ = run(steps // 2)
    assert again == wanted
    assert pair.second.process.poll() is None
