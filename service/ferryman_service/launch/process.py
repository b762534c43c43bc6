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
from typing import Final

from ferryman_service.domain.runs import ProcessIdentity

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG: Final = 1
_STATE_FIELD: Final = 0
_START_TIME_FIELD: Final = 19
"""Fields of /proc/<pid>/stat, counted from the one after the program's name, which may itself hold spaces."""
_HIGHEST_NICE: Final = 19
OOM_SCORE_ADJ: Final = 900
"""Of at most 1000."""


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


def lower_priority(pid: int, nice: int) -> None:
    """Raise the nice value of a program that has just begun, and of all that it will start, by `nice` over this
    process's; 19 is the limit. Let the kernel end them before others where memory is short (proc(5), oom_score_adj).
    """
    value = min(_HIGHEST_NICE, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, value)
    try:
        score = Path(f"/proc/{pid}/oom_score_adj")
        if int(score.read_text(encoding="ascii")) < OOM_SCORE_ADJ:
            score.write_text(str(OOM_SCORE_ADJ), encoding="ascii")
    except OSError as error:
        if not isinstance(error, FileNotFoundError | ProcessLookupError):  # it has ended already
            _log.warning("the kernel cannot be told to end worker %d first when memory is short: %s", pid, error)


def kill_all_with(arguments: Sequence[str], timeout_s: float) -> bool:
    """Send SIGKILL to every process whose command line holds these arguments one after the other, until there is none;
    return False if some have not ended in time. This process is not among them."""
    wanted = _joined(arguments)
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


def kill_process(identity: ProcessIdentity, timeout_s: float) -> bool:
    """Send SIGKILL to this very process; return False if it has not ended in time, or is not ours to kill."""
    with ExitStack() as opened:
        try:
            descriptor = os.pidfd_open(identity.pid)
            opened.callback(os.close, descriptor)
            if not is_alive(identity):
                return True
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _ends_within(descriptor, timeout_s)


def what_follows(arguments: Sequence[str]) -> dict[int, list[str]]:
    """Return, by pid, for every process whose command line holds these arguments one after the other, those behind
    them."""
    found = {}
    for pid in _pids():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            _, wanted, rest = _command_line(pid).partition(_joined(arguments))
            if wanted:
                found[pid] = rest.decode(errors="replace").split("\0")[:-1]
    return found


def sees_same(pid: int, folder: Path) -> bool:
    """Tell whether the path leads that process to the same folder; in another container it leads elsewhere."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/{pid}/root{folder}"), os.stat(folder))
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


def _joined(arguments: Sequence[str]) -> bytes:
    return b"\0".join([b"", *(os.fsencode(argument) for argument in arguments), b""])


def _command_line(pid: int) -> bytes:
    """Return the arguments, each between zero bytes; a zombie has none."""
    return b"\0" + Path(f"/proc/{pid}/cmdline").read_bytes()


def _ends_within(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, whatever the parent dies of.

    A process of a run would wait for the first one without end. Call it from the main thread, early.
    """
    parent_pid = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl: {os.strerror(code)}")
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def end_on_sigterm(
    stop: threading.Event, leave: Callable[[], None], *, status: int, patience_s: float, leave_s: float
) -> None:
    """Let SIGTERM set `stop`. If this process has not ended `patience_s` later, call `leave` from another thread and
    end with `status`, at the latest after another `leave_s`, whatever the other threads do.

    Call it from the main thread.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    # A handler in Python waits for the main thread, which may be inside a library for minutes. The interpreter's own,
    # in C, writes the number of the signal into the pipe at once.
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())

    def watch() -> None:
        while os.read(told, 1) != bytes([signal.SIGTERM]):
            pass
        stop.set()
        time.sleep(patience_s)
        _log.warning("the work at hand takes too long; ending in the middle of it")
        leaving = threading.Thread(target=leave, name="leave", daemon=True)
        leaving.start()
        leaving.join(leave_s)
        os._exit(status)

    threading.Thread(target=watch, name="sigterm", daemon=True).start()
