"""A real Prometheus scrapes the real service while runs train and sentences are translated: names, values, labels, and
how many series there are before, during and after a run."""

import socket
import subprocess
import time
import urllib.request

import grpc
import pytest

from ferryman.v1 import metrics_pb2, model_pb2, training_pb2, translation_pb2
from ferryman_service.observability import gpu, run_gauges
from ferryman_service.observability.catalogue import all_metrics
from ferryman_service.observability.definitions import Kind
from tests.ops.conftest import need_program
from tests.ops.prometheus_server import prometheus_server
from tests.system.conftest import Stubs, small_recipe
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.ops

JOB = "ferryman"
RUN_GAUGES = {metric.name for metric in run_gauges.METRICS}
TRANSLATE = 'grpc_service="ferryman.v1.TranslationService",grpc_method="Translate"'
OBSERVER_S = 1.5
"""The service looks at its runs once a second."""


class World:
    """A service, stubs to call it, and a Prometheus that watches it."""

    def __init__(self, service, prometheus):
        self.stubs = Stubs(service.address)
        self.prometheus = prometheus
        self.metrics_url = service.metrics_url()
        self.corpus_id = self.stubs.upload().corpus_id

    def wait_for_scrape(self):
        """Wait until Prometheus has seen what the service knows by now of its runs."""
        seen_s = time.time() + OBSERVER_S
        while self.prometheus.value(f'timestamp(up{{job="{JOB}"}})') < seen_s:
            time.sleep(0.1)

    def series(self):
        """The series of the newest scrape: the name and the labels of each."""
        self.wait_for_scrape()
        found = self.prometheus.query(f'{{job="{JOB}"}}')
        return {
            frozenset((name, value) for name, value in series["metric"].items() if name not in ("job", "instance"))
            for series in found
        }

    def train_a_model(self):
        """Train to the end; meanwhile another run waits, and is cancelled."""
        run = self.stubs.start(self.corpus_id, small_recipe())
        next(self.stubs.stream(run.run_id))
        self.cancel(self.stubs.start(self.corpus_id, small_recipe(), "endless").run_id)
        records = list(self.stubs.stream(run.run_id))
        assert records[-1].state_change.state == metrics_pb2.RUN_STATE_SUCCEEDED, self.stubs.run(run.run_id)
        return records

    def start_endless(self):
        """Start a run that only a cancellation ends; return its id once it has been validated."""
        run_id = self.stubs.start(self.corpus_id, small_recipe(max_steps=10_000_000), "endless").run_id
        self.stubs.wait_for_step(run_id, 40)
        return run_id

    def cancel(self, run_id):
        self.stubs.training.CancelTraining(training_pb2.CancelTrainingRequest(run_id=run_id))
        assert list(self.stubs.stream(run_id))[-1].state_change.state == metrics_pb2.RUN_STATE_CANCELLED

    def translate(self, *sentences):
        request = translation_pb2.TranslateRequest(model="reversal", sentences=sentences)
        return self.stubs.translation.Translate(request, timeout=60).translations

    def stream(self, *sentences):
        wire = [translation_pb2.StreamSentence(id="", sentence=sentence) for sentence in sentences]
        messages = [
            translation_pb2.StreamTranslateRequest(config=translation_pb2.StreamTranslateConfig(model="reversal")),
            translation_pb2.StreamTranslateRequest(sentences=translation_pb2.StreamSentences(sentences=wire)),
        ]
        return list(self.stubs.translation.StreamTranslate(iter(messages), timeout=60))

    def unload(self):
        self.stubs.models.UnloadModel(model_pb2.UnloadModelRequest(model="reversal/1"))

    def call_unknown_methods(self, count):
        for number in range(count):
            with pytest.raises(grpc.RpcError):
                self.stubs.channel.unary_unary(f"/ferryman.v1.TrainingService/Fly{number}")(b"")

    def changes_of(self, expressions, work):
        """Do the work; return by how much that has changed the value of each expression."""
        self.wait_for_scrape()
        before = [self.prometheus.value(expression) for expression in expressions]
        work()
        self.wait_for_scrape()
        after = [self.prometheus.value(expression) for expression in expressions]
        return [there - here for here, there in zip(before, after, strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = ServiceProcess(folder / "data", "--metrics-port", str(port))
    try:
        with prometheus_server(folder, {JOB: [f"127.0.0.1:{port}"]}) as prometheus:
            prometheus.wait_for(f'up{{job="{JOB}"}} == 1')
            yield World(service, prometheus)
    finally:
        service.stop()


@pytest.fixture(scope="module")
def records(world):
    """The records of a run that has trained the model "reversal"."""
    return world.train_a_model()


@pytest.fixture(scope="module")
def life(world, records):
    """The series before, during and after a run, its id, and what its gauges say; every method that is called meanwhile
    was called before."""
    world.translate("ba ce")
    world.stream("ba ce")
    world.unload()
    world.translate("ba ce")
    world.call_unknown_methods(1)
    world.prometheus.wait_for('ferryman_training_runs_ended_total{state="succeeded"} == 1')
    before = world.series()
    run_id = world.start_endless()
    world.translate("di fo", "gu")
    world.stream("ka le")
    world.call_unknown_methods(20)
    world.prometheus.wait_for(f'ferryman_training_run_validation_bleu{{run="{run_id}"}}')
    during = world.series()
    values = {name: world.prometheus.value(f'{name}{{run="{run_id}"}}') for name in sorted(RUN_GAUGES)}
    world.cancel(run_id)
    world.prometheus.wait_for(f'absent(ferryman_training_run_step{{run="{run_id}"}})')
    return before, during, world.series(), run_id, values


def test_every_metric_is_there(life):
    _, during, _, _, _ = life
    names = {dict(series)["__name__"] for series in during}
    for metric in {*all_metrics()} - {*gpu.METRICS}:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        assert {metric.name + suffix for suffix in suffixes} <= names
    assert {"process_resident_memory_bytes", "python_info"} <= names
    assert not [name for name in names if name.endswith("_created")]


def test_a_run_adds_its_gauges_and_takes_them_along(life):
    before, during, after, run_id, _ = life
    assert during - before == {frozenset({("__name__", name), ("run", run_id)}) for name in RUN_GAUGES}
    assert before - during == set()
    assert after == before


def test_what_the_gauges_of_a_run_say(world, life):
    *_, run_id, values = life
    run = {name.removeprefix("ferryman_training_run_"): value for name, value in values.items()}
    assert run["step"] >= 40 and run["epoch"] >= 1 and run["attempt"] == 1
    assert (run["restarts"], run["skipped_updates"], run["paused"]) == (0, 0, 0)
    assert 0 < run["progress_ratio"] < 0.1
    assert 0 < run["loss"] < 20 and 0 < run["validation_loss"] < 20
    assert run["started_timestamp_seconds"] < run["last_progress_timestamp_seconds"] < time.time()
    assert world.stubs.run(run_id).progress.step >= run["step"]


def test_steps_tokens_and_runs_are_those_of_the_records(world, records, life):
    query, run_id = world.prometheus.value, life[3]
    runs = [records, *(list(world.stubs.stream(run.run_id)) for run in cancelled_runs(world))]
    steps = [record.step for run in runs for record in run if record.WhichOneof("payload") == "step"]
    assert query("ferryman_training_steps_total") == len(steps)
    assert query("ferryman_training_step_seconds_count") == len(steps)
    assert query("ferryman_training_target_tokens_total") == sum(step.target_tokens for step in steps)
    seconds = sum(step.duration.ToNanoseconds() for step in steps) / 1e9
    assert query("ferryman_training_step_seconds_sum") == pytest.approx(seconds)
    assert run_id in {run.run_id for run in cancelled_runs(world)}
    assert query('ferryman_training_runs_ended_total{state="succeeded"}') == 1
    assert query('ferryman_training_runs_ended_total{state="cancelled"}') == 2
    assert query('ferryman_launcher_attempts_total{outcome="started"}') == 2
    assert query("sum(ferryman_training_runs)") == 0
    assert query("ferryman_training_checkpoints_total") >= 3
    assert query("ferryman_store_errors_total") == 0
    assert query("ferryman_store_lag_seconds_count") >= 3
    assert query("ferryman_store_lag_seconds_sum / ferryman_store_lag_seconds_count") < 10


def cancelled_runs(world):
    request = training_pb2.ListTrainingRunsRequest(states=[metrics_pb2.RUN_STATE_CANCELLED])
    return world.stubs.training.ListTrainingRuns(request).runs


def test_translating_is_counted(world, life):
    expressions = (
        "ferryman_translate_sentences_total",
        'ferryman_translate_requests_total{method="Translate"}',
        'ferryman_translate_requests_total{method="StreamTranslate"}',
        f"grpc_server_msg_received_total{{{TRANSLATE}}}",
        f"grpc_server_msg_sent_total{{{TRANSLATE}}}",
        f'grpc_server_handled_total{{{TRANSLATE},grpc_code="OK"}}',
        'ferryman_translate_seconds_count{stage="decode"}',
        "ferryman_translate_source_tokens_total",
    )

    def work():
        assert len(world.translate("ba ce di", "fo", "gu ka le mi")) == 3
        world.stream("ka", "le")

    *counts, source_tokens = world.changes_of(expressions, work)
    assert counts == [5, 1, 1, 1, 1, 1, 1]
    assert source_tokens > 5
    assert world.prometheus.value('ferryman_translate_queue_tokens{method="Translate"}') == 0
    assert world.prometheus.value('ferryman_translate_queue_limit_tokens{method="Translate"}') == 262_144


def test_steps_of_the_engine_are_counted_one_by_one(world, life):
    query = world.prometheus.value
    world.wait_for_scrape()
    assert query("ferryman_engine_steps_total") > 0
    assert query("ferryman_engine_steps_total - ferryman_engine_step_rows_count") == 0
    rows = query("ferryman_engine_step_rows_sum")
    assert rows >= query("ferryman_engine_steps_total")
    assert query("ferryman_engine_cache_bytes") > 0


def test_a_model_that_is_unloaded_takes_its_labels_along(world, life):
    loaded = "ferryman_model_loaded_info"
    world.translate("ba")
    world.wait_for_scrape()
    [series] = world.prometheus.query(loaded)
    assert {name: series["metric"][name] for name in ("model", "version", "compute_type")} == {
        "model": "reversal",
        "version": "1",
        "compute_type": "fp32",
    }
    assert world.prometheus.value("ferryman_model_memory_bytes") > 10_000
    loads = world.prometheus.value("ferryman_model_load_seconds_count")
    world.unload()
    world.wait_for_scrape()
    assert world.prometheus.query(loaded) == []
    assert world.prometheus.query("ferryman_model_memory_bytes") == []
    world.translate("ba")
    world.wait_for_scrape()
    assert world.prometheus.value("ferryman_model_load_seconds_count") == loads + 1


def test_health_build_and_disk(world, life):
    query = world.prometheus.value
    assert query('ferryman_health_serving{service="overall"}') == 1
    assert query('ferryman_health_serving{service="ferryman.v1.TranslationService"}') == 1
    assert query('ferryman_build_info{roles="training,translation"}') == 1
    assert 0 < query("ferryman_data_free_bytes / ferryman_data_size_bytes") <= 1


def test_labels_are_those_of_the_definitions(world, life):
    labels = {metric.name: set(metric.labels) for metric in all_metrics()}
    for series in life[1]:
        found = dict(series)
        name = found.pop("__name__")
        base = next((name.removesuffix(end) for end in ("_bucket", "_sum", "_count") if name.endswith(end)), name)
        found.pop("le", None)
        if name in labels or base in labels:
            assert set(found) == labels[name if name in labels else base], series


def test_promtool_finds_nothing_wrong(world, life):
    program = need_program("promtool", "prometheus")
    with urllib.request.urlopen(world.metrics_url, timeout=10) as answer:
        text = answer.read()
    checked = subprocess.run([program, "check", "metrics"], input=text, capture_output=True)
    assert checked.returncode == 0, checked.stderr.decode()
