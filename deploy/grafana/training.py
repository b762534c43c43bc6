"""The dashboard *Training*: a run is picked, or all are shown."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    Marks,
    Query,
    finished,
    graph,
    label_variable,
    new_dashboard,
    newest,
    quantiles,
    summed_rate,
)

_RUN: Final = 'job=~"$job", run=~"$run"'


def run_curve(name: str, legend: str = "{{run}}") -> Query:
    """Return a gauge of the chosen runs."""
    return Query(expression=f"ferryman_training_run_{name}{{{_RUN}}}", legend=legend)


def training() -> models.Dashboard:
    """Return the dashboard *Training*."""
    board = new_dashboard("Ferryman / Training", "ferryman-training", "Training runs, one by one and all together.")
    board.with_variable(label_variable("job", "ferryman_build_info", "job"))
    board.with_variable(label_variable("run", 'ferryman_training_run_attempt{job=~"$job"}', "run"))
    for marks in (
        Marks(
            name="Worker started again",
            expression=f"changes(ferryman_training_run_attempt{{{_RUN}}}[2m]) > 0",
            title="{{run}}: another worker",
            color="orange",
        ),
        Marks(
            name="Run started",
            expression=f"ferryman_training_run_started_timestamp_seconds{{{_RUN}}} * 1000",
            title="{{run}} started",
            color="blue",
            at_value=True,
        ),
    ):
        board.annotation(marks)
    rows = {
        "The run": _run_numbers(),
        "Learning": _learning(),
        "Speed and memory": _speed(),
        "All runs": _all_runs(),
    }
    return finished(board, rows)


def _run_numbers() -> list[Builder[models.Panel]]:
    progress = f"ferryman_training_run_progress_ratio{{{_RUN}}}"
    left = f"(1 - {progress}) / (deriv({progress}[15m]) > 0)"
    last = f"time() - ferryman_training_run_last_progress_timestamp_seconds{{{_RUN}}}"
    age = f"time() - ferryman_training_run_started_timestamp_seconds{{{_RUN}}}"
    return [
        newest("Step", run_curve("step"), unit="none", width=3, decimals=0),
        newest("Progress", run_curve("progress_ratio"), unit="percentunit", width=3, decimals=1),
        newest(
            "Time left",
            Query(expression=left, legend="{{run}}"),
            unit="s",
            width=3,
            decimals=0,
            text="Until the step or time limit, as the last 15 minutes went. Early stopping may end the run before.",
        ),
        newest("Since its start", Query(expression=age, legend="{{run}}"), unit="s", width=3, decimals=0),
        newest(
            "Since its last record",
            Query(expression=last, legend="{{run}}"),
            unit="s",
            width=3,
            decimals=0,
            text="Half an hour without a record is an alert: TrainingStalled.",
        ),
        newest("Worker", run_curve("attempt"), unit="none", width=3, decimals=0, text="How often one was started."),
        newest(
            "Workers without progress",
            run_curve("restarts"),
            unit="none",
            width=3,
            decimals=0,
            text="That ended in a row; from three on an alert: TrainingRunRestarting.",
        ),
        newest("Paused", run_curve("paused"), unit="bool_yes_no", width=3),
    ]


def _learning() -> list[Builder[models.Panel]]:
    return [
        graph(
            "Loss",
            run_curve("loss", "{{run}} training"),
            run_curve("validation_loss", "{{run}} validation"),
            unit="none",
            width=12,
            lowest=None,
            text="Label-smoothed cross-entropy per target token, nats.",
        ),
        graph(
            "Perplexity",
            run_curve("perplexity", "{{run}} training"),
            run_curve("validation_perplexity", "{{run}} validation"),
            unit="none",
            width=12,
            logarithmic=True,
        ),
        graph(
            "Validation scores",
            run_curve("validation_bleu", "{{run}} BLEU"),
            run_curve("validation_chrf", "{{run}} chrF"),
            unit="none",
            width=12,
            text="0 to 100, of the validation pairs.",
        ),
        graph("Learning rate", run_curve("learning_rate"), unit="sci", width=12),
        graph(
            "Gradient norm",
            run_curve("gradient_norm"),
            unit="none",
            width=12,
            logarithmic=True,
            text="Over all parameters, before clipping.",
        ),
        graph(
            "Epoch and skipped updates",
            run_curve("epoch", "{{run}} epoch"),
            run_curve("skipped_updates", "{{run}} skipped updates"),
            unit="none",
            width=12,
            text="An update is skipped when a gradient is not finite.",
        ),
    ]


def _speed() -> list[Builder[models.Panel]]:
    return [
        graph("Target tokens per second", run_curve("target_tokens_per_second"), unit="none"),
        graph(
            "Step time, all runs",
            *quantiles('ferryman_training_step_seconds_bucket{job=~"$job"}'),
            unit="s",
        ),
        graph("Padding", run_curve("padding_share"), unit="percentunit", text="Share of the last batch."),
        graph("Memory of the worker", run_curve("memory_bytes"), unit="bytes"),
        graph(
            "Model FLOPS utilization",
            run_curve("model_flops_utilization"),
            unit="percentunit",
            text="Share of the device's peak that the last step reached; 0 where it is unknown.",
        ),
        graph(
            "GPU",
            Query(expression='ferryman_gpu_utilization_ratio{job=~"$job"}', legend="{{instance}} {{gpu}} busy"),
            Query(
                expression='ferryman_gpu_memory_used_bytes{job=~"$job"} / ferryman_gpu_memory_total_bytes{job=~"$job"}',
                legend="{{instance}} {{gpu}} memory",
            ),
            unit="percentunit",
        ),
    ]


def _all_runs() -> list[Builder[models.Panel]]:
    def total(name: str, legend: str, by: str = "") -> Query:
        return Query(expression=summed_rate(f'ferryman_{name}{{job=~"$job"}}', by=by), legend=legend)

    def lately(name: str, legend: str, by: str = "") -> Query:
        grouping = f" by ({by})" if by else ""
        return Query(expression=f'sum{grouping} (increase(ferryman_{name}{{job=~"$job"}}[1h]))', legend=legend)

    lag = quantiles('ferryman_store_lag_seconds_bucket{job=~"$job"}')
    return [
        graph(
            "Runs by state",
            Query(expression='sum by (state) (ferryman_training_runs{job=~"$job"})', legend="{{state}}"),
            unit="none",
            stacked=True,
        ),
        graph("Steps per second", total("training_steps_total", "steps"), unit="none"),
        graph("Tokens per second", total("training_target_tokens_total", "target tokens"), unit="none"),
        graph("Ended in the last hour", lately("training_runs_ended_total", "{{state}}", "state"), unit="none"),
        graph(
            "In the last hour",
            lately("training_checkpoints_total", "checkpoints"),
            lately("training_restarts_total", "restarts"),
            lately("training_skipped_updates_total", "skipped updates"),
            lately("launcher_attempts_total", "workers {{outcome}}", "outcome"),
            unit="none",
        ),
        graph(
            "Store: from a step to its being read",
            *lag,
            unit="s",
            text="Above five seconds it is an alert: StoreLagging.",
        ),
    ]
