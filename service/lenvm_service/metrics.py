"""Prometheus metrics: names with unit suffixes, chosen buckets, labels from closed sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lenvm import __version__
from lenvm_service.answers import level_name

if TYPE_CHECKING:
    from lenvm_service.engine.core import BatchCounts

__all__ = ["EngineMetrics", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
_ERRORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
_LEVELS = frozenset({"0.5", "0.9", "0.95"})  # of feedback; others are any number of numbers


class Metrics:
    """All metrics of one process. Each ``Metrics`` has a registry of its own, so that tests may make many."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = CollectorRegistry() if registry is None else registry
        self.requests = Counter(
            "lenvm_requests",
            "Requests answered, by route, status and type of error (none: no error).",
            ("route", "status", "error_type"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "lenvm_request_duration_seconds",
            "Time from a request's first byte to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.inflight = Gauge("lenvm_requests_in_flight", "Requests being worked on.", registry=registry)
        self.rows = Counter("lenvm_rows", "Rows answered.", ("model", "kind", "outcome"), registry=registry)
        self.queue_seconds = Histogram(
            "lenvm_queue_wait_seconds",
            "Time a request's first row waited.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_tokens = Gauge("lenvm_queue_tokens", "New tokens of rows that wait.", ("model",), registry=registry)
        self.batch_rows = Histogram("lenvm_batch_rows", "Rows a batch.", ("model",), buckets=_ROWS, registry=registry)
        self.batch_tokens = Histogram(
            "lenvm_batch_tokens", "New tokens a batch.", ("model",), buckets=_TOKENS, registry=registry
        )
        self.batch_seconds = Histogram(
            "lenvm_batch_duration_seconds", "Time a batch took.", ("model",), buckets=_SECONDS, registry=registry
        )
        self.forwards = Counter("lenvm_forwards", "Forwards of the backbone.", ("model",), registry=registry)
        self.tokens = Counter(
            "lenvm_tokens",
            "Tokens by where their states came from: computed, cached (part of a held prefix) or promoted.",
            ("model", "source"),
            registry=registry,
        )
        self.sessions = Gauge("lenvm_sessions", "Prefix states held.", ("model",), registry=registry)
        self.evictions = Counter("lenvm_sessions_evicted", "Prefix states let go.", ("model",), registry=registry)
        self.blocks = Gauge(
            "lenvm_cache_blocks", "Blocks of the pool of prefix states.", ("model", "state"), registry=registry
        )
        self.guided = Counter(
            "lenvm_guidance_rows", "Guided rows, by objective.", ("model", "objective", "method"), registry=registry
        )
        self.feedback = Counter("lenvm_feedback", "Realised lengths.", ("model", "finish_reason"), registry=registry)
        self.covered = Counter(
            "lenvm_feedback_quantile",
            "Realised lengths against a predicted quantile: within or beyond it.",
            ("model", "quantile", "outcome"),
            registry=registry,
        )
        self.relative_error = Histogram(
            "lenvm_feedback_relative_error",
            "|horizon - l| / l of answers that ended by themselves.",
            ("model",),
            buckets=_ERRORS,
            registry=registry,
        )
        self.ready = Gauge("lenvm_engine_ready", "1 while the engine takes work.", ("model",), registry=registry)
        self.failures = Counter(
            "lenvm_engine_failures", "Batches that raised what no row was to blame for.", ("model",), registry=registry
        )
        self.build = Gauge("lenvm_build_info", "Always 1.", ("version",), registry=registry)
        self.build.labels(__version__).set(1)

    def observe_request(self, route: str, status: int, error_type: str, seconds: float) -> None:
        """One answered request. ``route``: the template; ``error_type``: of the error table, or "none"."""
        self.requests.labels(route, str(status), error_type).inc()
        self.request_seconds.labels(route).observe(seconds)

    def engine(self, model: str) -> EngineMetrics:
        """The metrics of one model's engine."""
        return EngineMetrics(self, model)


class EngineMetrics:
    """What an engine reports, with its ``model`` label filled in."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._evicted = 0
        # Series that are there from the start can be alerted on.
        metrics.ready.labels(model).set(0)
        metrics.failures.labels(model)
        metrics.queue_tokens.labels(model).set(0)
        for source in ("computed", "cached", "promoted"):
            metrics.tokens.labels(model, source)

    def row(self, kind: str, outcome: str) -> None:
        """One answered row: "predict", "tokens" or "candidates"; "ok" or the type of its error."""
        self._metrics.rows.labels(self._model, kind, outcome).inc()

    def waited(self, seconds: float) -> None:
        """A request's first row begins."""
        self._metrics.queue_seconds.labels(self._model).observe(seconds)

    def queued(self, tokens: int) -> None:
        """New tokens that wait now."""
        self._metrics.queue_tokens.labels(self._model).set(tokens)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """One batch is done."""
        self._metrics.batch_rows.labels(self._model).observe(rows)
        self._metrics.batch_tokens.labels(self._model).observe(tokens)
        self._metrics.batch_seconds.labels(self._model).observe(seconds)

    def work(self, counts: BatchCounts, *, sessions: int, evicted: int, used: int, free: int) -> None:
        """What the last batch computed, and what is held after it. ``evicted``: since the start."""
        metrics, model = self._metrics, self._model
        metrics.forwards.labels(model).inc(counts.forwards)
        metrics.tokens.labels(model, "computed").inc(counts.computed_tokens)
        metrics.tokens.labels(model, "cached").inc(max(0, counts.cached_tokens - counts.promoted_tokens))
        metrics.tokens.labels(model, "promoted").inc(counts.promoted_tokens)
        for (kind, method), rows in counts.guided.items():
            metrics.guided.labels(model, kind, method).inc(rows)
        metrics.sessions.labels(model).set(sessions)
        metrics.evictions.labels(model).inc(max(0, evicted - self._evicted))
        self._evicted = evicted
        metrics.blocks.labels(model, "used").set(used)
        metrics.blocks.labels(model, "free").set(free)

    def is_ready(self, ready: bool) -> None:
        """The engine takes work now, or does not."""
        self._metrics.ready.labels(self._model).set(int(ready))

    def failed(self) -> None:
        """A batch raised."""
        self._metrics.failures.labels(self._model).inc()

    def realised(
        self, length: int, *, cut: bool, horizon: float, levels: Sequence[float], quantiles: Sequence[int]
    ) -> None:
        """A predicted answer's remaining length l; ``cut``: it is longer than that."""
        metrics, model = self._metrics, self._model
        metrics.feedback.labels(model, "length" if cut else "stop").inc()
        if not cut:
            metrics.relative_error.labels(model).observe(abs(horizon - length) / length)
        for level, quantile in zip(levels, quantiles, strict=True):
            if level_name(level) not in _LEVELS or (cut and length < quantile):
                continue  # a cut answer below the quantile may have ended on either side
            outcome = "beyond" if length > quantile or cut else "within"
            metrics.covered.labels(model, level_name(level), outcome).inc()
