"""Schedules: the paper's numbers, and the laws that hold for every schedule."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.recipe import resolve_schedule
from ferryman_service.domain.schedule import (
    DecayPlan,
    DecayReason,
    DecayShape,
    LearningRateSchedule,
    ScheduleKind,
    curve,
    learning_rate,
    sample_steps,
    scheduled_decay_step,
)

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
        decay_share=length / (warmup + length) * 0.9,
        decay_shape=DecayShape.LINEAR,
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


WSD = resolve_schedule({"kind": ScheduleKind.WSD, "warmup_steps": 10, "peak_learning_rate": 0.004})
WSD_OF_100 = resolve_schedule(
    {"kind": ScheduleKind.WSD, "warmup_steps": 10, "peak_learning_rate": 0.004, "total_steps": 100, "decay_share": 0.2}
)


def planned(first_step, last_step):
    return DecayPlan(first_step=first_step, last_step=last_step, reason=DecayReason.TIME)


def test_wsd_warms_up_stays_and_decays_over_its_share_of_the_steps():
    assert scheduled_decay_step(WSD_OF_100) == 81
    assert [learning_rate(WSD_OF_100, step) for step in (5, 10, 50, 80)] == [0.002, 0.004, 0.004, 0.004]
    assert learning_rate(WSD_OF_100, 90) == pytest.approx(0.002)
    assert learning_rate(WSD_OF_100, 100) == 0.0
    assert learning_rate(WSD_OF_100, 1000) == 0.0


def test_one_minus_sqrt_falls_faster_at_first():
    schedule = dataclasses.replace(WSD_OF_100, decay_shape=DecayShape.ONE_MINUS_SQRT)
    assert learning_rate(schedule, 85) == pytest.approx(0.004 * (1 - math.sqrt(0.25)))
    assert learning_rate(schedule, 100) == 0.0


def test_wsd_without_a_number_of_steps_stays_at_its_peak_until_a_decay_is_planned():
    assert learning_rate(WSD, 10**6) == 0.004
    assert learning_rate(WSD, 500, [planned(501, 600)]) == 0.004
    assert learning_rate(WSD, 550, [planned(501, 600)]) == pytest.approx(0.002)
    assert learning_rate(WSD, 600, [planned(501, 600)]) == 0.0


def test_a_later_plan_decays_from_the_rate_that_the_earlier_one_had_reached():
    plans = [planned(501, 600), planned(551, 560)]
    assert learning_rate(WSD, 550, plans) == pytest.approx(0.002)
    assert learning_rate(WSD, 555, plans) == pytest.approx(0.001)
    assert learning_rate(WSD, 560, plans) == 0.0


def test_a_decay_in_the_warmup_starts_from_the_rate_reached_there():
    assert learning_rate(WSD, 6, [planned(6, 9)]) == pytest.approx(0.002 * 0.75)


def test_a_minimum_above_the_rate_reached_does_not_raise_it():
    schedule = dataclasses.replace(WSD, minimum_learning_rate=0.003)
    assert learning_rate(schedule, 8, [planned(6, 9)]) == pytest.approx(0.002)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400), st.integers(0, 400))
def test_no_plan_ever_raises_the_rate_after_warmup(stable, first_length, second_begin, second_length):
    begin = 10 + stable
    plans = [planned(begin, begin + first_length), planned(begin + second_begin, begin + second_begin + second_length)]
    rates = [learning_rate(WSD, step, plans) for step in range(10, plans[1].last_step + 3)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates))
    assert rates[-1] == 0.0


def test_the_corners_of_a_decay_are_among_the_points():
    steps = sample_steps(WSD, 1, 2000, 20, [planned(501, 600)])
    assert {10, 500, 600} <= set(steps)
    assert steps == sorted(set(steps)) and len(steps) == 20
    assert {80, 10} <= set(sample_steps(WSD_OF_100, 1, 100, 12))
    assert curve(WSD, [600], [planned(501, 600)]) == [(600, 0.0)]


def test_end_of_warmup_is_not_replaced_by_a_later_corner():
    schedule = dataclasses.replace(WSD, warmup_steps=151)
    assert 151 in sample_steps(schedule, 1, 1501, 11, [planned(162, 400)])
