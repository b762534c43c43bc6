"""The worker's side of metrics: records go to the store in order, in the background, so that no step waits for a
disk."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ferryman_service.application.ports import AppendAck, RunCancelled, RunStore
from ferryman_service.domain.errors import DatabaseDamaged, DiskFull, StoreUnavailable
from ferryman_service.domain.recipe import StopRecipe
from ferryman_service.domain.records import EventLevel, Payload, RunEvent, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import RunProgress, TrainingRun
from ferryman_service.domain.schedule import DecayPlan
from ferryman_service.domain.training import DiskIsFull, PauseRequested, StopRequested

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReporterConfig:
    """Records are written together every `flush_interval_s`; without any, the store is asked for news every
    `ack_interval_s`. A store that cannot be reached is tried again for `retry_s`: training goes on until it needs the
    reports to be durable. After that the worker is to die of it, as another process may have better luck."""

    flush_interval_s: float = 0.05
    ack_interval_s: float = 0.5
    retry_s: float = 600.0


_Report = tuple[Payload, RunProgress | None]
_Item = _Report | threading.Event
"""What the background thread takes: a report, or a flag to raise once all before it is durable."""


class StoreReporter:
    """Reports to a RunStore. `step`, `validation`, `event`, `resume` and `check` belong to the training thread."""

    def __init__(
        self,
        runs: RunStore,
        run: TrainingRun,
        config: ReporterConfig,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Store everything; `start` begins to write. `stop_requested` tells whether this process was told to end."""
        self._runs = runs
        self._run_id = run.run_id
        self._attempt = run.attempt
        self._config = config
        self._stop_requested = stop_requested
        self._meter = _ProgressMeter(run.recipe.stop, run.progress)
        self._known_reports = 0
        self._queue: queue.Queue[_Item | None] = queue.Queue()
        self._ack = AppendAck(last_sequence=0, cancel_requested=False)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin to write in the background."""
        self._thread.start()

    def step(self, metrics: StepMetrics) -> None:
        """Report an update."""
        if self._is_news():
            self._queue.put((metrics, self._meter.after_step(metrics)))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        if self._is_news():
            self._queue.put((metrics, self._meter.after_validation(metrics)))

    def decay_plan(self, plan: DecayPlan) -> None:
        """Report a planned decay of the learning rate."""
        if self._is_news():
            self._queue.put((plan, self._meter.after_decay_plan(plan)))

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Make a remark."""
        remark = RunEvent(level=level, code=code, message=message)
        if not repeats:
            self._queue.put((remark, None))
        elif self._is_news():
            self._queue.put((remark, self._meter.after_event()))

    def resume(self, reports: int) -> None:
        """Drop what follows `reports` reports of the series, as far as it is durable already."""
        self._known_reports = self._meter.reports - reports
        assert self._known_reports >= 0, "a checkpoint knows of reports that were never made"

    def flush(self) -> None:
        """Wait until everything that was reported is durable; raises what keeps it from being so."""
        durable = threading.Event()
        self._queue.put(durable)
        while not durable.wait(self._config.flush_interval_s):
            if self._error is not None:
                raise self._error

    def check(self) -> None:
        """Raise RunCancelled, PauseRequested, StopRequested, or what keeps the reports from being stored:
        AttemptFenced, DiskIsFull, StoreUnavailable, DatabaseDamaged, a bug."""
        if self._error is not None:
            raise self._error
        if self._ack.cancel_requested:
            raise RunCancelled(self._run_id)
        if self._ack.pause_requested:
            raise PauseRequested(self._run_id)
        if self._stop_requested():
            raise StopRequested(self._run_id)

    def close(self) -> None:
        """Wait until every report is durable; raises what keeps them from it, or RunCancelled. Nothing may be reported
        after it."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._ack.cancel_requested:
            raise RunCancelled(self._run_id)

    def _is_news(self) -> bool:
        if self._known_reports == 0:
            return True
        self._known_reports -= 1
        return False

    def _write_all(self) -> None:
        more = True
        try:
            while more:
                more, batch = self._next_batch()
                self._write([item for item in batch if not isinstance(item, threading.Event)])
                for item in batch:
                    if isinstance(item, threading.Event):
                        item.set()
        except Exception as error:  # noqa: BLE001
            self._error = error  # raised by the next call: nobody sees what this thread raises

    def _next_batch(self) -> tuple[bool, list[_Item]]:
        """Wait for a report, then take all that have gathered; (False, …) after close."""
        try:
            items = [self._queue.get(timeout=self._config.ack_interval_s)]
        except queue.Empty:
            return True, []
        if isinstance(items[0], tuple):
            time.sleep(self._config.flush_interval_s)
        while True:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return None not in items, [item for item in items if item is not None]

    def _write(self, batch: Sequence[_Report]) -> None:
        payloads = [payload for payload, _ in batch]
        progress = next((progress for _, progress in reversed(batch) if progress is not None), None)
        began_s = time.monotonic()
        while True:
            try:
                self._ack = self._runs.append(self._run_id, self._attempt, payloads, progress)
                return
            except DiskFull as error:
                raise DiskIsFull(f"the records cannot be stored: {error}") from error
            except (StoreUnavailable, DatabaseDamaged) as error:
                if time.monotonic() - began_s > self._config.retry_s:
                    raise
                _log.warning("the records cannot be stored, trying again: %s", error)
                time.sleep(self._config.ack_interval_s)


class SilentReporter:
    """The reporter of the processes that train beside rank 0: rank 0 speaks for all."""

    def step(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def validation(self, metrics: ValidationMetrics) -> None:
        """Say nothing."""

    def decay_plan(self, plan: DecayPlan) -> None:
        """Say nothing."""

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Say nothing."""

    def resume(self, reports: int) -> None:
        """Nothing was said."""

    def flush(self) -> None:
        """Nothing was said."""

    def check(self) -> None:
        """Go on: rank 0 tells the others when to stop."""


