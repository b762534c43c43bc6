"""Cleaning up after a failure or an abort."""

from __future__ import annotations

import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)


def clean_up(*steps: Callable[[], object]) -> None:
    """Try every step (closing, removing, unlocking) in order, whatever the others raise; log the errors, raise none.

    The caller sees the error that made the cleanup necessary, not one that follows from it.
    """
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 (the next step must be tried, and the first error stays the caller's)
            _log.warning("a cleanup step failed: %r", error)
