"""Where a run's files lie, and what a full disk means."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ferryman_service.domain.runs import FailureReason, TrainingFailed


@dataclass(frozen=True)
class RunFiles:
    """The files that training keeps in a run's folder."""

    run_dir: Path

    @property
    def subwords(self) -> Path:
        """The subword model."""
        return self.run_dir / "subwords.model"

    @property
    def pairs(self) -> Path:
        """The folder of the tokenised training pairs."""
        return self.run_dir / "pairs"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def weights(self) -> Path:
        """The weights that training ends with."""
        return self.run_dir / "weights.safetensors"

    def start_afresh(self) -> None:
        """Remove what an earlier attempt left."""
        for folder in (self.pairs, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.subwords, self.weights):
            file.unlink(missing_ok=True)
        self.checkpoints.mkdir()


@contextmanager
def disk_full_is_a_failure(folder: Path) -> Iterator[None]:
    """Raise TrainingFailed (DISK_FULL), naming the folder, in place of the operating system's "no space left"."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"no space left for the files of the run in {folder} ({error.strerror}): free some, then train again"
        raise TrainingFailed(FailureReason.DISK_FULL, text) from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
