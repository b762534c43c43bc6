"""The tracer that OpenTelemetry is behind. Imported only where traces are wanted, since its packages are an extra."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry import context, propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ferryman_service.domain.tracing import Attributes, Span
from ferryman_service.domain.training import PauseRequested, RunCancelled, StopRequested

_EXPORT_TIMEOUT_S: Final = 5.0
_EXPORT_DELAY_MS: Final = 1000.0
_CLOSE_TIMEOUT_S: Final = 1.5
_TRACEPARENT: Final = "traceparent"
_STORED: Final = TraceContextTextMapPropagator()
"""What outlives a process is written as W3C says, whatever OTEL_PROPAGATORS makes of the wire."""
_ORDERLY: Final = (RunCancelled, PauseRequested, StopRequested, asyncio.CancelledError, GeneratorExit)
"""Ways to end a block that are no failure."""
_NONE: Final[Attributes] = {}


def otlp_provider(endpoint: str, sample_ratio: float, service: str, version: str) -> TracerProvider:
    """Return a provider that sends to a collector. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and the environment
    variables of the exporter (headers, certificates) count too."""
    resource = Resource.create({SERVICE_VERSION: version})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    sampler = ParentBased(TraceIdRatioBased(sample_ratio))
    provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS))
    return provider


class OtelTracer:
    """Implements domain.tracing.Tracer. The provider is its own and no global, so that a process can have several."""

    def __init__(self, provider: TracerProvider, version: str = "") -> None:
        """Store; `close` shuts the provider down."""
        self._provider = provider
        self._tracer = provider.get_tracer("ferryman", version)

    @contextmanager
    def span(
        self,
        name: str,
        attributes: Attributes = _NONE,
        *,
        carrier: Mapping[str, str] | None = None,
        stored: str | None = None,
        serves: bool = False,
    ) -> Iterator[Span]:
        """Time the block; see Tracer."""
        around = None if carrier is None else propagate.extract(carrier)
        if stored is not None:
            around = _STORED.extract({_TRACEPARENT: stored})
        kind = SpanKind.SERVER if serves else SpanKind.INTERNAL
        span = self._tracer.start_span(name, around, kind, attributes)
        token = context.attach(trace.set_span_in_context(span, around))
        ours = _OtelSpan(span)
        try:
            yield ours
        except BaseException as error:
            if not serves and not isinstance(error, _ORDERLY):
                ours.fail(type(error).__name__)
            raise
        finally:
            context.detach(token)
            span.end()

    def past(self, name: str, start_ns: int, end_ns: int, attributes: Attributes = _NONE) -> None:
        """Keep a span that is over; see Tracer."""
        self._tracer.start_span(name, attributes=attributes, start_time=start_ns).end(end_ns)

    def annotate(self, attributes: Attributes) -> None:
        """See Tracer."""
        trace.get_current_span().set_attributes(attributes)

    def is_recording(self) -> bool:
        """See Tracer."""
        return trace.get_current_span().is_recording()

    def context(self) -> str:
        """See Tracer."""
        carrier: dict[str, str] = {}
        _STORED.inject(carrier)
        return carrier.get(_TRACEPARENT, "")

    def close(self) -> None:
        """Send what is left; a collector that does not answer holds up nobody for long."""
        # The provider waits up to half a minute, and cannot be told otherwise.
        closing = threading.Thread(target=self._provider.shutdown, name="trace-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)


class _OtelSpan:
    """Implements domain.tracing.Span."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def trace_id(self) -> str:
        """See Span."""
        return trace.format_trace_id(self._span.get_span_context().trace_id) if self._span.is_recording() else ""

    def set(self, attributes: Attributes) -> None:
        """See Span."""
        self._span.set_attributes(attributes)

    def fail(self, reason: str) -> None:
        """See Span."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(Status(StatusCode.ERROR))
