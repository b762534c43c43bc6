"""Checks that several requests share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from ferryman_service.domain.errors import Violation


def request_id_violations(request_id: str, field: str = "request_id") -> Iterator[Violation]:
    """Yield a violation unless the id is empty or a UUID."""
    if not request_id:
        return
    try:
        canonical = str(uuid.UUID(request_id))
    except ValueError:
        canonical = ""
    if canonical != request_id.lower():
        text = f"is {request_id[:80]!r}, must be a UUID such as {uuid.UUID(int=0x1B4E28BA2FA141D28383B9B5F2A3C8D1)}"
        yield Violation(field=field, description=text, reason="NOT_A_UUID")


def required(value: str, field: str) -> Iterator[Violation]:
    """Yield a violation if the value is empty."""
    if not value:
        yield Violation(field=field, description="is required", reason="REQUIRED")
