"""Room that is kept free for the last word of a worker whose disk is full."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Final

from ferryman_service.domain.cleanup import clean_up

_log = logging.getLogger(__name__)
_SIZE_BYTES: Final = 1 << 20


def make_reserve(path: Path) -> None:
    """Take the room, unless it is taken already; without any, there is no reserve."""
    if path.exists():
        return
    try:
        path.write_bytes(bytes(_SIZE_BYTES))
    except OSError as error:
        _log.warning("no reserve for a full disk: %s", error)
        clean_up(partial(free_reserve, path))


def free_reserve(path: Path) -> None:
    """Give the room back."""
    path.unlink(missing_ok=True)
