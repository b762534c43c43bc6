"""Where traces are sent to, for tests that look at what has arrived."""

from __future__ import annotations

from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans by OTLP over gRPC, as the OpenTelemetry collector does."""

    def __init__(self):
        self._spans = []
        self.tokens = {}
        """The header x-token of the last spans of each service."""
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context):
        for resource in request.resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.tokens[names["service.name"]] = dict(context.invocation_metadata()).get("x-token", "")
            for scope in resource.scope_spans:
                self._spans += [(names["service.name"], span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name, service="ferryman-service"):
        return [span for process, span in self._spans if (process, span.name) == (service, name)]

    def all_text(self):
        return "".join(str(span) for _, span in self._spans)

    def stop(self):
        self._server.stop(0)
