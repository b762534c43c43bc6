"""Keeps runs and workers together: starts queued runs, notices workers that died and lets others go on, ends
cancelled ones that do not listen.

The supervisor remembers nothing that matters: what it must know is in the store, so a restarted service goes on where
the last one stopped, with the workers that still run.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ferryman_service.application.ports import Launcher, RunStore
from ferryman_service.domain.errors import AttemptFenced, DiskFull, StoreUnavailable
from ferryman_service.domain.records import ACTIVE_STATES, EventLevel, RunEvent, RunState
from ferryman_service.domain.runs import FailureReason, Handover, RunFailure, TrainingRun, disk_full_handover

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
        queued = [run for run in unfinished if run.state is RunState.QUEUED]
        # A run whose worker died or was told to end keeps its place, also while it waits for its time.
        between_workers = [run for run in queued if run.not_before_ns]
        fresh = [run for run in queued if not run.not_before_ns]
        free = max(0, self._config.max_concurrent_runs - len(active))
        for run in [*between_workers, *fresh][:free]:
            if self._is_due(run):
                self._launch(run)
        self._forget(unfinished)

    def _is_due(self, run: TrainingRun) -> bool:
        wait_s = (run.not_before_ns - time.time_ns()) / 1e9
        # A longer wait than any that is ever given: somebody has set the clock back.
        return wait_s <= 0 or wait_s > self._config.max_backoff_s

    def _look_after(self, run: TrainingRun) -> None:
        alive = self._launcher.is_running(run.run_id, run.attempt, run.worker)
        if (run.cancel_requested or run.pause_requested) and alive and self._out_of_patience(run):
            _log.warning("%s does not listen to its cancellation or pause; ending its worker", run.run_id)
            self._end(run, "the worker did not listen and was killed")
        elif run.worker is None and not alive and (run.run_id, run.attempt) not in self._launched_at_s:
            self._launch(run)
        elif not alive:
            how = self._launcher.exit_description(run.run_id, run.attempt)
            self._end(run, f"the worker died ({how or 'nobody saw how'}); its log tells more")
        elif run.worker is None and self._start_is_overdue(run):
            self._end(run, f"the worker did not begin within {self._config.start_timeout_s:g} s and was killed")

    def _launch(self, run: TrainingRun) -> None:
        """Record the attempt, then start its worker. Should this process die in between, nobody claims the attempt, and
        the next supervisor makes a new one; should a worker of the old attempt turn up after all, its claim is
        refused."""
        if run.attempt and not self._launcher.kill(run.run_id, run.attempt):
            return  # two attempts must not write into one folder: the next look finds the old one gone
        started = self._runs.begin_attempt(run.run_id, run.attempt)
        if started is None:
            return
        self._launched_at_s[started.run_id, started.attempt] = time.monotonic()
        try:
            self._launcher.start(started.run_id, started.attempt, started.processes)
        except OSError as error:
            _log.exception("cannot start a worker for %s", run.run_id)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._give_up(started, disk_full_handover(str(error)))
            else:
                self._restart(started, f"the worker could not be started: {error}")

    def _end(self, run: TrainingRun, why: str) -> None:
        """See to it that the attempt's processes are gone, all of them, then say how it went and what comes now, unless
        the worker has said it first."""
        if not self._launcher.kill(run.run_id, run.attempt):
            return  # the next look finds them gone
        run = self._runs.get(run.run_id)
        if run.state in ACTIVE_STATES:
            self._restart(run, why)

    def _restart(self, run: TrainingRun, why: str) -> None:
        """Let another worker go on from the last checkpoint, after a pause; fail if too many have died in a row."""
        wanted = not (run.cancel_requested or run.pause_requested)
        if wanted and run.restarts >= self._config.max_restarts:
            self._fail(run, f"{why}; {run.restarts + 1} workers in a row got no further than each other")
            return
        pause_s = min(self._config.backoff_s * 2.0**run.restarts, self._config.max_backoff_s)
        tail = self._launcher.log_tail(run.run_id, run.attempt)
        _log.warning("attempt %d of %s: %s. Its last lines:\n%s", run.attempt, run.run_id, why, tail)
        text = f"{why}. Another goes on from the last checkpoint in {pause_s:g} s"
        handover = Handover(
            state=RunState.QUEUED,
            message=why,
            remark=RunEvent(level=EventLevel.WARNING, code="RESTARTED", message=text),
            restarts=run.restarts + 1,
            not_before_ns=time.time_ns() + int(pause_s * 1e9),
        )
        self._give_up(run, handover)

    def _give_up(self, run: TrainingRun, handover: Handover) -> None:
        with self._unless_overtaken(run):
            self._runs.give_up_attempt(run.run_id, run.attempt, handover)

    def _fail(self, run: TrainingRun, message: str) -> None:
        tail = self._launcher.log_tail(run.run_id, run.attempt)
        failure = RunFailure(reason=FailureReason.WORKER_DIED, message=message, log_tail=tail)
        with self._unless_overtaken(run):
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
