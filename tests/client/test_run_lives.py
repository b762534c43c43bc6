"""Pausing, resuming, deleting and fine-tuning, as the clients ask for it and the fake service does it."""

from __future__ import annotations

from uuid import uuid4

import pytest

from ferryman import (
    AsyncClient,
    Heartbeat,
    RunEvent,
    RunState,
    StateChange,
    StepMetrics,
    ValidationMetrics,
    errors,
)
from ferryman.testing import training_script


@pytest.fixture
def held(fake, client, corpus):
    """The id of a run that stands still after its second update."""
    fake.hold_after = 5
    return client.start_training(corpus.corpus_id, "m").run_id


def states(client, run_id):
    records = client.stream_metrics(run_id, follow=False)
    return [(record.payload.state, record.payload.attempt) for record in records if hasattr(record.payload, "state")]


def test_run_pauses_and_resumes(fake, client, held):
    assert client.pause_training(held).state is RunState.PAUSED
    assert client.pause_training(held).state is RunState.PAUSED
    assert client.resume_training(held).state is RunState.QUEUED
    assert client.resume_training(held).state is RunState.RUNNING
    fake.release(held)
    run = client.wait(held)
    assert (run.state, run.attempt, run.restarts) == (RunState.SUCCEEDED, 2, 0)
    assert states(client, held) == [
        ("queued", 0), ("starting", 1), ("running", 1), ("paused", 1),
        ("queued", 1), ("starting", 2), ("running", 2), ("exporting", 2), ("succeeded", 2),
    ]  # fmt: skip
    steps = [record.payload.step for record in client.stream_metrics(held) if isinstance(record.payload, StepMetrics)]
    assert steps == [1, 2, 3, 4]


def test_queued_run_can_be_paused(fake, client, corpus):
    fake.hold_after = 1
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    assert client.pause_training(run_id).state is RunState.PAUSED
    client.resume_training(run_id)
    fake.release(run_id)
    assert client.wait(run_id).attempt == 1


def test_stream_continues_across_a_pause(fake, client, held):
    stream = client.stream_metrics(held, 5, heartbeats=True)
    client.pause_training(held)
    assert next(stream).payload.state is RunState.PAUSED
    assert isinstance(heartbeat := next(stream), Heartbeat)
    assert heartbeat.state is RunState.PAUSED
    client.resume_training(held)
    fake.release(held)
    rest = [item for item in stream if not isinstance(item, Heartbeat)]
    assert [record.sequence for record in rest] == list(range(7, 15))
    assert rest[-1].payload.state is RunState.SUCCEEDED


def test_paused_run_can_be_cancelled(client, held):
    client.pause_training(held)
    assert client.cancel_training(held).state is RunState.CANCELLED
    for call in (client.pause_training, client.resume_training):
        with pytest.raises(errors.IllegalTransition):
            call(held)


def test_exporting_run_cannot_be_paused(fake, client, corpus):
    fake.hold_after = 9
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    assert client.get_training_run(run_id).state is RunState.EXPORTING
    with pytest.raises(errors.IllegalTransition):
        client.pause_training(run_id)


def test_restarts_are_counted_until_progress(fake, client, corpus):
    script = training_script(steps=2)
    lost = [StateChange(state=RunState.QUEUED, attempt=1), StateChange(state=RunState.STARTING, attempt=2)]
    fake.script = [*script[:4], *lost, *script[4:]]
    fake.hold_after = 6
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    assert client.get_training_run(run_id).restarts == 1
    fake.release(run_id)
    assert client.get_training_run(run_id).restarts == 0


def test_every_validation_has_a_checkpoint(client, corpus):
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    [checkpoint] = client.list_checkpoints(run_id)
    [validation] = [r.payload for r in client.stream_metrics(run_id) if isinstance(r.payload, ValidationMetrics)]
    assert (checkpoint.step, checkpoint.best, checkpoint.bleu, checkpoint.chrf, checkpoint.nll_per_token) == (
        validation.step,
        True,
        validation.bleu,
        validation.chrf,
        validation.nll_per_token,
    )
    assert checkpoint.size_bytes > 0
    assert checkpoint.create_time.tzinfo is not None


def test_deleting_run_keeps_its_model(client, corpus):
    request_id = str(uuid4())
    run_id = client.start_training(corpus.corpus_id, "m", request_id=request_id).run_id
    client.delete_training_run(run_id)
    for call in (client.get_training_run, client.list_checkpoints, client.delete_training_run):
        with pytest.raises(errors.RunNotFound):
            call(run_id)
    assert client.get_model("m/1").version.run_id == run_id
    assert client.start_training(corpus.corpus_id, "m", request_id=request_id).run_id != run_id


