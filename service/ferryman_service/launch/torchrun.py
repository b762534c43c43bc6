"""Workers started by torchrun on this machine.

A worker is a program of its own, in a session of its own, that writes to a file: it outlives the service, and a
terminal's Ctrl-C does not reach it. torchrun's agent is our child; the worker, which claims the run, is the agent's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ferryman_service.config.resources import usable_cpus
from ferryman_service.domain.runs import ProcessIdentity
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
# glibc would give the memory of large tensors back at every update, and the kernel would clear it anew: 5 to 8 % of a
# small model's step (docs/lab-log.md).
_ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
SPIN_COUNT: Final = "100"
TEMPORARY_FOLDER: Final = "tmp"
"""In the data folder; made only where nothing else takes temporary files."""
_STOP_TIMEOUT_S: Final = 45
"""How long torchrun's agent waits for workers that were told to end; they take at most 30 s."""


def torchrun_command(processes_per_node: int = 1) -> tuple[str, ...]:
    """Return the command line of a worker program under torchrun, on this machine alone; no restart, since the service
    decides about attempts."""
    # By default the workers look for the agent under the host's name, which need not resolve: in a pod on the host's
    # network it does not, and no worker begins. -P: a module in the service's working folder is not for the agent, nor
    # for the workers (worker_environment).
    agent = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost")
    size = ("--nnodes=1", f"--nproc-per-node={processes_per_node}")
    return (*agent, *size, "--max-restarts=0", "-m", "ferryman_service.worker")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a worker is started.

    `command(processes)` begins the command line of a worker of so many processes; "--data-dir D --run-id R --attempt N"
    is appended. `environment` is added to this process's own. `threads_per_worker` None: OMP_NUM_THREADS if it is set,
    else a fair share of the CPUs that this process may use (config/resources.py). `nice` is added to this process's own
    nice value.
    """

    data_dir: Path
    command: Callable[[int], Sequence[str]] = torchrun_command
    environment: Mapping[str, str] = field(default_factory=dict)
    threads_per_worker: int | None = None
    nice: int = 0


class TorchrunLauncher:
    """The Launcher. It starts no thread and imports no torch; `start` execs, it does not fork Python."""

    def __init__(self, config: LaunchConfig, log_path: Callable[[str, int], Path]) -> None:
        """Store the parts; `log_path` tells where the output of a run's attempt goes."""
        self._config = config
        self._log_path = log_path
        self._agents: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, run_id: str, attempt: int, processes: int) -> None:
        """Start a worker of so many processes; raises OSError if the program cannot be started at all."""
        log_path = self._log_path(run_id, attempt)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        environment = worker_environment(self._config, processes)
        own_folder = self._config.data_dir.resolve() / TEMPORARY_FOLDER
        if environment.get("TMPDIR") == str(own_folder):
            own_folder.mkdir(exist_ok=True)
        with log_path.open("ab") as log:
            agent = subprocess.Popen(  # noqa: S603
                [*self._config.command(processes), *self._task(run_id, attempt)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                close_fds=True,
                start_new_session=True,
            )
        if self._config.nice:
            # The agent takes seconds until it starts a worker, which inherits it.
            lower_priority(agent.pid, self._config.nice)
        with self._lock:
            self._agents[run_id, attempt] = agent
            for other in self._agents.values():
                other.poll()  # lets the kernel forget those that ended

    def is_running(self, run_id: str, attempt: int, worker: ProcessIdentity | None) -> bool:
        """Tell whether the attempt's agent, if it is our child, or its worker lives."""
        with self._lock:
            agent = self._agents.get((run_id, attempt))
            agent_lives = agent is not None and agent.poll() is None
        return agent_lives or (worker is not None and is_alive(worker))

    def living(self) -> Set[tuple[str, int]]:
        """Return the (run_id, attempt) of the agents and workers that live, also those that another service has
        started."""
        return {
            (rest[0], int(rest[2]))
            for pid, rest in what_follows(self._begin_of_task()).items()
            if len(rest) > 2 and rest[2].isdigit() and sees_same(pid, self._config.data_dir.resolve())
        }

    def kill(self, run_id: str, attempt: int, worker: ProcessIdentity | None) -> bool:
        """End the attempt's agent and workers at once, also those that another service has started; return whether
        none is left.

        They are known by their arguments. Our own agent has none for a moment after its start, and the worker that has
        claimed the attempt may have others, as in a folder that was moved meanwhile.
        """
        with self._lock:
            agent = self._agents.get((run_id, attempt))
            agent_lives = agent is not None and agent.poll() is None
        known = [process_identity(agent.pid) if agent is not None and agent_lives else None, worker]
        gone = [kill_process(identity, _KILL_TIMEOUT_S) for identity in known if identity is not None]
        return kill_all_with(self._task(run_id, attempt), _KILL_TIMEOUT_S) and all(gone)

    def exit_description(self, run_id: str, attempt: int) -> str:
        """Say how the attempt's agent ended, if it was our child."""
        with self._lock:
            agent = self._agents.get((run_id, attempt))
            status = None if agent is None else agent.poll()
        if status is None:
            return ""
        return f"exit status {status}" if status >= 0 else f"killed by signal {-status}"

    def log_tail(self, run_id: str, attempt: int) -> str:
        """Return the last lines of the attempt's log, at most 8 KiB."""
        return read_log_tail(self._log_path(run_id, attempt))

    def _task(self, run_id: str, attempt: int) -> tuple[str, ...]:
        """Return the arguments of an attempt, by which its processes are known."""
        return (*self._begin_of_task(), run_id, "--attempt", str(attempt))

    def _begin_of_task(self) -> tuple[str, ...]:
        return ("--data-dir", str(self._config.data_dir.resolve()), "--run-id")


def worker_environment(config: LaunchConfig, processes: int, root: Path = Path("/")) -> dict[str, str]:
    """Return the environment of each of so many processes of a worker; `root` holds /proc and the cgroup mounts."""
    environment = {**os.environ, **config.environment, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    if config.threads_per_worker is not None:
        environment["OMP_NUM_THREADS"] = str(config.threads_per_worker)
    # torchrun would choose one thread for several workers.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus(root).value // processes)))
    if not _has_temporary_folder():
        # torchrun makes one for the workers' errors, and ends if it cannot.
        environment["TMPDIR"] = str(config.data_dir.resolve() / TEMPORARY_FOLDER)
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_STOP_TIMEOUT_S)
    # All processes are on this machine. Without it gloo looks up the host's name, which need not resolve.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # OpenMP's threads spin while they wait for each other, also for one that has no core because another process is
    # busy. Left alone they spin so long that this makes training 45 times slower; this bound costs nothing on a quiet
    # machine (docs/lab-log.md; make bench-neighbour).
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    for name, value in _ALLOCATOR.items():
        environment.setdefault(name, value)
    return environment


def _has_temporary_folder() -> bool:
    """Tell whether Python finds a folder for temporary files that can be written."""
    try:
        with tempfile.TemporaryFile():
            return True
    except OSError:
        return False


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
