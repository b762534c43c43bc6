"""Keeps runs and workers together: starts queued runs, notices workers that died, ends cancelled ones that do not
listen.

The supervisor remembers nothing that matters: what it must know is in the store, so a restarted service goes on where
the last one stopped, with the workers that still run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ferryman_service.application.ports import Launcher, RunStore
from ferryman_service.domain.errors import AttemptFenced, DiskFull, StoreUnavailable
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import FailureReason, RunFailure, TrainingRun

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """How many workers at once, how often to look, how long to be patient."""

    max_concurrent_runs: int = 1
    interval_s: float = 0.25
    start_timeout_s: float = 180.0
    cancel_grace_s: float = 30.0


class Supervisor:
    """One per data folder. `tick` is called by one thread at a time."""

    def __init__(self, runs: RunStore, launcher: Launcher, config: SupervisorConfig) -> None:
        """Store the ports."""
        self._runs = runs
        self._launcher = launcher
        self._config = config
        self._launched_at_s: dict[tuple[str, int], float] = {}
        self._cancel_seen_at_s: dict[str, float] = {}

    async def run(self) -> None:
        """Tick until cancelled. Workers are not touched when it stops."""
        while True:
            try:
                await asyncio.to_thread(self.tick)
            except (StoreUnavailable, DiskFull) as error:
                _log.warning("cannot look after the runs, trying again: %s", error)
            await asyncio.sleep(self._config.interval_s)

    def tick(self) -> None:
        """Look at every run that is not terminal, once."""
        unfinished = self._runs.unfinished()
        active = [run for run in unfinished if run.state is not RunState.QUEUED]
        for run in active:
            self._look_after(run)
        free = self._config.max_concurrent_runs - len(active)
        for run in [run for run in unfinished if run.state is RunState.QUEUED][: max(0, free)]:
            self._launch(run)
        self._forget(unfinished)

    def _look_after(self, run: TrainingRun) -> None:
        alive = self._launcher.is_running(run.run_id, run.attempt, run.worker)
        if run.cancel_requested and alive and self._out_of_patience(run):
            _log.warning("%s does not listen to its cancellation; ending its worker", run.run_id)
            self._launcher.kill(run.run_id, run.attempt, run.worker)
            self._end(run)
        elif run.worker is None and not alive and (run.run_id, run.attempt) not in self._launched_at_s:
            self._launch(run)
        elif not alive:
            self._end(run)
        elif run.worker is None and self._start_is_overdue(run):
            self._launcher.kill(run.run_id, run.attempt, run.worker)
            self._end(run)

    def _launch(self, run: TrainingRun) -> None:
        """Record the attempt, then start its worker. Should this process die in between, nobody claims the attempt, and
        the next supervisor makes a new one; should a worker of the old attempt turn up after all, its claim is
        refused."""
        started = self._runs.begin_attempt(run.run_id, run.attempt)
        if started is None:
            return
        self._launched_at_s[started.run_id, started.attempt] = time.monotonic()
        try:
            self._launcher.start(started.run_id, started.attempt)
        except OSError as error:
            _log.exception("cannot start a worker for %s", run.run_id)
            self._fail(started, f"the worker could not be started: {error}")

    def _end(self, run: TrainingRun) -> None:
        """The worker is gone; unless it finished the run first, say how it ended."""
        run = self._runs.get(run.run_id)
        if run.state.is_terminal:
            return
        if run.cancel_requested:
            self._change(run, RunState.CANCELLED, "cancelled by the caller", None)
            return
        how = self._launcher.exit_description(run.run_id, run.attempt)
        self._fail(run, f"the worker died ({how or 'nobody saw how'}); its log tells more")

    def _fail(self, run: TrainingRun, message: str) -> None:
        tail = self._launcher.log_tail(run.run_id, run.attempt)
        failure = RunFailure(reason=FailureReason.WORKER_DIED, message=message, log_tail=tail)
        self._change(run, RunState.FAILED, message, failure)

    def _change(self, run: TrainingRun, state: RunState, message: str, failure: RunFailure | None) -> None:
        try:
            self._runs.change_state(run.run_id, run.attempt, state, message, failure)
        except AttemptFenced:
            _log.info("%s ended by itself in the meantime", run.run_id)

    def _out_of_patience(self, run: TrainingRun) -> bool:
        seen_s = self._cancel_seen_at_s.setdefault(run.run_id, time.monotonic())
        return time.monotonic() - seen_s > self._config.cancel_grace_s

    def _start_is_overdue(self, run: TrainingRun) -> bool:
        launched_s = self._launched_at_s.get((run.run_id, run.attempt), time.monotonic())
        return time.monotonic() - launched_s > self._config.start_timeout_s

    def _forget(self, unfinished: Sequence[TrainingRun]) -> None:
        known = {run.run_id for run in unfinished}
        self._launched_at_s = {key: at for key, at in self._launched_at_s.items() if key[0] in known}
        self._cancel_seen_at_s = {run_id: at for run_id, at in self._cancel_seen_at_s.items() if run_id in known}
