"""Pausing, resuming, deleting and fine-tuning, asked of the whole service with nothing but the generated stubs."""

import json
import time
import uuid

import grpc
import pytest

from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, recipe_pb2, training_pb2
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import Handover, ProcessIdentity
from ferryman_service.trash import empty_trash

WORKER = ProcessIdentity(pid=4242, start_ticks=7, boot_id="boot")


def ask(service, method, run_id):
    return getattr(service.training_stub, method)(getattr(training_pb2, f"{method}Request")(run_id=run_id))


def get(service, run_id):
    return ask(service, "GetTrainingRun", run_id).run


def start(service, **fields):
    request = training_pb2.StartTrainingRequest(corpus_id=service.upload().corpus_id, model_name="m", **fields)
    return service.training_stub.StartTraining(request).run


def ended(service, run_id):
    service.runs.change_state(run_id, 1, RunState.FAILED)


def leave_checkpoint(service, run_id, step, *, best_step, validated=None):
    """Leave what training leaves in the run's folder, but for the tensors."""
    path = service.folder.run_dir(run_id) / "checkpoints" / f"step-{step:010}"
    path.mkdir(parents=True)
    position = {"step": step, "epoch": 2, "best_step": best_step, "validated": validated}
    (path / "position.json").write_text(json.dumps(position))
    (path / "weights.safetensors").write_bytes(b"x" * 1000)


def test_a_queued_run_rests_at_once(service):
    run_id = start(service).run_id
    for _ in range(2):
        run = ask(service, "PauseTraining", run_id).run
        assert (run.state, run.pause_requested, run.last_sequence) == (metrics_pb2.RUN_STATE_PAUSED, False, 2)
    for _ in range(2):
        run = ask(service, "ResumeTraining", run_id).run
        assert (run.state, run.last_sequence) == (metrics_pb2.RUN_STATE_QUEUED, 3)
    listing = training_pb2.ListTrainingRunsRequest(states=[metrics_pb2.RUN_STATE_PAUSED])
    assert run_id not in [run.run_id for run in service.training_stub.ListTrainingRuns(listing).runs]


def test_a_worker_is_asked_to_rest_and_the_pause_can_be_withdrawn(service):
    run_id = service.claimed_run()
    run = ask(service, "PauseTraining", run_id).run
    assert (run.state, run.pause_requested) == (metrics_pb2.RUN_STATE_RUNNING, True)
    run = ask(service, "ResumeTraining", run_id).run
    assert (run.state, run.pause_requested) == (metrics_pb2.RUN_STATE_RUNNING, False)


def test_a_worker_that_rests_and_the_next_one(service):
    run_id = service.claimed_run()
    ask(service, "PauseTraining", run_id)
    service.runs.change_state(run_id, 1, RunState.PAUSED, "paused by the caller")
    run = get(service, run_id)
    assert (run.state, run.pause_requested) == (metrics_pb2.RUN_STATE_PAUSED, False)
    assert not run.HasField("end_time")
    ask(service, "ResumeTraining", run_id)
    service.runs.begin_attempt(run_id, 1)
    service.runs.claim_attempt(run_id, 2, WORKER)
    again = get(service, run_id)
    assert (again.state, again.attempt, again.start_time) == (metrics_pb2.RUN_STATE_RUNNING, 2, run.start_time)


def test_a_resting_run_is_cancelled_at_once(service):
    run_id = start(service).run_id
    ask(service, "PauseTraining", run_id)
    assert ask(service, "CancelTraining", run_id).run.state == metrics_pb2.RUN_STATE_CANCELLED


def test_an_exporting_run_does_not_rest(service, refused):
    run_id = service.claimed_run()
    service.runs.change_state(run_id, 1, RunState.EXPORTING)
    request = training_pb2.PauseTrainingRequest(run_id=run_id)
    assert refused(service.training_stub.PauseTraining, request).reason == "ILLEGAL_TRANSITION"


def test_a_stream_goes_on_across_a_rest(make_service):
    service = make_service(heartbeat_s=0.02)
    run_id = service.claimed_run()
    request = training_pb2.StreamMetricsRequest(run_id=run_id, after_sequence=3)
    stream = service.training_stub.StreamMetrics(request, timeout=20)
    service.runs.change_state(run_id, 1, RunState.PAUSED, "paused by the caller")
    record = next(item.record for item in stream if item.HasField("record"))
    assert (record.sequence, record.state_change.state) == (4, metrics_pb2.RUN_STATE_PAUSED)
    assert next(item for item in stream if item.heartbeat.state == metrics_pb2.RUN_STATE_PAUSED).heartbeat
    ask(service, "ResumeTraining", run_id)
    ask(service, "CancelTraining", run_id)
    rest = [item.record for item in stream if item.HasField("record")]
    assert [(record.sequence, record.state_change.state) for record in rest] == [
        (5, metrics_pb2.RUN_STATE_QUEUED),
        (6, metrics_pb2.RUN_STATE_CANCELLED),
    ]


