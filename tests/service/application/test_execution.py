"""What a worker does with its attempt, over the real stores; only the training itself is played."""

import dataclasses
import errno
import threading
import time

import pytest

from ferryman_service.application.execution import (
    WorkerPorts,
    execute_attempt,
    follow_attempt,
    initial_weights,
    leave_attempt,
)
from ferryman_service.application.ports import TrainedModel
from ferryman_service.application.reporting import ReporterConfig
from ferryman_service.bundle.manifest import (
    CONTENT_FILES,
    INT8_FILES,
    WEIGHTS_FILE,
    Architecture,
    ManifestHeader,
    read_manifest,
    seal,
    settle_int8,
)
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Side, Split
from ferryman_service.domain.errors import DiskFull, StoreUnavailable
from ferryman_service.domain.log_context import MAY_HOLD_TEXT
from ferryman_service.domain.models import (
    Int8Outcome,
    Int8Scores,
    ModelLineage,
    ModelReference,
    ModelScores,
    PublishedWeights,
)
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StateChange, StepMetrics
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import DiskIsFull, PauseRequested, RunCancelled, StopRequested
from ferryman_service.domain.translation import ComputeType, Hypothesis, Timings, Translation
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.models import FileModelStore
from ferryman_service.stores.run_folders import FileRunFolders
from ferryman_service.stores.runs import SqlRunStore
from tests.fakes.databases import open_migrated
from tests.fakes.spans import KeptSpans

SCORES = ModelScores(bleu=1.0, chrf=2.0, nll_per_token=3.0, weights=PublishedWeights.CHECKPOINT, step=1)


class PlayedEngine:
    """Reports one event, then does what the test says. `held_out` are the pairs that int8 is measured on."""

    def __init__(self, act=lambda reporter: None, held_out=(), check_sentences=("a", "b")):
        self.act, self.held_out, self.check_sentences = act, held_out, check_sentences

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
            check_sentences=self.check_sentences,
            held_out=self.held_out,
        )


class Echo:
    """A translator that gives back what the test says, word for word. `seen` is what it translated, and how."""

    def __init__(self, score=-1.0, tokens=(5,), text="x"):
        self.score, self.tokens, self.text = score, tokens, text
        self.seen = []
        self.closed = False

    def translate(self, sentences, options, token):
        assert not self.closed
        self.seen.append((list(sentences), options.beam_size))
        hypothesis = Hypothesis(
            text=self.text, score=self.score, log_probability=-1.0, target_tokens=2, finished=True, tokens=self.tokens
        )
        return [Translation(hypotheses=[hypothesis], source_tokens=1) for _ in sentences], Timings()

    def close(self):
        assert not self.closed
        self.closed = True


def write_bundle(bundle, lineage, files):
    for name in files:
        (bundle / name).write_bytes(b"x")
    network = lineage.recipe.model
    architecture = Architecture(
        d_model=network.d_model, decoder_layers=network.decoder_layers, heads=network.heads, vocabulary_size=32
    )
    header = ManifestHeader(
        lineage=lineage, scores=SCORES, parameters=7, max_sentence_tokens=64, architecture=architecture
    )
    seal(bundle, header)


class PlayedExporter:
    """Writes a bundle whose graphs are empty files, and loads it. BLEU is the number that the first text is."""

    def __init__(self, exported, reference, int8, fp16):
        self.trained = reference
        self.loads = {ComputeType.FP32: exported, ComputeType.INT8: int8, ComputeType.FP16: fp16}

    def export(self, trained, lineage, bundle):
        write_bundle(bundle, lineage, (*CONTENT_FILES, *INT8_FILES))

    def reference(self, trained):
        return self.trained

    def load(self, bundle, compute_type):
        assert bundle.exists()
        return self.loads[compute_type]

    def bleu(self, translations, references, target_language):
        assert references == ["y"] * len(translations)
        return float(translations[0])

    def settle_int8(self, bundle, scores, *, keep):
        settle_int8(bundle, scores, keep=keep)


@pytest.fixture
def house(tmp_path, worker):
    """Everything a worker needs, and a started attempt: (ports maker, run id, folder)."""
    folder = DataFolder(tmp_path / "data")
    folder.create()
    database = open_migrated(folder.database)
    yield House(folder, database, worker)
    database.dispose()


