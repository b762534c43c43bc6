"""Processes that cannot be mistaken for one another. Linux only: it reads /proc (proc(5)) and calls prctl(2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path
from typing import Final

from ferryman_service.domain.runs import ProcessIdentity

_PR_SET_PDEATHSIG: Final = 1
_STATE_FIELD: Final = 0
_START_TIME_FIELD: Final = 19
"""Fields of /proc/<pid>/stat, counted from the one after the program's name, which may itself hold spaces."""


def process_identity(pid: int) -> ProcessIdentity | None:
    """Return the identity of a living process; a zombie does not live."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[_STATE_FIELD] in ("Z", "X"):
        return None
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ProcessIdentity(pid=pid, start_ticks=int(fields[_START_TIME_FIELD]), boot_id=boot_id)


def current_process_identity() -> ProcessIdentity:
    """Return the identity of this process."""
    identity = process_identity(os.getpid())
    assert identity is not None, "this process lives"
    return identity


def is_alive(identity: ProcessIdentity) -> bool:
    """Tell whether this very process, and not another with its pid, still lives."""
    return process_identity(identity.pid) == identity


def kill_process(identity: ProcessIdentity) -> None:
    """Send SIGKILL to this very process; harmless if it is gone."""
    if is_alive(identity):
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, signal.SIGKILL)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, whatever the parent dies of.

    A worker without its torchrun agent would train on with nobody to end it. Call it from the main thread, early.
    """
    parent_pid = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}")
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)
