"""Folders that appear whole, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from ferryman_service.domain.cleanup import clean_up

_log = logging.getLogger(__name__)
_NAME_BYTES: Final = 16
_NAME: Final = re.compile(rf"[0-9a-f]{{{2 * _NAME_BYTES}}}")


class HeldFolder:
    """A new folder with a random name that belongs to this process as long as it lives or until `release`.

    A lock on the folder tells others (`remove_abandoned`) that it is in use; the kernel drops it when the process dies.
    """

    def __init__(self, parent: Path) -> None:
        """Create the folder below `parent` and lock it."""
        self.path = parent / secrets.token_hex(_NAME_BYTES)
        self._descriptor = -1
        try:
            with _locked(parent):  # nobody takes the folder for abandoned before it is locked
                self.path.mkdir()
                self._descriptor = _open_folder(self.path)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError:
            clean_up(partial(remove_folder, self.path), self.release)
            raise

    def release(self) -> None:
        """Remove the folder, unless it was renamed, and let go of it. Harmless when repeated; raises nothing.

        Files that cannot be removed now are left to `remove_abandoned`.
        """
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            clean_up(partial(remove_folder, self.path), partial(os.close, descriptor))


def own_folders(parent: Path, is_own_name: Callable[[str], object]) -> list[Path]:
    """Return the folders in `parent` whose names this program gives, and log what else is there but hidden folders.

    What a file manager, an editor, a file server or a person has left is nobody's to remove here.
    """
    own, foreign = [], []
    for path in sorted(parent.iterdir()):
        if is_own_name(path.name) and path.is_dir():
            own.append(path)
        elif not (path.name.startswith(".") and path.is_dir()):
            foreign.append(path.name)
    if foreign:
        _log.warning("%s holds files that are not Ferryman's, they are left alone: %s", parent, ", ".join(foreign))
    return own


def remove_abandoned(parent: Path) -> None:
    """Remove the folders below `parent` that were made by a HeldFolder and that no living process holds.

    One that cannot be removed is logged, and keeps no other from being removed.
    """
    clean_up(*(partial(_remove_if_abandoned, path) for path in own_folders(parent, _NAME.fullmatch)))


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder whose content is durable, durably."""
    os.rename(source, target)
    sync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder with everything in it, or what else is in its place; harmless if there is none.

    Raises OSError, after trying every file.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)  # once more, for the error that says why


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = _open_folder(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as opened:  # its process was faster
        with _locked(path.parent):
            descriptor = _open_folder(path)
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        # The folder is this process's now: removing gigabytes does not keep anybody from making another one.
        remove_folder(path)


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _open_folder(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