class _ProgressMeter:
    """Sums up the records into a RunProgress, from what earlier attempts left."""

    def __init__(self, stop: StopRecipe, progress: RunProgress) -> None:
        self._stop = stop
        self._progress = progress
        self._rate = progress.target_tokens_per_second
        # What came before this attempt took a time that only its share of the limit tells.
        self._fraction_before = progress.fraction
        self._began_s = time.monotonic()

    @property
    def reports(self) -> int:
        """How many reports of the series were made, by earlier attempts too."""
        return self._progress.reports

    def after_step(self, metrics: StepMetrics) -> RunProgress:
        rate = metrics.target_tokens_per_second
        self._rate = rate if not self._rate else 0.95 * self._rate + 0.05 * rate
        fraction = self._fraction(metrics)
        elapsed_s = time.monotonic() - self._began_s
        self._progress = replace(
            self._progress,
            step=metrics.step,
            epoch=metrics.epoch,
            target_tokens=self._progress.target_tokens + metrics.target_tokens,
            target_tokens_per_second=self._rate,
            fraction=fraction,
            remaining_s=self._remaining_s(fraction, elapsed_s),
            last_step=metrics,
            skipped_updates=self._progress.skipped_updates + metrics.skipped,
            step_time_ns=time.time_ns(),
        )
        return self.after_event()

    def after_validation(self, metrics: ValidationMetrics) -> RunProgress:
        if metrics.best:
            self._progress = replace(self._progress, best_validation=metrics)
        return self.after_event()

    def after_decay_plan(self, plan: DecayPlan) -> RunProgress:
        # After a divergence a run may report a plan that it had reported before: then it follows that one again.
        before = [decay for decay in self._progress.decays if decay.first_step < plan.first_step]
        self._progress = replace(self._progress, decays=(*before, plan))
        return self.after_event()

    def after_event(self) -> RunProgress:
        self._progress = replace(self._progress, reports=self._progress.reports + 1)
        return self._progress

    def _remaining_s(self, fraction: float, elapsed_s: float) -> float | None:
        done = fraction - self._fraction_before
        return elapsed_s * (1 - fraction) / done if done > 0 else None

    def _fraction(self, metrics: StepMetrics) -> float:
        """Share of the nearest limit; finished epochs count, the present one does not. A run whose decay has begun ends
        with it."""
        shares = [0.0]
        if self._progress.decays:
            return min(1.0, metrics.step / self._progress.decays[-1].last_step)
        if self._stop.max_steps:
            shares.append(metrics.step / self._stop.max_steps)
        if self._stop.max_epochs:
            shares.append((metrics.epoch - 1) / self._stop.max_epochs)
        if self._stop.max_duration_s:
            elapsed_s = time.monotonic() - self._began_s
            shares.append(self._time_before() + elapsed_s / self._stop.max_duration_s)
        return min(1.0, max(shares))

    def _time_before(self) -> float:
        limited_by_time = not (self._stop.max_steps or self._stop.max_epochs)
        return self._fraction_before if limited_by_time else 0.0