class House:
    def __init__(self, folder, database, worker):
        self.folder, self.worker = folder, worker
        self.runs = SqlRunStore(database)
        self.corpora = FileCorpusStore(database, folder, CorpusLimits())
        self.models = FileModelStore(database, folder, examine=lambda bundle: None)
        upload = self.corpora.begin_upload(
            CorpusHeader(display_name="", source_language="en", target_language="de"), ""
        )
        for split in Split:
            upload.add_pairs(split, [SentencePair(source="a", target="b")])
        self.corpus = upload.finish()

    def start(self, new_run):
        run = self.runs.create(new_run(self.corpus.corpus_id), None, 10)
        self.runs.begin_attempt(run.run_id, 0)
        run_dir = self.folder.run_dir(run.run_id)
        run_dir.mkdir(parents=True, exist_ok=True)
        return run, run_dir

    def ports(
        self,
        act=lambda reporter: None,
        exported=None,
        reference=None,
        int8=None,
        fp16=None,
        held_out=(),
        check_sentences=("a", "b"),
        **changes,
    ):
        exporter = PlayedExporter(exported or Echo(), reference or Echo(), int8 or Echo(), fp16 or Echo(text="0"))
        values = {
            "runs": self.runs,
            "corpora": self.corpora,
            "models": self.models,
            "engine": PlayedEngine(act, held_out, check_sentences),
            "exporter": exporter,
            "loader": exporter,
            "log_tail": lambda run_id, attempt: f"tail {attempt}",
            "prepared_dir": self.folder.prepared,
            "reporter": ReporterConfig(flush_interval_s=0.001, ack_interval_s=0.005),
        }
        return WorkerPorts(**values | changes)

    def work(self, new_run, act=lambda reporter: None, **options):
        run, run_dir = self.start(new_run)
        succeeded = execute_attempt(self.ports(act, **options), run.run_id, 1, self.worker, run_dir)
        return succeeded, self.runs.get(run.run_id)

    def payloads(self, run_id):
        return [record.payload for record in self.runs.records_after(run_id, 0, 100)]

    def raise_after(self, request, error):
        """Return what an engine does whose caller asks for something while it is on its way out with the error."""

        def act(reporter):
            [run] = self.runs.unfinished()
            request(run.run_id)
            raise error

        return act


def test_the_road_ends_in_a_published_model(house, new_run):
    succeeded, run = house.work(lambda *corpus: dataclasses.replace(new_run(*corpus), initial_model="base/1"))
    assert succeeded
    assert (run.state, run.model_version, run.worker) == (RunState.SUCCEEDED, 1, house.worker)
    version = house.models.resolve(ModelReference(name="en-de"))
    assert version.lineage.initial_model == "base/1"
    assert version.lineage.corpus_digest == house.corpus.digest
    assert (version.lineage.run_id, version.scores) == (run.run_id, SCORES)
    payloads = [record.payload for record in house.runs.records_after(run.run_id, 0, 100)]
    states = [payload.state for payload in payloads if isinstance(payload, StateChange)]
    assert states == [RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.EXPORTING, RunState.SUCCEEDED]
    checked = [payload for payload in payloads if isinstance(payload, RunEvent)][-2]
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


def test_a_text_that_is_not_what_was_uploaded_is_not_trained_on(house, new_run):
    path = house.corpora.files(house.corpus.corpus_id).files[Split.TRAIN, Side.TARGET]
    path.write_bytes(path.read_bytes().swapcase())
    _, run = house.work(new_run)
    assert (run.state, run.failure.reason) == (RunState.FAILED, FailureReason.CORPUS_DAMAGED)
    assert "upload it again" in run.failure.message


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


def test_a_pause_reaches_the_engine_and_leaves_the_run_to_a_later_attempt(house, new_run):
    def pause(reporter):
        [run] = house.runs.unfinished()
        house.runs.request_pause(run.run_id)
        while True:
            reporter.check()

    succeeded, run = house.work(new_run, pause)
    assert not succeeded
    assert (run.state, run.worker, run.restarts, run.pause_requested) == (RunState.PAUSED, None, 0, False)
    assert house.payloads(run.run_id)[-1].message == "paused by the caller"


