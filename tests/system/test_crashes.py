"""What dies, and what lives on."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from ferryman.v1 import metrics_pb2, training_pb2
from ferryman_service.training.checkpoint import checkpoint_path, verify_checkpoint
from tests.system.conftest import Stubs, small_recipe
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.system

LONG = 1_000_000


def worker_pids(run_id):
    """The processes whose command line names the run; the first one has started the others."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if run_id.encode() in file.read():
                        found.append(int(name))
            except OSError:
                continue
    return found


def wait_until(condition, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_service_killed_in_training_misses_nothing_and_its_worker_goes_on(start_service):
    service = start_service()
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, small_recipe(LONG))
    before = stubs.wait_for_step(run.run_id, 50)
    service.kill()
    assert worker_pids(run.run_id)

    restarted = start_service(data_dir=service.data_dir)
    stubs = Stubs(restarted.address)
    after = []
    for record in stubs.stream(run.run_id, after_sequence=before[-1].sequence):
        after.append(record)
        if record.step.step >= before[-1].step.step + 100:
            break
    steps = [record.step.step for record in before + after if record.HasField("step")]
    assert steps == list(range(1, len(steps) + 1))
    sequences = [record.sequence for record in before + after]
    assert sequences == list(range(1, len(sequences) + 1))
    assert stubs.run(run.run_id).attempt == 1

    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
    rest = list(stubs.stream(run.run_id, after_sequence=sequences[-1]))
    assert rest[-1].state_change.state == metrics_pb2.RUN_STATE_CANCELLED
    wait_until(lambda: not worker_pids(run.run_id))


def steps_of(records):
    return [record.step.step for record in records if record.HasField("step")]


def series_of(records):
    """What of the steps and validations is a function of recipe, corpus, seed and number of processes."""
    steps, validations = [], []
    for record in records:
        step, validation = record.step, record.validation
        if record.HasField("step"):
            steps.append((step.step, step.epoch, step.loss, step.gradient_norm, step.target_tokens))
        if record.HasField("validation"):
            validations.append((validation.step, validation.loss, validation.bleu, validation.best))
    return steps, validations


def states_of(records):
    names = [metrics_pb2.RunState.Name(r.state_change.state) for r in records if r.HasField("state_change")]
    return [name.removeprefix("RUN_STATE_") for name in names]


SHORT = 100


