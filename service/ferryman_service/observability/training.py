"""Training as Prometheus sees it: counters over all runs, and gauges for the active ones only (`run_gauges`).

Curves of single runs belong to StreamMetrics.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client import CollectorRegistry

from ferryman_service.domain.errors import DatabaseDamaged, DiskFull, StoreUnavailable
from ferryman_service.domain.records import Record, RunEvent, RunState, StateChange, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import CheckpointInfo, RunFilter, TrainingRun
from ferryman_service.domain.stored import UnreadableRow, readable
from ferryman_service.domain.threads import Threads
from ferryman_service.observability.definitions import counter, gauge, histogram
from ferryman_service.observability.run_gauges import RunGauges
from ferryman_service.observability.store import StoreMetrics

_log = logging.getLogger(__name__)
_READ_LIMIT: Final = 1000
_OLDEST_FIRST: Final = RunFilter(oldest_first=True)
_NEWEST_FIRST: Final = RunFilter()
_STEP_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_RESTARTS: Final = frozenset({"RESTARTED", "HANDED_OVER"})
_FURTHER: Final = frozenset({RunState.RUNNING, RunState.EXPORTING})

STEPS: Final = counter("ferryman_training_steps_total", "Training updates of all runs.")
TOKENS: Final = counter(
    "ferryman_training_target_tokens_total", "Target tokens of all training updates.", unit="tokens"
)
STEP_SECONDS: Final = histogram("ferryman_training_step_seconds", "Duration of a training update.", _STEP_SECONDS)
RUNS: Final = gauge("ferryman_training_runs", "Unfinished runs, by state.", ("state",))
RUNS_ENDED: Final = counter("ferryman_training_runs_ended_total", "Ended runs, by state.", ("state",))
CHECKPOINTS: Final = counter(
    "ferryman_training_checkpoints_total",
    "Checkpoints written. Polled once a second: a checkpoint deleted between two polls is missed.",
)
SKIPPED: Final = counter("ferryman_training_skipped_updates_total", "Updates skipped because of a non-finite gradient.")
RESTARTS: Final = counter(
    "ferryman_training_restarts_total", "Workers that died or were stopped, and whose run a new worker takes over."
)
METRICS: Final = (STEPS, TOKENS, STEP_SECONDS, RUNS, RUNS_ENDED, CHECKPOINTS, SKIPPED, RESTARTS)


class RunReader(Protocol):
    """The part of the run store that is read here."""

    def unfinished(self) -> Sequence[TrainingRun | UnreadableRow]:
        """Return all runs that are not terminal, oldest first."""
        ...

    def list_page(self, wanted: RunFilter, after: str | None, limit: int) -> Sequence[TrainingRun | UnreadableRow]:
        """Return runs that follow the run `after` in the filter's order, at most `limit`."""
        ...

    def records_after(self, run_id: str, after_sequence: int, limit: int) -> Sequence[Record]:
        """Return records in order, at most `limit`."""
        ...


class CheckpointReader(Protocol):
    """The part of the runs' folders that is read here."""

    def checkpoints(self, run_id: str) -> Sequence[CheckpointInfo]:
        """Return the complete checkpoints; none if there is no folder."""
        ...


@dataclass(frozen=True, kw_only=True)
class ObserverConfig:
    """How often to look, how many runs may have gauges of their own, and how many records of a run one look reads."""

    interval_s: float = 1.0
    max_runs: int = 50
    max_records: int = 10_000


