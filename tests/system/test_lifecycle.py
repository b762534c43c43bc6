"""How the service lives and ends: health that follows the data folder, and an end under load."""

import contextlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from examples.local_service import reserved_port
from ferryman.v1 import corpus_pb2, metrics_pb2, training_pb2, translation_pb2
from tests.make_bundle import main as make_bundle
from tests.system.conftest import Stubs, small_recipe
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.system

LONG = 1_000_000
LONG_S = 600
"""Longer than any test may take: what is over sooner has not been waited for."""
TRANSLATION, TRAINING = "ferryman.v1.TranslationService", "ferryman.v1.TrainingService"


@pytest.fixture(scope="module")
def with_model(tmp_path_factory):
    """A data folder with the model "random", to copy."""
    folder = tmp_path_factory.mktemp("with-model")
    make_bundle(folder / "bundle")
    command = [sys.executable, "-m", "ferryman_service", "import-model", str(folder / "bundle"), "random"]
    subprocess.run([*command, "--data-dir", str(folder / "data")], check=True, capture_output=True)
    return folder / "data"


@pytest.fixture
def data_dir(with_model, tmp_path):
    """A data folder of the test's own with the model "random"."""
    return shutil.copytree(with_model, tmp_path / "data")


@pytest.fixture
def start_with_model(start_service, data_dir):
    """A maker of services that have the model "random"."""
    return lambda *flags: start_service(*flags, data_dir=data_dir)


@pytest.fixture
def probe_port():
    with reserved_port() as port:
        yield port


@pytest.fixture
def metrics_port():
    with reserved_port() as port:
        yield port


@pytest.fixture(scope="module")
def translating(with_model, tmp_path_factory):
    """A service with the role translation, for tests that leave it as it is, and its port for probes."""
    data_dir = shutil.copytree(with_model, tmp_path_factory.mktemp("translating") / "data")
    with reserved_port() as port:
        service = ServiceProcess(data_dir, "--probe-port", str(port), "--roles", "translation")
        yield service, port
        assert service.stop() == 0


