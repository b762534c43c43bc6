"""How many files, sockets among them, this process has open and may have open."""

from __future__ import annotations

import os
import resource
import sys
from typing import Final

from ferryman_service.domain.os_errors import NO_FILES

_OPENED: Final = "/proc/self/fd"


def raise_limit() -> int:
    """Raise the soft limit to the hard one, and return it: the shell's soft limit of 1,024 is one for programs that use
    select(2), which this one does not."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return limit()


def limit() -> int:
    """Return how many this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def count() -> int:
    """Return how many this process has; the limit if there are too many to look."""
    try:
        return len(os.listdir(_OPENED)) - 1  # without that of the folder itself
    except OSError as error:
        if error.errno not in NO_FILES:
            raise
        return limit()


def half_used() -> bool:
    """Tell whether half of the limit is used."""
    return 2 * count() >= limit()


def are_exhausted() -> bool:
    """Tell whether no file can be opened now. Libraries that report a file as damaged do not say so."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in NO_FILES
    return False
