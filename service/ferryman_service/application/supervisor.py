"""Keeps runs and workers together: starts queued runs, notices workers that died and lets others go on, ends
cancelled ones that do not listen.

The supervisor remembers nothing that matters: what it must know is in the store, so a restarted service goes on where
the last one stopped, with the workers that still run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ferryman_service.application.ports import Launcher, RunStore
from ferryman_service.domain.errors import AttemptFenced, DiskFull, StoreUnavailable
from ferryman_service.domain.records import ACTIVE_STATES, EventLevel, RunEvent, RunState
from ferryman_service.domain.runs import FailureReason, RunFailure, TrainingRun

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """How many workers at once, how often to look, how long to be patient.

    A worker that dies is followed by another, `max_restarts` times in a row without getting further; the pauses before
    them double from `backoff_s` to `max_backoff_s`.
    """

    max_concurrent_runs: int = 1
    interval_s: float = 0.25
    start_timeout_s: float = 180.0
    cancel_grace_s: float = 30.0
    max_restarts: int = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0


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
        active = [run for run in unfinished if run.state in ACTIVE_STATES]
        for run in active:
            self._look_after(run)
        free = self._config.max_concurrent_runs - len(active)
        now_ns = time.time_ns()
        due = [run for run in unfinished if run.state is RunState.QUEUED and run.not_before_ns <= now_ns]
        for run in due[: max(0, free)]:
            self._launch(run)
        self._forget(unfinished)

    def _look_after(self, run: TrainingRun) -> None:
        alive = self._launcher.is_running(run.run_id, run.attempt, run.worker)
        if (run.cancel_requested or run.pause_requested) and alive and self._out_of_patience(run):
            _log.warning("%s does not listen to its cancellation or pause; ending its worker", run.run_id)
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
            self._launcher.start(started.run_id, started.attempt, started.processes)
        except OSError as error:
            _log.exception("cannot start a worker for %s", run.run_id)
            self._restart(started, f"the worker could not be started: {error}")

    def _end(self, run: TrainingRun) -> None:
        """The worker is gone; unless it ended the run or its attempt first, say how it went and what comes now."""
        run = self._runs.get(run.run_id)
        if run.state not in ACTIVE_STATES:
            return
        with self._unless_overtaken(run):
            if run.cancel_requested:
                self._runs.change_state(run.run_id, run.attempt, RunState.CANCELLED, "cancelled by the caller")
            elif run.pause_requested:
                self._runs.change_state(run.run_id, run.attempt, RunState.PAUSED, "paused by the caller")
            else:
                how = self._launcher.exit_description(run.run_id, run.attempt)
                self._restart(run, f"the worker died ({how or 'nobody saw how'}); its log tells more")

    def _restart(self, run: TrainingRun, message: str) -> None:
        """Let another worker go on from the last checkpoint, after a pause; fail if too many have died in a row."""
        with self._unless_overtaken(run):
            if run.restarts >= self._config.max_restarts:
                self._fail(run, f"{message}; {run.restarts + 1} workers in a row got no further than each other")
                return
            pause_s = min(self._config.backoff_s * 2**run.restarts, self._config.max_backoff_s)
            tail = self._launcher.log_tail(run.run_id, run.attempt)
            _log.warning("%s: %s; the next starts in %.0f s. Its last lines:\n%s", run.run_id, message, pause_s, tail)
            text = f"{message}. The next goes on from the last checkpoint in {pause_s:g} s"
            remark = RunEvent(level=EventLevel.WARNING, code="RESTARTED", message=text)
            self._runs.append(run.run_id, run.attempt, [remark], None)
            not_before_ns = time.time_ns() + int(pause_s * 1e9)
            restarts = run.restarts + 1
            self._runs.requeue(run.run_id, run.attempt, message, restarts=restarts, not_before_ns=not_before_ns)

    def _fail(self, run: TrainingRun, message: str) -> None:
        tail = self._launcher.log_tail(run.run_id, run.attempt)
        failure = RunFailure(reason=FailureReason.WORKER_DIED, message=message, log_tail=tail)
        self._runs.change_state(run.run_id, run.attempt, RunState.FAILED, message, failure)

    @contextmanager
    def _unless_overtaken(self, run: TrainingRun) -> Iterator[None]:
        try:
            yield
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
        asked = {run.run_id for run in unfinished if run.cancel_requested or run.pause_requested}
        self._cancel_seen_at_s = {run_id: at for run_id, at in self._cancel_seen_at_s.items() if run_id in asked}
