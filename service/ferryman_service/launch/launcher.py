"""Workers started as processes of this machine.

A worker is a program of its own that writes to a file, in a process group of its own: it outlives the service, and a
terminal's Ctrl-C does not reach it. It stays in the service's session, so that a nice value counts between the two
where the kernel shares the processor among sessions (sched(7), autogroup). Of a run of several processes the first is
our child; it claims the run and starts the others (launch/group.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ferryman_service.config.resources import usable_cpus
from ferryman_service.domain.runs import ProcessIdentity
from ferryman_service.launch.environment import inherited, private, training_defaults
from ferryman_service.launch.group import exit_description
from ferryman_service.launch.heartbeat import HEARTBEAT, last_beat
from ferryman_service.launch.process import (
    is_alive,
    kill_all_with,
    kill_process,
    lower_priority,
    process_identity,
    sees_same,
    what_follows,
)

_LOG_TAIL_BYTES: Final = 8192
_KILL_TIMEOUT_S: Final = 5.0


def worker_command(processes: int = 1) -> tuple[str, ...]:
    """Return the command line of a worker of so many processes, without its task."""
    # -P: a module in the service's working folder is not for the worker.
    program = (sys.executable, "-P", "-m", "ferryman_service.worker")
    return (*program, "--processes", str(processes), "--private-environment-on-stdin")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a worker is started.

    `command(processes)` begins the command line of a worker of so many processes; "--data-dir D --run-id R --attempt N"
    is appended. `environment` is added to what the worker inherits (launch/environment.py). `threads_per_worker` None:
    OMP_NUM_THREADS if it is set, else a fair share of the CPUs that this process may use (config/resources.py). `nice`
    is added to this process's own nice value.
    """

    data_dir: Path
    command: Callable[[int], Sequence[str]] = worker_command
    environment: Mapping[str, str] = field(default_factory=dict)
    threads_per_worker: int | None = None
    nice: int = 0


