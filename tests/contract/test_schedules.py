"""GetLRSchedule tells the very numbers that the domain's functions compute, for every kind."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferryman.v1 import recipe_pb2, training_pb2
from ferryman_service.domain.recipe import resolve_schedule
from ferryman_service.domain.schedule import ScheduleKind, learning_rate

STEPS = st.integers(1, 10**9)
RATES = st.floats(1e-9, 10)
FIELDS = {
    ScheduleKind.NOAM: {"factor": st.floats(1e-6, 1000), "d_model": st.integers(1, 65_536)},
    ScheduleKind.INVERSE_SQRT: {"peak_learning_rate": RATES},
    ScheduleKind.COSINE: {"peak_learning_rate": RATES, "total_steps": st.integers(2, 10**9)},
    ScheduleKind.LINEAR: {"peak_learning_rate": RATES, "total_steps": st.integers(2, 10**9)},
    ScheduleKind.CONSTANT: {"peak_learning_rate": RATES},
    ScheduleKind.WSD: {
        "peak_learning_rate": RATES,
        "total_steps": st.integers(10, 10**9),
        "decay_share": st.floats(0.001, 0.1),
    },
}


@st.composite
def curves(draw, kind):
    fields = {name: draw(values) for name, values in FIELDS[kind].items()}
    most = fields.get("total_steps", 10**9)
    fields["warmup_steps"] = draw(st.integers(1, most // 2 if kind is ScheduleKind.WSD else most - 1))
    first, last = sorted((draw(STEPS), draw(STEPS)))
    return fields, first, last, draw(st.integers(2, 40))


@pytest.mark.parametrize("kind", ScheduleKind)
def test_the_curve_is_the_domains_to_the_last_bit(service, kind):
    @settings(
        max_examples=settings().max_examples // 3,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(curves(kind))
    def check(drawn):
        fields, first, last, max_points = drawn
        schedule = recipe_pb2.LearningRateSchedule(kind=f"SCHEDULE_KIND_{kind.name}", **fields)
        request = training_pb2.GetLRScheduleRequest(
            schedule=schedule, first_step=first, last_step=last, max_points=max_points
        )
        curve = service.training_stub.GetLRSchedule(request)
        known = resolve_schedule({"kind": kind, **fields})
        steps = [point.step for point in curve.points]
        assert (steps[0], steps[-1]) == (first, last)
        assert steps == sorted(set(steps))
        assert len(steps) == min(max_points, last - first + 1)
        assert [point.learning_rate for point in curve.points] == [learning_rate(known, step) for step in steps]
        assert curve.peak.step == known.warmup_steps
        assert all(point.learning_rate <= curve.peak.learning_rate for point in curve.points)
        if first <= known.warmup_steps <= last and max_points > 2:
            assert known.warmup_steps in steps

    check()


def test_every_step_where_there_is_room(service):
    request = training_pb2.GetLRScheduleRequest(recipe=recipe_pb2.Recipe(), max_points=100_000)
    assert [point.step for point in service.training_stub.GetLRSchedule(request).points] == list(range(1, 10_001))


def test_the_longest_answer_fits_a_clients_default_limit(service):
    request = training_pb2.GetLRScheduleRequest(
        schedule=recipe_pb2.LearningRateSchedule(), last_step=10**9, max_points=100_000
    )
    curve = service.training_stub.GetLRSchedule(request)
    assert len(curve.points) == 100_000
    assert curve.ByteSize() < 4 * 2**20
