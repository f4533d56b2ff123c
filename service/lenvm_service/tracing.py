"""OpenTelemetry traces of requests, from the caller's ``traceparent`` through the queue to the device.

Off by default, and then nothing of OpenTelemetry is imported: whoever holds ``Tracing | None`` asks one ``if``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from lenvm import __version__
from lenvm._extras import missing_extra

if TYPE_CHECKING:
    from lenvm_service.api.middleware import RequestContext
    from lenvm_service.engine.queueing import Ticket
    from lenvm_service.settings import Settings

__all__ = ["Tracing", "make_tracing", "traced"]

logger = logging.getLogger(__name__)

_NOTHING: AbstractContextManager[None] = nullcontext()
_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def make_tracing(settings: Settings) -> Tracing | None:
    """Where ``--otel-endpoint`` or OpenTelemetry's own variables name a collector; None where traces are off.

    Raises MissingExtraError where the option asks for what is not installed. A variable, which may be there for all
    that runs on a machine, is only warned about.
    """
    named = settings.otel_endpoint
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if named is None and (disabled or not any(os.environ.get(name) for name in _VARIABLES)):
        return None
    try:
        return Tracing(named)
    except ModuleNotFoundError as error:
        missing = missing_extra("otel", error.name or "opentelemetry")
        if named is not None:
            raise missing from None
        logger.warning("no traces, although a variable names a collector: %s", missing)
        return None


def traced(tracing: Tracing | None, name: str, **attributes: Any) -> AbstractContextManager[Any]:
    """A span around a block, where there are traces."""
    return _NOTHING if tracing is None else tracing.span(name, **attributes)


class Tracing:
    """Spans to an OTLP/HTTP collector; a thread of its own sends them, and what it cannot send is dropped.

    ``endpoint``: the collector's base URL, ``http://host:4318``; None takes OpenTelemetry's variables, which set all
    else too: service name, headers, sampling, batches.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        from opentelemetry import context, propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._trace, self._context, self._propagate = trace, context, propagate
        own = {"service.version": __version__}
        if "OTEL_SERVICE_NAME" not in os.environ:
            own["service.name"] = "lenvm"
        self._provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
        url = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("lenvm_service", __version__)

    def close(self) -> None:
        """Send what waits, for some seconds at most."""
        self._provider.force_flush(5_000)
        self._provider.shutdown()

    def span(self, name: str, **attributes: Any) -> AbstractContextManager[Any]:
        """A span around a block, below the one that is current."""
        current: AbstractContextManager[Any] = self._tracer.start_as_current_span(name, attributes=attributes)
        return current

    @contextmanager
    def request(self, scope: Any, route: str, context: RequestContext) -> Iterator[None]:
        """The span of one HTTP request, below the caller's. ``context`` tells at the end what became of it."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        with self._tracer.start_as_current_span(
            f"{scope['method']} {route}",
            context=self._propagate.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "http.route": route,
                "lenvm.request_id": context.request_id,
            },
        ) as span:
            yield
            told = {
                "http.response.status_code": context.status,
                "lenvm.model": context.model,
                "lenvm.rows": context.rows,
            }
            if context.error_type != "none":
                told["error.type"] = context.error_type
            span.set_attributes({name: value for name, value in told.items() if value is not None})
            if context.status >= 500:
                span.set_status(self._trace.StatusCode.ERROR)

    def carrier(self) -> dict[str, str]:
        """The current span, for another process."""
        found: dict[str, str] = {}
        self._propagate.inject(found)
        return found

    @contextmanager
    def attached(self, carrier: Mapping[str, str]) -> Iterator[None]:
        """What another process said is current in the block."""
        token = self._context.attach(self._propagate.extract(carrier))
        try:
            yield
        finally:
            self._context.detach(token)

    def here(self) -> Any:
        """What a thread that works for this request needs to know: see ``Ticket.trace``."""
        return self._context.get_current()

    @contextmanager
    def batch(self, tickets: Sequence[Ticket], first: Sequence[Ticket], **attributes: int) -> Iterator[None]:
        """The span of one batch, on the engine's thread, and what it is to each request in it.

        A span has one parent: the batch stands in the trace of its first request, with links to all others. Every
        request gets the time that it waited (``first``: those whose first batch this is) and the time that it was
        worked on, which has a link to the batch.
        """
        now, began = time.monotonic(), time.time_ns()
        for ticket in first:
            waited = round(1e9 * (now - ticket.arrived))
            self._tracer.start_span("queue", ticket.trace, start_time=began - waited).end(began)
        links = [self._link(self._trace.get_current_span(ticket.trace)) for ticket in tickets[1:]]
        parent = tickets[0].trace if tickets else None
        span = self._tracer.start_span("batch", parent, links=links, attributes=attributes)
        try:
            with self._trace.use_span(span, end_on_exit=True):
                yield
        finally:
            for ticket in tickets:
                work = self._tracer.start_span("inference", ticket.trace, links=[self._link(span)], start_time=began)
                work.end()

    def _link(self, span: Any) -> Any:
        return self._trace.Link(span.get_span_context())