def test_a_worker_that_is_told_to_end_leaves_the_run_to_another(house, new_run):
    def run_on(reporter):
        while True:
            reporter.check()

    succeeded, run = house.work(new_run, run_on, stop_requested=lambda: True)
    assert not succeeded
    assert (run.state, run.worker, run.restarts) == (RunState.QUEUED, None, 1)
    assert run.not_before_ns > run.create_time_ns, "it keeps its place"
    event, change = house.payloads(run.run_id)[-2:]
    assert (event.code, change.message) == ("HANDED_OVER", "the worker was told to end")


def test_a_worker_that_got_further_may_be_told_to_end(house, new_run):
    def get_further(reporter):
        reporter.step(step(1))
        reporter.flush()
        raise StopRequested

    _, run = house.work(new_run, get_further)
    assert (run.state, run.progress.step, run.restarts) == (RunState.QUEUED, 1, 0)


def test_the_pauses_double_while_none_that_is_told_to_end_gets_further(house, new_run):
    run, _ = house.start(new_run)
    waits_s = []
    for attempt in range(1, 8):
        leave_attempt(house.ports(), run.run_id, attempt)
        left = house.runs.get(run.run_id)
        assert left.restarts == attempt
        waits_s.append(left.not_before_ns / 1e9 - time.time())
        house.runs.begin_attempt(run.run_id, attempt)
    assert waits_s == pytest.approx([2, 4, 8, 16, 32, 60, 60], abs=2)


@pytest.mark.parametrize("error", [PauseRequested(), StopRequested(), DiskIsFull("full")])
def test_a_cancellation_that_comes_meanwhile_is_kept(house, new_run, error):
    _, run = house.work(new_run, house.raise_after(house.runs.request_cancel, error))
    assert (run.state, run.cancel_requested) == (RunState.CANCELLED, False)


def test_a_pause_that_was_withdrawn_meanwhile_does_not_happen(house, new_run):
    _, run = house.work(new_run, house.raise_after(house.runs.request_resume, PauseRequested()))
    assert run.state is RunState.QUEUED
    assert run.not_before_ns > run.create_time_ns, "it keeps its place"


def test_a_pause_that_comes_while_a_worker_ends_happens(house, new_run):
    _, run = house.work(new_run, house.raise_after(house.runs.request_pause, StopRequested()))
    assert (run.state, run.pause_requested) == (RunState.PAUSED, False)


class FullStore:
    """A run store whose last word does not fit on the disk for the first times."""

    def __init__(self, runs, refusals):
        self.runs, self.refusals = runs, list(refusals)

    def give_up_attempt(self, *arguments):
        if self.refusals:
            raise self.refusals.pop()
        return self.runs.give_up_attempt(*arguments)

    def __getattr__(self, name):
        return getattr(self.runs, name)


def step(number):
    return StepMetrics(**dict.fromkeys(StepMetrics.__dataclass_fields__, 1) | {"step": number, "skipped": False})


def raise_disk_full(reporter):
    raise DiskIsFull("no space left in /data")


def test_a_disk_that_is_really_full_is_told_when_there_is_room(house, new_run):
    store = FullStore(house.runs, [DiskFull("not a byte"), StoreUnavailable("disk I/O error"), DiskFull("not a byte")])
    freed = []
    _, run = house.work(new_run, raise_disk_full, runs=store, free_reserve=lambda: freed.append(len(store.refusals)))
    assert (run.state, store.refusals) == (RunState.PAUSED, [])
    assert freed == [2, 1, 0]
    assert "/data" in house.payloads(run.run_id)[-1].message


def test_a_worker_that_waits_for_room_can_be_told_to_end(house, new_run):
    run, run_dir = house.start(new_run)
    store = FullStore(house.runs, [DiskFull("not a byte")] * 10)
    ports = house.ports(raise_disk_full, runs=store, stop_requested=lambda: True)
    with pytest.raises(DiskFull):
        execute_attempt(ports, run.run_id, 1, house.worker, run_dir)


def test_leaving_an_attempt_that_has_ended_does_no_harm(house, new_run):
    _, run = house.work(new_run)
    leave_attempt(house.ports(), run.run_id, 1)
    assert house.runs.get(run.run_id).state is RunState.SUCCEEDED
    house.runs.delete(run.run_id)
    leave_attempt(house.ports(), run.run_id, 1)


