"""What replicas on Ray Serve are worth: requests a second by their number, and what Serve itself costs.

    python benchmarks/ray_serve.py --data ../shared/data --report reports/ray.json
    python benchmarks/ray_serve.py --data ../shared/data --quick

Real parts on this machine: the shipped model in float32, one torch thread a replica (``num_cpus: 1``), a redis-server
that the replicas share, prompts that nothing has cached; so many callers a replica, each waiting for its answer;
medians over ``--turns`` rounds. Variants: ``lenvm serve`` with one thread, and one to ``--replicas``
replicas behind Serve's proxy and behind HAProxy. The load generator, proxies, Redis and Ray's own processes run on the
same cores, so that the last replica never gets a whole one: a machine of its own for each replica scales better.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _engine import merge
from _load import Outcome, Replica, closed_loop, prompts, unique

from tests.support.ray_cluster import RayCluster, serve_config
from tests.support.redis_server import RedisServer, free_port

SECRET = "benchmark-secret-0123"
MODEL = "smollm2-135m-instruct"


class Bench:
    """One run. ``callers``: for each replica."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.folder, self.callers, self.seconds, self.turns = folder, given.callers, given.seconds, given.turns
        self.texts = unique(prompts(given.data))
        self.redis = RedisServer(folder / "redis", "--maxmemory", "512mb", "--maxmemory-policy", "allkeys-lru").start()

    def measure(self, url: str, replicas: int) -> list[Outcome]:
        """Rounds of load on what is ready, one to warm up before them."""
        workers = self.callers * replicas
        rounds = [closed_loop(url, self.texts, workers=workers, seconds=self.seconds) for _ in range(1 + self.turns)]
        return [asyncio.run(one) for one in rounds][1:]

    def alone(self) -> list[Outcome]:
        """``lenvm serve``, without Ray."""
        replica = Replica(self.folder, "--redis-url", self.redis.url, "--secret", SECRET, model=MODEL).ready()
        found = self.measure(replica.url, 1)
        replica.stop()
        return found

    @contextmanager
    def cluster(self, haproxy: bool) -> Iterator[RayCluster]:
        """A node of Ray with a CPU for each replica that may come."""
        environment = {"LENVM_SECRET": SECRET, "LENVM_REDIS_URL": self.redis.url, "LENVM_LOG_LEVEL": "warning"}
        folder = self.folder / ("haproxy" if haproxy else "proxy")
        folder.mkdir()
        cluster = RayCluster(folder, cpus=2 * (os.cpu_count() or 1), environment=environment, haproxy=haproxy)
        try:
            yield cluster
        finally:
            cluster.close()

    def served(self, cluster: RayCluster, port: int, replicas: int) -> list[Outcome]:
        """So many replicas."""
        url = cluster.deploy(serve_config(port, {"model": [MODEL]}, num_replicas=replicas))

        def complete() -> bool:
            ready = [value for _, value in cluster.samples("ray_lenvm_engine_ready") if value == 1]
            return len(ready) == len(cluster.replicas()) == replicas

        cluster.wait(complete, f"{replicas} replicas are ready")
        return self.measure(url, replicas)


def summary(outcomes: list[Outcome], replicas: int) -> dict[str, Any]:
    """Medians over the rounds."""
    failed = sum(one.sent - one.count("200") for one in outcomes)
    return {
        "replicas": replicas,
        "requests_per_s": statistics.median(one.count("200") / one.seconds for one in outcomes),
        "p50_ms": statistics.median(one.ms("200", 0.5) or 0.0 for one in outcomes),
        "p99_ms": statistics.median(one.ms("200", 0.99) or 0.0 for one in outcomes),
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--replicas", type=int, default=2, help="the most")
    parser.add_argument("--callers", type=int, default=4, help="for each replica")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a round")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 5 s each, to see that it works; no report")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.quick and given.report:
        parser.error("--quick makes no report")
    if given.quick:
        given.seconds, given.turns = 5.0, 1
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, Path(folder))
        found: dict[str, Any] = {"callers_per_replica": given.callers, "cores": os.cpu_count()}
        try:
            found["lenvm_serve"] = summary(bench.alone(), 1)
            for name in ("proxy", "haproxy"):
                with bench.cluster(name == "haproxy") as cluster:
                    port, since = free_port(), time.monotonic()
                    for replicas in range(1, given.replicas + 1):
                        found[f"{name}_{replicas}"] = row = summary(bench.served(cluster, port, replicas), replicas)
                        print(f"{name}, {replicas} ({time.monotonic() - since:.0f} s): {row}", flush=True)
        finally:
            bench.redis.kill()
    print(found)
    merge(given.report, {"scale_out": found}, "cpu")


if __name__ == "__main__":
    main()
