"""Prometheus metrics: names with unit suffixes, chosen buckets, labels from closed sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lenvm import __version__
from lenvm_service.answers import level_name
from lenvm_service.realised import LEVELS, FeedbackWindow

if TYPE_CHECKING:
    from lenvm_service.engine.core import BatchCounts

__all__ = ["EngineMetrics", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LOOKUP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
_ERRORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
_LEVELS = frozenset(map(level_name, LEVELS))  # of feedback; others are any number of numbers


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
            "Tokens by where their states came from: computed, cached (part of a held prefix), shared (from Redis) or "
            "promoted.",
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
            "Realised lengths against a predicted quantile: within or beyond it. Where many answers are cut, within is "
            "too frequent: lenvm_feedback_coverage_ratio has that put right.",
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
        self._window(registry)
        self.ready = Gauge("lenvm_engine_ready", "1 while the engine takes work.", ("model",), registry=registry)
        self.failures = Counter(
            "lenvm_engine_failures", "Batches that raised what no row was to blame for.", ("model",), registry=registry
        )
        self._tier(registry)
        self.build = Gauge("lenvm_build_info", "Always 1.", ("version",), registry=registry)
        self.build.labels(__version__).set(1)

    def _window(self, registry: CollectorRegistry) -> None:
        self.window_items = Gauge(
            "lenvm_feedback_window_items", "Realised lengths in the sliding window.", ("model",), registry=registry
        )
        self.coverage = Gauge(
            "lenvm_feedback_coverage_ratio",
            "Part of the window's answers that are at most as long as a predicted quantile, cut answers as censored "
            "(Kaplan-Meier). Nominally the quantile's level; NaN: no answer tells.",
            ("model", "quantile"),
            registry=registry,
        )
        self.drift = Gauge(
            "lenvm_feedback_log_ratio",
            "Mean of ln(realised / predicted median) in the window, cut answers as censored. It moves up where answers "
            "get longer than predicted; NaN: no answer tells.",
            ("model",),
            registry=registry,
        )

    def _tier(self, registry: CollectorRegistry) -> None:
        self.lookups = Counter(
            "lenvm_shared_lookups",
            "Questions to Redis, by outcome: hit, partial, miss, session, skipped (cheaper to compute), gone (the "
            "caller), timeout, error, or open (not asked: Redis does not answer).",
            ("model", "outcome"),
            registry=registry,
        )
        self.lookup_seconds = Histogram(
            "lenvm_shared_lookup_duration_seconds",
            "Time a request waited for Redis.",
            ("model",),
            buckets=_LOOKUP_SECONDS,
            registry=registry,
        )
        self.shared_results = Counter(
            "lenvm_shared_results", "Predictions whose numbers came from Redis.", ("model",), registry=registry
        )
        self.shared_written = Counter(
            "lenvm_shared_written_bytes", "Bytes stored in Redis.", ("model",), registry=registry
        )
        self.shared_dropped = Counter(
            "lenvm_shared_dropped",
            "Values that were not stored: queue full, Redis refused or was gone, or the tenant's quota was used up.",
            ("model", "reason"),
            registry=registry,
        )
        self.shared_corrupt = Counter(
            "lenvm_shared_refused_values",
            "Values in Redis that are damaged or not ours.",
            ("model",),
            registry=registry,
        )
        self.shared_open = Gauge(
            "lenvm_shared_breaker_open", "1 while Redis is left alone.", ("model",), registry=registry
        )
        self.break_even = Gauge(
            "lenvm_shared_break_even_tokens",
            "Tokens of a prefix from which on fetching is cheaper than computing.",
            ("model",),
            registry=registry,
        )

    def observe_request(self, route: str, status: int, error_type: str, seconds: float) -> None:
        """One answered request. ``route``: the template; ``error_type``: of the error table, or "none"."""
        self.requests.labels(route, str(status), error_type).inc()
        self.request_seconds.labels(route).observe(seconds)

    async def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def engine(self, model: str) -> EngineMetrics:
        """The metrics of one model's engine."""
        return EngineMetrics(self, model)


