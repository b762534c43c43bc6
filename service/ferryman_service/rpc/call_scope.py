"""What surrounds a call for those who watch: its request id, the fields of its log lines, its span, its last line."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import grpc

from ferryman_service.domain.errors import FerrymanError, InvalidArgument
from ferryman_service.domain.log_context import FIELDS, MAY_HOLD_TEXT, logging_with
from ferryman_service.domain.tracing import NULL_TRACER, Span, Tracer

REQUEST_ID_KEY: Final = "x-request-id"
"""Metadata: the caller's id of a call, or else one that is made here; returned in the trailing metadata."""
_LEGAL_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_OURS: Final = "ferryman.v1."
_WITH_TEXT: Final = ("ferryman.v1.TranslationService", "ferryman.v1.CorpusService")
_MOST_VIOLATIONS: Final = 8
# As OpenTelemetry's conventions for RPC have it: at a server these are failures, other codes are the caller's affair.
_FAILURES: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
_log = logging.getLogger(__name__)
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class CallScope:
    """One call, from its begin to its end."""

    def __init__(self, service: str, method: str, request_id: str, span: Span, *, log_sentences: bool) -> None:
        self._name = f"{service}/{method}"
        self._request_id = request_id
        self._span = span
        self._may_hold_text = service in _WITH_TEXT and not log_sentences
        # Probes come often, and say little.
        self._level = logging.INFO if service.startswith(_OURS) else logging.DEBUG
        self._failure = ""

    def bug(self, text: str, error: BaseException) -> None:
        """Log an error that must not reach the caller."""
        _log.error("%s: %s", self._name, text, exc_info=error, extra={MAY_HOLD_TEXT: self._may_hold_text})

    def machine_failed(self, error: OSError) -> None:
        """Log an error of the operating system, whose file must not reach the caller."""
        _log.error("%s: %s", self._name, error)

    async def abort(self, context: _Context, status: grpc.Status, error: FerrymanError | None = None) -> None:
        """End the call with the status, and the request id beside it; `error` is what the log may tell of it."""
        if error is not None:
            self._failure = self._told(error)
        trailing = (*(status.trailing_metadata or ()), (REQUEST_ID_KEY, self._request_id))
        try:
            await context.abort(status.code, status.details, trailing)
        except grpc.aio.InternalError as failure:
            # A message is on its way to a caller who does not read: nothing can follow it but the connection's end.
            raise asyncio.CancelledError from failure

    def ended(self, code: grpc.StatusCode, seconds: float) -> None:
        """Say how the call went."""
        self._span.set({"rpc.grpc.status_code": code.value[0]})
        if code in _FAILURES:
            self._span.fail(code.name)
        if _log.isEnabledFor(self._level):
            reason = f": {self._failure}" if self._failure else ""
            fields = {"code": code.name, "seconds": round(seconds, 6)}
            _log.log(self._level, "%s %s%s", self._name, code.name, reason, extra={FIELDS: fields})

    def _told(self, error: FerrymanError) -> str:
        """Return the error for the log. A description may quote what was sent: it is for the caller alone."""
        if self._may_hold_text and isinstance(error, InvalidArgument):
            places = [f"{each.field} {each.reason}" for each in error.violations[:_MOST_VIOLATIONS]]
            more = len(error.violations) - len(places)
            return f"{error.reason}: {', '.join(places)}" + (f" and {more} more" if more else "")
        return f"{error.reason}: {error.message}"


class CallScopes:
    """Opens scopes. `log_sentences`: the log may hold what callers have sent."""

    def __init__(self, tracer: Tracer, *, log_sentences: bool = False) -> None:
        self._tracer = tracer
        self._log_sentences = log_sentences

    @contextmanager
    def open(self, service: str, method: str, context: _Context) -> Iterator[CallScope]:
        """Surround a call of a method that exists."""
        metadata = _texts(context.invocation_metadata())
        request_id = _request_id(metadata)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        attributes["ferryman.request_id"] = request_id
        tracer = self._tracer if service.startswith(_OURS) else NULL_TRACER  # nobody wants a trace of each probe
        with tracer.span(f"{service}/{method}", attributes, carrier=metadata, serves=True) as span:
            fields = {"request_id": request_id, "method": f"{service}/{method}"}
            if span.trace_id:
                fields["trace_id"] = span.trace_id
            with logging_with(**fields):
                yield CallScope(service, method, request_id, span, log_sentences=self._log_sentences)


DEFAULT_SCOPES: Final = CallScopes(NULL_TRACER)
"""Without traces, and without sentences in the log."""


def _texts(metadata: Any) -> Mapping[str, str]:  # noqa: ANN401 (grpc.aio's own class, without a type)
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _request_id(metadata: Mapping[str, str]) -> str:
    """Return the caller's id, if it is one that can stand in a line of the log."""
    given = metadata.get(REQUEST_ID_KEY, "")
    return given if _LEGAL_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
