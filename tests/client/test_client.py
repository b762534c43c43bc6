from __future__ import annotations

import threading
from uuid import uuid4

import pytest

from ferryman import (
    Client,
    LearningRateSchedule,
    ModelRecipe,
    Recipe,
    RunState,
    ScheduleKind,
    StepMetrics,
    errors,
)
from ferryman.testing import FakeFerryman, noam_learning_rate


def test_run_from_corpus_to_translation(fake, client, corpus):
    recipe = Recipe(preset="tiny", model=ModelRecipe(d_model=64, norm="pre"), seed=0)
    run = client.start_training(corpus.corpus_id, "en-de", recipe)
    seen = []
    run = client.wait(run.run_id, seen.append)
    assert (run.state, run.model_version, run.recipe) == (RunState.SUCCEEDED, 1, recipe)
    assert [record.sequence for record in seen] == list(range(1, 11))
    assert seen[3].payload == fake.script[3]
    assert seen[0].time.tzinfo is not None
    result = client.translate("en-de", ["hallo welt", ""], n_best=2)
    assert result.model == "en-de/1"
    assert [translation.text for translation in result.translations] == ["HALLO WELT", ""]
    assert [hypothesis.score for hypothesis in result.translations[0].hypotheses] == [-0.1, -0.2]
    assert result.timings.total_s == 0.007
    assert client.get_model("en-de/1").version.run_id == run.run_id


def test_single_string_is_one_sentence(fake, client):
    fake.add_model("m")
    assert [t.text for t in client.translate("m", "ab").translations] == ["AB"]


def test_learning_rates_are_exact(client):
    curve = client.get_lr_schedule(schedule=LearningRateSchedule(kind="noam"), first_step=3, last_step=9)
    assert [point.step for point in curve.points] == list(range(3, 10))
    assert [point.learning_rate for point in curve.points] == [noam_learning_rate(step) for step in range(3, 10)]
    assert curve.schedule.kind is ScheduleKind.NOAM


@pytest.mark.parametrize("subject", [{}, {"run_id": "x", "recipe": Recipe()}])
def test_curve_needs_exactly_one_subject(client, fake, subject):
    with pytest.raises(errors.InvalidRequest, match="exactly one"):
        client.get_lr_schedule(**subject)
    assert fake.calls == []


def test_list_yields_all_pages(fake, client, corpus):
    started = [client.start_training(corpus.corpus_id, f"m{i % 2}").run_id for i in range(120)]
    fake.calls.clear()
    assert [run.run_id for run in client.list_training_runs()] == started[::-1]
    assert fake.calls == ["ListTrainingRuns"] * 3
    assert [run.run_id for run in client.list_training_runs(model_name="m1", order="oldest_first")] == started[1::2]
    assert list(client.list_training_runs(states=[RunState.FAILED])) == []
    assert [model.name for model in client.list_models()] == ["m0", "m1"]
    assert [c.corpus_id for c in client.list_corpora()] == [corpus.corpus_id]


def test_unknown_state_is_refused_before_the_call(client, fake):
    with pytest.raises(errors.InvalidRequest, match="'done', must be one of queued"):
        client.list_training_runs(states=["done"])
    assert fake.calls == []


def test_validate_only_starts_no_run(client, corpus):
    run = client.start_training(corpus.corpus_id, "m", validate_only=True)
    assert (run.run_id, run.state) == ("", RunState.QUEUED)
    assert list(client.list_training_runs()) == []


def test_request_id_makes_start_idempotent(client, corpus):
    request_id = str(uuid4())
    first = client.start_training(corpus.corpus_id, "m", request_id=request_id)
    assert client.start_training(corpus.corpus_id, "m", request_id=request_id).run_id == first.run_id
    with pytest.raises(errors.RequestIdReused):
        client.start_training(corpus.corpus_id, "other", request_id=request_id)


def test_safe_calls_are_retried_while_unavailable(fake, client, corpus):
    fake.calls.clear()
    fake.fail_next("StartTraining", errors.Unavailable("not now"), times=3)
    client.start_training(corpus.corpus_id, "m")
    assert fake.calls == ["StartTraining"] * 4
    assert len(list(client.list_training_runs())) == 1


def test_retries_end_after_four_attempts(fake, client):
    fake.fail_next("Translate", errors.StoreUnavailable("locked"), times=10)
    with pytest.raises(errors.StoreUnavailable, match="locked"):
        client.translate("m", "x")
    assert fake.calls == ["Translate"] * 4


def test_other_errors_are_not_retried(fake, client):
    fake.fail_next("GetCorpus", errors.DiskFull("full"), times=10)
    with pytest.raises(errors.DiskFull):
        client.get_corpus("x")
    assert fake.calls == ["GetCorpus"]


def test_deadline_ends_call():
    gate = threading.Event()

    def slow(sentence: str) -> str:
        gate.wait(10)
        return sentence

    with FakeFerryman(translate=slow) as fake, Client(fake.target) as client:
        fake.add_model("m")
        with pytest.raises(errors.DeadlineExceeded):
            client.translate("m", "x", timeout_s=0.05)
        gate.set()


def test_unreachable_server_raises_unavailable(fake, client):
    fake.stop()
    with pytest.raises(errors.Unavailable) as caught:
        client.get_training_run("run_x")
    assert caught.value.code.name == "UNAVAILABLE"


def test_held_run_can_be_cancelled(corpus, fake, client):
    fake.hold_after = 4
    run = client.start_training(corpus.corpus_id, "m")
    assert client.get_training_run(run.run_id).state is RunState.RUNNING
    assert client.cancel_training(run.run_id).state is RunState.CANCELLED
    assert client.wait(run.run_id).state is RunState.CANCELLED
    assert client.cancel_training(run.run_id).state is RunState.CANCELLED


def test_finished_run_cannot_be_cancelled(client, corpus):
    run = client.start_training(corpus.corpus_id, "m")
    with pytest.raises(errors.IllegalTransition):
        client.cancel_training(run.run_id)


def test_history_ends_at_the_last_record(fake, client, corpus):
    fake.hold_after = 5
    run = client.start_training(corpus.corpus_id, "m")
    records = list(client.stream_metrics(run.run_id, 3, follow=False))
    assert [record.sequence for record in records] == [4, 5]
    assert isinstance(records[0].payload, StepMetrics)


def test_heartbeats_are_yielded_on_request(fake, client, corpus):
    fake.hold_after = 4
    run = client.start_training(corpus.corpus_id, "m")
    stream = client.stream_metrics(run.run_id, 4, heartbeats=True)
    heartbeat = next(stream)
    assert (heartbeat.last_sequence, heartbeat.state) == (4, RunState.RUNNING)
    assert heartbeat.interval_s == pytest.approx(0.1)
    stream.close()