@pytest.mark.parametrize("over", ["other attempt", "not running", "ended"])
def test_a_process_that_comes_too_late_does_not_train(house, new_run, over):
    run, run_dir = house.start(new_run)
    match over:
        case "other attempt":
            house.runs.begin_attempt(run.run_id, 1)
        case "not running":
            house.runs.claim_attempt(run.run_id, 1, house.worker)
            house.runs.change_state(run.run_id, 1, RunState.EXPORTING)
        case "ended":
            house.runs.change_state(run.run_id, 1, RunState.CANCELLED)
    assert not follow_attempt(house.ports(raise_disk_full), run.run_id, 1, run_dir)
    assert house.runs.get(run.run_id).state is not RunState.PAUSED


@pytest.mark.parametrize(
    ("error", "state", "went_well"),
    [
        (RunCancelled("rank 0 gave up"), RunState.RUNNING, True),
        (TrainingFailed(FailureReason.OUT_OF_MEMORY, "on this rank"), RunState.FAILED, False),
        (DiskIsFull("no space left for this rank"), RunState.PAUSED, False),
    ],
)
def test_a_process_beside_the_first_writes_down_what_may_have_failed_in_it_alone(
    house, new_run, error, state, went_well
):
    run, run_dir = house.start(new_run)
    house.runs.claim_attempt(run.run_id, 1, house.worker)

    def fail(reporter):
        raise error

    assert follow_attempt(house.ports(fail), run.run_id, 1, run_dir) is went_well
    run = house.runs.get(run.run_id)
    assert run.state is state
    assert (run.failure is not None) == (state is RunState.FAILED)


def test_a_process_beside_the_first_comes_to_the_same_end(house, new_run):
    run, run_dir = house.start(new_run)
    house.runs.claim_attempt(run.run_id, 1, house.worker)
    assert follow_attempt(house.ports(), run.run_id, 1, run_dir)


def test_a_store_that_stays_out_of_reach_ends_the_worker_and_not_the_run(house, new_run):
    def fail(reporter):
        raise StoreUnavailable("the database is locked")

    run, run_dir = house.start(new_run)
    with pytest.raises(StoreUnavailable):
        execute_attempt(house.ports(fail), run.run_id, 1, house.worker, run_dir)
    assert house.runs.get(run.run_id).state is RunState.RUNNING, "the supervisor lets another go on"


def test_an_attempt_whose_run_was_deleted_is_over(house, new_run):
    def delete(reporter):
        [run] = house.runs.unfinished()
        house.runs.change_state(run.run_id, 1, RunState.CANCELLED)
        house.runs.delete(run.run_id)
        while True:
            reporter.check()

    run, run_dir = house.start(new_run)
    assert not execute_attempt(house.ports(delete), run.run_id, 1, house.worker, run_dir)


class FullModels:
    """A model store with no room for publication."""

    def __init__(self, models):
        self.models = models

    def publish(self, run_id, attempt, staged):
        assert staged.exists()
        raise DiskFull("no space left")

    def __getattr__(self, name):
        return getattr(self.models, name)


def test_a_disk_that_is_full_when_the_model_is_published_holds_no_half_bundle(house, new_run):
    _, run = house.work(new_run, models=FullModels(house.models))
    assert run.state is RunState.PAUSED
    assert list(house.folder.staging.iterdir()) == []


def test_a_cancellation_that_comes_just_before_publication_publishes_nothing(house, new_run):
    class LateCancel(FullModels):
        def publish(self, run_id, attempt, staged):
            assert house.runs.request_cancel(run_id).cancel_requested
            return self.models.publish(run_id, attempt, staged)

    succeeded, run = house.work(new_run, models=LateCancel(house.models))
    assert (succeeded, run.state) == (False, RunState.CANCELLED)
    assert house.models.list_page(None, 10) == []


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
    ports = house.ports()
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


PAIRS = (("x", "y"), ("z", "y"))


def manifest_of_the_only_model(house):
    return read_manifest(house.models.bundle_dir(house.models.resolve(ModelReference(name="en-de"))))


