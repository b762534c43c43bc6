"""Exit statuses, and the clean exit after Ctrl-C and closed pipes."""

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
USAGE_ERROR: Final = 2
INTERRUPTED: Final = 130
"""The status that shells report for a program ended by SIGINT."""

HELP: Final = (
    "Exit status: 0 success, also if the reader closes the pipe early; 1 the server or the run failed; "
    "2 the command or its input is wrong; 130 interrupted by Ctrl-C."
)

_UNWIND_S: Final = 2.0
"""The time to clean up after Ctrl-C. Closing the connection may wait for a lock that an interrupted gRPC call holds."""


def run_process(command: Callable[[], object]) -> None:
    """Run the command and exit the process with its status."""
    _fill_standard_descriptors()
    output.prepare_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise ignored, as in a background job
        signal.signal(signal.SIGINT, _interrupt)
    try:
        command()
        status: str | int | None = 0
    except SystemExit as end:
        status = end.code
    except BaseException:  # Ctrl-C may interrupt a call, which then fails with another error
        if not was_interrupted():
            raise
        status = 0
    status = INTERRUPTED if was_interrupted() else status
    try:
        output.flush()
    except OSError:
        output.discard()
    if status == INTERRUPTED:
        _exit_now()  # without joining threads: one may wait for a lock of the interrupted call
    sys.exit(status)


def _fill_standard_descriptors() -> None:
    """Open /dev/null in place of a closed standard stream, whose descriptor a connection would otherwise get."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


_interrupted = threading.Event()


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed; later errors are consequences of it."""
    return _interrupted.is_set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Clean up for at most _UNWIND_S; a second Ctrl-C exits at once."""
    _interrupted.set()
    signal.signal(signal.SIGINT, lambda *_: _exit_now())
    _thread.start_new_thread(_exit_later, ())
    raise KeyboardInterrupt


def _exit_later() -> None:
    time.sleep(_UNWIND_S)
    _exit_now()


def _exit_now() -> NoReturn:
    os._exit(INTERRUPTED)
