"""Prefix states in a real redis-server, between engines with a tiny model: shared, resumed, and every way to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lenvm_service.engine import CandidateJob, Engine, EngineOptions, PredictJob, Prefix
from lenvm_service.errors import PrefixUnknownError
from lenvm_service.metrics import Metrics
from lenvm_service.prefix_cache import CodecError
from lenvm_service.prefix_cache.redis_tier import RedisTier, TierOptions, session_name
from tests.support.redis_server import Line, RedisServer, free_port

SECRET = b"0123456789abcdef"


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


class Replica:
    """An engine with a tiny model, made to look slow, so that fetching pays."""

    def __init__(self, checkpoint: Path, url: str, *, secret: bytes | None = SECRET, **options: Any) -> None:
        self.metrics = Metrics()
        # The budget is long: on a busy machine a late answer would make a test of hits fail now and then.
        tier = TierOptions(url, **{"lookup_s": 5.0, "secret": secret or b"", **options})
        engine_options = EngineOptions(secret=secret, tier=tier)
        self.engine = Engine("tiny", checkpoint, engine_options, self.metrics.engine("tiny"))
        self.engine.start()
        until(lambda: self.engine.state != "loading")
        assert self.engine.failure is None
        costs = self.tier.costs
        costs.tokens_per_s = 10.0
        costs.computed = lambda tokens, seconds: None  # type: ignore[method-assign]

    @property
    def tier(self) -> RedisTier:
        assert self.engine.tier is not None
        return self.engine.tier

    def connected(self) -> Replica:
        until(lambda: not self.tier.is_open)
        return self

    def ask(self, *jobs: Any) -> list[Any]:
        return asyncio.run(self.engine.submit(jobs)).results

    def one(self, job: Any) -> dict[str, Any]:
        (result,) = self.ask(job)
        assert isinstance(result, dict), result
        return result

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model": "tiny", **labels}) or 0.0

    def computed(self) -> float:
        return self.count("lenvm_tokens_total", source="computed")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis").start()
    yield server
    server.kill()


@pytest.fixture
def replica(tiny_checkpoint: Path) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(url: str, **options: Any) -> Replica:
        made.append(Replica(tiny_checkpoint, url, **options))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def stored(server: RedisServer, kind: str, count: int) -> list[bytes]:
    """Wait until so many values are there."""
    client = server.client()
    until(lambda: len(client.keys(f"lenvm:{kind}:*")) >= count)  # type: ignore[arg-type]
    return client.keys(f"lenvm:{kind}:*")  # type: ignore[return-value]


# -- shared ------------------------------------------------------------------------------------------------------------


def test_what_one_replica_computed_another_fetches(server: RedisServer, replica: Any) -> None:
    here, there = replica(server.url).connected(), replica(server.url).connected()
    text = ids(0, 100)
    first = here.one(PredictJob(Prefix(text)))
    stored(server, "b", 3)
    stored(server, "s", 1)
    before = there.computed()
    again = there.one(PredictJob(Prefix(text)))  # its numbers alone
    assert again == {**first, "cached_tokens": 100}
    assert there.computed() == before
    assert there.count("lenvm_shared_results_total") == 1
    other = [*text[:96], *ids(1, 7)]  # blocks
    row = there.one(CandidateJob(Prefix(other), [5, 6]))
    assert row["cached_tokens"] == 96
    assert there.computed() - before == 7 + 2
    assert there.count("lenvm_tokens_total", source="shared") == 96
    expected = replica("redis://127.0.0.1:1/0").one(CandidateJob(Prefix(other), [5, 6]))
    assert row["values"] == pytest.approx(expected["values"], abs=1e-5)
    # Fetched blocks are held: the next one needs no Redis.
    server.kill()
    assert there.one(PredictJob(Prefix([*text[:96], 9])))["cached_tokens"] == 96


def test_a_session_goes_on_at_another_replica(server: RedisServer, replica: Any) -> None:
    here, there = replica(server.url).connected(), replica(server.url).connected()
    text = ids(2, 70)
    session = here.one(CandidateJob(Prefix(text), [5, 6, 7]))["session"]
    for token in (5, 8):
        session = here.one(CandidateJob(Prefix([token], session), [5, 6, 7], generated=1))["session"]
    stored(server, "s", 3)
    stored(server, "b", 2)
    wanted = here.one(CandidateJob(Prefix([6], session), [9, 10], generated=3))
    found = there.one(CandidateJob(Prefix([6], session), [9, 10], generated=3))
    assert found["session"] == wanted["session"]
    assert found["values"] == pytest.approx(wanted["values"], abs=1e-6)
    assert found["cached_tokens"] == 64
    assert there.count("lenvm_shared_lookups_total", outcome="session") == 1
    (unknown,) = there.ask(PredictJob(Prefix([6], "s-" + "0" * 32)))
    assert isinstance(unknown, PrefixUnknownError)
    (stolen,) = there.ask(PredictJob(Prefix([6], session, tenant="other")))
    assert isinstance(stolen, PrefixUnknownError)


def test_replicas_without_a_secret_share_blocks_and_no_sessions(server: RedisServer, replica: Any) -> None:
    here, there = replica(server.url, secret=None).connected(), replica(server.url, secret=None).connected()
    text = ids(3, 70)
    session = here.one(PredictJob(Prefix(text)))["session"]
    stored(server, "b", 2)
    assert there.one(CandidateJob(Prefix([*text, 5]), [6]))["cached_tokens"] == 64
    assert isinstance(there.ask(PredictJob(Prefix([6], session)))[0], PrefixUnknownError)


def test_a_batch_asks_once_and_tenants_have_keys_of_their_own(server: RedisServer, replica: Any) -> None:
    here, there = replica(server.url).connected(), replica(server.url).connected()
    text = ids(4, 64)
    jobs = [PredictJob(Prefix([*text, 5, at], tenant=tenant)) for at in range(3) for tenant in ("a", "b")]
    here.ask(*jobs)
    assert len(stored(server, "b", 4)) == 4  # two of each tenant
    stored(server, "s", 6)
    lookups = there.count("lenvm_shared_lookups_total", outcome="hit")
    rows = there.ask(*(CandidateJob(job.prefix, [9]) for job in jobs))
    assert [row["cached_tokens"] for row in rows] == [64] * 6
    assert there.count("lenvm_shared_lookups_total", outcome="hit") == lookups + 1
    assert there.one(PredictJob(Prefix([*text, 5, 0], tenant="c")))["cached_tokens"] == 0


def test_int8_payloads_are_a_quarter_of_the_bytes_and_close(server: RedisServer, replica: Any) -> None:
    here = replica(server.url, payload="int8").connected()
    there = replica(server.url, payload="int8").connected()
    text = ids(5, 100)
    first = here.one(PredictJob(Prefix(text)))
    keys = stored(server, "b", 3)
    assert server.client().strlen(keys[0]) < 0.4 * here.engine.core.scorer.layout.nbytes  # heads of 8 in the tiny model
    row = there.one(CandidateJob(Prefix(text), [5]))
    assert row["cached_tokens"] == 96
    assert row["value"] == pytest.approx(first["value"], abs=0.02)


@pytest.mark.parametrize("how", ["cluster", "sentinel"])
def test_cluster_and_sentinel(tmp_path: Path, replica: Any, how: str) -> None:
    if how == "cluster":
        bus = str(free_port())  # by itself it takes the port plus 10,000, which there may not be
        server = RedisServer(tmp_path / "node", "--cluster-enabled", "yes", "--cluster-port", bus).start()
        server.client().execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: server.client().execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        url, others = f"redis+cluster://127.0.0.1:{server.port}", []
    else:
        server = RedisServer(tmp_path / "master").start()
        port = free_port()
        config = tmp_path / "sentinel.conf"
        config.write_text(f"port {port}\nsentinel monitor lenvm 127.0.0.1 {server.port} 1\n")
        others = [RedisServer(tmp_path / "sentinel", str(config), "--sentinel", port=port).start()]
        url = f"redis+sentinel://127.0.0.1:{port}/lenvm"
    try:
        here, there = replica(url).connected(), replica(url).connected()
        text = ids(6, 100)
        here.one(PredictJob(Prefix(text)))
        stored(server, "b", 3)
        assert there.one(CandidateJob(Prefix(text), [5]))["cached_tokens"] == 96
    finally:
        for one in (server, *others):
            one.kill()


# -- what must never be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["changed", "cut", "swapped", "replaced"])
def test_a_tampered_value_is_never_used(server: RedisServer, replica: Any, how: str) -> None:
    here, there = replica(server.url).connected(), replica(server.url).connected()
    text = ids(7, 100)
    first = here.one(PredictJob(Prefix(text)))
    keys = [*stored(server, "b", 3), *stored(server, "s", 1)]
    client = server.client()
    values: list[bytes] = [client.get(key) for key in keys]  # type: ignore[misc]
    for at, (key, value) in enumerate(zip(keys, values, strict=True)):
        middle = len(value) // 2
        wrong = {
            "changed": value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :],
            "cut": value[:-1],
            "swapped": values[(at + 1) % 3] if at < 3 else value[:-1] + b"x",
            "replaced": bytes(len(value)),
        }[how]
        client.set(key, wrong)
    before = there.computed()
    row = there.one(PredictJob(Prefix(text)))
    assert row["cached_tokens"] == 0
    assert there.computed() - before == 100
    assert row["value"] == pytest.approx(first["value"], abs=1e-6)
    assert there.count("lenvm_shared_refused_values_total") >= 1
    assert not there.tier.is_open
    # What was refused is gone, and what was computed instead takes its place.
    third = replica(server.url).connected()
    root = there.engine.core.prefixes.root()
    chain = root.extend(text)
    until(lambda: _sound(third, client.get(session_name(chain.handle.encode())), chain))
    assert third.one(PredictJob(Prefix(text)))["cached_tokens"] == 100


def _sound(replica: Replica, value: Any, chain: Any) -> bool:
    try:
        replica.tier.codec.unpack_session(chain.root.digest, chain.handle.encode(), value or b"")
    except CodecError:
        return False
    return True


def test_other_weights_under_the_same_name_never_hit(
    server: RedisServer, replica: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    here = replica(server.url).connected()
    text = ids(8, 100)
    here.one(PredictJob(Prefix(text)))
    stored(server, "b", 3)
    stored(server, "s", 1)
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "lenvm.json").read_text())
    config["gamma"] = 0.98  # everything else, weights included, is the same
    (other / "lenvm.json").write_text(json.dumps(config))
    there = Replica(other, server.url).connected()
    try:
        assert there.engine.core.config.name == here.engine.core.config.name
        assert there.one(PredictJob(Prefix(text)))["cached_tokens"] == 0
    finally:
        there.engine.close()


# -- Redis slow, full, wrong or gone is a miss -------------------------------------------------------------------------


def test_killed_and_restarted_empty(server: RedisServer, replica: Any) -> None:
    here = replica(server.url).connected()
    there = replica(server.url).connected()
    server.kill()
    for seed in range(4):
        assert here.one(PredictJob(Prefix(ids(20 + seed, 70))))["cached_tokens"] == 0
    until(lambda: here.tier.is_open)
    assert here.count("lenvm_shared_breaker_open") == 1
    server.start()
    here.connected()
    here.one(PredictJob(Prefix(ids(30, 100))))
    stored(server, "b", 3)
    there.connected()
    assert there.one(CandidateJob(Prefix(ids(30, 100)), [5]))["cached_tokens"] == 96


def test_paused(server: RedisServer, replica: Any) -> None:
    here = replica(server.url, lookup_s=0.2).connected()
    server.pause()
    for seed in range(4):
        assert here.one(PredictJob(Prefix(ids(40 + seed, 70))))["cached_tokens"] == 0
    assert here.tier.is_open
    outcomes = [here.count("lenvm_shared_lookups_total", outcome=name) for name in ("timeout", "error", "open")]
    assert sum(outcomes[:2]) >= 1  # the writer notices, too
    server.resume()
    here.connected()


def test_full(server: RedisServer, replica: Any) -> None:
    here, there = replica(server.url).connected(), replica(server.url).connected()
    here.one(PredictJob(Prefix(ids(49, 100))))
    stored(server, "b", 3)
    client = server.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    here.one(PredictJob(Prefix(ids(50, 100))))
    until(lambda: here.count("lenvm_shared_dropped_total", reason="error") > 0)
    assert not here.tier.is_open  # it can still be read
    assert there.one(CandidateJob(Prefix(ids(49, 100)), [5]))["cached_tokens"] == 96
    client.config_set("maxmemory", 0)
    time.sleep(1.1)  # it is not asked to store for a second
    here.one(PredictJob(Prefix(ids(51, 100))))
    stored(server, "b", 6)


def test_a_wrong_password_and_then_the_right_one(tmp_path: Path, replica: Any) -> None:
    server = RedisServer(tmp_path / "locked", "--requirepass", "right").start()
    try:
        here = replica(f"redis://:wrong@127.0.0.1:{server.port}/0")
        time.sleep(0.3)
        assert here.tier.is_open
        assert here.one(PredictJob(Prefix(ids(60, 70))))["cached_tokens"] == 0
        server.client(password="right").config_set("requirepass", "wrong")
        here.connected()
        here.one(PredictJob(Prefix(ids(61, 70))))
        client = server.client(password="wrong")
        until(lambda: len(client.keys("lenvm:b:*")) == 2)  # type: ignore[arg-type]
    finally:
        server.kill()


@pytest.mark.parametrize(
    "garbage", [b"HTTP/1.1 200 OK\r\n\r\n", b"$5\r\nab", bytes(64), b":1\r\n"], ids=["http", "cut", "zeros", "number"]
)
def test_something_else_answers(server: RedisServer, replica: Any, garbage: bytes) -> None:
    line = Line(server.port)
    try:
        here = replica(line.url, lookup_s=0.3).connected()
        line.garbage = garbage
        for seed in range(5):
            assert here.one(PredictJob(Prefix(ids(70 + seed, 70))))["cached_tokens"] == 0
        until(lambda: here.tier.is_open)
        line.garbage = None
        here.connected()
        assert here.one(PredictJob(Prefix(ids(80, 70))))["prompt_tokens"] == 70
    finally:
        line.close()


def test_slow(server: RedisServer, replica: Any) -> None:
    line = Line(server.port)
    try:
        here = replica(line.url, lookup_s=0.3).connected()
        line.delay_s = 2.0
        for seed in range(4):
            assert here.one(PredictJob(Prefix(ids(90 + seed, 70))))["cached_tokens"] == 0
        until(lambda: here.tier.is_open)
        line.delay_s = 0.0
        here.connected()
    finally:
        line.close()


def test_a_tenant_stores_what_its_quota_allows(server: RedisServer, replica: Any) -> None:
    here = replica(server.url, quota_bytes=12_000).connected()
    size = here.tier.costs.block_bytes
    for seed in range(12):
        here.one(PredictJob(Prefix(ids(200 + seed, 70), tenant="greedy")))
    until(lambda: here.count("lenvm_shared_dropped_total", reason="quota") > 0)
    client = server.client()
    held = sum(client.strlen(key) for key in client.keys("lenvm:[bs]:*"))  # type: ignore[union-attr,misc]
    assert held <= 12_000 + 3 * size
    before = len(client.keys("lenvm:b:*"))  # type: ignore[arg-type]
    here.one(PredictJob(Prefix(ids(300, 70), tenant="modest")))
    until(lambda: len(client.keys("lenvm:b:*")) > before)  # type: ignore[arg-type]


def test_closing_writes_what_still_waits(server: RedisServer, replica: Any) -> None:
    here = replica(server.url).connected()
    here.one(PredictJob(Prefix(ids(400, 100))))
    here.engine.close()
    assert len(server.client().keys("lenvm:b:*")) == 3  # type: ignore[arg-type]