class RunObserver:
    """Follows the records of all runs from the first look on. `look` is called by one thread at a time."""

    def __init__(
        self,
        runs: RunReader,
        checkpoints: CheckpointReader,
        registry: CollectorRegistry,
        store: StoreMetrics,
        config: ObserverConfig,
        thread: Threads,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Store the parts; `store` is told how old steps are when they are read, and `thread` is for `run`."""
        self._runs = runs
        self._config = config
        self._thread = thread
        self._store = store
        self._now_ns = now_ns
        self._totals = _Totals(registry)
        self._gauges = RunGauges(registry, config.max_runs)
        self._checkpoints = _CheckpointCount(checkpoints, registry)
        self._states = RUNS.gauge(registry)
        self._cursors: dict[str, int] | None = None
        self._newest: str | None = None
        self._progress_ns: dict[str, int] = {}
        self._step_ns: dict[str, int] = {}

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self._thread.run(self.look)
            except (StoreUnavailable, DiskFull, DatabaseDamaged) as error:
                _log.warning("cannot read the records of the runs, trying again: %s", error)
            await asyncio.sleep(self._config.interval_s)

    def look(self) -> None:
        """Read what is new. What was recorded before the first look is not counted: another process has done that."""
        unfinished = readable(self._runs.unfinished())
        if self._cursors is None:
            self._begin(unfinished)
        cursors = self._cursors
        assert cursors is not None
        for state in (state for state in RunState if not state.is_terminal):
            self._states.labels(state.value).set(sum(run.state is state for run in unfinished))
        last_sequences = {run.run_id: run.last_sequence for run in unfinished}
        # A run may be born and end between two looks.
        for run_id in (*last_sequences, *self._new_runs()):
            cursors.setdefault(run_id, 0)
        for run_id in list(cursors):
            has_news = cursors[run_id] != last_sequences.get(run_id) and self._follow(run_id)
            if not has_news and run_id not in last_sequences:
                self._let_go(run_id)  # it was deleted before its end was read
        for run in unfinished:
            if run.run_id in cursors:  # else its end was read just now
                self._show(run)

    def _begin(self, unfinished: Sequence[TrainingRun]) -> None:
        for run in unfinished:
            self._recall(run)
        newest = self._runs.list_page(_NEWEST_FIRST, None, 1)
        self._newest = newest[0].place if newest else None
        self._cursors = {run.run_id: run.last_sequence for run in unfinished}

    def _recall(self, run: TrainingRun) -> None:
        """Take note of how far a run came before the first look: its last records say when, and its last scores."""
        self._checkpoints.begin(run.run_id)
        self._step_ns[run.run_id] = run.progress.step_time_ns
        if run.progress.last_step is not None:
            self._gauges.show_step(run.run_id, run.progress.last_step)
        first = run.last_sequence
        for _ in range(self._pages):
            if first == 0:
                break
            first, before = max(0, first - _READ_LIMIT), first
            for record in reversed(self._runs.records_after(run.run_id, first, before - first)):
                self._note_progress(run.run_id, record)
                if isinstance(record.payload, ValidationMetrics):
                    self._gauges.show_validation(run.run_id, record.payload)
                    return

    def _new_runs(self) -> Sequence[str]:
        """Return the runs that were created since the last look, as many as one page holds."""
        runs = self._runs.list_page(_OLDEST_FIRST, self._newest, _READ_LIMIT)
        self._newest = runs[-1].place if runs else self._newest
        return [run.run_id for run in readable(runs)]

    @property
    def _pages(self) -> int:
        return -(-self._config.max_records // _READ_LIMIT)

    def _follow(self, run_id: str) -> bool:
        """Read a run's news, at most `max_records`; let go of the run when it has ended. Return whether there were
        any."""
        assert self._cursors is not None
        before = self._cursors[run_id]
        for _ in range(self._pages):
            records = self._runs.records_after(run_id, self._cursors[run_id], _READ_LIMIT)
            self._observe(run_id, records)
            if records and isinstance(end := records[-1].payload, StateChange) and end.state.is_terminal:
                self._checkpoints.look(run_id)
                self._let_go(run_id)
                return True
            if len(records) < _READ_LIMIT:
                break
        has_news = self._cursors[run_id] != before
        if has_news:
            self._checkpoints.look(run_id)
        return has_news

    def _let_go(self, run_id: str) -> None:
        assert self._cursors is not None
        del self._cursors[run_id]
        self._progress_ns.pop(run_id, None)
        self._step_ns.pop(run_id, None)
        self._checkpoints.forget(run_id)
        self._gauges.remove(run_id)

    def _observe(self, run_id: str, records: Sequence[Record]) -> None:
        assert self._cursors is not None
        step: StepMetrics | None = None
        validation: ValidationMetrics | None = None
        for record in records:
            self._totals.count(record)
            self._note_progress(run_id, record)
            self._cursors[run_id] = record.sequence
            if isinstance(record.payload, StepMetrics):
                step = record.payload
            elif isinstance(record.payload, ValidationMetrics):
                validation = record.payload
        if step is not None:
            self._gauges.show_step(run_id, step)
        if validation is not None:
            self._gauges.show_validation(run_id, validation)

    def _note_progress(self, run_id: str, record: Record) -> None:
        payload = record.payload
        moves = isinstance(payload, StepMetrics | ValidationMetrics)
        if moves or (isinstance(payload, StateChange) and payload.state in _FURTHER):
            self._progress_ns[run_id] = max(record.time_ns, self._progress_ns.get(run_id, 0))

    def _show(self, run: TrainingRun) -> None:
        step_ns = run.progress.step_time_ns
        if step_ns > self._step_ns.get(run.run_id, 0):
            self._step_ns[run.run_id] = step_ns
            self._store.lagged(max(0, self._now_ns() - step_ns) / 1e9)
        if run.start_time_ns is not None:
            self._gauges.show_run(run, self._progress_ns.get(run.run_id, run.start_time_ns))


class _Totals:
    """The counters over all runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._steps = STEPS.counter(registry)
        self._tokens = TOKENS.counter(registry)
        self._seconds = STEP_SECONDS.histogram(registry)
        self._skipped = SKIPPED.counter(registry)
        self._restarts = RESTARTS.counter(registry)
        ended = RUNS_ENDED.counter(registry)
        self._ended = {state: ended.labels(state.value) for state in RunState if state.is_terminal}

    def count(self, record: Record) -> None:
        match record.payload:
            case StepMetrics() as step:
                self._steps.inc()
                self._tokens.inc(step.target_tokens)
                self._seconds.observe(step.duration_s)
                self._skipped.inc(step.skipped)
            case StateChange(state=state) if state.is_terminal:
                self._ended[state].inc()
            case RunEvent(code=code) if code in _RESTARTS:
                self._restarts.inc()


class _CheckpointCount:
    """Counts the checkpoints that are there and were not before: nothing else tells of them."""

    def __init__(self, folders: CheckpointReader, registry: CollectorRegistry) -> None:
        self._folders = folders
        self._total = CHECKPOINTS.counter(registry)
        self._seen: dict[str, set[tuple[int, int]]] = {}

    def begin(self, run_id: str) -> None:
        """Take those that are there for known."""
        self._seen[run_id] = self._present(run_id)

    def look(self, run_id: str) -> None:
        present = self._present(run_id)
        self._total.inc(len(present - self._seen.get(run_id, set())))
        self._seen[run_id] = present

    def forget(self, run_id: str) -> None:
        self._seen.pop(run_id, None)

    def _present(self, run_id: str) -> set[tuple[int, int]]:
        return {(found.step, found.create_time_ns) for found in self._folders.checkpoints(run_id)}