@pytest.mark.parametrize(("int8_bleu", "kept"), [("30.5", True), ("29.71", True), ("31", True), ("29.5", False)])
def test_int8_is_kept_if_it_costs_little(house, new_run, int8_bleu, kept):
    exact, int8 = Echo(text="30"), Echo(text=int8_bleu)
    succeeded, run = house.work(new_run, exported=exact, int8=int8, held_out=PAIRS)
    assert succeeded
    manifest = manifest_of_the_only_model(house)
    assert manifest.header.int8 == Int8Scores(pairs=2, fp32_bleu=30.0, int8_bleu=float(int8_bleu))
    assert manifest.has_int8 is kept
    event = [payload for payload in house.payloads(run.run_id) if isinstance(payload, RunEvent)][-1]
    expected = (EventLevel.INFO, "INT8_CHECKED") if kept else (EventLevel.WARNING, "INT8_LEFT_OUT")
    assert (event.level, event.code) == expected
    assert f"2 held-out pairs, greedy: 30.00 in fp32, {float(int8_bleu):.2f} in int8" in event.message
    assert exact.seen[-1] == int8.seen[-1] == (["x", "z"], 1)
    assert exact.closed and int8.closed
    outcome = house.models.resolve(ModelReference(name="en-de")).int8
    assert outcome == Int8Outcome(scores=manifest.header.int8, kept=kept), "the published version says so too"


@pytest.mark.parametrize(
    ("fp16_bleu", "code"), [("29.5", "FP16_CHECKED"), ("28.5", "FP16_LOSES"), ("nan", "FP16_LOSES")]
)
def test_fp16_loss_is_measured_on_few_pairs_and_reported(house, new_run, fp16_bleu, code):
    exact, fp16 = Echo(text="30"), Echo(text=fp16_bleu)
    succeeded, run = house.work(new_run, exported=exact, int8=Echo(text="30"), fp16=fp16, held_out=PAIRS * 100)
    assert succeeded
    [event] = [payload for payload in house.payloads(run.run_id) if getattr(payload, "code", "").startswith("FP16")]
    assert (event.code, event.level) == (code, EventLevel.INFO if code == "FP16_CHECKED" else EventLevel.WARNING)
    assert f"of 100 held-out pairs, greedy, on a CPU: 30.00 in fp32, {float(fp16_bleu):.2f} in fp16" in event.message
    assert sum(len(sentences) for sentences, _ in fp16.seen) == 100
    assert fp16.closed


@pytest.mark.parametrize("failure", ["load", "translate"])
def test_fp16_that_cannot_be_tried_fails_no_run(house, new_run, failure):
    class Broken(Echo):
        def translate(self, sentences, options, token):
            raise ArithmeticError("not on this CPU")

    fp16 = Broken()
    ports = house.ports(exported=Echo(text="30"), int8=Echo(text="30"), fp16=fp16, held_out=PAIRS)
    if failure == "load":
        del ports.loader.loads[ComputeType.FP16]
    run, run_dir = house.start(new_run)
    assert execute_attempt(ports, run.run_id, 1, house.worker, run_dir)
    codes = {getattr(payload, "code", "") for payload in house.payloads(run.run_id)}
    assert {"FP16_NOT_MEASURED", "INT8_CHECKED"} < codes
    assert fp16.closed or failure == "load"


class Mute(Echo):
    """A model whose numbers are not finite: it has no hypothesis."""

    def translate(self, sentences, options, token):
        translations, timings = super().translate(sentences, options, token)
        return [dataclasses.replace(translation, hypotheses=[]) for translation in translations], timings


def test_graphs_that_give_no_translation_are_named_or_left_out(house, new_run):
    succeeded, run = house.work(new_run, exported=Echo(text="30"), int8=Mute(), fp16=Mute(), held_out=PAIRS)
    assert succeeded
    events = {payload.code: payload for payload in house.payloads(run.run_id) if isinstance(payload, RunEvent)}
    assert "too large for 16 bits" in events["FP16_LOSES"].message
    assert events["INT8_LEFT_OUT"].level is EventLevel.WARNING
    assert not manifest_of_the_only_model(house).has_int8


def test_a_model_that_gives_no_translation_fails_the_run(house, new_run):
    succeeded, run = house.work(new_run, exported=Mute(), int8=Mute(), held_out=PAIRS)
    assert not succeeded
    assert run.failure.reason is FailureReason.NON_FINITE_LOSS
    assert "Lower the learning rate" in run.failure.message


