"""A run's records as CSV and as curves."""

import csv
from datetime import UTC, datetime

import pytest

from examples import run_report
from ferryman.types import (
    LearningRateCurve,
    LearningRatePoint,
    LearningRateSchedule,
    MetricRecord,
    RunState,
    StateChange,
    StepMetrics,
    ValidationMetrics,
)

PNG = b"\x89PNG\r\n\x1a\n"
STEP = StepMetrics(
    step=7,
    epoch=1,
    loss=2.5,
    nll_per_token=2.25,
    perplexity=9.5,
    learning_rate=1e-3,
    gradient_norm=0.5,
    target_tokens=700,
    target_tokens_per_second=3500.0,
    duration_s=0.2,
    padding_share=0.05,
    memory_bytes=2**30,
)
VALIDATION = ValidationMetrics(
    step=7,
    epoch=1,
    loss=2.4,
    nll_per_token=2.2,
    perplexity=9.0,
    bleu=12.5,
    chrf=30.0,
    translated_pairs=100,
    duration_s=1.5,
    best=True,
)


@pytest.fixture
def records():
    payloads = [StateChange(state=RunState.RUNNING), STEP, VALIDATION]
    return [
        MetricRecord(sequence=number, time=datetime(2026, 3, 3, tzinfo=UTC), payload=payload)
        for number, payload in enumerate(payloads, start=1)
    ]


def test_csv_has_every_step_and_validation(records, tmp_path):
    run_report.save_metrics(records, tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        step, validation = csv.DictReader(file)
    assert (step["sequence"], step["kind"], step["loss"], step["bleu"]) == ("2", "step", "2.5", "")
    assert (validation["sequence"], validation["kind"], validation["bleu"]) == ("3", "validation", "12.5")
    assert float(step["learning_rate"]) == STEP.learning_rate
    assert step["time"] == "2026-03-03T00:00:00+00:00"


def test_curves_are_saved_as_png(records, tmp_path):
    run_report.save_training(records, tmp_path / "training.png")
    points = tuple(LearningRatePoint(step=step, learning_rate=step * 1e-6) for step in range(1, 10))
    curve = LearningRateCurve(points=points, schedule=LearningRateSchedule(), peak=points[-1])
    run_report.save_learning_rate(curve, tmp_path / "learning-rate.png")
    for name in ("training.png", "learning-rate.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_run_without_validations_can_be_plotted(records, tmp_path):
    run_report.save_training(records[:2], tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
