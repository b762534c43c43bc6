"""One service with one finished run, shared by the tests that only look; and a maker of services for the others."""

from __future__ import annotations

import random
import time

import grpc
import pytest

from examples.local_service import reserved_port
from ferryman.v1 import (
    corpus_pb2,
    corpus_pb2_grpc,
    metrics_pb2,
    model_pb2_grpc,
    recipe_pb2,
    training_pb2,
    training_pb2_grpc,
    translation_pb2_grpc,
)
from tests.system.service_process import ServiceProcess

WORDS = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu"]


def reversal_corpus(count, seed):
    """Sentences of 2 to 6 nonsense words; the translation is the words in upper case, last word first."""
    rng = random.Random(seed)
    sources = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(count)]
    return [(source, " ".join(reversed(source.upper().split()))) for source in sources]


def small_recipe(max_steps=60, **stop):
    return recipe_pb2.Recipe(
        model=recipe_pb2.ModelRecipe(d_model=32, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=64, dropout=0.0),
        data=recipe_pb2.DataRecipe(vocabulary_size=50, max_sentence_tokens=64),
        schedule=recipe_pb2.LearningRateSchedule(warmup_steps=20),
        optimization=recipe_pb2.OptimizationRecipe(batch_target_tokens=512),
        stop=recipe_pb2.StopRecipe(max_steps=max_steps, **stop),
        validation=recipe_pb2.ValidationRecipe(interval_steps=30, max_translated_pairs=20, keep_last=2),
    )


class Stubs:
    """Nothing but the generated stubs, as a foreign client would have them."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),))
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.corpora = corpus_pb2_grpc.CorpusServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.translation = translation_pb2_grpc.TranslationServiceStub(self.channel)

    def upload(self, train=None, validation=None):
        def messages():
            header = corpus_pb2.UploadHeader(display_name="reversal", source_language="xx", target_language="yy")
            yield corpus_pb2.UploadCorpusRequest(header=header)
            for split, pairs in (
                (corpus_pb2.SPLIT_TRAIN, train or reversal_corpus(2000, seed=1)),
                (corpus_pb2.SPLIT_VALIDATION, validation or reversal_corpus(40, seed=2)),
            ):
                wire = [corpus_pb2.SentencePair(source=source, target=target) for source, target in pairs]
                yield corpus_pb2.UploadCorpusRequest(pairs=corpus_pb2.PairBatch(split=split, pairs=wire))

        return self.corpora.UploadCorpus(messages()).corpus

    def start(self, corpus_id, recipe, model_name="reversal", **fields):
        request = training_pb2.StartTrainingRequest(corpus_id=corpus_id, model_name=model_name, recipe=recipe, **fields)
        return self.training.StartTraining(request).run

    def run(self, run_id):
        return self.training.GetTrainingRun(training_pb2.GetTrainingRunRequest(run_id=run_id)).run

    def stream(self, run_id, after_sequence=0, timeout_s=90):
        """Yield the records, without the heartbeats."""
        request = training_pb2.StreamMetricsRequest(run_id=run_id, after_sequence=after_sequence)
        for response in self.training.StreamMetrics(request, timeout=timeout_s, wait_for_ready=True):
            if response.WhichOneof("metrics_update") == "record":
                yield response.record

    def wait_for_step(self, run_id, step):
        """Return the records up to the first one of that step."""
        records = []
        for record in self.stream(run_id):
            records.append(record)
            if record.step.step >= step:
                return records
        raise AssertionError(f"{run_id} ended before step {step}: {self.run(run_id)}")


@pytest.fixture
def start_service(tmp_path):
    """Return a maker of services; whatever still runs at the end of the test is ended."""
    services = []

    def start(*flags, data_dir=None, **options):
        service = ServiceProcess(data_dir or tmp_path / "data", *flags, **options)
        services.append(service)
        return service

    yield start
    for service in services:
        if service.process.poll() is None:
            service.stop()


@pytest.fixture(scope="session")
def ages_s():
    """How old each record of the road was when it arrived, in seconds."""
    return []


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The empty home folder of the road's user."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def working_folder(tmp_path_factory):
    """The road's working folder, with scripts of its user that have names of modules; one that runs leaves a file."""
    folder = tmp_path_factory.mktemp("working-folder")
    for name in ("queue", "random", "torch", "onnxruntime", "ferryman_service"):
        (folder / f"{name}.py").write_text(f"open({str(folder / name)!r} + '-was-executed', 'w')\n")
    return folder


@pytest.fixture(scope="session")
def road(tmp_path_factory, ages_s, home, working_folder):
    """A service that has trained, exported and published a small model: (service, stubs, finished run, its records)."""
    data_dir = tmp_path_factory.mktemp("road") / "data"
    with reserved_port() as port:
        service = ServiceProcess(data_dir, "--metrics-port", str(port), home=home, working_folder=working_folder)
    stubs = Stubs(service.address)
    run = stubs.start(stubs.upload().corpus_id, small_recipe(max_steps=300))
    records = []
    for record in stubs.stream(run.run_id, timeout_s=300):
        records.append(record)
        ages_s.append(time.time() - record.time.ToNanoseconds() / 1e9)
    assert records[-1].state_change.state == metrics_pb2.RUN_STATE_SUCCEEDED, stubs.run(run.run_id)
    yield service, stubs, stubs.run(run.run_id), records
    assert service.stop() == 0
