"""One training service per data folder: two supervisors would start each run twice."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderInUse(OSError):
    """Another process holds the folder."""


class FolderLock:
    """An advisory lock on a file; the kernel releases it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        """Store the path; nothing is locked yet."""
        self._path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; raises FolderInUse at once if another process has it."""
        # Not inheritable, or a worker that outlives the service would keep it locked.
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FolderInUse(
                f"{self._path.parent} is in use by another training service; stop it, choose another --data-dir, "
                "or serve with --roles translation"
            ) from error
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; harmless without it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
