"""Keeps runs and workers together: starts queued runs, notices workers that died and lets others go on, ends
cancelled ones that do not listen.

The supervisor remembers nothing that matters: what it must know is in the store, so a restarted service goes on where
the last one stopped, with the workers that still run.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ferryman_service.application.ports import FolderOwnership, Launcher, LaunchObserver, RunStore
from ferryman_service.domain.errors import AttemptFenced, DatabaseDamaged, DiskFull, RunNotFound, StoreUnavailable
from ferryman_service.domain.log_context import logging_with
from ferryman_service.domain.os_errors import NO_SPACE, is_exhaustion
from ferryman_service.domain.records import ACTIVE_STATES, EventLevel, RunEvent, RunState
from ferryman_service.domain.runs import FailureReason, Handover, RunFailure, TrainingRun, disk_full_handover
from ferryman_service.domain.stored import UnreadableRow, readable
from ferryman_service.domain.threads import Threads

_log = logging.getLogger(__name__)
_MAX_DOUBLINGS: Final = 16
_LONGEST_LOOK_S: Final = 10.0
"""What the time between two looks at a worker counts at most: a machine that was suspended, or a container that was
frozen, has stopped this process too."""


class FolderNotHeld(Exception):
    """The data folder's path does not lead to the folder that this process owns: nothing may be done there."""


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """How many workers at once, how often to look, how long to be patient.

    A worker that dies is followed by another, `max_restarts` times in a row without getting further; the pauses before
    them double from `backoff_s` to `max_backoff_s`. One that does not heed a cancellation or a pause is killed
    `cancel_grace_s` or `pause_grace_s` later: a pause may have to wait for a large checkpoint. What is left of an
    attempt that is over is killed `exit_grace_s` after it was found; it is looked for every `leftovers_interval_s`.
    A worker that gives no sign of life for `silence_s` is killed and counts as one that died.
    After a tick with an unexpected error the pause before the next one doubles, from `backoff_s` to `max_backoff_s`.
    """

    max_concurrent_runs: int = 1
    interval_s: float = 0.25
    start_timeout_s: float = 180.0
    cancel_grace_s: float = 30.0
    pause_grace_s: float = 600.0
    silence_s: float = 300.0
    exit_grace_s: float = 30.0
    leftovers_interval_s: float = 2.0
    max_restarts: int = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0


@dataclass(frozen=True)
class Silence:
    """A worker's last beat, when it was looked at last, and how long it had been silent by then."""

    beat: int
    seen_at_s: float
    lasted_s: float = 0.0

    def at(self, beat: int, now_s: float) -> Silence:
        """Return the silence at a new look."""
        if beat != self.beat:
            return Silence(beat, now_s)
        return Silence(beat, now_s, self.lasted_s + min(now_s - self.seen_at_s, _LONGEST_LOOK_S))


