"""Where a run's files lie, how they are written, and what a full disk means."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ferryman_service.domain.training import DiskIsFull


@dataclass(frozen=True)
class RunFiles:
    """The files that training keeps in a run's folder."""

    run_dir: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def weights(self) -> Path:
        """The weights that training ends with."""
        return self.run_dir / "weights.safetensors"

    @property
    def epochs(self) -> Path:
        """The folder of pairs that were segmented for one epoch."""
        return self.run_dir / "epochs"


class Disk:
    """The changes that training makes to the disk, one by one, so that a test can let each of them fail."""

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file and wait until the disk has it."""
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def make_folder(self, path: Path) -> None:
        """Make a folder that does not exist."""
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or a folder."""
        source.rename(target)

    def remove(self, folder: Path) -> None:
        """Remove a folder with everything in it; harmless if there is none."""
        shutil.rmtree(folder, ignore_errors=True)

    def sync(self, folder: Path) -> None:
        """Wait until the disk has the folder's list of names."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def disk_full_is_told(folder: Path) -> Iterator[None]:
    """Raise DiskIsFull, naming the folder, in place of the operating system's "no space left"."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskIsFull(f"no space left for the files of the run in {folder} ({error.strerror})") from error
