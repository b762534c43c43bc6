"""Saves the records of a run as CSV and its curves as PNG."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ferryman.types import LearningRateCurve, MetricRecord, StepMetrics, ValidationMetrics


def save_learning_rate(curve: LearningRateCurve, path: Path) -> None:
    """Plot the curve of GetLRSchedule to a PNG file."""
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot([point.step for point in curve.points], [point.learning_rate for point in curve.points])
    _label(axes, "Learning Rate Schedule", "Training Step", "Learning Rate")
    figure.savefig(path)


def save_training(records: Sequence[MetricRecord], path: Path) -> None:
    """Plot loss and BLEU over the steps to a PNG file."""
    steps = [record.payload for record in records if isinstance(record.payload, StepMetrics)]
    validations = [record.payload for record in records if isinstance(record.payload, ValidationMetrics)]
    figure = _figure()
    loss_axes, bleu_axes = figure.subplots(2, sharex=True)
    loss_axes.plot([step.step for step in steps], [step.loss for step in steps], linewidth=0.6, label="training")
    validated_at = [validation.step for validation in validations]
    loss_axes.plot(validated_at, [validation.loss for validation in validations], marker="o", label="validation")
    loss_axes.legend()
    _label(loss_axes, "Training", "", "Loss (nats per token)")
    bleu_axes.plot(validated_at, [validation.bleu for validation in validations], marker="o")
    _label(bleu_axes, "", "Training Step", "Validation BLEU")
    figure.savefig(path)


def save_metrics(records: Sequence[MetricRecord], path: Path) -> None:
    """Write every step and validation record as a line of CSV; fields of the other kind stay empty."""
    kinds = {"step": StepMetrics, "validation": ValidationMetrics}
    names = list(dict.fromkeys(field.name for kind in kinds.values() for field in dataclasses.fields(kind)))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sequence", "time", "kind", *names], restval="")
        writer.writeheader()
        for record in records:
            for name, kind in kinds.items():
                if isinstance(record.payload, kind):
                    head = {"sequence": record.sequence, "time": record.time.isoformat(), "kind": name}
                    writer.writerow(head | dataclasses.asdict(record.payload))


def _figure() -> Figure:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True)
