"""A tracer whose spans stay in this process, to be looked at."""

from __future__ import annotations

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

from ferryman_service.observability.otel import OtelTracer


class KeptSpans:
    """`tracer` fills it; `provider` may be given to others too."""

    def __init__(self, sampler=None):
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler or ParentBased(ALWAYS_ON), shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OtelTracer(self.provider)

    def all(self):
        """Every span that has ended, in that order."""
        return self._exporter.get_finished_spans()

    def named(self, name):
        """The spans of that name."""
        return [span for span in self.all() if span.name == name]

    def one(self, name):
        """The only span of that name."""
        [span] = self.named(name)
        return span

    def ancestors(self, span):
        """The names of the spans around, the nearest first."""
        by_id = {each.context.span_id: each for each in self.all()}
        names = []
        while span.parent is not None and span.parent.span_id in by_id:
            span = by_id[span.parent.span_id]
            names.append(span.name)
        return names