class ProcessLauncher:
    """The Launcher. It starts no thread and imports no torch; `start` execs, it does not fork Python."""

    def __init__(
        self, config: LaunchConfig, log_path: Callable[[str, int], Path], scratch_dir: Callable[[str, int], Path]
    ) -> None:
        """Store the parts; `log_path` tells where the output of a run's attempt goes, `scratch_dir` which folder the
        attempt has for itself until it ends."""
        self._config = config
        self._log_path = log_path
        self._scratch_dir = scratch_dir
        self._workers: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, run_id: str, attempt: int, processes: int) -> None:
        """Start a worker of so many processes; raises OSError if the program cannot be started at all."""
        try:
            worker = self._open(run_id, attempt, processes)
        except OSError:
            shutil.rmtree(self._scratch_dir(run_id, attempt), ignore_errors=True)
            raise
        # Python takes longer until it starts a thread or a process, which inherits both.
        lower_priority(worker.pid, self._config.nice)
        with self._lock:
            self._workers[run_id, attempt] = worker
            for other in self._workers.values():
                other.poll()  # lets the kernel forget those that ended
        _hand_over(worker, private(os.environ))

    def _open(self, run_id: str, attempt: int, processes: int) -> subprocess.Popen[bytes]:
        log_path, scratch = self._log_path(run_id, attempt), self._scratch_dir(run_id, attempt)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir(mode=0o700, exist_ok=True)
        (scratch / HEARTBEAT).touch()
        with log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603
                [*self._config.command(processes), *self._task(run_id, attempt)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=worker_environment(self._config, processes) | {"TMPDIR": str(scratch.resolve())},
                close_fds=True,
                process_group=0,
            )

    def is_running(self, run_id: str, attempt: int, worker: ProcessIdentity | None) -> bool:
        """Tell whether the attempt's worker lives, as our child or by its identity."""
        with self._lock:
            child = self._workers.get((run_id, attempt))
            child_lives = child is not None and child.poll() is None
        return child_lives or (worker is not None and is_alive(worker))

    def last_beat(self, run_id: str, attempt: int) -> int | None:
        """Return a number that changes while the attempt's worker gives signs of life; None if it gives none."""
        return last_beat(self._scratch_dir(run_id, attempt) / HEARTBEAT)

    def living(self) -> Set[tuple[str, int]]:
        """Return the (run_id, attempt) of the processes that live, also those that another service has started."""
        return {
            (rest[0], int(rest[2]))
            for pid, rest in what_follows(self._begin_of_task()).items()
            if len(rest) > 2 and rest[2].isdigit() and sees_same(pid, self._config.data_dir.resolve())
        }

    def kill(self, run_id: str, attempt: int, worker: ProcessIdentity | None) -> bool:
        """End the attempt's processes at once, also those that another service has started; return whether none is
        left. Then its temporary files are removed.

        They are known by their arguments. Our own child has none for a moment after its start, and the worker that has
        claimed the attempt may have others, as in a folder that was moved meanwhile.
        """
        with self._lock:
            child = self._workers.get((run_id, attempt))
            child_lives = child is not None and child.poll() is None
        known = [process_identity(child.pid) if child is not None and child_lives else None, worker]
        gone = [kill_process(identity, _KILL_TIMEOUT_S) for identity in known if identity is not None]
        none_left = kill_all_with(self._task(run_id, attempt), _KILL_TIMEOUT_S) and all(gone)
        if child is not None and child_lives:
            self._kill_group(child)
        if none_left:
            shutil.rmtree(self._scratch_dir(run_id, attempt), ignore_errors=True)
        return none_left

    def _kill_group(self, child: subprocess.Popen[bytes]) -> None:
        """End what a worker has started, such as a compiler, as long as no other group can have its number."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if child.returncode is None:  # nobody has waited for it yet
                os.killpg(child.pid, signal.SIGKILL)

    def exit_description(self, run_id: str, attempt: int) -> str:
        """Say how the attempt's worker ended, if it was our child."""
        with self._lock:
            worker = self._workers.get((run_id, attempt))
            status = None if worker is None else worker.poll()
        return "" if status is None else exit_description(status)

    def log_tail(self, run_id: str, attempt: int) -> str:
        """Return the last lines of the attempt's log, at most 8 KiB."""
        return read_log_tail(self._log_path(run_id, attempt))

    def _task(self, run_id: str, attempt: int) -> tuple[str, ...]:
        """Return the arguments of an attempt, by which its processes are known."""
        return (*self._begin_of_task(), run_id, "--attempt", str(attempt))

    def _begin_of_task(self) -> tuple[str, ...]:
        return ("--data-dir", str(self._config.data_dir.resolve()), "--run-id")


def _hand_over(worker: subprocess.Popen[bytes], variables: Mapping[str, str]) -> None:
    """Write the variables, a few hundred bytes, to the worker's standard input, and close it."""
    assert worker.stdin is not None, "it was opened as a pipe"
    with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:  # it has ended already
        pipe.write(json.dumps(variables).encode())


def worker_environment(config: LaunchConfig, processes: int, root: Path = Path("/")) -> dict[str, str]:
    """Return the environment of each of so many processes of a worker; `root` holds /proc and the cgroup mounts."""
    environment = inherited(os.environ) | dict(config.environment)
    if config.threads_per_worker is not None:
        environment["OMP_NUM_THREADS"] = str(config.threads_per_worker)
    return training_defaults(environment, max(1, usable_cpus(root).value // processes))


def read_log_tail(path: Path) -> str:
    """Return the last whole lines of a text file, at most 8 KiB of UTF-8; "" if there is no file."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - _LOG_TAIL_BYTES))
            content = file.read(_LOG_TAIL_BYTES)
    except FileNotFoundError:
        return ""
    # A bad byte becomes three, so the limit is applied once more.
    text = content.decode(errors="replace").encode()
    tail = text[-_LOG_TAIL_BYTES:]
    if max(size_bytes, len(text)) > _LOG_TAIL_BYTES:
        _, newline, rest = tail.partition(b"\n")
        tail = rest if newline else tail
    return tail.decode(errors="ignore")
