"""A run limited by time alone, through the real service: it plans its decay, pauses in it, and follows it to the
end."""

from datetime import timedelta

import pytest

from ferryman.v1 import metrics_pb2, recipe_pb2, training_pb2
from tests.system.conftest import Stubs, small_recipe

pytestmark = pytest.mark.system

SECONDS = timedelta(seconds=6)


def curve_of(stubs, run_id, **bounds):
    return stubs.training.GetLRSchedule(training_pb2.GetLRScheduleRequest(run_id=run_id, max_points=100_000, **bounds))


def timed_recipe():
    recipe = small_recipe(max_steps=0, max_duration=SECONDS)
    recipe.schedule.CopyFrom(recipe_pb2.LearningRateSchedule(warmup_steps=20))
    return recipe


def test_run_with_a_time_limit_follows_its_plan_through_a_pause(start_service):
    stubs = Stubs(start_service().address)
    run = stubs.start(stubs.upload().corpus_id, timed_recipe(), model_name="timed")
    assert run.recipe.schedule.kind == recipe_pb2.SCHEDULE_KIND_WSD
    assert curve_of(stubs, run.run_id).provisional_from_step == 1
    records = []
    for record in stubs.stream(run.run_id):
        records.append(record)
        if record.HasField("decay_plan") and not any(r.HasField("decay_plan") for r in records[:-1]):
            stubs.training.PauseTraining(training_pb2.PauseTrainingRequest(run_id=run.run_id))
            curve = curve_of(stubs, run.run_id)
            assert list(curve.decays) == [record.decay_plan]
            assert curve.provisional_from_step > 1
        if record.state_change.state == metrics_pb2.RUN_STATE_PAUSED:
            stubs.training.ResumeTraining(training_pb2.ResumeTrainingRequest(run_id=run.run_id))
    assert records[-1].state_change.state == metrics_pb2.RUN_STATE_SUCCEEDED, stubs.run(run.run_id)
    plans = [record.decay_plan for record in records if record.HasField("decay_plan")]
    rates = {record.step.step: record.step.learning_rate for record in records if record.HasField("step")}
    assert plans[0].reason == metrics_pb2.DECAY_REASON_TIME
    assert plans[0].first_step > 20
    assert max(rates) == plans[-1].last_step
    assert rates[plans[-1].last_step] == 0.0
    curve = curve_of(stubs, run.run_id, last_step=max(rates))
    assert {point.step: point.learning_rate for point in curve.points} == rates
    assert list(curve.decays) == plans and curve.provisional_from_step == 0
    sequences = {record.sequence: record for record in records}
    planned = next(record.sequence for record in records if record.HasField("decay_plan"))
    decayed = next(r.sequence for r in records if r.HasField("step") and r.step.step >= plans[0].first_step)
    assert planned < decayed and len(sequences) == len(records)
