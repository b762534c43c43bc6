"""The worker's side of metrics: records go to the store in order, in the background, so that no step waits for a
disk."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ferryman_service.application.ports import AppendAck, RunCancelled, RunStore
from ferryman_service.domain.errors import AttemptFenced, DiskFull, StoreUnavailable
from ferryman_service.domain.recipe import StopRecipe
from ferryman_service.domain.records import EventLevel, Payload, RunEvent, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import FailureReason, RunProgress, TrainingFailed


@dataclass(frozen=True, kw_only=True)
class ReporterConfig:
    """Records are written together every `flush_interval_s`; without any, the store is asked for news every
    `ack_interval_s`. A store that cannot be reached is tried again for `retry_s`."""

    flush_interval_s: float = 0.05
    ack_interval_s: float = 0.5
    retry_s: float = 60.0


class StoreReporter:
    """Reports to a RunStore. `step`, `validation`, `event` and `check` belong to the training thread."""

    def __init__(self, runs: RunStore, run_id: str, attempt: int, stop: StopRecipe, config: ReporterConfig) -> None:
        """Store everything; `start` begins to write."""
        self._runs = runs
        self._run_id = run_id
        self._attempt = attempt
        self._config = config
        self._meter = _ProgressMeter(stop)
        self._queue: queue.Queue[tuple[Payload, RunProgress | None] | None] = queue.Queue()
        self._ack = AppendAck(last_sequence=0, cancel_requested=False)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin to write in the background."""
        self._thread.start()

    def step(self, metrics: StepMetrics) -> None:
        """Report an update."""
        self._queue.put((metrics, self._meter.after_step(metrics)))

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        self._queue.put((metrics, self._meter.after_validation(metrics)))

    def event(self, level: EventLevel, code: str, message: str) -> None:
        """Make a remark."""
        self._queue.put((RunEvent(level=level, code=code, message=message), None))

    def check(self) -> None:
        """Raise RunCancelled, AttemptFenced, or TrainingFailed if the reports cannot be stored."""
        if self._error is not None:
            raise self._error
        if self._ack.cancel_requested:
            raise RunCancelled(self._run_id)

    def close(self) -> None:
        """Wait until every report is durable, then check once more. Nothing may be reported after it."""
        self._queue.put(None)
        self._thread.join()
        self.check()

    def _write_all(self) -> None:
        more = True
        try:
            while more:
                more, batch = self._next_batch()
                self._write(batch)
        except (AttemptFenced, TrainingFailed) as error:
            self._error = error

    def _next_batch(self) -> tuple[bool, list[tuple[Payload, RunProgress | None]]]:
        """Wait for a report, then take all that have gathered; (False, …) after close."""
        try:
            items = [self._queue.get(timeout=self._config.ack_interval_s)]
        except queue.Empty:
            return True, []
        if items[0] is not None:
            time.sleep(self._config.flush_interval_s)
        while True:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return None not in items, [item for item in items if item is not None]

    def _write(self, batch: Iterable[tuple[Payload, RunProgress | None]]) -> None:
        batch = list(batch)
        payloads = [payload for payload, _ in batch]
        progress = next((progress for _, progress in reversed(batch) if progress is not None), None)
        give_up_s = time.monotonic() + self._config.retry_s
        while True:
            try:
                self._ack = self._runs.append(self._run_id, self._attempt, payloads, progress)
                return
            except DiskFull as error:
                raise TrainingFailed(FailureReason.DISK_FULL, f"the records cannot be stored: {error}") from error
            except StoreUnavailable as error:
                if time.monotonic() > give_up_s:
                    raise TrainingFailed(FailureReason.WORKER_DIED, f"the store is out of reach: {error}") from error
                time.sleep(self._config.ack_interval_s)


class SilentReporter:
    """The reporter of the processes that train beside rank 0: rank 0 speaks for all."""

    def step(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def validation(self, metrics: ValidationMetrics) -> None:
        """Say nothing."""

    def event(self, level: EventLevel, code: str, message: str) -> None:
        """Say nothing."""

    def check(self) -> None:
        """Go on: rank 0 tells the others when to stop."""


class _ProgressMeter:
    """Sums up the records into a RunProgress."""

    def __init__(self, stop: StopRecipe) -> None:
        self._stop = stop
        self._began_s = time.monotonic()
        self._progress = RunProgress()
        self._rate = 0.0

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
            remaining_seconds=elapsed_s * (1 - fraction) / fraction if fraction > 0 else None,
            last_step=metrics,
        )
        return self._progress

    def after_validation(self, metrics: ValidationMetrics) -> RunProgress:
        if metrics.best:
            self._progress = replace(self._progress, best_validation=metrics)
        return self._progress

    def _fraction(self, metrics: StepMetrics) -> float:
        """Share of the nearest limit; finished epochs count, the present one does not."""
        shares = [0.0]
        if self._stop.max_steps:
            shares.append(metrics.step / self._stop.max_steps)
        if self._stop.max_epochs:
            shares.append((metrics.epoch - 1) / self._stop.max_epochs)
        if self._stop.max_time_seconds:
            shares.append((time.monotonic() - self._began_s) / self._stop.max_time_seconds)
        return min(1.0, max(shares))