def health(port, service="", timeout_s=5):
    """What a probe finds; "" if there is no answer."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError:
            return ""
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def wait_until(condition, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.02)


def translate(stubs, sentences=("a b c",)):
    request = translation_pb2.TranslateRequest(model="random", sentences=sentences)
    return stubs.translation.Translate(request, timeout=30)


def details_of(error):
    """The reason, whether there is a hint when to call again, and those where to go on."""
    info, retry = ErrorInfo(), RetryInfo()
    for detail in rpc_status.from_call(error).details:
        detail.Unpack(info) or detail.Unpack(retry)
    return info.reason, retry.retry_delay.seconds > 0, dict(info.metadata)


class Load:
    """Callers that hardly pause: each outcome is noted, with the time at which it came."""

    def __init__(self, address):
        self.outcomes, self.over = [], threading.Event()
        self._channels = []
        kinds = [self._translate] * 4 + [self._stream] * 2 + [self._list] * 2
        self._threads = [threading.Thread(target=self._call, args=(kind, Stubs(address))) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def end(self):
        self.over.set()
        for thread in self._threads:
            thread.join()

    def codes(self):
        return {code for _, code, _ in self.outcomes}

    def _call(self, kind, stubs):
        while not self.over.is_set():
            try:
                kind(stubs)
                code = None
            except grpc.RpcError as error:
                code = error.code()
            self.outcomes.append((time.monotonic(), code, kind.__name__))
            self.over.wait(0.01)
        stubs.channel.close()

    def _translate(self, stubs):
        translate(stubs, ["a b c", "d e f"])

    def _stream(self, stubs):
        def messages():
            config = translation_pb2.StreamTranslateConfig(model="random")
            yield translation_pb2.StreamTranslateRequest(config=config)
            for number in range(20):
                sentence = translation_pb2.StreamSentence(id=str(number), sentence="a b c")
                batch = translation_pb2.StreamSentences(sentences=[sentence])
                yield translation_pb2.StreamTranslateRequest(sentences=batch)
                self.over.wait(0.01)

        for _ in stubs.translation.StreamTranslate(messages(), timeout=30):
            pass

    def _list(self, stubs):
        stubs.training.ListTrainingRuns(training_pb2.ListTrainingRunsRequest(), timeout=30)


def test_health_follows_the_data_folder_on_both_ports(start_with_model, data_dir, probe_port):
    service = start_with_model("--probe-port", str(probe_port))
    ports = (service.port, probe_port)
    names = ("", TRAINING, TRANSLATION, "liveness")
    assert {health(port, name) for port in ports for name in names} == {"SERVING"}
    away = data_dir.with_name("away")
    data_dir.rename(away)
    wait_until(lambda: all(health(port, name) == "NOT_SERVING" for port in ports for name in names[:3]))
    assert {health(port, "liveness") for port in ports} == {"SERVING"}
    away.rename(data_dir)
    wait_until(lambda: all(health(port, name) == "SERVING" for port in ports for name in names))

    stubs = Stubs(service.address)
    translate(stubs)
    data_dir.rename(away)
    wait_until(lambda: health(probe_port, TRAINING) == "NOT_SERVING")
    assert health(probe_port, TRANSLATION) == "SERVING", "the model that is in memory translates on"
    translate(stubs)
    away.rename(data_dir)
    wait_until(lambda: health(probe_port) == "SERVING")
    stubs.upload()
    assert service.stop() == 0


FOREIGN_FILES = (
    ".DS_Store",
    "corpora/.DS_Store",
    "corpora/.incoming/.nfs000000000001",
    "runs/notes.txt~",
    "models/.staging/.DS_Store",
    "models/.staging/backup/bundle",
    "models/.imports/#autosave#",
    "models/.imports/copy/bundle",
    "models/random/.DS_Store",
    "models/random/7",
    "models/README.md",
)


def metric(service, name):
    with urllib.request.urlopen(service.metrics_url()) as page:
        found = [line.split()[-1] for line in page.read().decode().splitlines() if line.startswith(f"{name} ")]
    return float(found[0])


def test_foreign_files_stay_and_a_supervisor_that_fails_leaves_translation_alone(
    start_with_model, data_dir, probe_port, metrics_port
):
    for name in FOREIGN_FILES:
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / name).write_text("somebody's")
    service = start_with_model("--probe-port", str(probe_port), "--metrics-port", str(metrics_port))
    assert {health(probe_port, name) for name in (TRAINING, TRANSLATION)} == {"SERVING"}
    with contextlib.closing(sqlite3.connect(data_dir / "ferryman.db")) as database, database:
        database.execute("ALTER TABLE runs RENAME TO runs_elsewhere")
    wait_until(lambda: health(probe_port, TRAINING) == "NOT_SERVING")
    assert health(probe_port, TRANSLATION) == "SERVING"
    stubs = Stubs(service.address)
    translate(stubs)
    assert metric(service, "ferryman_supervisor_failures_total") >= 1
    with contextlib.closing(sqlite3.connect(data_dir / "ferryman.db")) as database, database:
        database.execute("ALTER TABLE runs_elsewhere RENAME TO runs")
    wait_until(lambda: health(probe_port, TRAINING) == "SERVING", timeout_s=90)
    assert service.stop() == 0
    assert all((data_dir / name).read_text() == "somebody's" for name in FOREIGN_FILES)
    log = service.log.read_text()
    assert log.count(".nfs000000000001") == 1
    assert "training is not ready: the supervisor cannot work" in log
    assert log.count("a bug in looking after the runs") == 1


def test_a_data_folder_that_another_service_has_made_anew_ends_the_first_one_without_harm(
    start_with_model, start_service, data_dir
):
    first = start_with_model()
    first.process.send_signal(signal.SIGSTOP)
    shutil.rmtree(data_dir)
    second = start_service(data_dir=data_dir)
    stubs = Stubs(second.address)
    run = stubs.start(stubs.upload().corpus_id, small_recipe(max_steps=LONG))
    stubs.wait_for_step(run.run_id, 1)
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(60) == 1
    assert "was removed or replaced while this service was using it" in first.log.read_text()
    step = stubs.run(run.run_id).progress.step
    stubs.wait_for_step(run.run_id, step + 20)
    assert stubs.run(run.run_id).attempt == 1
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
    *_, last = stubs.stream(run.run_id)
    assert last.state_change.state == metrics_pb2.RUN_STATE_CANCELLED
    assert second.stop() == 0


def test_a_process_that_is_stuck_is_not_alive(translating):
    service, probe_port = translating
    assert health(probe_port, "liveness") == "SERVING"
    service.process.send_signal(signal.SIGSTOP)
    try:
        assert health(probe_port, "liveness", timeout_s=1) == ""
    finally:
        service.process.send_signal(signal.SIGCONT)
    wait_until(lambda: health(probe_port, "liveness") == "SERVING")


def test_the_command_health_asks_either_port(translating):
    service, probe_port = translating

    def command(*flags):
        program = [sys.executable, "-m", "ferryman_service", "health", "--port", str(service.port), *flags]
        ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
        return ended.returncode, ended.stdout.strip()

    probe = ("--probe", "--probe-port", str(probe_port))
    assert command() == command(*probe) == command(*probe, "--service", "liveness") == (0, "SERVING")
    assert command(*probe, "--service", TRAINING) == (1, "NOT_SERVING")
    assert command(*probe, "--service", "nobody") == (1, "SERVICE_UNKNOWN")


def test_an_end_under_load_fails_no_call_but_with_unavailable(start_with_model, probe_port):
    drain_s = 2
    service = start_with_model("--drain-s", str(drain_s), "--grace-s", "10", "--probe-port", str(probe_port))
    load = Load(service.address)
    wait_until(lambda: len(load.outcomes) > 100)
    assert load.codes() == {None}
    told_s = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: health(probe_port, TRANSLATION) == "NOT_SERVING")
    turned_s = time.monotonic()
    assert health(probe_port, "liveness") == "SERVING"
    assert service.process.wait(60) == 0
    load.end()
    first_failure_s = min(at_s for at_s, code, _ in load.outcomes if code)
    assert turned_s < first_failure_s, "health turns before calls are refused"
    assert first_failure_s - told_s > 0.9 * drain_s, "nobody is refused before the wait is over"
    assert load.codes() == {None, grpc.StatusCode.UNAVAILABLE}


def test_streams_end_with_a_hint_and_calls_may_end(start_with_model, metrics_port):
    service = start_with_model("--grace-s", "60", "--metrics-port", str(metrics_port))
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, small_recipe(LONG))
    stubs.wait_for_step(run.run_id, 5)
    request = training_pb2.StreamMetricsRequest(run_id=run.run_id)
    tails = [stubs.training.StreamMetrics(request) for _ in range(3)]
    for tail in tails:
        next(tail)
    begun, go_on = threading.Event(), threading.Event()
    call = stubs.corpora.UploadCorpus.future(upload_that_waits(begun, go_on))
    assert begun.wait(30)
    wait_until(lambda: started(service, "UploadCorpus") == 2)
    service.process.send_signal(signal.SIGTERM)
    for tail in tails:
        last_sequence, error = read_to_its_end(tail)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(error) == ("SERVER_SHUTTING_DOWN", True, {"after_sequence": str(last_sequence)})
    assert service.process.poll() is None, "it waits for the upload"
    go_on.set()
    assert call.result(30).corpus.train.pairs == 1
    assert service.process.wait(30) == 0

    stubs = Stubs(start_with_model().address)
    stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run.run_id))
    sequences = [record.sequence for record in stubs.stream(run.run_id, after_sequence=last_sequence)]
    assert sequences == list(range(last_sequence + 1, last_sequence + 1 + len(sequences))), "its worker trained on"
    assert len(sequences) > 2


def read_to_its_end(tail):
    """Return the last sequence that came, and the error that ended the stream."""
    last_sequence = None
    try:
        for response in tail:
            last_sequence = response.record.sequence or last_sequence
    except grpc.RpcError as error:
        return last_sequence, error
    raise AssertionError("the stream ended as if the run had")


def upload_that_waits(begun, go_on, timeout_s=60):
    """Messages of an upload that halts in the middle."""
    header = corpus_pb2.UploadHeader(source_language="xx", target_language="yy")
    yield corpus_pb2.UploadCorpusRequest(header=header)
    pair = corpus_pb2.SentencePair(source="ba", target="BA")
    for split in (corpus_pb2.SPLIT_TRAIN, corpus_pb2.SPLIT_VALIDATION):
        yield corpus_pb2.UploadCorpusRequest(pairs=corpus_pb2.PairBatch(split=split, pairs=[pair]))
    begun.set()
    go_on.wait(timeout_s)


@pytest.fixture
def halted_upload():
    """A maker of uploads that never end by themselves."""
    released = threading.Event()

    def start(service):
        begun = threading.Event()
        call = Stubs(service.address).corpora.UploadCorpus.future(upload_that_waits(begun, released))
        assert begun.wait(30)
        wait_until(lambda: started(service, "UploadCorpus") == 1)
        return call

    yield start
    released.set()


def test_a_call_that_does_not_end_is_told_so_after_the_grace(start_with_model, halted_upload, metrics_port):
    service = start_with_model("--grace-s", "0.5", "--metrics-port", str(metrics_port))
    call = halted_upload(service)
    began_s = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    with pytest.raises(grpc.RpcError) as caught:
        call.result(60)
    assert time.monotonic() - began_s > 0.5
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value) == ("SERVER_SHUTTING_DOWN", True, {})
    assert service.process.wait(60) == 0


@pytest.mark.parametrize("phase", ["--drain-s", "--grace-s"])
def test_a_second_signal_hurries_the_end(start_with_model, halted_upload, metrics_port, phase):
    service = start_with_model(phase, str(LONG_S), "--metrics-port", str(metrics_port))
    call = halted_upload(service)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: " stopping" in service.log.read_text())
    with pytest.raises(subprocess.TimeoutExpired):
        service.process.wait(1)
    service.process.send_signal(signal.SIGINT)
    with pytest.raises(grpc.RpcError) as caught:
        call.result(LONG_S / 10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert service.process.wait(LONG_S / 10) == 0


def test_what_is_stuck_holds_up_no_end(start_with_model, data_dir, metrics_port):
    """A thread that waits for the database cannot be ended; the process ends all the same, with exit status 0."""
    service = start_with_model("--grace-s", "0.2", "--metrics-port", str(metrics_port))
    stubs = Stubs(service.address)
    corpus_id = stubs.upload().corpus_id
    with contextlib.closing(sqlite3.connect(data_dir / "ferryman.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        request = training_pb2.StartTrainingRequest(corpus_id=corpus_id, model_name="m", recipe=small_recipe(10))
        call = stubs.training.StartTraining.future(request)
        wait_until(lambda: started(service, "StartTraining") == 1)
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            call.result(60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details_of(caught.value)[0] == "SERVER_SHUTTING_DOWN"
        assert service.process.wait(60) == 0
        assert "exiting without them" in service.log.read_text()
        other.execute("ROLLBACK")


def started(service, method):
    """How many calls of the method have begun."""
    with urllib.request.urlopen(service.metrics_url(), timeout=10) as response:
        found = re.search(rf'grpc_server_started_total\{{.*"{method}".*\}} (\S+)', response.read().decode())
    return float(found[1]) if found else 0