def short_recipe(max_steps=SHORT):
    recipe = small_recipe(max_steps)
    recipe.validation.checkpoint_interval_steps = 20
    return recipe


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for the tests that leave it running."""
    service = ServiceProcess(tmp_path_factory.mktemp("service") / "data")
    yield service
    assert service.stop() == 0


def test_run_resumes_after_sigterm_and_after_sigkill_of_its_worker(service):
    last_step = 120
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, short_recipe(last_step))
    stubs.wait_for_step(run.run_id, 30)
    pids = worker_pids(run.run_id)
    os.kill(min(pids), signal.SIGTERM)
    wait_until(lambda: not set(pids) & set(worker_pids(run.run_id)))
    stubs.wait_for_step(run.run_id, 70)
    for pid in worker_pids(run.run_id):
        os.kill(pid, signal.SIGKILL)
    records = list(stubs.stream(run.run_id))
    assert states_of(records)[-1] == "SUCCEEDED", stubs.run(run.run_id)
    assert steps_of(records) == list(range(1, last_step + 1))
    codes = [record.event.code for record in records if record.HasField("event")]
    assert (codes.count("HANDED_OVER"), codes.count("RESTARTED"), codes.count("RESUMED")) == (1, 1, 2)
    ended = stubs.run(run.run_id)
    assert (ended.attempt, ended.restarts, ended.model_version) == (3, 0, 1)


def test_run_resumes_after_the_loss_of_one_of_its_processes(service):
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, short_recipe(), processes=2)
    stubs.wait_for_step(run.run_id, 30)
    os.kill(max(worker_pids(run.run_id)), signal.SIGKILL)
    records = list(stubs.stream(run.run_id))
    assert states_of(records)[-1] == "SUCCEEDED", stubs.run(run.run_id)
    assert steps_of(records) == list(range(1, SHORT + 1))
    # The first process may notice by itself, or be told to end before.
    codes = [record.event.code for record in records if record.HasField("event")]
    assert codes.count("RESTARTED") + codes.count("HANDED_OVER") == 1
    ended = stubs.run(run.run_id)
    assert (ended.attempt, ended.restarts) == (2, 0)

    undisturbed = stubs.start(run.corpus_id, short_recipe(), processes=2)
    assert series_of(records) == series_of(stubs.stream(undisturbed.run_id))


@pytest.mark.full
def test_stopped_process_is_replaced(start_service):
    """Of two processes the second: then the first waits for it. After that the first, which then says nothing."""
    stubs = Stubs(start_service("--worker-silence-s", "6", "--restart-backoff-s", "0").address)
    run = stubs.start(stubs.upload().corpus_id, small_recipe(LONG), processes=2)
    for choose in (max, min):
        stubs.wait_for_step(run.run_id, stubs.run(run.run_id).progress.step + 5)
        attempt, stopped = stubs.run(run.run_id).attempt, choose(worker_pids(run.run_id))
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda attempt=attempt: stubs.run(run.run_id).attempt > attempt, timeout_s=60)
        assert stopped not in worker_pids(run.run_id)
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
    events = [record.event for record in stubs.stream(run.run_id) if record.HasField("event")]
    ends = [event.message for event in events if event.code in ("RESTARTED", "HANDED_OVER")]
    assert len(ends) == 2, events
    assert all("no sign of life for 6 s" in message for message in ends), events


def test_a_paused_run_holds_no_worker_outlives_the_service_and_goes_on(start_service):
    service = start_service()
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, short_recipe())
    stubs.wait_for_step(run.run_id, 30)
    stubs.training.PauseTraining(training_pb2.PauseTrainingRequest(run_id=run.run_id))
    wait_until(lambda: stubs.run(run.run_id).state == metrics_pb2.RUN_STATE_PAUSED)
    wait_until(lambda: not worker_pids(run.run_id))
    request = training_pb2.ListCheckpointsRequest(run_id=run.run_id)
    checkpoints = stubs.training.ListCheckpoints(request).checkpoints
    assert checkpoints[-1].step == stubs.run(run.run_id).progress.step
    assert service.stop() == 0

    stubs = Stubs(start_service(data_dir=service.data_dir).address)
    assert stubs.run(run.run_id).state == metrics_pb2.RUN_STATE_PAUSED
    refused = training_pb2.DeleteTrainingRunRequest(run_id=run.run_id)
    with pytest.raises(grpc.RpcError) as caught:
        stubs.training.DeleteTrainingRun(refused)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    stubs.training.ResumeTraining(training_pb2.ResumeTrainingRequest(run_id=run.run_id))
    records = list(stubs.stream(run.run_id))
    assert states_of(records)[-1] == "SUCCEEDED", stubs.run(run.run_id)
    assert steps_of(records) == list(range(1, SHORT + 1))

    fine_tuning_goes_on_where_the_model_stands(stubs, run.corpus_id, losses_of(records))
    stubs.training.DeleteTrainingRun(training_pb2.DeleteTrainingRunRequest(run_id=run.run_id))
    with pytest.raises(grpc.RpcError) as caught:
        stubs.run(run.run_id)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert not (service.data_dir / "runs" / run.run_id).exists()


def fine_tuning_goes_on_where_the_model_stands(stubs, corpus_id, losses):
    tuned = stubs.start(corpus_id, small_recipe(10), model_name="tuned", initial_model="reversal", keep_optimizer=True)
    assert tuned.initial_model == "reversal/1"
    assert tuned.recipe.model.d_model == 32
    tuning = list(stubs.stream(tuned.run_id))
    assert states_of(tuning)[-1] == "SUCCEEDED", stubs.run(tuned.run_id)
    assert losses_of(tuning)[0] < (losses[0] + losses[-1]) / 2


def losses_of(records):
    return [record.step.loss for record in records if record.HasField("step")]


def test_second_training_service_on_the_same_folder_is_refused(service, start_service):
    with pytest.raises(AssertionError, match="in use by another training service"):
        start_service(data_dir=service.data_dir)


def test_taken_port_is_refused(service, start_service, tmp_path):
    with pytest.raises(AssertionError, match=str(service.port)):
        start_service(data_dir=tmp_path / "other", port=service.port)


def test_corpus_too_small_for_its_vocabulary_fails_with_the_cure(service):
    stubs = Stubs(service.address)
    recipe = small_recipe(10)
    recipe.data.vocabulary_size = 8000
    run = stubs.start(stubs.upload().corpus_id, recipe)
    assert list(stubs.stream(run.run_id))[-1].state_change.state == metrics_pb2.RUN_STATE_FAILED
    error = stubs.run(run.run_id).error
    assert error.reason == "VOCABULARY_TOO_LARGE"
    assert "8000" in error.message


SMALL_DISK = 'mount -t tmpfs -o size=$0 tmpfs $1 && shift && exec "$@"'


@pytest.fixture
def small_disk(tmp_path):
    """The start of a command line whose program sees a disk of 16 MiB at the returned folder, and nobody else does."""
    folder = tmp_path / "disk"
    folder.mkdir()
    own_mounts = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*own_mounts, "true"], check=False).returncode and "CI" not in os.environ:
        pytest.skip("this kernel does not allow mount namespaces to this user")
    return folder, (*own_mounts, "sh", "-c", SMALL_DISK, "16m", str(folder))


def fill_up(path):
    """Leave the disk no byte."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")


