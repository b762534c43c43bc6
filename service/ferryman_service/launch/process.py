"""Processes that cannot be mistaken for one another. Linux only: it reads /proc (proc(5)) and calls prctl(2)."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Final

from ferryman_service.domain.runs import ProcessIdentity

_log = logging.getLogger(__name__)
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


def kill_all_with(arguments: Sequence[str], timeout_s: float) -> bool:
    """Send SIGKILL to every process whose command line holds these arguments one after the other, until there is none;
    return False if some have not ended in time. This process is not among them."""
    wanted = b"\0".join([b"", *(argument.encode() for argument in arguments), b""])
    deadline_s = time.monotonic() + timeout_s
    while True:
        with ExitStack() as opened:
            found = [descriptor for pid in _pids() for descriptor in _open_if(pid, wanted, opened)]
            if not found:
                return True  # none, and none that one of them has started while it was looked for
            for descriptor in found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            if not all(_ends_within(descriptor, deadline_s - time.monotonic()) for descriptor in found):
                return False


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _open_if(pid: int, wanted: bytes, opened: ExitStack) -> list[int]:
    """Return a descriptor of the process, in a list, if its command line holds `wanted`."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
        if wanted in _command_line(pid):
            descriptor = os.pidfd_open(pid)
            opened.callback(os.close, descriptor)
            # The number cannot pass to another process any more, but may have done so just before.
            if wanted in _command_line(pid):
                return [descriptor]
    return []


def _command_line(pid: int) -> bytes:
    """Return the arguments, each between zero bytes; a zombie has none."""
    return b"\0" + Path(f"/proc/{pid}/cmdline").read_bytes()


def _ends_within(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


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


def end_on_sigterm(stop: threading.Event, leave: Callable[[], None], patience_s: float) -> None:
    """Let SIGTERM set `stop`; if this process has not ended `patience_s` later, call `leave` from another thread and
    end with status 0, whatever the main thread does. Call it from the main thread."""

    def end_now() -> None:
        _log.warning("the work at hand takes too long; ending in the middle of it")
        try:
            leave()
        finally:
            os._exit(0)

    def end(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            timer = threading.Timer(patience_s, end_now)
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, end)
