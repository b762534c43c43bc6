"""What a worker does with its attempt, over the real stores; only the training itself is played."""

import errno

import pytest

from ferryman_service.application.execution import WorkerPorts, execute_attempt
from ferryman_service.application.ports import TrainedModel
from ferryman_service.application.reporting import ReporterConfig
from ferryman_service.bundle.manifest import Architecture, ManifestHeader, seal
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.errors import DiskFull
from ferryman_service.domain.models import ModelReference, ModelScores
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StateChange
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import DiskIsFull, PauseRequested, StopRequested
from ferryman_service.domain.translation import Hypothesis, Timings, Translation
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.runs import SqlRunStore

SCORES = ModelScores(bleu=1.0, chrf=2.0, nll_per_token=3.0, weights="best", step=1)


class PlayedEngine:
    """Reports one event, then does what the test says."""

    def __init__(self, act=lambda reporter: None):
        self.act = act

    def train(self, job, reporter):
        reporter.event(EventLevel.INFO, "TRAINED", job.run_id)
        self.act(reporter)
        (job.run_dir / "weights").write_text("w")
        return TrainedModel(
            weights=job.run_dir / "weights",
            subwords=job.run_dir / "weights",
            recipe=job.recipe,
            scores=SCORES,
            parameters=7,
            check_sentences=("a", "b"),
        )


class Echo:
    """A translator that gives back what the test says, word for word."""

    def __init__(self, score=-1.0, tokens=(5,)):
        self.score, self.tokens = score, tokens

    def translate(self, sentences, options, token):
        hypothesis = Hypothesis(
            text="x", score=self.score, log_probability=-1.0, target_tokens=2, finished=True, tokens=self.tokens
        )
        return [Translation(hypotheses=[hypothesis], source_tokens=1) for _ in sentences], Timings(
            queue_ns=0, text_ns=0, encode_ns=0, decode_ns=0
        )


class PlayedExporter:
    """Writes a bundle whose graphs are empty files."""

    def __init__(self, exported, reference):
        self.exported, self.trained = exported, reference

    def export(self, trained, lineage, bundle):
        for name in ("encoder.onnx", "decoder.onnx", "subwords.model"):
            (bundle / name).write_bytes(b"x")
        architecture = Architecture(d_model=8, decoder_layers=1, heads=1, vocabulary_size=32)
        seal(
            bundle,
            ManifestHeader(
                lineage=lineage,
                scores=trained.scores,
                parameters=trained.parameters,
                max_sentence_tokens=64,
                architecture=architecture,
            ),
        )

    def reference(self, trained):
        return self.trained

    def load(self, bundle):
        return self.exported


@pytest.fixture
def house(tmp_path, worker):
    """Everything a worker needs, and a started attempt: (ports maker, run id, folder)."""
    folder = DataFolder(tmp_path / "data")
    folder.create()
    database = open_database(folder.database)
    upgrade(database)
    yield House(folder, database, worker)
    database.dispose()


class House:
    def __init__(self, folder, database, worker):
        self.folder, self.worker = folder, worker
        self.runs = SqlRunStore(database)
        self.corpora = FileCorpusStore(database, folder, CorpusLimits())
        self.models = FileModelStore(database, folder)
        upload = self.corpora.begin_upload(
            CorpusHeader(display_name="", source_language="en", target_language="de"), ""
        )
        for split in Split:
            upload.add_pairs(split, [SentencePair(source="a", target="b")])
        self.corpus = upload.finish()

    def work(self, new_run, act=lambda reporter: None, exported=None, reference=None):
        run = self.runs.create(new_run(self.corpus.corpus_id), None, 10)
        self.runs.begin_attempt(run.run_id, 0)
        run_dir = self.folder.run_dir(run.run_id)
        run_dir.mkdir(parents=True, exist_ok=True)
        exporter = PlayedExporter(exported or Echo(), reference or Echo())
        ports = WorkerPorts(
            runs=self.runs,
            corpora=self.corpora,
            models=self.models,
            engine=PlayedEngine(act),
            exporter=exporter,
            loader=exporter,
            log_tail=lambda run_id, attempt: f"tail {attempt}",
            prepared_dir=run_dir / "prepared",
            reporter=ReporterConfig(flush_interval_s=0.001, ack_interval_s=0.005),
        )
        succeeded = execute_attempt(ports, run.run_id, 1, self.worker, run_dir)
        return succeeded, self.runs.get(run.run_id)


