"""Training as Prometheus sees it: counters over all runs, and gauges for the active ones only.

Curves of single runs belong to StreamMetrics. The gauges carry the run's id as a label, which is bounded because they
are removed when the run ends and at most `max_runs` are shown.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ferryman_service.domain.errors import DiskFull, StoreUnavailable
from ferryman_service.domain.records import Record, RunState, StateChange, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import RunFilter, TrainingRun

_log = logging.getLogger(__name__)
_READ_LIMIT: Final = 1000
_OLDEST_FIRST: Final = RunFilter(oldest_first=True)
_NEWEST_FIRST: Final = RunFilter()
_STEP_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STEP_GAUGES: Final[Mapping[str, str]] = {
    "step": "Updates done.",
    "epoch": "The pass over the training pairs.",
    "loss": "Label-smoothed cross-entropy per target token of the last step, nats.",
    "perplexity": "Perplexity of the last step.",
    "learning_rate": "Learning rate of the last step.",
    "gradient_norm": "Global norm of the last step's gradient before clipping.",
    "target_tokens_per_second": "Target tokens per second of the last step.",
    "padding_share": "Share of padding in the last batch, 0 to 1.",
    "memory_bytes": "The worker's memory.",
    "model_flops_utilization": "Share of the device's peak that the last step reached, 0 to 1; 0 where it is unknown.",
}
_RUN_GAUGES: Final[Mapping[str, tuple[str, Callable[[TrainingRun], float]]]] = {
    "attempt": ("How often a worker was started.", lambda run: run.attempt),
    "restarts": ("Workers that died in a row without getting further.", lambda run: run.restarts),
    "skipped_updates": (
        "Updates skipped for a gradient that was not finite.",
        lambda run: run.progress.skipped_updates,
    ),
    "paused": ("1 while the run is paused, else 0.", lambda run: run.state is RunState.PAUSED),
}
_VALIDATION_GAUGES: Final[Mapping[str, str]] = {
    "loss": "Label-smoothed cross-entropy per target token of the last validation, nats.",
    "perplexity": "Perplexity of the last validation.",
    "bleu": "BLEU of the last validation, 0 to 100.",
    "chrf": "chrF of the last validation, 0 to 100.",
}


class RunReader(Protocol):
    """The part of the run store that is read here."""

    def unfinished(self) -> Sequence[TrainingRun]:
        """Return all runs that are not terminal, oldest first."""
        ...

    def list_page(self, wanted: RunFilter, after: str | None, limit: int) -> Sequence[TrainingRun]:
        """Return runs that follow the run `after` in the filter's order, at most `limit`."""
        ...

    def records_after(self, run_id: str, after_sequence: int, limit: int) -> Sequence[Record]:
        """Return records in order, at most `limit`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ObserverConfig:
    """How often to look, how many runs may have gauges of their own, and how many records of a run one look reads."""

    interval_s: float = 1.0
    max_runs: int = 50
    max_records: int = 10_000


class RunObserver:
    """Follows the records of all runs from the first look on. `look` is called by one thread at a time."""

    def __init__(self, runs: RunReader, registry: CollectorRegistry, config: ObserverConfig) -> None:
        self._runs = runs
        self._config = config
        self._cursors: dict[str, int] | None = None
        self._newest: str | None = None
        self._shown: set[str] = set()
        self._steps = Counter("ferryman_training_steps_total", "Updates of all runs.", registry=registry)
        self._tokens = Counter("ferryman_training_target_tokens_total", "Target tokens trained on.", registry=registry)
        self._seconds = Histogram(
            "ferryman_training_step_seconds", "Time of an update.", buckets=_STEP_SECONDS, registry=registry
        )
        self._ended = Counter(
            "ferryman_training_runs_ended_total", "Runs that ended, by state.", ("state",), registry=registry
        )
        self._states = Gauge(
            "ferryman_training_runs", "Runs that are not over, by state.", ("state",), registry=registry
        )
        run_texts = {name: text for name, (text, _) in _RUN_GAUGES.items()}
        self._run_gauges = _gauges("ferryman_training_run_", run_texts, registry)
        self._step_gauges = _gauges("ferryman_training_run_", _STEP_GAUGES, registry)
        self._validation_gauges = _gauges("ferryman_training_run_validation_", _VALIDATION_GAUGES, registry)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.look)
            except (StoreUnavailable, DiskFull) as error:
                _log.warning("cannot read the records of the runs, trying again: %s", error)
            await asyncio.sleep(self._config.interval_s)

    def look(self) -> None:
        """Read what is new. What was recorded before the first look is not counted: another process has done that."""
        unfinished = self._runs.unfinished()
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
            self._show_run(run)

    def _begin(self, unfinished: Sequence[TrainingRun]) -> None:
        self._cursors = {run.run_id: run.last_sequence for run in unfinished}
        for run in unfinished:
            if run.progress.last_step is not None:
                self._show(run.run_id, self._step_gauges, run.progress.last_step)
        newest = self._runs.list_page(_NEWEST_FIRST, None, 1)
        self._newest = newest[0].place if newest else None

    def _new_runs(self) -> Sequence[str]:
        """Return the runs that were created since the last look, as many as one page holds."""
        runs = self._runs.list_page(_OLDEST_FIRST, self._newest, _READ_LIMIT)
        self._newest = runs[-1].place if runs else self._newest
        return [run.run_id for run in runs]

    def _follow(self, run_id: str) -> bool:
        """Read a run's news, at most `max_records`; let go of the run when it has ended. Return whether there were
        any."""
        assert self._cursors is not None
        before = self._cursors[run_id]
        for _ in range(-(-self._config.max_records // _READ_LIMIT)):
            records = self._runs.records_after(run_id, self._cursors[run_id], _READ_LIMIT)
            for record in records:
                self._observe(run_id, record)
                self._cursors[run_id] = record.sequence
            if records and isinstance(end := records[-1].payload, StateChange) and end.state.is_terminal:
                self._let_go(run_id)
                return True
            if len(records) < _READ_LIMIT:
                break
        return self._cursors[run_id] != before

    def _let_go(self, run_id: str) -> None:
        assert self._cursors is not None
        del self._cursors[run_id]
        if run_id in self._shown:
            self._shown.discard(run_id)
            for gauge in (*self._run_gauges.values(), *self._step_gauges.values(), *self._validation_gauges.values()):
                gauge.remove(run_id)

    def _observe(self, run_id: str, record: Record) -> None:
        match record.payload:
            case StepMetrics() as step:
                self._steps.inc()
                self._tokens.inc(step.target_tokens)
                self._seconds.observe(step.step_seconds)
                self._show(run_id, self._step_gauges, step)
            case ValidationMetrics() as validation:
                self._show(run_id, self._validation_gauges, validation)
            case StateChange(state=state) if state.is_terminal:
                self._ended.labels(state.value).inc()

    def _show(self, run_id: str, gauges: Mapping[str, Gauge], metrics: StepMetrics | ValidationMetrics) -> None:
        if run_id in self._shown or len(self._shown) < self._config.max_runs:
            self._shown.add(run_id)
            for name, gauge in gauges.items():
                gauge.labels(run_id).set(getattr(metrics, name))

    def _show_run(self, run: TrainingRun) -> None:
        if run.run_id in self._shown:
            for name, (_, value_of) in _RUN_GAUGES.items():
                self._run_gauges[name].labels(run.run_id).set(value_of(run))


def _gauges(prefix: str, texts: Mapping[str, str], registry: CollectorRegistry) -> Mapping[str, Gauge]:
    return {name: Gauge(prefix + name, text, ("run",), registry=registry) for name, text in texts.items()}
