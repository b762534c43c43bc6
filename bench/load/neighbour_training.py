"""The processes of the neighbour benchmark: a training worker that is halted and continued, and a busy process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ferryman import Client
from ferryman.types import DataRecipe, Recipe, StepMetrics, StopRecipe, TrainingRun, ValidationRecipe
from ferryman_service.launch.process import kill_all_with, what_follows

MODEL_NAME: Final = "trained-beside"
WARM_UP_UPDATES: Final = 10
_NEVER: Final = 10**6
_START_TIMEOUT_S: Final = 600.0
_KILL_TIMEOUT_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.1
# It also ends when the benchmark does, however that ends.
_SPIN: Final = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


class TrainingFailed(Exception):
    """The run has ended, or did not begin to train."""


@contextlib.contextmanager
def busy_process() -> Iterator[int]:
    """Run one process that computes without pause, at this process's priority and on any core; yield its pid.

    It has a session of its own, as a program that somebody else has started: where the kernel shares the processor
    among sessions (sched_autogroup_enabled), it gets a share of its own.
    """
    with subprocess.Popen([sys.executable, "-c", _SPIN], stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield process.pid
        finally:
            process.kill()


class HaltableRun:
    """A training run of the service, whose worker processes can be halted and continued at any time."""

    def __init__(self, client: Client, run: TrainingRun, data_dir: Path) -> None:
        self._client = client
        self._run = run
        self._arguments = ("--data-dir", str(data_dir.resolve()), "--run-id", run.run_id)

    def wait_for_updates(self, updates: int = WARM_UP_UPDATES) -> None:
        """Return after the run's first updates; raises TrainingFailed."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while (run := self._client.get_training_run(self._run.run_id)).progress.step < updates:
            if run.state.is_terminal or time.monotonic() > deadline_s:
                raise TrainingFailed(f"the run is {run.state} after {run.progress.step} updates: {run.error}")
            time.sleep(_LOOK_EVERY_S)

    def workers(self) -> list[int]:
        """Return the pids of the processes that train."""
        return list(what_follows(self._arguments))

    def halt(self) -> None:
        """Stop the worker where it is."""
        self._signal(signal.SIGSTOP)

    def proceed(self) -> None:
        """Let a halted worker continue."""
        self._signal(signal.SIGCONT)

    def updates(self) -> Sequence[tuple[float, float]]:
        """Return the time at which each update began and ended, in seconds of the epoch."""
        records = self._client.stream_metrics(self._run.run_id, follow=False)
        found = [(record.time.timestamp(), record.payload) for record in records]
        return [(end_s - step.duration_s, end_s) for end_s, step in found if isinstance(step, StepMetrics)]

    def shipped_with(self) -> dict[str, object]:
        """Return what the worker runs with: its nice value, its threads, how long these spin."""
        pid = self.workers()[0]
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
        names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        values = dict(entry.split("=", 1) for entry in entries if entry.split("=", 1)[0] in names)
        return {"worker_nice": os.getpriority(os.PRIO_PROCESS, pid), **values}

    def end(self) -> None:
        """Cancel the run, and end whatever is left of it."""
        with contextlib.suppress(Exception):  # the service may be what failed; the processes end all the same
            self._client.cancel_training(self._run.run_id)
        kill_all_with(self._arguments, _KILL_TIMEOUT_S)

    def _signal(self, number: signal.Signals) -> None:
        if not (pids := self.workers()):
            raise TrainingFailed(f"the run has no worker: {self._client.get_training_run(self._run.run_id).error}")
        for pid in pids:
            os.kill(pid, number)


@contextlib.contextmanager
def training_run(
    client: Client, corpus_id: str, data_dir: Path, preset: str, vocabulary_size: int
) -> Iterator[HaltableRun]:
    """Train the preset for the length of the block, without validations; raises TrainingFailed."""
    recipe = Recipe(
        preset=preset,
        data=DataRecipe(vocabulary_size=vocabulary_size),
        stop=StopRecipe(max_steps=_NEVER),
        validation=ValidationRecipe(interval_steps=_NEVER),
    )
    run = HaltableRun(client, client.start_training(corpus_id, MODEL_NAME, recipe), data_dir)
    try:
        run.wait_for_updates()
        yield run
    finally:
        run.end()
