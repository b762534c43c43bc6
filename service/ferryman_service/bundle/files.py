"""Opening the files of a bundle, which may come from anywhere: regular files alone, of the size that they should have.

A link could name any file of the machine, a pipe or a device would let its reader wait or read without an end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.os_errors import refuse_if_exhausted

_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered, and follow no link.

    Raises ModelDamaged naming the file, TooManyOpenFiles.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # to open a device may already do something
            raise _not_regular(path)
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        refuse_if_exhausted(error)
        raise ModelDamaged(f"{path.name} cannot be read: {error.strerror}", file=path.name) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was exchanged in between
        os.close(descriptor)
        raise _not_regular(path)
    return open(descriptor, "rb", buffering=0)


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


def _not_regular(path: Path) -> ModelDamaged:
    text = f"{path.name} is a link, a folder, a pipe or a device: put the file itself into the bundle"
    return ModelDamaged(text, file=path.name)
