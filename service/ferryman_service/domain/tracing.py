"""What the layers below gRPC tell a distributed trace, and the tracer that keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol, TypeAlias

Attributes: TypeAlias = Mapping[str, str | int | float | bool]
"""What a span says of itself: numbers, ids and names, never the text of a sentence."""
_NONE: Final[Attributes] = {}


class Span(Protocol):
    """A span that has not ended."""

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; "" if the span is not kept."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        ...

    def fail(self, reason: str) -> None:
        """Mark the span as failed; `reason` is a code or the name of a class."""
        ...


class Tracer(Protocol):
    """Makes spans. Safe to use from every thread and task; the span around is the one of the caller's."""

    def span(
        self,
        name: str,
        attributes: Attributes = _NONE,
        *,
        carrier: Mapping[str, str] | None = None,
        stored: str | None = None,
        serves: bool = False,
    ) -> AbstractContextManager[Span]:
        """Time the block, as a child of the span around it, or of one in another process: the one that the headers of a
        call (`carrier`) name, or the one whose `context` was `stored`. An error that ends the block marks the span as
        failed, without the error's text; but of a call at its server (`serves`) who opened the span says how it went.
        """
        ...

    def past(self, name: str, start_ns: int, end_ns: int, attributes: Attributes = _NONE) -> None:
        """Keep a span that is over, a child of the one around. Times are nanoseconds since 1970."""
        ...

    def annotate(self, attributes: Attributes) -> None:
        """Add attributes to the span around."""
        ...

    def is_recording(self) -> bool:
        """Tell whether there is a span around, and it is kept."""
        ...

    def context(self) -> str:
        """Return the span around as W3C's `traceparent`, to go on with in another process; "" without one."""
        ...

    def close(self) -> None:
        """Send what is left, or give up soon. Spans that end later are lost."""
        ...


class _NullSpan:
    """A span that is not kept."""

    trace_id = ""

    def set(self, attributes: Attributes) -> None:
        """Do nothing."""

    def fail(self, reason: str) -> None:
        """Do nothing."""


_NULL_SPAN: Final[AbstractContextManager[Span]] = nullcontext(_NullSpan())


class NullTracer:
    """The tracer of a process that does not trace."""

    def span(
        self,
        name: str,
        attributes: Attributes = _NONE,
        *,
        carrier: Mapping[str, str] | None = None,
        stored: str | None = None,
        serves: bool = False,
    ) -> AbstractContextManager[Span]:
        """Run the block."""
        return _NULL_SPAN

    def past(self, name: str, start_ns: int, end_ns: int, attributes: Attributes = _NONE) -> None:
        """Do nothing."""

    def annotate(self, attributes: Attributes) -> None:
        """Do nothing."""

    def is_recording(self) -> bool:
        """There is no span."""
        return False

    def context(self) -> str:
        """There is no span."""
        return ""

    def close(self) -> None:
        """Do nothing."""


NULL_TRACER: Final = NullTracer()
