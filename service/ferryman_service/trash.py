"""The trash of the data folder: what has lost its row or is damaged goes here, and is deleted a week later.

    trash/<id>/note.json    where it lay, why it was moved, and when
    trash/<id>/content      the folder or file itself

The note is durable before the content arrives, so an entry without content is what a crash has left of a move that
never happened. To take something back, move `content` to where the note says it lay.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

_log = logging.getLogger(__name__)
KEPT_DAYS: Final = 7
_KEPT_NS: Final = KEPT_DAYS * 24 * 3600 * 10**9
_NOTE: Final = "note.json"
_CONTENT: Final = "content"
_ID: Final = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class TrashEntry:
    """Something in the trash. `origin` is relative to the data folder; `time_ns` is when it was moved."""

    folder: Path
    origin: str
    reason: str
    time_ns: int

    @property
    def content(self) -> Path:
        """What was moved."""
        return self.folder / _CONTENT

    @property
    def end_ns(self) -> int:
        """When it is deleted, in nanoseconds since 1970."""
        return self.time_ns + _KEPT_NS

    def size_bytes(self) -> int:
        """Return the size of its files, symbolic links not followed."""
        if not self.content.is_dir() or self.content.is_symlink():
            return _size_bytes(self.content)
        return sum(_size_bytes(Path(folder) / name) for folder, _, names in os.walk(self.content) for name in names)


def move_to_trash(trash: Path, path: Path, reason: str) -> TrashEntry | None:
    """Move a file or folder of the data folder, whose trash this is, durably; a symbolic link is moved, not followed.

    Return None if there is nothing. Raises OSError, as for a path on another file system; then nothing has moved.
    """
    if not os.path.lexists(path):
        return None
    time_ns = time.time_ns()
    stamp = datetime.fromtimestamp(time_ns / 1e9, UTC).strftime("%Y%m%d-%H%M%S")
    entry = TrashEntry(
        folder=trash / f"{stamp}-{secrets.token_hex(4)}",
        origin=os.path.relpath(path, trash.parent),
        reason=reason,
        time_ns=time_ns,
    )
    entry.folder.mkdir(parents=True)
    try:
        _write_note(entry)
        _sync(trash)
        path.rename(entry.content)
    except FileNotFoundError:  # somebody else was faster
        shutil.rmtree(entry.folder, ignore_errors=True)
        return None
    except OSError:
        shutil.rmtree(entry.folder, ignore_errors=True)
        raise
    _sync(entry.folder)
    _sync(path.parent)
    _log.warning("moved %s to %s: %s", entry.origin, entry.content, reason)
    return entry


def list_trash(trash: Path) -> list[TrashEntry]:
    """Return what is in the trash, the oldest first; what is not Ferryman's there is left out."""
    if not trash.is_dir():
        return []
    return [_read(path) for path in sorted(trash.iterdir()) if _ID.fullmatch(path.name) and path.is_dir()]


def empty_trash(trash: Path, now_ns: int) -> None:
    """Delete what was moved over a week before `now_ns`; what cannot be deleted is logged and stays."""
    for entry in list_trash(trash):
        if entry.end_ns < now_ns:
            _log.info("deleting %s, which was moved from %s: %s", entry.folder, entry.origin, entry.reason)
            delete_entry(entry)


def delete_entry(entry: TrashEntry) -> None:
    """Delete an entry now, its note last: what a crash leaves is still known for what it is."""
    try:
        if entry.content.is_dir() and not entry.content.is_symlink():
            shutil.rmtree(entry.content)
        else:
            entry.content.unlink(missing_ok=True)
        shutil.rmtree(entry.folder)
    except OSError as error:
        _log.warning("%s could not be deleted, it is tried again: %s", entry.folder, error)


def _write_note(entry: TrashEntry) -> None:
    note = {"origin": entry.origin, "reason": entry.reason, "time_ns": entry.time_ns}
    with (entry.folder / _NOTE).open("w", encoding="utf-8") as file:
        json.dump(note, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(entry.folder)


def _read(folder: Path) -> TrashEntry:
    try:
        note: dict[str, Any] = json.loads((folder / _NOTE).read_bytes())
        return TrashEntry(
            folder=folder, origin=str(note["origin"]), reason=str(note["reason"]), time_ns=int(note["time_ns"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        time_ns = folder.stat().st_mtime_ns
        return TrashEntry(folder=folder, origin="unknown", reason="its note cannot be read", time_ns=time_ns)


def _size_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