def test_a_restart_is_seen(service):
    run_id = service.claimed_run()
    service.runs.give_up_attempt(run_id, 1, Handover(state=RunState.QUEUED, message="the worker died", restarts=1))
    run = get(service, run_id)
    assert (run.state, run.restarts, run.attempt) == (metrics_pb2.RUN_STATE_QUEUED, 1, 1)


def test_checkpoints(service):
    run_id = service.claimed_run()
    assert list(ask(service, "ListCheckpoints", run_id).checkpoints) == []
    scores = {"bleu": 31.5, "chrf": 55.25, "nll_per_token": 1.5}
    leave_checkpoint(service, run_id, 250, best_step=250, validated=scores)
    leave_checkpoint(service, run_id, 300, best_step=250)
    validated, other = ask(service, "ListCheckpoints", run_id).checkpoints
    assert (validated.step, validated.epoch, validated.best) == (250, 2, True)
    assert (validated.bleu, validated.chrf, validated.nll_per_token) == (31.5, 55.25, 1.5)
    assert validated.size_bytes > 1000
    assert validated.create_time.seconds > 1_700_000_000
    assert (other.step, other.best) == (300, False)
    assert [other.HasField(name) for name in ("bleu", "chrf", "nll_per_token")] == [False] * 3
    leave_checkpoint(service, run_id, 350, best_step=250)
    (service.folder.run_dir(run_id) / "checkpoints" / "step-0000000350" / "position.json").write_text("")
    assert list(ask(service, "ListCheckpoints", run_id).checkpoints) == [validated, other]


def test_a_deleted_run_leaves_nothing_but_what_it_published(service, refused):
    request_id = str(uuid.uuid4())
    run_id = service.start_run(request_id=request_id).run_id
    other = service.start_run().run_id
    leave_checkpoint(service, run_id, 1, best_step=1)
    service.runs.begin_attempt(run_id, 0)
    service.runs.claim_attempt(run_id, 1, WORKER)
    ended(service, run_id)
    ask(service, "DeleteTrainingRun", run_id)
    assert not service.folder.run_dir(run_id).exists()
    for method in ("GetTrainingRun", "StreamMetrics", "ListCheckpoints", "DeleteTrainingRun"):
        request = getattr(training_pb2, f"{method}Request")(run_id=run_id)
        assert refused(getattr(service.training_stub, method), request).reason == "RUN_NOT_FOUND"
    assert get(service, other).last_sequence == 1
    assert service.model_stub.GetModel(model_pb2.GetModelRequest(model="en-de")).version.version == 1
    assert start(service, request_id=request_id).run_id not in ("", run_id)


@pytest.mark.parametrize("rest", [False, True])
def test_a_run_that_has_not_ended_is_not_deleted(service, refused, rest):
    run_id = start(service).run_id
    if rest:
        ask(service, "PauseTraining", run_id)
    request = training_pb2.DeleteTrainingRunRequest(run_id=run_id)
    assert refused(service.training_stub.DeleteTrainingRun, request).reason == "RUN_NOT_FINISHED"
    assert get(service, run_id).run_id == run_id


@pytest.fixture(scope="module")
def weights(service):
    """The reference of a version that training can start from, of the preset "tiny"."""
    return service.import_model("pretrained", weights=True).reference


def test_fine_tuning_takes_network_and_subwords_of_the_model(service, weights):
    recipe = recipe_pb2.Recipe(preset=recipe_pb2.PRESET_BASE, model=recipe_pb2.ModelRecipe(dropout=0.25))
    run = start(service, initial_model="pretrained", recipe=recipe, processes=2)
    assert (run.initial_model, run.processes) == (weights, 2)
    assert (run.recipe.model.d_model, run.recipe.data.vocabulary_size) == (128, 8000), "those of the model"
    assert run.recipe.model.dropout == 0.25, "the caller's"
    assert run.recipe.optimization.batch_target_tokens == 25_000, "the preset's"
    assert get(service, run.run_id) == run


def test_a_run_says_whether_it_keeps_the_optimizer(service, weights):
    version, _ = service.trained_model("source")
    run = start(service, initial_model="source", keep_optimizer=True)
    assert (run.initial_model, run.keep_optimizer) == (version.reference, True)
    assert get(service, run.run_id).keep_optimizer
    assert not start(service, initial_model="source").keep_optimizer


