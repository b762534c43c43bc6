"""The short form of `make soak`: real workers that die by signals, and runs that nobody can tell from unbroken ones."""

import signal

import pytest

from bench.training.kill import STEPS, after_s, at_step, in_a_write, kill_points, open_arena
from ferryman_service.domain.records import RunState, StepMetrics

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return open_arena(tmp_path_factory.mktemp("kill") / "data")


@pytest.fixture(scope="module")
def unbroken(arena):
    outcome = arena.train([]).outcome
    assert [item.step for item in outcome.series if isinstance(item, StepMetrics)] == list(range(1, STEPS + 1))
    return outcome


def test_a_worker_that_is_killed_again_and_again_leaves_no_trace(arena, unbroken):
    trial = arena.train([after_s(0.5), in_a_write(4), at_step(13), in_a_write(30)])
    assert trial.outcome.difference(unbroken) == ""
    assert len(trial.kills) == 4
    assert trial.kills[0].state is RunState.STARTING


def test_a_worker_that_is_told_to_end_leaves_a_checkpoint_of_its_last_step(arena, unbroken):
    """And it is gone within 30 seconds, or `train` fails."""
    trial = arena.train([at_step(11)], signal.SIGTERM)
    assert trial.outcome.difference(unbroken) == ""
    (kill,) = trial.kills
    assert kill.state is RunState.QUEUED
    assert not kill.left_half_written


def test_a_difference_is_seen(arena, unbroken):
    shorter = type(unbroken)(unbroken.weights, unbroken.series[:-1])
    assert "reports are not" in unbroken.difference(shorter)
    assert "weights" in unbroken.difference(type(unbroken)("", unbroken.series))


def test_the_points_meet_every_step():
    points = kill_points(seed=1, attempt_s=1.0)
    reached = {step for _ in range(8) for point in next(points) for step in [_first_step(point)]}
    assert reached == set(range(1, STEPS + 1))


def _first_step(point):
    from bench.training.kill import Look

    return next(s for s in range(STEPS + 1) if point(Look(step=s, age_s=0.0, is_writing=False)))