def test_a_full_disk_pauses_runs_and_they_go_on_from_their_last_checkpoints_when_there_is_room(
    start_service, small_disk
):
    folder, wrapper = small_disk
    service = start_service(data_dir=folder, wrapper=wrapper)
    stubs = Stubs(service.address)
    corpus_id = stubs.upload().corpus_id
    a_checkpoint_that_does_not_fit_pauses_its_run(stubs, corpus_id)

    # The service lives, and so does the next run, until the disk has no byte left.
    run = stubs.start(corpus_id, short_recipe(300))
    stubs.wait_for_step(run.run_id, 30)
    seen_by_service = Path(f"/proc/{service.process.pid}/root{folder}")
    fill_up(seen_by_service / "filler")
    wait_until(lambda: stubs.run(run.run_id).state == metrics_pb2.RUN_STATE_PAUSED, timeout_s=60)
    wait_until(lambda: not worker_pids(run.run_id))

    request = training_pb2.ListCheckpointsRequest(run_id=run.run_id)
    last = stubs.training.ListCheckpoints(request).checkpoints[-1]
    assert last.step >= 20
    assert verify_checkpoint(checkpoint_path(seen_by_service / "runs" / run.run_id / "checkpoints", last.step))

    (seen_by_service / "filler").unlink()
    stubs.training.ResumeTraining(training_pb2.ResumeTrainingRequest(run_id=run.run_id))
    records = list(stubs.stream(run.run_id))
    assert states_of(records)[-1] == "SUCCEEDED", stubs.run(run.run_id)
    assert steps_of(records) == list(range(1, 301))
    codes = [record.event.code for record in records if record.HasField("event")]
    assert codes.count("DISK_FULL") == codes.count("RESUMED") == 1


def a_checkpoint_that_does_not_fit_pauses_its_run(stubs, corpus_id):
    recipe = small_recipe(60)
    recipe.model.d_model, recipe.model.ffn_dim = 512, 2048
    recipe.validation.checkpoint_interval_steps = 5
    run = stubs.start(corpus_id, recipe)
    wait_until(lambda: stubs.run(run.run_id).state == metrics_pb2.RUN_STATE_PAUSED, timeout_s=90)
    history = training_pb2.StreamMetricsRequest(run_id=run.run_id, history_only=True)
    records = [response.record for response in stubs.training.StreamMetrics(history)]
    assert "space" in next(record.event.message for record in records if record.event.code == "DISK_FULL")
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