def test_a_score_that_is_no_number_is_too_low(house, new_run):
    succeeded, _ = house.work(new_run, exported=Echo(text="30"), int8=Echo(text="nan"), held_out=PAIRS)
    assert succeeded
    assert not manifest_of_the_only_model(house).has_int8


def test_without_held_out_pairs_nothing_is_measured_and_this_is_said(house, new_run):
    int8, fp16 = Echo(), Echo()
    _, run = house.work(new_run, int8=int8, fp16=fp16)
    assert int8.seen == fp16.seen == []
    manifest = manifest_of_the_only_model(house)
    assert (manifest.header.int8, manifest.has_int8) == (Int8Scores(pairs=0), True)
    event = [payload for payload in house.payloads(run.run_id) if isinstance(payload, RunEvent)][-1]
    assert (event.level, event.code) == (EventLevel.WARNING, "ARITHMETICS_NOT_MEASURED")
    assert house.models.resolve(ModelReference(name="en-de")).int8.scores.loss is None


class Slow(Echo):
    """A translator that takes a while, and has something happen when it begins."""

    def __init__(self, begins):
        super().__init__(text="0")
        self.begins = begins

    def translate(self, sentences, options, token):
        if not self.seen:
            self.begins()
        time.sleep(0.01)
        return super().translate(sentences, options, token)


@pytest.mark.parametrize("stage", ["exported", "reference", "fp16", "int8"])
def test_checking_a_bundle_ends_soon_after_a_cancellation(house, new_run, stage):
    slow = Slow(lambda: [house.runs.request_cancel(run.run_id) for run in house.runs.unfinished()])
    options = {"exported": Echo(text="0"), "int8": Echo(text="0"), "reference": Echo(text="0"), stage: slow}
    succeeded, run = house.work(new_run, check_sentences=("a",) * 6400, held_out=PAIRS * 3200, **options)
    assert (succeeded, run.state) == (False, RunState.CANCELLED)
    assert len(slow.seen) < 60
    assert slow.closed or stage == "reference"
    assert house.models.list_page(None, 10) == []


def test_checking_a_bundle_ends_soon_after_the_worker_is_told_to_end(house, new_run):
    told = threading.Event()
    slow = Slow(told.set)
    succeeded, run = house.work(
        new_run, exported=Echo(text="0"), int8=slow, held_out=PAIRS * 3200, stop_requested=told.is_set
    )
    assert (succeeded, run.state, run.worker) == (False, RunState.QUEUED, None), "another attempt exports it"
    assert len(slow.seen) < 60
    assert list(house.folder.staging.iterdir()) == []


def test_models_that_were_loaded_to_be_checked_are_closed_whatever_happens(house, new_run):
    exact, int8 = Echo(text="30"), Echo(text="no number")
    with pytest.raises(ValueError, match="no number"):
        house.work(new_run, exported=exact, int8=int8, held_out=PAIRS)
    assert exact.closed and int8.closed
    assert list(house.folder.staging.iterdir()) == []


@pytest.fixture
def publish(house, new_run):
    """A maker of published versions, as import-model makes them; returns the reference and the run of its lineage."""

    def make(*files, run=None):
        run = run or new_run()
        bundle = house.folder.root / "elsewhere"
        bundle.mkdir()
        lineage = ModelLineage(
            run_id=run.run_id,
            corpus_id="cor_0000000000000000000000",
            corpus_digest="00" * 32,
            source_language="en",
            target_language="de",
            recipe=run.recipe,
        )
        write_bundle(bundle, lineage, (*CONTENT_FILES, *files))
        return house.models.import_bundle(bundle, "base"), run

    return make


def tuning(new_run, version, **fields):
    return dataclasses.replace(new_run(), initial_model=version.reference, **fields)


def test_a_run_from_random_weights_starts_from_nothing(house, new_run):
    assert initial_weights(house.models, FileRunFolders(house.folder), new_run()) is None


def test_a_run_starts_from_the_checked_files_of_a_version(house, new_run, publish):
    version, _ = publish(WEIGHTS_FILE)
    found = initial_weights(house.models, FileRunFolders(house.folder), tuning(new_run, version))
    bundle = house.models.bundle_dir(version)
    assert (found.weights, found.subwords, found.checkpoint) == (
        bundle / WEIGHTS_FILE,
        bundle / "subwords.model",
        None,
    )


