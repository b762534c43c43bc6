"""What dies, and what lives on."""

import os
import signal
import subprocess
import time

import grpc
import pytest

from ferryman.v1 import metrics_pb2, training_pb2
from tests.system.conftest import Stubs, small_recipe

pytestmark = pytest.mark.system

LONG = 1_000_000


def worker_pids(run_id):
    """The processes whose command line names the run: torchrun and the worker."""
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
        if record.step.step >= before[-1].step.step + 300:
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


def test_a_worker_that_is_killed_fails_its_run_and_nothing_else(start_service):
    service = start_service()
    stubs = Stubs(service.address)
    corpus_id = stubs.upload().corpus_id
    run = stubs.start(corpus_id, small_recipe(LONG))
    stubs.wait_for_step(run.run_id, 5)
    for pid in worker_pids(run.run_id):
        os.kill(pid, signal.SIGKILL)
    last = list(stubs.stream(run.run_id))[-1]
    assert last.state_change.state == metrics_pb2.RUN_STATE_FAILED
    failed = stubs.run(run.run_id)
    assert failed.error.reason == "WORKER_DIED"
    assert "attempt 1" in failed.error.log_tail
    assert service.process.poll() is None
    again = stubs.start(corpus_id, small_recipe(LONG))
    stubs.wait_for_step(again.run_id, 1)
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=again.run_id))
    assert list(stubs.stream(again.run_id))[-1].state_change.state == metrics_pb2.RUN_STATE_CANCELLED


def test_sigterm_ends_the_service_and_not_the_worker(start_service):
    service = start_service()
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, small_recipe(LONG))
    seen = stubs.wait_for_step(run.run_id, 5)
    tail = stubs.stream(run.run_id, after_sequence=seen[-1].sequence)
    next(tail)
    began_s = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began_s < 8, "open streams must not hold up the end"
    with pytest.raises(grpc.RpcError) as caught:
        list(tail)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert worker_pids(run.run_id)

    stubs = Stubs(start_service(data_dir=service.data_dir).address)
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
    records = list(stubs.stream(run.run_id))
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    assert records[-1].state_change.state == metrics_pb2.RUN_STATE_CANCELLED


def test_a_second_training_service_on_the_same_folder_is_refused(start_service):
    service = start_service()
    with pytest.raises(AssertionError, match="in use by another training service"):
        start_service(data_dir=service.data_dir)


def test_a_port_that_is_taken_is_refused(start_service, tmp_path):
    service = start_service()
    with pytest.raises(AssertionError, match=str(service.port)):
        start_service(data_dir=tmp_path / "other", port=service.port)


def test_a_corpus_too_small_for_its_vocabulary_fails_with_the_cure(start_service):
    stubs = Stubs(start_service().address)
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


def test_a_full_disk_fails_the_run_and_leaves_the_service_alive(start_service, small_disk):
    folder, wrapper = small_disk
    stubs = Stubs(start_service(data_dir=folder, wrapper=wrapper).address)
    corpus_id = stubs.upload().corpus_id
    recipe = small_recipe(60)
    recipe.model.d_model, recipe.model.ffn_dim = 512, 2048  # its first checkpoint is larger than the disk
    run = stubs.start(corpus_id, recipe)
    assert list(stubs.stream(run.run_id))[-1].state_change.state == metrics_pb2.RUN_STATE_FAILED
    failed = stubs.run(run.run_id)
    assert failed.error.reason == "DISK_FULL"
    assert "space" in failed.error.message
    again = stubs.start(corpus_id, small_recipe(60))
    assert list(stubs.stream(again.run_id))[-1].state_change.state == metrics_pb2.RUN_STATE_SUCCEEDED