def test_the_road_ends_in_a_published_model(house, new_run):
    succeeded, run = house.work(new_run)
    assert succeeded
    assert (run.state, run.model_version, run.worker) == (RunState.SUCCEEDED, 1, house.worker)
    version = house.models.resolve(ModelReference(name="en-de"))
    assert version.lineage.corpus_digest == house.corpus.digest
    assert (version.lineage.run_id, version.scores) == (run.run_id, SCORES)
    payloads = [record.payload for record in house.runs.records_after(run.run_id, 0, 100)]
    states = [payload.state for payload in payloads if isinstance(payload, StateChange)]
    assert states == [RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.EXPORTING, RunState.SUCCEEDED]
    checked = [payload for payload in payloads if isinstance(payload, RunEvent)][-1]
    assert checked.code == "EXPORT_CHECKED"
    assert "4 of 4" in checked.message


def test_an_expected_failure_is_written_down(house, new_run):
    def fail(reporter):
        raise TrainingFailed(FailureReason.VOCABULARY_TOO_LARGE, "take 100")

    succeeded, run = house.work(new_run, fail)
    assert not succeeded
    assert (run.state, run.failure.log_tail) == (RunState.FAILED, "tail 1")
    assert run.failure.reason is FailureReason.VOCABULARY_TOO_LARGE
    codes = [getattr(record.payload, "code", "") for record in house.runs.records_after(run.run_id, 0, 100)]
    assert "TRAINED" in codes, "what was reported before the failure is kept"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), DiskIsFull("no space left"), DiskFull("no space left")]
)
def test_a_full_disk_pauses_the_run_and_says_what_to_do(house, new_run, error):
    def fail(reporter):
        raise error

    succeeded, run = house.work(new_run, fail)
    assert not succeeded
    assert (run.state, run.failure, run.worker) == (RunState.PAUSED, None, None)
    last = [record.payload for record in house.runs.records_after(run.run_id, 0, 100)][-2:]
    assert last[0].code == "DISK_FULL"
    assert "resume the run" in last[1].message
    assert house.runs.request_resume(run.run_id).state is RunState.QUEUED


@pytest.mark.parametrize(("error", "state"), [(PauseRequested(), RunState.PAUSED), (StopRequested(), RunState.QUEUED)])
def test_a_worker_that_is_not_wanted_for_now_leaves_the_run_to_another(house, new_run, error, state):
    def stop(reporter):
        raise error

    succeeded, run = house.work(new_run, stop)
    assert not succeeded
    assert (run.state, run.worker, run.restarts, run.pause_requested) == (state, None, 0, False)


def test_a_bug_leaves_with_its_stack_trace(house, new_run):
    def fail(reporter):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        house.work(new_run, fail)


def test_another_io_error_is_no_full_disk(house, new_run):
    def fail(reporter):
        raise PermissionError(errno.EACCES, "not yours")

    with pytest.raises(PermissionError):
        house.work(new_run, fail)


def test_an_attempt_that_was_overtaken_does_nothing(house, new_run):
    run = house.runs.create(new_run(house.corpus.corpus_id), None, 10)
    house.runs.begin_attempt(run.run_id, 0)
    house.runs.begin_attempt(run.run_id, 1)
    ports = WorkerPorts(
        runs=house.runs,
        corpora=house.corpora,
        models=house.models,
        engine=PlayedEngine(),
        exporter=PlayedExporter(Echo(), Echo()),
        loader=PlayedExporter(Echo(), Echo()),
        log_tail=lambda run_id, attempt: "",
        prepared_dir=house.folder.prepared,
        reporter=ReporterConfig(),
    )
    assert not execute_attempt(ports, run.run_id, 1, house.worker, house.folder.run_dir(run.run_id))
    assert house.runs.get(run.run_id).state is RunState.STARTING


def test_a_cancellation_publishes_nothing(house, new_run):
    def cancel(reporter):
        [run] = house.runs.unfinished()
        house.runs.request_cancel(run.run_id)
        while True:
            reporter.check()

    succeeded, run = house.work(new_run, cancel)
    assert (succeeded, run.state, run.cancel_requested) == (False, RunState.CANCELLED, False)
    assert house.models.list_page(None, 10) == []


def test_a_model_that_translates_otherwise_is_not_published(house, new_run):
    _, run = house.work(new_run, exported=Echo(tokens=(5,)), reference=Echo(tokens=(6,), score=-2.0))
    assert run.failure.reason is FailureReason.EXPORT_MISMATCH
    assert house.models.list_page(None, 10) == []
    assert list(house.folder.staging.iterdir()) == [], "half a bundle must not fill the disk"


def test_a_tie_broken_the_other_way_is_no_mismatch(house, new_run):
    _, run = house.work(new_run, exported=Echo(tokens=(5,)), reference=Echo(tokens=(6,), score=-1.0000001))
    assert run.state is RunState.SUCCEEDED
