"""How the process ends: by itself, by Ctrl-C, or because nobody reads what it prints. Each has its exit status."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final, NoReturn

from ferryman.cli import output

FAILED: Final = 1
CALLERS_MISTAKE: Final = 2
INTERRUPTED: Final = 130
"""What shells report for a program that SIGINT has ended."""

HELP: Final = (
    "Exit status: 0 done, also if the reader of the output has closed it early; 1 the server or the run has failed; "
    "2 something in the command or its input is wrong; 130 interrupted by Ctrl-C."
)

_UNWIND_S: Final = 2.0
"""Ctrl-C may interrupt gRPC where it holds a lock that closing the connection waits for."""


def run_process(command: Callable[[], object]) -> None:
    """Run the command line as this process, and end the process with its status."""
    _fill_standard_descriptors()
    output.prepare_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _interrupt)
    try:
        command()
        status: str | int | None = 0
    except SystemExit as end:
        status = end.code
    except BaseException:  # Ctrl-C may end a call in the middle, which then fails in another way
        if not was_interrupted():
            raise
        status = 0
    status = INTERRUPTED if was_interrupted() else status
    try:
        output.flush()
    except OSError:
        output.discard()
    if status == INTERRUPTED:
        _end()  # no waiting for threads: one may wait for what the interrupted call has locked
    sys.exit(status)


def _fill_standard_descriptors() -> None:
    """Open /dev/null in place of a closed standard stream: else the next connection would get its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


_interrupted = threading.Event()


def was_interrupted() -> bool:
    """Tell whether the process has had Ctrl-C: what fails from then on fails because of it."""
    return _interrupted.is_set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind what the command has begun, within a time; a second Ctrl-C does not wait for it."""
    _interrupted.set()
    signal.signal(signal.SIGINT, lambda *_: _end())
    _thread.start_new_thread(_end_later, ())
    raise KeyboardInterrupt


def _end_later() -> None:
    time.sleep(_UNWIND_S)
    _end()


def _end() -> NoReturn:
    os._exit(INTERRUPTED)
