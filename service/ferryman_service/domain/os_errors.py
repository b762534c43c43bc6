"""The one table from errors of the operating system to domain errors."""

from __future__ import annotations

import errno
import os
from typing import Final

from ferryman_service.domain.errors import DiskFull, FerrymanError, StoreUnavailable, TooManyOpenFiles

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})
_OUT_OF_ORDER: Final = frozenset({errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT})
_EXHAUSTED: Final = NO_FILES | {errno.EAGAIN, errno.ENOMEM}


def domain_error(error: OSError) -> FerrymanError | None:
    """Return the error for what the machine did; None if the operating system says that something else is wrong,
    which then is a mistake of ours. The text names no path of this machine."""
    why = os.strerror(error.errno) if error.errno else "no reason given"
    if error.errno in NO_SPACE:
        return DiskFull("the disk of the data folder has no space left: free some and try again")
    if error.errno in NO_FILES:
        return TooManyOpenFiles(f"no file can be opened now ({why}): try again; the operator can raise the limit")
    if error.errno == errno.EROFS:
        return StoreUnavailable(f"the data folder cannot be written ({why}): the operator must mount it writable")
    if error.errno in _OUT_OF_ORDER:
        return StoreUnavailable(f"the disk of the data folder fails ({why}): the operator must check the disk")
    return None


def is_exhaustion(error: OSError) -> bool:
    """Tell whether the process or the machine has run out of files, processes or memory: it is nobody's mistake, and
    says nothing of the file that was opened or the program that was started."""
    return error.errno in _EXHAUSTED


def refuse_if_exhausted(error: BaseException) -> None:
    """Raise TooManyOpenFiles if the error says nothing of the file, because no file can be opened; else return."""
    if isinstance(error, OSError) and error.errno in NO_FILES and (translated := domain_error(error)) is not None:
        raise translated from error
