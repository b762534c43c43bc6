"""The low-water mark of the data folder's disk: below it nothing new begins, so that runs in progress can end.

Uploads, imports and new runs stop at the mark. Checkpoints, records and the publications of runs go on: what they still
need is what the mark keeps free.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.domain.errors import DiskFull

_log = logging.getLogger(__name__)
_BYTES_PER_MIB: Final = 2**20
_MOST_KEPT_BYTES: Final = 2 << 30
_KEPT_SHARE: Final = 20
"""By default the mark is a twentieth of the disk, 2 GiB at most. Of a large disk a twentieth would be far more than any
run needs to end, and a small one (a container's, a laptop's) may have no 2 GiB in all."""


@dataclass(frozen=True)
class DiskSpace:
    """What a disk has free, and its mark, bytes."""

    free_bytes: int
    mark_bytes: int


class FreeSpace:
    """The disk of a folder. Safe to use from every thread."""

    def __init__(self, folder: Path, min_free_mib: int = 0) -> None:
        """Store; 0: a twentieth of the disk, 2 GiB at most."""
        self._folder = folder
        self._min_free_mib = min_free_mib
        self._was_low = False

    def look(self) -> DiskSpace:
        """Ask the file system; raises OSError."""
        found = os.statvfs(self._folder)
        automatic = min(found.f_blocks * found.f_frsize // _KEPT_SHARE, _MOST_KEPT_BYTES)
        mark_bytes = self._min_free_mib * _BYTES_PER_MIB or automatic
        return DiskSpace(free_bytes=found.f_bavail * found.f_frsize, mark_bytes=mark_bytes)

    def require(self, size_bytes: int = 0) -> None:
        """Raise DiskFull if less than the mark would be free after writing so much."""
        try:
            space = self.look()
        except OSError:
            return  # the write itself will report the error
        if space.free_bytes - size_bytes < space.mark_bytes:
            free_mib, mark_mib = space.free_bytes // _BYTES_PER_MIB, -(-space.mark_bytes // _BYTES_PER_MIB)
            needed = f" after writing {-(-size_bytes // _BYTES_PER_MIB)}" if size_bytes else ""
            raise DiskFull(
                f"the disk of the data folder has {free_mib} MiB free and must keep {mark_mib}{needed}: delete runs or "
                "model versions, enlarge the disk, or start the service with a lower --min-free-mib",
                free_mib=free_mib,
                min_free_mib=mark_mib,
            )

    def has_room(self) -> bool:
        """Tell whether the mark is free; the log tells when that changes."""
        try:
            self.require()
        except DiskFull as error:
            if not self._was_low:
                _log.warning("uploads, imports and new runs are refused: %s", error.message)
            self._was_low = True
        else:
            if self._was_low:
                _log.info("the disk of the data folder has room again")
            self._was_low = False
        return not self._was_low
