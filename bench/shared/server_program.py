"""A server as a program of its own: it prints "serving on HOST:PORT" when it serves, and ends on SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.shared.process import log_tail

START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 30.0
_LOOK_EVERY_S: Final = 0.05
_SERVING = re.compile(r"^serving on (\S+)$", re.MULTILINE)


class ServerFailed(Exception):
    """A server did not start, or ended badly. The message holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server: how it is called here, where it serves, its process."""

    name: str
    address: str
    pid: int


def remove_data(data_dir: Path) -> None:
    """Remove a data folder of the service, whose published bundles are read-only folders."""
    for path in (data_dir, *data_dir.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(data_dir, ignore_errors=True)


def import_model(bundle: Path, data_dir: Path, name: str) -> None:
    """Publish a bundle as a model in a data folder; raises ServerFailed."""
    command = [sys.executable, "-m", "ferryman_service", "import-model", str(bundle), name]
    environment = {**os.environ, "FERRYMAN_DATA_DIR": str(data_dir)}
    if (ended := subprocess.run(command, capture_output=True, text=True, env=environment)).returncode:
        raise ServerFailed(f"cannot publish the bundle {bundle}:\n{ended.stderr[-2000:]}")


@contextlib.contextmanager
def started_server(name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run the program for the length of the block; raises ServerFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        # In a session of its own, so that Ctrl-C reaches only the caller, who then stops the server in order.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
    try:
        yield Server(name, _address(process, name, log), process.pid)
        if process.poll() is not None:
            raise ServerFailed(f"{name} ended by itself, exit status {process.returncode}{log_tail(log)}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], name: str, log: Path) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if match := _SERVING.search(log.read_text(errors="replace")):
            return match[1]
        if process.poll() is not None:
            raise ServerFailed(f"{name} ended at once, exit status {process.returncode}{log_tail(log)}")
        time.sleep(_LOOK_EVERY_S)
    raise ServerFailed(f"{name} did not start within {START_TIMEOUT_S:g} s{log_tail(log)}")
