"""A gauge of each kind for every active run. The label is the run's id, which is bounded because a run's gauges are
removed at its end and at most `max_runs` are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from ferryman_service.domain.records import RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import TrainingRun
from ferryman_service.observability.definitions import Metric, gauge

_RUN: Final = "ferryman_training_run_"
_VALIDATION: Final = f"{_RUN}validation_"


def _gauge(prefix: str, name: str, text: str, unit: str = "") -> Metric:
    return gauge(prefix + name, text, ("run",), unit)


OF_STEPS: Final[Mapping[str, Metric]] = {
    "step": _gauge(_RUN, "step", "Updates done."),
    "epoch": _gauge(_RUN, "epoch", "Current epoch."),
    "loss": _gauge(_RUN, "loss", "Label-smoothed cross-entropy per target token of the last step.", "nats"),
    "perplexity": _gauge(_RUN, "perplexity", "Perplexity of the last step."),
    "learning_rate": _gauge(_RUN, "learning_rate", "Learning rate of the last step."),
    "gradient_norm": _gauge(_RUN, "gradient_norm", "Global norm of the last step's gradient before clipping."),
    "target_tokens_per_second": _gauge(
        _RUN, "target_tokens_per_second", "Target tokens per second of the last step.", "tokens/s"
    ),
    "padding_share": _gauge(_RUN, "padding_share", "Share of padding in the last batch, 0 to 1."),
    "memory_bytes": _gauge(_RUN, "memory_bytes", "Memory of the run's worker.", "bytes"),
    "model_flops_utilization": _gauge(
        _RUN,
        "model_flops_utilization",
        "Model FLOPs utilization of the last step: share of the device's peak, 0 to 1. 0 if the peak is unknown.",
    ),
}
"""By the field of StepMetrics."""

OF_VALIDATIONS: Final[Mapping[str, Metric]] = {
    "loss": _gauge(
        _VALIDATION, "loss", "Label-smoothed cross-entropy per target token of the last validation.", "nats"
    ),
    "perplexity": _gauge(_VALIDATION, "perplexity", "Perplexity of the last validation."),
    "bleu": _gauge(_VALIDATION, "bleu", "BLEU of the last validation, 0 to 100."),
    "chrf": _gauge(_VALIDATION, "chrf", "chrF of the last validation, 0 to 100."),
}
"""By the field of ValidationMetrics."""

LAST_PROGRESS: Final = _gauge(
    _RUN,
    "last_progress_timestamp_seconds",
    "Unix time of the last progress: a step, a validation, the start of a worker, or the start of the export.",
    "seconds",
)


def _started_s(run: TrainingRun) -> float:
    assert run.start_time_ns is not None, "a worker has begun it"
    return run.start_time_ns / 1e9


OF_RUNS: Final[Mapping[Metric, Callable[[TrainingRun], float]]] = {
    _gauge(_RUN, "attempt", "Number of workers started for the run."): lambda run: run.attempt,
    _gauge(_RUN, "restarts", "Workers that died in a row without progress."): lambda run: run.restarts,
    _gauge(_RUN, "skipped_updates", "Updates skipped because of a non-finite gradient."): (
        lambda run: run.progress.skipped_updates
    ),
    _gauge(_RUN, "paused", "1 while the run is paused, else 0."): lambda run: run.state is RunState.PAUSED,
    _gauge(_RUN, "progress_ratio", "Progress towards the nearest limit of the recipe, 0 to 1."): (
        lambda run: run.progress.fraction
    ),
    _gauge(
        _RUN, "started_timestamp_seconds", "Unix time of the start of the run's first worker.", "seconds"
    ): _started_s,
}
"""What is read from the run."""

METRICS: Final = (*OF_STEPS.values(), *OF_VALIDATIONS.values(), *OF_RUNS, LAST_PROGRESS)


class RunGauges:
    """Shows at most `max_runs` runs. Used by one thread at a time."""

    def __init__(self, registry: CollectorRegistry, max_runs: int) -> None:
        self._max_runs = max_runs
        self._gauges = {metric: metric.gauge(registry) for metric in METRICS}
        self._shown: set[str] = set()

    def show_step(self, run_id: str, step: StepMetrics) -> None:
        """Show the last step of a run."""
        if self._has_place(run_id):
            for field, metric in OF_STEPS.items():
                self._set(metric, run_id, getattr(step, field))

    def show_validation(self, run_id: str, validation: ValidationMetrics) -> None:
        """Show the last validation of a run."""
        if self._has_place(run_id):
            for field, metric in OF_VALIDATIONS.items():
                self._set(metric, run_id, getattr(validation, field))

    def show_run(self, run: TrainingRun, last_progress_ns: int) -> None:
        """Show how a run stands that a worker has begun."""
        if self._has_place(run.run_id):
            for metric, value_of in OF_RUNS.items():
                self._set(metric, run.run_id, value_of(run))
            self._set(LAST_PROGRESS, run.run_id, last_progress_ns / 1e9)

    def remove(self, run_id: str) -> None:
        """Show a run no more, and let another have its place."""
        if run_id in self._shown:
            self._shown.discard(run_id)
            for shown in self._gauges.values():
                shown.remove(run_id)

    def _has_place(self, run_id: str) -> bool:
        if run_id not in self._shown and len(self._shown) < self._max_runs:
            self._shown.add(run_id)
        return run_id in self._shown

    def _set(self, metric: Metric, run_id: str, value: float) -> None:
        found: Gauge = self._gauges[metric]
        found.labels(run_id).set(value)
