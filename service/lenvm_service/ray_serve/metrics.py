"""From our Prometheus registry to Ray's metrics: every node's agent exports what its replicas measure, with the labels
``application``, ``deployment`` and ``replica``, and Ray writes the file by which Prometheus finds the agents."""

from __future__ import annotations

import logging
import threading
from typing import Any

from prometheus_client import CollectorRegistry

__all__ = ["MetricsBridge"]

logger = logging.getLogger(__name__)

_EVERY_S = 5.0


class MetricsBridge:
    """Copies every sample, under its name, into a gauge of Ray's. Only inside a replica.

    A gauge, because it can be set: to PromQL the series of a counter or of a histogram's buckets look the same. Ray
    adds the prefix ``ray_``, which ``deploy/ray/prometheus.yaml`` takes off again.
    """

    def __init__(self, registry: CollectorRegistry, *, every_s: float = _EVERY_S) -> None:
        self._registry, self._every_s = registry, every_s
        self._gauges: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-to-ray", daemon=True)

    def start(self) -> None:
        """Copy now and every so many seconds."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(2 * self._every_s)

    def copy(self) -> None:
        """Set all gauges."""
        from ray.serve.metrics import Gauge

        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_created"):  # when the series began: nothing that we use
                    continue
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    keys = tuple(sorted(sample.labels)) or None
                    gauge = self._gauges[sample.name] = Gauge(sample.name, family.documentation, keys)
                gauge.set(sample.value, dict(sample.labels))

    def _run(self) -> None:
        while True:
            try:
                self.copy()
            except Exception:  # metrics are no reason to stop serving
                logger.exception("metrics were not handed to Ray")
            if self._stop.wait(self._every_s):
                return
