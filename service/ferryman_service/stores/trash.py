"""The trash of the data folder: what was deleted goes here, and is removed a week later.

trash/<id>/note.json    where it lay, why it was moved, and when
trash/<id>/content      the folder or file itself
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ferryman_service.stores.folders import sync_folder

KEPT_DAYS: Final = 7
_KEPT_NS: Final = KEPT_DAYS * 24 * 3600 * 10**9
_ID: Final = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")


def move_to_trash(trash: Path, path: Path, reason: str) -> None:
    """Move a file or folder of the data folder, whose trash this is, durably; harmless if there is nothing.

    Raises OSError; then nothing has moved.
    """
    if not os.path.lexists(path):
        return
    time_ns = time.time_ns()
    stamp = datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y%m%d-%H%M%S")
    entry = trash / f"{stamp}-{secrets.token_hex(4)}"
    entry.mkdir(parents=True)
    note = {"origin": os.path.relpath(path, trash.parent), "reason": reason, "time_ns": time_ns}
    try:
        (entry / "note.json").write_text(json.dumps(note), encoding="utf-8")
        path.rename(entry / "content")
    except OSError:
        shutil.rmtree(entry, ignore_errors=True)
        raise
    for folder in (entry, trash, path.parent):
        sync_folder(folder)


def empty_trash(trash: Path, now_ns: int) -> None:
    """Remove what was moved over a week before `now_ns`; what cannot be removed stays until the next call."""
    for entry in sorted(trash.iterdir()) if trash.is_dir() else ():
        if _ID.fullmatch(entry.name) and _moved_ns(entry) + _KEPT_NS < now_ns:
            shutil.rmtree(entry, ignore_errors=True)


def _moved_ns(entry: Path) -> int:
    try:
        return int(json.loads((entry / "note.json").read_bytes())["time_ns"])
    except (OSError, ValueError, KeyError, TypeError):
        return entry.stat().st_mtime_ns
