"""Learning-rate schedules: pure functions of the step and, for WSD, of the decays that a run has planned. The trainer
and GetLRSchedule use the same functions.

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
    WSD = "wsd"


class DecayShape(enum.StrEnum):
    """The shape of WSD's decay over p, the share of its steps that are done: 1 - p, or 1 - sqrt(p)."""

    LINEAR = "linear"
    ONE_MINUS_SQRT = "one_minus_sqrt"


class DecayReason(enum.StrEnum):
    """Why a run's learning rate begins to decay."""

    TIME = "time"
    TARGET_SCORE = "target_score"
    PATIENCE = "patience"


@dataclass(frozen=True, kw_only=True)
class DecayPlan:
    """A decay that a run has planned: the first step with a decayed rate, and the step at which the minimum is reached.

    The decay starts from the rate of the step before it. A later plan replaces what follows its first step.
    """

    first_step: int
    last_step: int
    reason: DecayReason


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """A resolved schedule. Fields that its kind does not know are None.

    NOAM knows `factor` and `d_model`; the others `peak_learning_rate`; COSINE, LINEAR and WSD also
    `minimum_learning_rate` and `total_steps`; WSD also `decay_share` and `decay_shape`. The `total_steps` of WSD are
    None where only time is limited.
    """

    kind: ScheduleKind
    warmup_steps: int
    factor: float | None = None
    d_model: int | None = None
    peak_learning_rate: float | None = None
    minimum_learning_rate: float | None = None
    total_steps: int | None = None
    decay_share: float | None = None
    decay_shape: DecayShape | None = None


def learning_rate(schedule: LearningRateSchedule, step: int, decays: Sequence[DecayPlan] = ()) -> float:
    """Return the learning rate of update number `step` (from 1), given the decays that the run has planned.

    NOAM is section 5.3 of "Attention Is All You Need"; the cosine is that of SGDR without restarts; WSD is that of Hu
    et al. (2024) and Hägele et al. (2024).
    """
    assert step >= 1, "steps count from 1"
    for number in reversed(range(len(decays))):
        if decays[number].first_step <= step:
            top = learning_rate(schedule, max(1, decays[number].first_step - 1), decays[:number])
            return _decayed(schedule, step, decays[number].first_step, decays[number].last_step, top)
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
        case ScheduleKind.WSD:
            first = scheduled_decay_step(schedule)
            if first is None or step < first:
                return _peak(schedule)
            assert schedule.total_steps is not None
            return _decayed(schedule, step, first, schedule.total_steps, _peak(schedule))


def scheduled_decay_step(schedule: LearningRateSchedule) -> int | None:
    """Return the first decayed step of a WSD schedule with `total_steps`; None for every other schedule."""
    if schedule.kind is not ScheduleKind.WSD or schedule.total_steps is None:
        return None
    assert schedule.decay_share is not None
    return schedule.total_steps - decay_steps(schedule.decay_share, schedule.total_steps) + 1


def decay_steps(decay_share: float, total_steps: int) -> int:
    """Return how many of a budget's steps its decay takes: at least 1."""
    return max(1, round(decay_share * total_steps))


def curve(
    schedule: LearningRateSchedule, steps: Sequence[int], decays: Sequence[DecayPlan] = ()
) -> list[tuple[int, float]]:
    """Return (step, learning rate) for each of the steps."""
    return [(step, learning_rate(schedule, step, decays)) for step in steps]


def sample_steps(
    schedule: LearningRateSchedule,
    first_step: int,
    last_step: int,
    max_points: int,
    decays: Sequence[DecayPlan] = (),
) -> list[int]:
    """Return at most `max_points` rising steps from first to last, both included, at equal distances.

    The corners of the curve (the end of warmup, where every schedule has its peak, and the begin and end of decays)
    replace their nearest inner neighbours if they lie between them; the earlier corners first.
    """
    assert 1 <= first_step <= last_step and max_points >= 2
    span = last_step - first_step
    if span < max_points:
        return list(range(first_step, last_step + 1))
    steps = [first_step + span * i // (max_points - 1) for i in range(max_points)]
    taken = {0, max_points - 1}
    for corner in _corners(schedule, decays):
        if not first_step < corner < last_step or len(taken) == max_points:
            continue
        if corner in steps:
            taken.add(steps.index(corner))
            continue
        nearest = min((i for i in range(max_points) if i not in taken), key=lambda i: abs(steps[i] - corner))
        steps[nearest] = corner
        taken.add(nearest)
    return sorted(set(steps))


def _corners(schedule: LearningRateSchedule, decays: Sequence[DecayPlan]) -> list[int]:
    corners = [schedule.warmup_steps]
    scheduled = scheduled_decay_step(schedule)
    if scheduled is not None and not (decays and decays[0].first_step <= scheduled):
        corners.append(scheduled - 1)
    for decay in decays:
        corners += [decay.first_step - 1, decay.last_step]
    return corners


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


def _decayed(schedule: LearningRateSchedule, step: int, first_step: int, last_step: int, top: float) -> float:
    """Return the rate of a step of a decay from `top`, which is not raised to a minimum above it."""
    assert schedule.minimum_learning_rate is not None
    done = min(1.0, (step - first_step + 1) / (last_step - first_step + 1))
    share = 1.0 - (math.sqrt(done) if schedule.decay_shape is DecayShape.ONE_MINUS_SQRT else done)
    bottom = min(schedule.minimum_learning_rate, top)
    return bottom + (top - bottom) * share


def _descend(schedule: LearningRateSchedule, share: float) -> float:
    assert schedule.minimum_learning_rate is not None
    return schedule.minimum_learning_rate + (_peak(schedule) - schedule.minimum_learning_rate) * share
