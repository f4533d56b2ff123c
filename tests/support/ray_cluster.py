"""A Ray node of its own on this machine, and applications on it by a Serve config, as ``docs/ray.md`` says."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import psutil
import yaml

from tests.support.redis_server import free_port

__all__ = ["CONFIG", "ROOT", "RayCluster", "serve_config"]

ROOT = Path(__file__).resolve().parents[2]
_MARK = "LENVM_TEST_RAY"
CONFIG = ROOT / "deploy" / "ray" / "serve.yaml"


def serve_config(port: int, args: Mapping[str, Any], **deployment: Any) -> dict[str, Any]:
    """``deploy/ray/serve.yaml`` for this machine: other ``args``, and other options of its deployment, one CPU each."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] = dict(args)
    (options,) = application["deployments"]
    if "num_replicas" in deployment:
        del options["autoscaling_config"]
    options |= {"ray_actor_options": {"num_cpus": 1}, **deployment}
    return config


class RayCluster:
    """``ray start --head``, then ``serve run`` of configs.

    ``environment``: of the node, and so of all its processes. ``haproxy``: in front of the replicas, where otherwise
    Serve's own proxy stands.
    """

    def __init__(
        self, folder: Path, *, cpus: int = 2, environment: Mapping[str, str] | None = None, haproxy: bool = False
    ) -> None:
        self.folder = folder
        # Paths of Unix sockets are short: Ray's own folder cannot lie deep.
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-"))
        self.port, self.metrics_port = free_port(), free_port()
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("models", "service", "clients")),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "lenvm_service.ray_serve:proxy_middlewares",
            "RAY_USAGE_STATS_ENABLED": "0",
            _MARK: str(self.temporary),
            **(environment or {}),
        }
        if haproxy:
            ports = {name: str(free_port()) for name in ("METRICS", "STATS")}
            self.environment |= {f"RAY_SERVE_HAPROXY_{name}_PORT": port for name, port in ports.items()}
            self.environment["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        self.log = folder / "ray.log"
        self.node = self._run(
            *("ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--port", str(self.port), "--num-cpus", str(cpus), "--num-gpus", "0"),
            *("--metrics-export-port", str(self.metrics_port), "--object-store-memory", str(100 << 20)),
            *("--include-dashboard", "false", "--temp-dir", str(self.temporary)),
            *("--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", str(free_port())),
            *("--min-worker-port", "0", "--max-worker-port", "0"),  # any: the others may lie in their usual range
        )
        self.address = f"127.0.0.1:{self.port}"

    def _run(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        # The commands `ray` and `serve` by their modules: the folder that they lie in need not be on the path.
        with self.log.open("ab") as output:
            command = [sys.executable, "-m", module, *arguments]
            return subprocess.Popen(
                command, stdout=output, stderr=output, env=self.environment, cwd=self.folder, start_new_session=True
            )

    def deploy(self, config: Mapping[str, Any]) -> str:
        """Run the config; the URL of its proxy, once ``/health/ready`` answers there."""
        path = self.folder / "serve.yaml"
        path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        serve = self._run("ray.serve.scripts", "run", "--non-blocking", "--address", self.address, str(path))
        assert serve.wait(120) == 0, self.output()
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        self.wait(lambda: _answers(f"{url}/health/ready"), "the service is ready")
        return url

    def replicas(self) -> list[psutil.Process]:
        """Processes of the replicas."""
        found = []
        for process in psutil.Process(self.node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica"):
                    found.append(process)
        return found

    def samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        """A metric's samples as the node's agent exports them: labels and value."""
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx2.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10).text
        families = text_string_to_metric_families(text)
        return [(one.labels, one.value) for family in families for one in family.samples if one.name == name]

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
        """Until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.node.poll() is None, self.output()
            assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}\n{self.output()}"
            time.sleep(0.1)

    def output(self) -> str:
        """The end of what commands and replicas wrote."""
        logs = [self.log, *sorted(self.temporary.glob("session_latest/logs/serve/*.log"))]
        logs += sorted(self.temporary.glob("session_latest/logs/worker-*.err"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def close(self) -> None:
        """End every process of the node, and remove what Ray left."""
        ours = self._processes()
        self.node.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(ours, timeout=5)
        # HAProxy is started anew when a replica ends: what came meanwhile counts too.
        while alive := [*alive, *self._processes()]:
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            _, alive = psutil.wait_procs(alive, timeout=1)
        self.node.wait(10)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        """All of the node that run: its children, and orphans that have its mark."""
        found = set[psutil.Process]()
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.node.pid)
            found = {node, *node.children(recursive=True)}
        found |= {process for process in psutil.process_iter() if self._is_ours(process)}
        return [process for process in found if not _is_zombie(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == str(self.temporary)
        except psutil.Error:
            return False


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False
