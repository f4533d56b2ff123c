"""The real service: ``lenvm serve`` in a process of its own, with the real model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lenvm_client import Client, LenVMClientError


@dataclass
class ServiceProcess:
    """A running ``lenvm serve``."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        import urllib.request

        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        return self.process.wait(timeout_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_service(folder: Path, *arguments: str, wait: bool = True) -> ServiceProcess:
    """Start ``lenvm serve`` on a free port; its output goes to ``folder/serve.log``."""
    port = free_port()
    log = folder / "serve.log"
    command = [sys.executable, "-m", "lenvm_service.cli", "serve", "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    service = ServiceProcess(f"http://127.0.0.1:{port}", process, log)
    if wait:
        end = time.monotonic() + 120
        with Client(service.url, timeout=5, max_retries=0) as client:
            while not _is_ready(client):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.05)
    return service


def _is_ready(client: Client) -> bool:
    try:
        return client.ready()
    except LenVMClientError:
        return False


@pytest.fixture(scope="session")
def service(real_backbone_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """One for all tests that only ask."""
    running = start_service(tmp_path_factory.mktemp("service"))
    yield running
    assert running.process.poll() is None, running.log.read_text()
    assert running.stop() == 0


@pytest.fixture
def own_service(real_backbone_dir: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    """One that the test may stop."""
    running = start_service(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()