@pytest.mark.parametrize("damage", ["gone", "without weights", "changed"])
def test_a_version_that_cannot_be_started_from_fails_the_run(house, new_run, publish, damage):
    version, _ = publish(*([] if damage == "without weights" else [WEIGHTS_FILE]))
    run = tuning(new_run, version)
    if damage == "gone":
        run = dataclasses.replace(run, initial_model="base/9")
    if damage == "changed":
        path = house.models.bundle_dir(version) / WEIGHTS_FILE
        path.chmod(0o644)
        path.write_bytes(b"y")
    with pytest.raises(TrainingFailed) as caught:
        initial_weights(house.models, FileRunFolders(house.folder), run)
    assert caught.value.reason is FailureReason.INITIAL_MODEL_UNUSABLE


def test_the_optimizer_may_be_gone_once_the_run_has_a_checkpoint(house, new_run, publish):
    folders = FileRunFolders(house.folder)
    version, source = publish(WEIGHTS_FILE)
    run = tuning(new_run, version, keep_optimizer=True)
    with pytest.raises(TrainingFailed, match=source.run_id):
        initial_weights(house.models, folders, run)
    kept = house.folder.run_dir(source.run_id) / "checkpoints" / "step-0000000007"
    kept.mkdir(parents=True)
    assert initial_weights(house.models, folders, run).checkpoint == kept
    (house.folder.run_dir(run.run_id) / "checkpoints" / "step-0000000001").mkdir(parents=True)
    folders.delete(source.run_id)
    later = initial_weights(house.models, folders, run)
    assert (later.keep_optimizer, later.checkpoint) == (True, None)


TRACE = "0af7651916cd43dd8448eb211c80319c"


def in_a_trace(new_run):
    """A maker of runs that were started in a trace."""
    context = f"00-{TRACE}-b7ad6b7169203331-01"
    return lambda *args: dataclasses.replace(new_run(*args), trace_context=context)


def test_the_spans_of_an_attempt_belong_to_the_trace_the_run_was_started_in(house, new_run):
    spans = KeptSpans()
    succeeded, run = house.work(in_a_trace(new_run), tracer=spans.tracer)
    assert succeeded
    attempt, export = spans.one("attempt"), spans.one("export")
    assert f"{attempt.context.trace_id:032x}" == TRACE
    assert f"{attempt.parent.span_id:016x}" == "b7ad6b7169203331"
    assert export.parent.span_id == attempt.context.span_id
    assert attempt.attributes == {"ferryman.run": run.run_id, "ferryman.attempt": 1, "ferryman.model_name": "en-de"}
    assert attempt.status.is_unset


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TrainingFailed(FailureReason.OUT_OF_MEMORY, "no room"), "TrainingFailed"),
        (OSError(errno.ENOSPC, "full"), "OSError"),
        (PauseRequested(), None),
        (RunCancelled(), None),
    ],
    ids=lambda value: str(value),
)
def test_an_attempt_that_fails_says_so_in_its_span_and_one_that_was_told_to_end_does_not(house, new_run, error, told):
    def act(reporter):
        raise error

    spans = KeptSpans()
    house.work(in_a_trace(new_run), act, tracer=spans.tracer)
    attempt = spans.one("attempt")
    assert attempt.attributes.get("error.type") == told
    assert attempt.status.is_ok is (told is None)


def test_the_sentences_of_an_export_that_is_not_the_same_are_marked_in_the_log(house, new_run, caplog):
    house.work(new_run, exported=Echo(tokens=(5,)), reference=Echo(tokens=(6,), score=-9.0))
    marks = [getattr(record, MAY_HOLD_TEXT) for record in caplog.records if record.exc_info]
    assert marks == [True]


def test_a_failure_whose_cause_is_known_is_one_line_in_the_log(house, new_run, caplog):
    house.work(new_run, lambda reporter: fail_for_memory())
    [record] = [record for record in caplog.records if "the attempt failed" in record.getMessage()]
    assert "no room" in record.getMessage()
    assert record.exc_info is None, "the last lines of the log are shown to the caller"


def fail_for_memory():
    raise TrainingFailed(FailureReason.OUT_OF_MEMORY, "no room")