class EngineMetrics:
    """What an engine reports, with its ``model`` label filled in."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._evicted = 0
        self.window = window = FeedbackWindow()
        metrics.window_items.labels(model).set_function(lambda: window.summary().items)
        metrics.drift.labels(model).set_function(lambda: window.summary().log_ratio)
        for level in LEVELS:
            metrics.coverage.labels(model, level_name(level)).set_function(partial(window.coverage, level))
        # Series that are there from the start can be alerted on.
        metrics.ready.labels(model).set(0)
        metrics.failures.labels(model)
        metrics.queue_tokens.labels(model).set(0)
        metrics.queue_seconds.labels(model)
        for counter in (metrics.shared_corrupt, metrics.shared_results, metrics.shared_written, metrics.evictions):
            counter.labels(model)
        for reason in ("queue", "error", "breaker", "quota"):
            metrics.shared_dropped.labels(model, reason)
        for source in ("computed", "cached", "shared", "promoted"):
            metrics.tokens.labels(model, source)
        # Of every request or batch: looking a series up takes longer than all else that is done with it.
        self._series: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def nowhere(cls) -> EngineMetrics:
        """Metrics that nobody reads."""
        return cls(Metrics(), "none")

    def _of(self, metric: Any, *labels: str) -> Any:
        """The model's series of a metric."""
        key = (id(metric), *labels)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = metric.labels(self._model, *labels)
        return series

    def rows(self, kind: str, outcome: str, count: int) -> None:
        """So many answered rows: "predict", "tokens" or "candidates"; "ok" or the type of their error."""
        self._of(self._metrics.rows, kind, outcome).inc(count)

    def waited(self, seconds: float) -> None:
        """A request's first row begins."""
        self._of(self._metrics.queue_seconds).observe(seconds)

    def queued(self, tokens: int) -> None:
        """New tokens that wait now."""
        self._of(self._metrics.queue_tokens).set(tokens)

    def batch(self, rows: int, tokens: int, seconds: float) -> None:
        """One batch is done."""
        self._of(self._metrics.batch_rows).observe(rows)
        self._of(self._metrics.batch_tokens).observe(tokens)
        self._of(self._metrics.batch_seconds).observe(seconds)

    def work(self, counts: BatchCounts, *, sessions: int, evicted: int, used: int, free: int) -> None:
        """What the last batch computed, and what is held after it. ``evicted``: since the start."""
        metrics, of = self._metrics, self._of
        of(metrics.forwards).inc(counts.forwards)
        of(metrics.tokens, "computed").inc(counts.computed_tokens)
        cached = counts.cached_tokens - counts.promoted_tokens - counts.shared_tokens
        of(metrics.tokens, "cached").inc(max(0, cached))
        of(metrics.tokens, "shared").inc(counts.shared_tokens)
        of(metrics.tokens, "promoted").inc(counts.promoted_tokens)
        for (kind, method), rows in counts.guided.items():
            of(metrics.guided, kind, method).inc(rows)
        of(metrics.sessions).set(sessions)
        of(metrics.evictions).inc(max(0, evicted - self._evicted))
        self._evicted = evicted
        of(metrics.blocks, "used").set(used)
        of(metrics.blocks, "free").set(free)

    def is_ready(self, ready: bool) -> None:
        """The engine takes work now, or does not."""
        self._metrics.ready.labels(self._model).set(int(ready))

    def failed(self) -> None:
        """A batch raised."""
        self._metrics.failures.labels(self._model).inc()

    def realised(
        self,
        length: int,
        *,
        cut: bool,
        horizon: float,
        levels: Sequence[float],
        quantiles: Sequence[int],
        cap: int | None = None,
    ) -> None:
        """A predicted answer's remaining length l; ``cut``: it is longer than that; ``cap``: of the predictions."""
        metrics, model = self._metrics, self._model
        self.window.add(length, cut=cut, horizon=horizon, levels=levels, quantiles=quantiles, cap=cap)
        metrics.feedback.labels(model, "length" if cut else "stop").inc()
        if not cut:
            metrics.relative_error.labels(model).observe(abs(horizon - length) / length)
        for level, quantile in zip(levels, quantiles, strict=True):
            if level_name(level) not in _LEVELS or (cut and length < quantile):
                continue  # a cut answer below the quantile may have ended on either side
            outcome = "beyond" if length > quantile or cut else "within"
            metrics.covered.labels(model, level_name(level), outcome).inc()

    def looked_up(self, outcome: str, seconds: float) -> None:
        """A question to Redis, or one that was not asked."""
        self._metrics.lookups.labels(self._model, outcome).inc()
        if outcome != "open":
            self._metrics.lookup_seconds.labels(self._model).observe(seconds)

    def memo(self) -> None:
        """A prediction's numbers came from Redis."""
        self._metrics.shared_results.labels(self._model).inc()

    def written(self, nbytes: int) -> None:
        """So much was stored there."""
        self._metrics.shared_written.labels(self._model).inc(nbytes)

    def dropped(self, reason: str, count: int) -> None:
        """So many values were not."""
        self._metrics.shared_dropped.labels(self._model, reason).inc(count)

    def corrupt(self) -> None:
        """A value there was refused."""
        self._metrics.shared_corrupt.labels(self._model).inc()

    def breaker(self, is_open: bool) -> None:
        """Redis is left alone now, or asked again."""
        self._metrics.shared_open.labels(self._model).set(int(is_open))

    def break_even(self, tokens: float) -> None:
        """What was measured says so."""
        self._metrics.break_even.labels(self._model).set(tokens)
