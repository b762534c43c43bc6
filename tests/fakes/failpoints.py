"""Lets the operating system fail at any one of the calls that this process makes on the files of a folder.

The calls are found by watching, not listed: whatever Python code does to a file below the folder passes through the
functions that are replaced here for the length of a `with` block, and each change to the database through SQLAlchemy's
dialect.
Product code knows nothing of it, so no user can reach it and nothing is paid for it.
"""

from __future__ import annotations

import builtins
import enum
import errno
import fcntl
import io
import os
import re
import signal
import sqlite3
import traceback
from pathlib import Path

from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

CRASHED = 99
"""Exit status of a process that Fault.CRASH has ended."""
_IDS = re.compile(r"[0-9a-f]{32}|(cor|run)_[0-9a-z]+")
_BY_PATH = ("mkdir", "rmdir", "rename", "unlink", "link", "open", "chmod", "utime", "scandir", "listdir")
_BY_DESCRIPTOR = ("close", "fsync", "write", "ftruncate", "sendfile")
_NEEDS_ROOM = frozenset(
    {"mkdir", "create", "link", "write", "sendfile", "fsync", "INSERT", "UPDATE", "DELETE", "COMMIT"}
)
_NEEDS_DESCRIPTOR = frozenset({"open", "create", "scandir", "listdir"})
_SQLITE_CODES = {errno.EIO: sqlite3.SQLITE_IOERR, errno.ENOSPC: sqlite3.SQLITE_FULL}


class Fault(enum.Enum):
    """How a call fails. An I/O error comes once; a full disk, and a process without descriptors, stay so."""

    CRASH = 0
    EIO = errno.EIO
    ENOSPC = errno.ENOSPC
    EMFILE = errno.EMFILE

    def strikes(self, name: str) -> bool:
        """Tell whether the call can fail so."""
        call = name.partition(" ")[0]
        if self is Fault.ENOSPC:
            return call in _NEEDS_ROOM
        if self is Fault.EMFILE:
            return call in _NEEDS_DESCRIPTOR
        return self is Fault.CRASH or call != "COMMITTED"


class Failpoints:
    """A context in which the call with a number, from 0, fails; without a fault, all are only noted in `seen`."""

    def __init__(self, folder: Path, fault: Fault | None = None, number: int = -1) -> None:
        self.seen: list[str] = []
        self._folder = str(folder.resolve())
        self._fault, self._number = fault, number
        self._real = {}
        self._changes_database = False

    def __enter__(self):
        for module, name in [(os, name) for name in (*_BY_PATH, *_BY_DESCRIPTOR)] + [(fcntl, "flock")]:
            self._replace(module, name, self._watching(name, getattr(module, name)))
        self._replace(io, "open", self._opening(io.open))
        self._replace(builtins, "open", io.open)
        dialect = SQLiteDialect_pysqlite
        self._replace(dialect, "do_commit", self._committing(dialect.do_commit))
        for name in ("do_execute", "do_executemany"):
            self._replace(dialect, name, self._executing(getattr(dialect, name)))
        return self

    def __exit__(self, *_):
        for (owner, name), real in self._real.items():
            setattr(owner, name, real)

    def point(self, name, do=lambda: None, half=lambda: None):
        """Pass a failpoint: return what `do` returns, or fail. `half` is what a crash may leave done of it."""
        number = len(self.seen)
        self.seen.append(name)
        fault = self._fault
        is_it = number == self._number or (number > self._number >= 0 and fault in (Fault.ENOSPC, Fault.EMFILE))
        if fault is None or not is_it or not fault.strikes(name):
            return do()
        if fault is Fault.CRASH:
            if number % 2:
                half()
            os._exit(CRASHED)
        if name.startswith("close"):
            do()  # a descriptor is closed, whatever close returns
        raise self._error(fault.value, name)

    def _error(self, number, name):
        if name.partition(" ")[0].isupper():
            error = sqlite3.OperationalError(os.strerror(number))
            error.sqlite_errorcode = _SQLITE_CODES[number]
            return error
        return OSError(number, os.strerror(number), name)

    def _replace(self, owner, name, new):
        self._real[owner, name] = getattr(owner, name)
        setattr(owner, name, new)

    def _name(self, call, file, dir_fd=None):
        """Return the failpoint's name; None if it is about no file of the folder."""
        if not isinstance(file, int | str | os.PathLike):
            return None
        try:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
            if dir_fd is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        except OSError:
            return None
        path = os.path.abspath(path)
        if not path.startswith(self._folder):
            return None
        return f"{call} {_IDS.sub('*', path.removeprefix(self._folder))}"

    def _watching(self, call, real):
        def watched(file, *args, **options):
            creates = call == "open" and args and args[0] & os.O_CREAT
            name = self._name("create" if creates else call, file, options.get("dir_fd"))
            if name is None:
                return real(file, *args, **options)
            return self.point(name, lambda: real(file, *args, **options))

        return watched

    def _opening(self, real):
        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            def plain():
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)

            is_written = bool(set(mode) & set("wxa+"))
            name = self._name("create" if is_written else "open", file)
            if name is None:
                return plain()
            if not isinstance(file, int):
                self.point(name)
            if not is_written:
                return plain()
            raw = _File(file, mode.replace("t", ""), closefd, opener)
            raw.points, raw.path = self, file
            if buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

        return opened

    def _executing(self, real):
        def execute(dialect, cursor, statement, *args, **options):
            call, *words = statement.split()
            if call == "BEGIN":
                self._changes_database = False
            elif call in _NEEDS_ROOM:
                self._changes_database = True
                self.point(f"{call} {words[0] if call == 'UPDATE' else words[1]}")
            return real(dialect, cursor, statement, *args, **options)

        return execute

    def _committing(self, real):
        def commit(dialect, connection):
            if self._changes_database:
                self.point("COMMIT", lambda: real(dialect, connection))
                self.point("COMMITTED")
            else:
                real(dialect, connection)

        return commit


class _File(io.FileIO):
    """A file whose system calls are failpoints: those of a buffer come when it is flushed, at the latest in close."""

    points = path = None

    def write(self, data):
        name = self.points._name("write", self.path)
        data = bytes(data)
        return self.points.point(
            name, lambda: super(_File, self).write(data), lambda: super(_File, self).write(data[: len(data) // 2])
        )

    def close(self):
        if self.points is None or self.closed:
            super().close()
        else:
            self.points.point(self.points._name("close", self.path), super().close)


def in_child(work, timeout_s=60):
    """Do the work in a child process that ends without cleaning up; return its exit status: 0, CRASHED, or 1."""
    child = os.fork()
    if child == 0:
        signal.alarm(timeout_s)
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 (the child ends here)
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