def test_unfinished_run_cannot_be_deleted(client, held):
    with pytest.raises(errors.RunNotFinished):
        client.delete_training_run(held)


def test_deletion_is_not_retried(fake, client, corpus):
    """Its second attempt would say that there is no such run."""
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    fake.calls.clear()
    fake.fail_next("DeleteTrainingRun", errors.Unavailable("not now"))
    with pytest.raises(errors.Unavailable):
        client.delete_training_run(run_id)
    assert fake.calls == ["DeleteTrainingRun"]


@pytest.mark.parametrize("rpc", ["PauseTraining", "ResumeTraining", "ListCheckpoints"])
def test_pause_resume_and_list_are_retried(fake, client, held, rpc):
    fake.calls.clear()
    fake.fail_next(rpc, errors.Unavailable("not now"))
    {
        "PauseTraining": client.pause_training,
        "ResumeTraining": client.resume_training,
        "ListCheckpoints": client.list_checkpoints,
    }[rpc](held)
    assert fake.calls == [rpc] * 2


def test_fine_tuned_run_names_its_initial_model(client, corpus):
    first = client.start_training(corpus.corpus_id, "m")
    assert (first.initial_model, first.processes, first.keep_optimizer) == (None, 1, False)
    second = client.start_training(corpus.corpus_id, "m", initial_model="m", keep_optimizer=True, processes=2)
    assert (second.initial_model, second.processes, second.keep_optimizer) == ("m/1", 2, True)
    with pytest.raises(errors.ModelNotFound):
        client.start_training(corpus.corpus_id, "m", initial_model="m/9")
    client.delete_training_run(first.run_id)
    with pytest.raises(errors.OptimizerNotKept):
        client.start_training(corpus.corpus_id, "m", initial_model="m/1", keep_optimizer=True)
    with pytest.raises(errors.InvalidRequest, match="keep_optimizer"):
        client.start_training(corpus.corpus_id, "m", keep_optimizer=True)


def test_run_whose_optimizer_is_needed_cannot_be_deleted(fake, client, corpus):
    source = client.start_training(corpus.corpus_id, "m").run_id
    fake.hold_after = 1
    needy = client.start_training(corpus.corpus_id, "m", initial_model="m/1", keep_optimizer=True).run_id
    with pytest.raises(errors.RunStillNeeded, match=needy):
        client.delete_training_run(source)
    assert client.get_training_run(source).run_id == source
    client.cancel_training(needy)
    client.delete_training_run(source)


def test_unsendable_start_options_are_reported(client, fake):
    with pytest.raises(errors.InvalidRequest) as caught:
        client.start_training("c", "m", processes=2**40)
    assert [violation.field for violation in caught.value.violations] == ["processes"]
    assert fake.calls == []


def test_fake_replays_training_events(fake, client, corpus):
    fake.script.insert(5, RunEvent(level="warning", code="UPDATE_SKIPPED", message="step 2: the gradient was inf"))
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    assert [r.payload.code for r in client.stream_metrics(run_id) if isinstance(r.payload, RunEvent)] == [
        "UPDATE_SKIPPED"
    ]


async def test_async_client_pauses_and_resumes(fake, held):
    async with AsyncClient(fake.target) as client:
        assert (await client.pause_training(held)).state is RunState.PAUSED
        assert (await client.resume_training(held)).state is RunState.QUEUED
        fake.release(held)
        run = await client.wait(held)
        assert [checkpoint.step for checkpoint in await client.list_checkpoints(held)] == [4]
        tuned = await client.start_training(run.corpus_id, "m", initial_model="m/1", keep_optimizer=True, processes=3)
        assert (tuned.initial_model, tuned.processes) == ("m/1", 3)
        await client.delete_training_run(held)
        with pytest.raises(errors.RunNotFound):
            await client.get_training_run(held)


def test_corpus_can_be_deleted_once_unused(fake, client, corpus):
    fake.hold_after = 2
    run_id = client.start_training(corpus.corpus_id, "m").run_id
    with pytest.raises(errors.CorpusInUse) as caught:
        client.delete_corpus(corpus.corpus_id)
    assert caught.value.metadata["runs"] == run_id
    fake.release(run_id)
    client.delete_corpus(corpus.corpus_id)
    assert client.get_training_run(run_id).corpus_deleted
    with pytest.raises(errors.CorpusNotFound):
        client.delete_corpus(corpus.corpus_id)
