"""One training service per data folder: two supervisors would start each run twice."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


class FolderInUse(OSError):
    """Another process holds the folder."""


class FolderLock:
    """An advisory lock on a file; the kernel releases it when the process ends, however it ends.

    It locks the file, not its name: whoever removes the folder and makes it anew makes another file, which another
    process can lock. `is_held` and `is_lost` compare the two; both are safe to call from every thread.
    """

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

    def is_held(self) -> bool:
        """Tell whether the path leads to the file that this process has locked; not so while the folder is away."""
        locked, found = self._locked(), self._found()
        return locked is not None and found is not None and os.path.samestat(locked, found)

    def is_lost(self) -> bool:
        """Tell whether the locked file was deleted or another one is in its place. One that is away may return."""
        if self._descriptor is None:
            return False
        found = self._found()
        try:
            locked = os.fstat(self._descriptor)
        except OSError as error:  # a file server whose export was made anew does not know the file any more
            return error.errno == errno.ESTALE and found is not None
        return locked.st_nlink == 0 or (found is not None and not os.path.samestat(locked, found))

    def _locked(self) -> os.stat_result | None:
        if self._descriptor is None:
            return None
        try:
            return os.fstat(self._descriptor)
        except OSError:  # the file server that has it does not answer for it any more
            return None

    def _found(self) -> os.stat_result | None:
        try:
            return os.stat(self._path)
        except OSError:
            return None

    def release(self) -> None:
        """Give the lock back; harmless without it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