def test_a_run_is_not_deleted_while_another_needs_its_optimizer(service, refused):
    _, source = service.trained_model("needed")
    needy = start(service, initial_model="needed", keep_optimizer=True).run_id
    request = training_pb2.DeleteTrainingRunRequest(run_id=source)
    refusal = refused(service.training_stub.DeleteTrainingRun, request)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RUN_STILL_NEEDED")
    assert needy in refusal.message
    assert refusal.details["ErrorInfo"].metadata == {"run_id": source, "needed_by": needy}
    leave_checkpoint(service, needy, 0, best_step=0)
    service.training_stub.DeleteTrainingRun(request)


def test_every_mismatch_is_named(service, weights, refused):
    recipe = recipe_pb2.Recipe(
        model=recipe_pb2.ModelRecipe(d_model=256, heads=4, activation=recipe_pb2.ACTIVATION_GELU),
        data=recipe_pb2.DataRecipe(vocabulary_size=4000, subword_algorithm=recipe_pb2.SUBWORD_ALGORITHM_BPE),
    )
    request = training_pb2.StartTrainingRequest(
        corpus_id=service.upload().corpus_id, model_name="m", initial_model=weights, recipe=recipe
    )
    refusal = refused(service.training_stub.StartTraining, request)
    assert refusal.violations == [
        ("recipe.model.d_model", "CONFLICT"),
        ("recipe.model.activation", "CONFLICT"),
        ("recipe.data.vocabulary_size", "CONFLICT"),
        ("recipe.data.subword_algorithm", "CONFLICT"),
    ]


def test_a_caller_who_says_nothing_gets_the_servers_processes_and_random_weights(service):
    run = start(service)
    assert (run.processes, run.initial_model) == (1, "")


def test_checking_alone_checks_the_model_too(service, weights):
    run = start(service, initial_model=weights, validate_only=True)
    assert (run.run_id, run.initial_model) == ("", weights)


@pytest.mark.parametrize(
    "change", [{"initial_model": "pretrained"}, {"processes": 2}, {"initial_model": "pretrained", "keep_optimizer": 1}]
)
def test_a_request_id_covers_the_new_fields(service, weights, refused, change):
    request = training_pb2.StartTrainingRequest(
        corpus_id=service.upload().corpus_id, model_name="m", request_id=str(uuid.uuid4())
    )
    service.training_stub.StartTraining(request)
    service.training_stub.StartTraining(request)
    leave_checkpoint(service, "run_0000000000000000000000", uuid.uuid4().int % 10**9, best_step=0)
    changed = training_pb2.StartTrainingRequest(**change)
    changed.MergeFrom(request)
    assert refused(service.training_stub.StartTraining, changed).reason == "REQUEST_ID_REUSED"


def test_a_corpus_is_deleted_once_no_run_needs_it_and_ended_runs_tell(service, refused):
    request_id = str(uuid.uuid4())
    corpus_id = service.upload(request_id=request_id).corpus_id
    wanted = training_pb2.StartTrainingRequest(corpus_id=corpus_id, model_name="m")
    run_ids = [service.training_stub.StartTraining(wanted).run.run_id for _ in range(2)]
    deletion = corpus_pb2.DeleteCorpusRequest(corpus_id=corpus_id)
    ask(service, "CancelTraining", run_ids[0])
    ask(service, "PauseTraining", run_ids[1])
    refusal = refused(service.corpus_stub.DeleteCorpus, deletion)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CORPUS_IN_USE")
    assert refusal.details["ErrorInfo"].metadata["runs"] == run_ids[1]
    ask(service, "CancelTraining", run_ids[1])
    assert not get(service, run_ids[0]).corpus_deleted
    service.corpus_stub.DeleteCorpus(deletion)
    assert refused(service.corpus_stub.DeleteCorpus, deletion).reason == "CORPUS_NOT_FOUND"
    listed = service.training_stub.ListTrainingRuns(training_pb2.ListTrainingRunsRequest(model_name="m", page_size=500))
    for run in (get(service, run_ids[0]), *(run for run in listed.runs if run.run_id in run_ids)):
        assert (run.corpus_id, run.corpus_deleted) == (corpus_id, True)
    stream = training_pb2.StreamMetricsRequest(run_id=run_ids[0])
    assert len(list(service.training_stub.StreamMetrics(stream))) == 2
    assert refused(service.training_stub.StartTraining, wanted).reason == "CORPUS_NOT_FOUND"
    assert service.upload(request_id=request_id).corpus_id != corpus_id, "its request_id is free again"
    [content] = service.folder.trash.glob("*/content")
    assert "train.source" in {path.name for path in content.iterdir()}
    assert not service.folder.corpus_dir(corpus_id).exists()
    day_ns = 24 * 3600 * 10**9
    for days, is_there in ((6, True), (8, False)):
        empty_trash(service.folder.trash, time.time_ns() + days * day_ns)
        assert content.exists() is is_there
