"""The processes of a run: the first starts the others, and ends with them.

No process waits for another one at a port: they meet in a file (training/ranks.py), and the kernel ends the others when
the first dies.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

_log = logging.getLogger(__name__)


def start_others(processes: int) -> Sequence[subprocess.Popen[bytes]]:
    """Start processes 1 to `processes` - 1 of a run with this program's command line and their `--rank`; their output
    goes where this process's goes.

    Call it from the main thread of the first process, which must live as long as the process does: the others ask the
    kernel to end them with it (`die_with_parent`). When one of them fails, this process gets SIGTERM.
    """
    others = []
    for rank in range(1, processes):
        command = [sys.executable, *sys.orig_argv[1:], "--rank", str(rank)]
        other = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603
        threading.Thread(target=_watch, args=(other, rank), name=f"rank-{rank}", daemon=True).start()
        others.append(other)
    return others


def exit_description(status: int) -> str:
    """Say how a process ended, from the status that subprocess gives: "exit status 1", "killed by signal 9"."""
    return f"exit status {status}" if status >= 0 else f"killed by signal {-status}"


def _watch(other: subprocess.Popen[bytes], rank: int) -> None:
    if (status := other.wait()) != 0:
        _log.error("process %d of the run has ended: %s; ending the others", rank, exit_description(status))
        os.kill(os.getpid(), signal.SIGTERM)
