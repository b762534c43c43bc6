"""A process that dies at each of its changes to the disk in turn."""

from __future__ import annotations

import os
import shutil
import sys

from ferryman_service.stores.layout import DataFolder

STEP = 1 if os.environ.get("FERRYMAN_SOAK") else 4
_CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir"}


def tree_of(root):
    """Return the content of every file below a folder, by its relative path; None for a folder. The database's own
    files beside it are left out: reading it changes them."""
    return {
        os.path.relpath(path, root): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
        if not path.name.endswith(("-wal", "-shm", ".lock")) and path.exists()
    }


def each_crash(folder, copies, work):
    """Yield copies of a data folder in which `work(copy)` has died before its first change, its fifth, and so on until
    it came to its end; in `make soak` before each."""
    number = 0
    while True:
        copy = DataFolder(shutil.copytree(folder.root, copies / str(number), symlinks=True))
        child = os.fork()
        if child == 0:
            _work_and_die(lambda copy=copy: work(copy), number)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        assert ended in (0, 9), f"the work failed with {ended}, see its output"
        if ended == 0:
            return
        yield copy
        shutil.rmtree(copy.root)
        number += STEP


def _work_and_die(work, before):
    left = before

    def die(event, arguments):
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa")
        changes = event in _CHANGES and not (event == "os.remove" and not os.path.lexists(arguments[0]))
        if changes or writes:
            if left == 0:
                os._exit(9)
            left -= 1

    status = 1
    try:
        sys.addaudithook(die)
        work()
        status = 0
    finally:
        os._exit(status)
