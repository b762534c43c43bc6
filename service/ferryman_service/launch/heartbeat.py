"""A worker's sign of life: a file that it touches. It works on a full disk and without a database."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Final

from ferryman_service.domain.heartbeat import Heartbeat

_log = logging.getLogger(__name__)
HEARTBEAT: Final = "heartbeat"
"""The name of the file, in the folder that an attempt has for itself."""
_INTERVAL_S: Final = 1.0


def beat(path: Path, heartbeat: Heartbeat) -> None:
    """Touch the file about once a second from now on, as long as the process runs and `heartbeat` is alive."""
    threading.Thread(target=_beat_for_ever, args=(path, heartbeat), name="heartbeat", daemon=True).start()


def last_beat(path: Path) -> int | None:
    """Return a number that changes with every beat; None if there is no such file."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _beat_for_ever(path: Path, heartbeat: Heartbeat) -> None:
    trouble = ""
    while True:
        if heartbeat.is_alive():
            try:
                os.utime(path)
            except OSError as error:
                if trouble != (trouble := str(error)):
                    _log.warning("no sign of life can be given: %s", error)
        time.sleep(_INTERVAL_S)
