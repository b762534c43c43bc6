"""Schedules: the paper's numbers, and the laws that hold for every schedule."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.recipe import resolve_schedule
from ferryman_service.domain.schedule import LearningRateSchedule, ScheduleKind, learning_rate, sample_steps

PAPER = resolve_schedule({"d_model": 512, "warmup_steps": 4000})


def test_noam_has_the_numbers_of_the_paper():
    assert learning_rate(PAPER, 4000) == pytest.approx(6.98771e-4, rel=1e-5)
    assert learning_rate(PAPER, 1) == pytest.approx(1.74693e-7, rel=1e-5)
    assert learning_rate(PAPER, 16_000) == pytest.approx(learning_rate(PAPER, 4000) / 2, rel=1e-12)


@given(st.integers(1, 100_000), st.integers(1, 4096), st.integers(1, 20_000))
def test_noam_equals_the_formula(step, d_model, warmup):
    schedule = resolve_schedule({"d_model": d_model, "warmup_steps": warmup, "factor": 2.0})
    expected = 2.0 * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
    assert learning_rate(schedule, step) == expected


schedules = st.builds(
    lambda kind, warmup, length, share: LearningRateSchedule(
        kind=kind,
        warmup_steps=warmup,
        factor=1.0,
        d_model=64,
        peak_learning_rate=0.01,
        minimum_learning_rate=0.01 * share,
        total_steps=warmup + length,
    ),
    st.sampled_from(ScheduleKind),
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0, 1),
)


@given(schedules)
def test_every_schedule_rises_to_a_peak_at_the_end_of_warmup_and_never_rises_again(schedule):
    rates = [learning_rate(schedule, step) for step in range(1, 1200)]
    top = schedule.warmup_steps - 1
    tolerance = 1 + 1e-12
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(b <= a * tolerance for a, b in itertools.pairwise(rates[top:]))
    assert rates[top] * tolerance >= max(rates)


@given(schedules)
def test_warmup_is_a_straight_line_through_zero(schedule):
    peak = learning_rate(schedule, schedule.warmup_steps)
    for step in range(1, schedule.warmup_steps + 1):
        assert learning_rate(schedule, step) == pytest.approx(peak * step / schedule.warmup_steps, rel=1e-12)


@pytest.mark.parametrize("kind", [ScheduleKind.COSINE, ScheduleKind.LINEAR])
def test_annealing_reaches_its_minimum_and_stays(kind):
    schedule = resolve_schedule(
        {"kind": kind, "warmup_steps": 10, "total_steps": 110, "peak_learning_rate": 1.0, "minimum_learning_rate": 0.1}
    )
    assert learning_rate(schedule, 10) == 1.0
    assert learning_rate(schedule, 11) == pytest.approx(1.0, abs=0.01), "no jump at the end of warmup"
    assert learning_rate(schedule, 60) == pytest.approx(0.55)
    assert learning_rate(schedule, 110) == pytest.approx(0.1)
    assert learning_rate(schedule, 10_000) == pytest.approx(0.1)


def test_inverse_square_root_halves_when_steps_quadruple():
    schedule = resolve_schedule({"kind": ScheduleKind.INVERSE_SQRT, "warmup_steps": 100, "peak_learning_rate": 0.5})
    assert learning_rate(schedule, 400) == pytest.approx(0.25)
    assert learning_rate(resolve_schedule({"kind": ScheduleKind.CONSTANT, "warmup_steps": 5}), 999) == 1e-3


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(2, 200), st.integers(1, 6000))
def test_samples_rise_keep_the_ends_and_the_peak(first, span, points, warmup):
    schedule = resolve_schedule({"warmup_steps": warmup})
    last = first + span
    steps = sample_steps(schedule, first, last, points)
    assert steps == sorted(set(steps))
    assert len(steps) <= points
    assert (steps[0], steps[-1]) == (first, last)
    if points > 2 and first < warmup < last:
        assert warmup in steps
    if span < points:
        assert len(steps) == span + 1
    assert all(math.isfinite(learning_rate(schedule, step)) for step in steps)
