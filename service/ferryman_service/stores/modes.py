"""Who may read and write the data folder."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)
_WORLD: Final = 0o007
_WORLD_WRITES: Final = 0o002
_GROUP: Final = 0o070
_GROUP_WRITES: Final = 0o020


class WorldWritable(PermissionError):
    """Every user of the machine can write to the data folder."""


def close_to_others(folder: Path) -> None:
    """Take the permissions of other users from the folder, if it belongs to this user.

    The group keeps what it has if it is one of this process's own and may write, as on a volume of Kubernetes with an
    fsGroup, or if others had nothing: then somebody has chosen so. A folder that others can read after all warns.
    Raises WorldWritable if they can write it, or could have put something into it.
    """
    found = folder.stat()
    mode = stat.S_IMODE(found.st_mode)
    if not mode & _WORLD:
        return
    is_own = found.st_uid == os.geteuid()
    trouble = "which belongs to another user"
    if is_own and not (mode & _WORLD_WRITES and any(folder.iterdir())):
        shared = mode & _GROUP_WRITES and found.st_gid in {os.getegid(), *os.getgroups()}
        try:
            folder.chmod(mode & ~_WORLD if shared else mode & ~(_WORLD | _GROUP))
        except OSError as error:
            trouble = f"and its mode cannot be changed: {error}"
        else:
            return
    if mode & _WORLD_WRITES:
        text = f"every user of this machine can write to the data folder {folder.absolute()}: look whether what it"
        give = "" if is_own else f"chown -R {os.geteuid()}:{os.getegid()} {folder.absolute()} && "
        raise WorldWritable(f"{text} holds is yours, then make it so: {give}chmod o-w {folder.absolute()}")
    _log.warning("every user of this machine can read the data folder %s, %s", folder.absolute(), trouble)


def umask_for(folder: Path) -> int:
    """Return the umask that gives files in the folder to whom the folder is given, and nothing to other users."""
    group = stat.S_IMODE(folder.stat().st_mode) & _GROUP
    return _WORLD | (_GROUP ^ group)
