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
from pathlib import Path
from typing import Final

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
        with _locked(parent):  # nobody takes the folder for abandoned before it is locked
            self.path.mkdir()
            self._descriptor = _open_folder(self.path)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def release(self) -> None:
        """Remove the folder, unless it was renamed, and let go of it. Harmless when repeated."""
        if self._descriptor >= 0:
            # Whatever cannot be removed now is removed at the next start.
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1


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
    """Remove the folders below `parent` that were made by a HeldFolder and that no living process holds."""
    with _locked(parent):
        for path in own_folders(parent, _NAME.fullmatch):
            try:
                _remove_unless_held(path)
            except OSError as error:
                _log.warning("%s could not be removed, it is left alone: %s", path, error)


def _remove_unless_held(path: Path) -> None:
    descriptor = _open_folder(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder whose content is durable, durably."""
    os.rename(source, target)
    sync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder with everything in it, or what else is in its place; harmless if there is none."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = _open_folder(path)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
