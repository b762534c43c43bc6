"""Learning-rate schedules: pure functions of the step, used by the trainer and by GetLRSchedule alike.

Steps count from 1. Every schedule warms up linearly over `warmup_steps`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass


class ScheduleKind(enum.StrEnum):
    """The shapes."""

    NOAM = "noam"
    INVERSE_SQRT = "inverse_sqrt"
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """A resolved schedule. Fields that its kind does not know are None.

    NOAM knows `factor` and `d_model`; the others `peak_learning_rate`; COSINE and LINEAR also `minimum_learning_rate`
    and `total_steps`.
    """

    kind: ScheduleKind
    warmup_steps: int
    factor: float | None = None
    d_model: int | None = None
    peak_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    total_steps: int | None = None


def learning_rate(schedule: LearningRateSchedule, step: int) -> float:
    """Return the learning rate of update number `step` (from 1).

    NOAM is section 5.3 of "Attention Is All You Need"; the cosine is that of SGDR without restarts.
    """
    assert step >= 1, "steps count from 1"
    match schedule.kind:
        case ScheduleKind.NOAM:
            return _noam(schedule, step)
        case ScheduleKind.INVERSE_SQRT:
            return _peak(schedule) * min(step / schedule.warmup_steps, math.sqrt(schedule.warmup_steps / step))
        case _ if step <= schedule.warmup_steps:
            return _peak(schedule) * (step / schedule.warmup_steps)
        case ScheduleKind.COSINE:
            return _descend(schedule, 0.5 * (1.0 + math.cos(math.pi * _progress(schedule, step))))
        case ScheduleKind.LINEAR:
            return _descend(schedule, 1.0 - _progress(schedule, step))
        case ScheduleKind.CONSTANT:
            return _peak(schedule)


def curve(schedule: LearningRateSchedule, steps: Sequence[int]) -> list[tuple[int, float]]:
    """Return (step, learning rate) for each of the steps."""
    return [(step, learning_rate(schedule, step)) for step in steps]


def sample_steps(schedule: LearningRateSchedule, first_step: int, last_step: int, max_points: int) -> list[int]:
    """Return at most `max_points` rising steps from first to last, both included, at equal distances.

    The end of warmup, where every schedule has its peak, replaces its nearest inner neighbour if it lies between them.
    """
    assert 1 <= first_step <= last_step and max_points >= 2
    span = last_step - first_step
    if span < max_points:
        return list(range(first_step, last_step + 1))
    steps = [first_step + span * i // (max_points - 1) for i in range(max_points)]
    peak = schedule.warmup_steps
    if max_points > 2 and first_step < peak < last_step and peak not in steps:
        nearest = min(range(1, max_points - 1), key=lambda i: abs(steps[i] - peak))
        steps[nearest] = peak
    return steps


def _noam(schedule: LearningRateSchedule, step: int) -> float:
    assert schedule.factor is not None and schedule.d_model is not None
    # min() of the paper's two branches equals the left one up to and including step == warmup_steps.
    rate: float = schedule.factor * schedule.d_model**-0.5 * min(step**-0.5, step * schedule.warmup_steps**-1.5)
    return rate


def _peak(schedule: LearningRateSchedule) -> float:
    assert schedule.peak_learning_rate is not None
    return schedule.peak_learning_rate


def _progress(schedule: LearningRateSchedule, step: int) -> float:
    assert schedule.total_steps is not None
    return min(1.0, (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps))


def _descend(schedule: LearningRateSchedule, share: float) -> float:
    assert schedule.minimum_learning_rate is not None
    return schedule.minimum_learning_rate + (_peak(schedule) - schedule.minimum_learning_rate) * share