class Supervisor:
    """One per data folder. `tick` is called by one thread at a time."""

    def __init__(
        self,
        runs: RunStore,
        launcher: Launcher,
        config: SupervisorConfig,
        thread: Threads,
        observer: LaunchObserver | None = None,
        ownership: FolderOwnership | None = None,
        has_space: Callable[[], bool] = lambda: True,
    ) -> None:
        """Store the ports and the thread for `run`; `observer` is told of every start of a worker. Nothing is done to
        runs and workers while `ownership` is not held. Runs that have not begun yet wait while `has_space` is False."""
        self._has_space = has_space
        self._runs = runs
        self._launcher = launcher
        self._config = config
        self._thread = thread
        self._observer = observer
        self._ownership = ownership
        self._trouble = ""
        self._failures = 0
        self._lost = asyncio.Event()
        self._launched_at_s: dict[tuple[str, int], float] = {}
        self._asked_at_s: dict[tuple[str, str], float] = {}
        self._leftovers_since_s: dict[tuple[str, int], float] = {}
        self._leftovers_seen_at_s = -math.inf
        self._silences: dict[tuple[str, int], Silence] = {}
        self._last_bugs: dict[str, str] = {}

    async def run(self) -> None:
        """Tick until cancelled; a tick that has begun goes on in its thread. Workers are not touched when it stops."""
        while True:
            try:
                await self._thread.run(self.tick)
            except (StoreUnavailable, DiskFull, DatabaseDamaged) as error:
                _log.warning("cannot look after the runs, trying again: %s", error)
            except FolderNotHeld as error:
                self._note_trouble(str(error))
                if self._ownership is not None and await self._thread.run(self._ownership.is_lost):
                    self._lost.set()
            except OSError as error:
                self._note_os_error(error)
            except Exception as error:  # noqa: BLE001
                self._note_failure(error)
            else:
                self._note_success()
            await asyncio.sleep(self._pause_s())

    def works(self) -> bool:
        """Tell whether the last tick has not failed unexpectedly; safe to call from every thread."""
        return not self._trouble

    async def folder_lost(self) -> None:
        """Return once another folder is in the place of the one that this process owns; in most lives, never."""
        await self._lost.wait()

    def tick(self) -> None:
        """Look at every run that is not terminal, once.

        Raises FolderNotHeld, StoreUnavailable, DiskFull, DatabaseDamaged.
        """
        self._check_ownership()
        found = self._runs.unfinished()
        unfinished = readable(found)
        unreadable = {row.name for row in found if isinstance(row, UnreadableRow)}
        active = [run for run in unfinished if run.state in ACTIVE_STATES]
        for run in active:
            with self._apart(run):
                self._look_after(run)
        queued = [run for run in unfinished if run.state is RunState.QUEUED]
        has_place = bool(queued) and len(active) < self._config.max_concurrent_runs
        leftovers = self._end_leftovers(active, unreadable, at_once=has_place)
        self._start_waiting(queued, {run.run_id for run in active} | leftovers)
        self._forget(unfinished)

    def _check_ownership(self) -> None:
        """Raise FolderNotHeld where another service may be in charge: what is killed or started could be its own."""
        if self._ownership is not None and not self._ownership.is_held():
            raise FolderNotHeld("the data folder was moved, removed or replaced while this service was using it")

    def _note_trouble(self, why: str) -> None:
        if self._trouble != why:
            _log.error("training is not ready: %s", why)
        self._trouble = why

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._observer is not None:
            self._observer.failed_to_supervise()
        why = f"the supervisor cannot work: {error!r}"
        if self._trouble != why:
            _log.error("a bug in looking after the runs", exc_info=error)
        self._note_trouble(why)

    def _note_os_error(self, error: OSError) -> None:
        """Note what keeps the supervisor from its work; what the machine lacks now, it may have at the next tick."""
        if is_exhaustion(error):
            self._note_trouble(f"the supervisor cannot work now: {error.strerror}")
        else:
            self._note_failure(error)

    def _note_success(self) -> None:
        if self._trouble:
            _log.info("the supervisor works again")
        self._trouble, self._failures = "", 0

    def _pause_s(self) -> float:
        if not self._failures:
            return self._config.interval_s
        doubled_s = max(self._config.backoff_s, self._config.interval_s) * 2.0 ** min(
            self._failures - 1, _MAX_DOUBLINGS
        )
        return min(doubled_s, max(self._config.max_backoff_s, self._config.interval_s))

    def _start_waiting(self, queued: Sequence[TrainingRun], holding: Set[str]) -> None:
        """Start queued runs as long as there are places; `holding` are the runs that have one."""
        # A run whose worker died or was told to end keeps its place, also while it waits for its time.
        between_workers = [run for run in queued if run.not_before_ns]
        fresh = [run for run in queued if not run.not_before_ns]
        may_begin = bool(fresh) and self._has_space()
        for run in [*between_workers, *fresh]:
            if not run.attempt and not may_begin:
                continue
            holding = holding | {run.run_id}
            if len(holding) > self._config.max_concurrent_runs:
                break
            with self._apart(run):
                if run.restarts > self._config.max_restarts:
                    self._fail_waiting(run)
                elif self._is_due(run):
                    self._launch(run)

    def _is_due(self, run: TrainingRun) -> bool:
        wait_s = (run.not_before_ns - time.time_ns()) / 1e9
        # A longer wait than any that is ever given: somebody has set the clock back.
        return wait_s <= 0 or wait_s > self._config.max_backoff_s

    def _look_after(self, run: TrainingRun) -> None:
        alive = self._launcher.is_running(run.run_id, run.attempt, run.worker)
        if alive and self._out_of_patience(run):
            _log.warning("%s does not listen to its cancellation or pause; ending its worker", run.run_id)
            self._end(run, "the worker did not listen and was killed")
        elif alive and self._is_silent(run):
            self._end(run, f"the worker gave no sign of life for {self._config.silence_s:g} s and was killed")
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
        self._check_ownership()
        if run.attempt and not self._launcher.kill(run.run_id, run.attempt, run.worker):
            return  # two attempts must not write into one folder: the next look finds the old one gone
        started = self._runs.begin_attempt(run.run_id, run.attempt)
        if started is None:
            return
        self._launched_at_s[started.run_id, started.attempt] = time.monotonic()
        try:
            self._launcher.start(started.run_id, started.attempt, started.processes)
        except OSError as error:
            if self._observer is not None:
                self._observer.failed_to_start()
            _log.exception("cannot start a worker for %s", run.run_id)
            if error.errno in NO_SPACE:
                self._give_up(started, disk_full_handover(str(error)))
            elif is_exhaustion(error):
                self._wait_for_resources(started, error)
            else:
                self._restart(started, f"the worker could not be started: {error}")
        else:
            if self._observer is not None:
                self._observer.started()

    def _end(self, run: TrainingRun, why: str) -> None:
        """See to it that the attempt's processes are gone, all of them, then say how it went and what comes now, unless
        the worker has said it first."""
        self._check_ownership()
        if not self._launcher.kill(run.run_id, run.attempt, run.worker):
            return  # the next look finds them gone
        run = self._runs.get(run.run_id)
        if run.state in ACTIVE_STATES:
            self._restart(run, why)

    def _end_leftovers(self, active: Sequence[TrainingRun], unreadable: Set[str], *, at_once: bool) -> Set[str]:
        """See to it that the processes of attempts that are over end; return the runs of which some are left. Such a
        run may be gone. It has been a while since they were looked for, unless `at_once`.

        A run whose row cannot be read keeps its worker, which may well go on, and its place.
        """
        now_s = time.monotonic()
        if at_once or now_s - self._leftovers_seen_at_s > self._config.leftovers_interval_s:
            self._leftovers_seen_at_s = now_s
            over = self._launcher.living() - {(run.run_id, run.attempt) for run in active}
            since_s = self._leftovers_since_s
            self._leftovers_since_s = {key: now_s if key[0] in unreadable else since_s.get(key, now_s) for key in over}
            for (run_id, attempt), found_s in self._leftovers_since_s.items():
                if now_s - found_s > self._config.exit_grace_s:
                    self._check_ownership()
                    _log.warning("attempt %d of %s is over, but has not ended; killing it", attempt, run_id)
                    self._launcher.kill(run_id, attempt, None)
        return {run_id for run_id, _ in self._leftovers_since_s}

    def _restart(self, run: TrainingRun, why: str) -> None:
        """Let another worker go on from the last checkpoint, after a pause; fail if too many have died in a row."""
        wanted = not (run.cancel_requested or run.pause_requested)
        if wanted and run.restarts >= self._config.max_restarts:
            self._fail(run, f"{why}; {_no_further(run.restarts + 1)}")
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

    def _wait_for_resources(self, run: TrainingRun, error: OSError) -> None:
        """Let another worker try after the longest pause. None has begun, so none counts as having died."""
        pause_s = self._config.max_backoff_s
        text = f"the worker could not be started ({error.strerror}); another try follows in {pause_s:g} s"
        handover = Handover(
            state=RunState.QUEUED,
            message=text,
            remark=RunEvent(level=EventLevel.WARNING, code="NOT_STARTED", message=text),
            not_before_ns=time.time_ns() + int(pause_s * 1e9),
        )
        self._give_up(run, handover)

    def _give_up(self, run: TrainingRun, handover: Handover) -> None:
        with self._unless_overtaken(run):
            self._runs.give_up_attempt(run.run_id, run.attempt, handover)

    def _fail(self, run: TrainingRun, message: str) -> None:
        with self._unless_overtaken(run):
            self._runs.change_state(run.run_id, run.attempt, RunState.FAILED, message, self._failure(run, message))

    def _fail_waiting(self, run: TrainingRun) -> None:
        """Fail a run whose workers were told to end too many times in a row: one of them writes that down itself."""
        message = f"the worker was told to end, or one of its processes died; {_no_further(run.restarts)}"
        with self._unless_overtaken(run):
            self._runs.fail_waiting(run.run_id, run.attempt, self._failure(run, message))

    def _failure(self, run: TrainingRun, message: str) -> RunFailure:
        tail = self._launcher.log_tail(run.run_id, run.attempt)
        return RunFailure(reason=FailureReason.WORKER_DIED, message=message, log_tail=tail)

    @contextmanager
    def _apart(self, run: TrainingRun) -> Iterator[None]:
        """Keep what goes wrong with a run from the others; the next look tries again."""
        with logging_with(run=run.run_id), self._going_on_after_errors(run):
            yield

    @contextmanager
    def _going_on_after_errors(self, run: TrainingRun) -> Iterator[None]:
        try:
            yield
        except RunNotFound:
            _log.info("%s was deleted in the meantime", run.run_id)
        except (StoreUnavailable, DiskFull, DatabaseDamaged) as error:
            _log.warning("cannot look after %s, trying again: %s", run.run_id, error)
        except FolderNotHeld:
            raise
        except Exception as error:  # noqa: BLE001
            # The same bug several times a second would fill the log.
            if self._last_bugs.get(run.run_id) != repr(error):
                if isinstance(error, OSError) and is_exhaustion(error):
                    _log.warning("cannot look after %s now, trying again: %s", run.run_id, error)
                else:
                    _log.exception("a bug in looking after %s, trying again", run.run_id)
            self._last_bugs[run.run_id] = repr(error)

    @contextmanager
    def _unless_overtaken(self, run: TrainingRun) -> Iterator[None]:
        try:
            yield
        except AttemptFenced:
            _log.info("%s ended by itself in the meantime", run.run_id)

    def _out_of_patience(self, run: TrainingRun) -> bool:
        now_s = time.monotonic()
        asked = {name: self._asked_at_s.setdefault((run.run_id, name), now_s) for name in _requests(run)}
        graces_s = {"cancel": self._config.cancel_grace_s, "pause": self._config.pause_grace_s}
        return any(now_s - asked_s > graces_s[name] for name, asked_s in asked.items())

    def _is_silent(self, run: TrainingRun) -> bool:
        key, now_s = (run.run_id, run.attempt), time.monotonic()
        beat = self._launcher.last_beat(*key)
        if beat is None:
            self._silences.pop(key, None)
            return False
        silence = self._silences.get(key, Silence(beat, now_s)).at(beat, now_s)
        self._silences[key] = silence
        return silence.lasted_s > self._config.silence_s

    def _start_is_overdue(self, run: TrainingRun) -> bool:
        launched_s = self._launched_at_s.get((run.run_id, run.attempt), time.monotonic())
        return time.monotonic() - launched_s > self._config.start_timeout_s

    def _forget(self, unfinished: Sequence[TrainingRun]) -> None:
        known = {run.run_id for run in unfinished}
        self._launched_at_s = {key: at for key, at in self._launched_at_s.items() if key[0] in known}
        self._silences = {key: silence for key, silence in self._silences.items() if key[0] in known}
        self._last_bugs = {run_id: bug for run_id, bug in self._last_bugs.items() if run_id in known}
        asked = {(run.run_id, name) for run in unfinished for name in _requests(run)}
        self._asked_at_s = {key: at for key, at in self._asked_at_s.items() if key in asked}


def _requests(run: TrainingRun) -> Sequence[str]:
    """Return what the run's caller has asked its worker for. An export is not paused: it is about to end."""
    pausing = run.pause_requested and run.state is not RunState.EXPORTING
    asked = {"cancel": run.cancel_requested, "pause": pausing}
    return [name for name, is_asked in asked.items() if is_asked]


def _no_further(workers: int) -> str:
    return f"{workers} workers in a row got no further than each other"
