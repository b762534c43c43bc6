"""What the use cases need from the world, as Protocols. Adapters satisfy them structurally and do not import this
file's classes to inherit from them; the values that cross the ports are defined in domain and named here again.

Every method is synchronous, may block, and may be called from any thread unless it says otherwise. Every store raises
StoreUnavailable when the database cannot be reached, DatabaseDamaged when it is damaged, and DiskFull when the disk has
no space left; for what it names by an id or a reference it raises RowUnreadable when its row cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Protocol

from ferryman_service.domain.corpora import Corpus, CorpusHeader, SentencePair, Side, Split
from ferryman_service.domain.corpora import CorpusFiles as CorpusFiles
from ferryman_service.domain.models import BundleFile, Int8Scores, Model, ModelLineage, ModelReference, ModelVersion
from ferryman_service.domain.readiness import StoreState
from ferryman_service.domain.records import EventLevel, Payload, Record, RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import AppendAck as AppendAck
from ferryman_service.domain.runs import (
    CheckpointInfo,
    Handover,
    ProcessIdentity,
    RunFailure,
    RunFilter,
    RunProgress,
    TrainingRun,
)
from ferryman_service.domain.runs import RequestKey as RequestKey
from ferryman_service.domain.runs import RunHead as RunHead
from ferryman_service.domain.schedule import DecayPlan
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.domain.training import RunCancelled as RunCancelled
from ferryman_service.domain.training import TrainedModel as TrainedModel
from ferryman_service.domain.training import TrainingJob as TrainingJob
from ferryman_service.domain.translation import (
    CancelToken,
    ComputeType,
    PreparedSentence,
    SearchOptions,
    SentenceWork,
    Timings,
    Translation,
)


class RunStore(Protocol):
    """Runs and their records. Every state change is written together with its StateChange record, in one
    transaction."""

    def create(self, run: TrainingRun, key: RequestKey | None, max_queued: int, max_unfinished: int) -> TrainingRun:
        """Store a QUEUED run and its first record. With a known key, return the run of that key in its present state.

        Raises RequestIdReused (same id, other digest), CorpusNotFound, TooManyRuns (max_queued runs are QUEUED, or
        max_unfinished are not terminal).
        """
        ...

    def check_capacity(self, max_queued: int, max_unfinished: int) -> None:
        """Raise TooManyRuns where `create` would."""
        ...

    def find(self, key: RequestKey) -> TrainingRun | None:
        """Return the run of the key in its present state, None if the key is unknown; raises RequestIdReused."""
        ...

    def get(self, run_id: str) -> TrainingRun:
        """Return the run; raises RunNotFound."""
        ...

    def list_page(self, wanted: RunFilter, after: str | None, limit: int) -> Sequence[TrainingRun | UnreadableRow]:
        """Return at most `limit` runs that follow the place `after` (None: from the start) in the filter's order.

        `after` is a TrainingRun.place; its run may be gone.
        """
        ...

    def unfinished(self) -> Sequence[TrainingRun | UnreadableRow]:
        """Return all runs that are not terminal, in the order in which they were created, whatever the clock said."""
        ...

    def begin_attempt(self, run_id: str, previous_attempt: int) -> TrainingRun | None:
        """Make the run STARTING with attempt previous_attempt + 1, no worker yet.

        None if the run is not QUEUED or STARTING, or its attempt is not `previous_attempt`, or its worker has claimed
        it.
        """
        ...

    def claim_attempt(self, run_id: str, attempt: int, worker: ProcessIdentity) -> TrainingRun:
        """Make the run RUNNING under this worker; raises AttemptFenced if it is not STARTING with this attempt and
        unclaimed."""
        ...

    def append(self, run_id: str, attempt: int, payloads: Sequence[Payload], progress: RunProgress | None) -> AppendAck:
        """Append records in order, durably, all or none; also store the progress if given. An empty sequence only
        asks for the ack.

        Raises AttemptFenced if the run has another attempt, or this one was given up (terminal, PAUSED, QUEUED again).
        A StepMetrics clears `restarts`. StateChange payloads are not allowed here.
        """
        ...

    def change_state(
        self, run_id: str, attempt: int, state: RunState, message: str = "", failure: RunFailure | None = None
    ) -> TrainingRun:
        """Change the state to EXPORTING or a terminal one, which sets the end time and clears the requests.

        Raises AttemptFenced (other attempt, or given up already), IllegalTransition.
        """
        ...

    def give_up_attempt(self, run_id: str, attempt: int, handover: Handover) -> TrainingRun:
        """Give the attempt up without an end, so that another can go on from the last checkpoint.

        What the caller has asked for comes first: the run becomes CANCELLED, or PAUSED; else what the handover says.
        Raises AttemptFenced.
        """
        ...

    def fail_waiting(self, run_id: str, attempt: int, failure: RunFailure) -> TrainingRun:
        """Make a QUEUED run FAILED that shall have no other attempt after this one.

        Raises AttemptFenced (other attempt, or not QUEUED any more), RunNotFound.
        """
        ...

    def request_pause(self, run_id: str) -> TrainingRun:
        """Make a QUEUED run PAUSED, set pause_requested on a STARTING or RUNNING one, leave a PAUSED one alone.

        Raises RunNotFound, IllegalTransition (EXPORTING or terminal).
        """
        ...

    def request_resume(self, run_id: str) -> TrainingRun:
        """Make a PAUSED run QUEUED, withdraw a pause_requested, leave any other unfinished run alone.

        Raises RunNotFound, IllegalTransition (terminal).
        """
        ...

    def delete(self, run_id: str) -> None:
        """Remove a terminal run, or one that cannot be read, with its records; raises RunNotFound, RunNotFinished."""
        ...

    def request_cancel(self, run_id: str) -> TrainingRun:
        """Make a QUEUED or PAUSED run CANCELLED, set cancel_requested on an active one, leave a CANCELLED one alone.

        Raises RunNotFound, IllegalTransition (SUCCEEDED or FAILED).
        """
        ...

    def records_after(self, run_id: str, after_sequence: int, limit: int) -> Sequence[Record]:
        """Return at most `limit` records with a larger sequence, in order, without gap: one that cannot be read is an
        event RECORD_UNREADABLE."""
        ...

    def heads(self, run_ids: Iterable[str]) -> Mapping[str, RunHead]:
        """Return the heads of the runs that exist and can be read. Cheap: called several times a second."""
        ...


class RunFolders(Protocol):
    """What training keeps of a run beside its records."""

    def checkpoints(self, run_id: str) -> Sequence[CheckpointInfo]:
        """Return the complete checkpoints, by rising step, but for damaged ones; none if there is no folder."""
        ...

    def last_checkpoint(self, run_id: str) -> Path | None:
        """Return the folder of the newest complete checkpoint."""
        ...

    def delete(self, run_id: str) -> None:
        """Remove the folder of a run that was deleted, if there is one; what cannot be removed now is removed later."""
        ...


class CorpusUpload(Protocol):
    """An upload in progress; used by one thread at a time, then either finished or aborted."""

    def add_pairs(self, split: Split, pairs: Sequence[SentencePair]) -> None:
        """Append pairs. Raises CorpusTooLarge, InvalidCorpus (a split given both as pairs and as files)."""
        ...

    def add_chunk(self, split: Split, side: Side, data: bytes) -> None:
        """Append a piece of a file. Raises CorpusTooLarge, InvalidCorpus."""
        ...

    @property
    def size_bytes(self) -> int:
        """How much text has come so far."""
        ...

    def finish(self) -> Corpus:
        """Check and store the corpus, atomically. With a known key and the same content, return the stored corpus.

        Raises InvalidCorpus with up to 20 violations; RequestIdReused. Either way the upload is over and leaves no
        files.
        """
        ...

    def abort(self) -> None:
        """Throw the upload away; harmless after finish, and raises nothing."""
        ...


class CorpusStore(Protocol):
    """Corpora."""

    def begin_upload(self, header: CorpusHeader, request_id: str) -> CorpusUpload:
        """Start an upload; an empty request_id is no key."""
        ...

    def get(self, corpus_id: str) -> Corpus:
        """Return the corpus; raises CorpusNotFound."""
        ...

    def list_page(self, after: str | None, limit: int) -> Sequence[Corpus | UnreadableRow]:
        """Return at most `limit` corpora that follow the place `after`, newest first; its corpus may be gone."""
        ...

    def present(self, corpus_ids: Iterable[str]) -> Set[str]:
        """Return those of the ids that are a corpus's."""
        ...

    def delete(self, corpus_id: str) -> None:
        """Remove the corpus; its files move to the trash. Raises CorpusNotFound, CorpusInUse (unfinished runs train on
        it)."""
        ...

    def files(self, corpus_id: str) -> CorpusFiles:
        """Return where the corpus lies; raises CorpusNotFound."""
        ...

    def find_damage(self, corpus_id: str) -> str:
        """Read the whole text and say how it differs from what was uploaded, "" if it does not.

        Raises CorpusNotFound, and OSError if a file cannot be read for another reason than that it is gone.
        """
        ...


class BundleReader(Protocol):
    """The files of a published version, open: they can be read to their end although the version is deleted meanwhile.
    Used by one thread at a time, then closed."""

    @property
    def version(self) -> ModelVersion:
        """What the files are of."""
        ...

    @property
    def files(self) -> Sequence[BundleFile]:
        """The files, the manifest first."""
        ...

    def read(self, file: BundleFile, size_bytes: int) -> bytes:
        """Return the next bytes of the file, at most so many; none at its end."""
        ...

    def close(self) -> None:
        """Close the files; harmless when repeated."""
        ...


class ModelStore(Protocol):
    """Published models."""

    def staging_dir(self, run_id: str) -> Path:
        """Return an empty folder, on the file system of the published models, to write a run's bundle into."""
        ...

    def discard_staging(self, run_id: str) -> None:
        """Remove the run's staging folder, if there is one."""
        ...

    def publish(self, run_id: str, attempt: int, staged: Path) -> ModelVersion:
        """Publish the staged bundle as the next version of the run's model and make the run SUCCEEDED, together or
        not at all.

        The run must be EXPORTING. Raises AttemptFenced, RunCancelled (a cancellation was acknowledged before).
        """
        ...

    def import_bundle(self, bundle: Path, name: str) -> ModelVersion:
        """Copy a bundle from elsewhere, check every digest, publish it as the next version of `name`.

        Raises ModelDamaged, InvalidRequest (bad name).
        """
        ...

    def resolve(self, reference: ModelReference) -> ModelVersion:
        """Return the version that the reference names; raises ModelNotFound."""
        ...

    def revision(self) -> int:
        """Return a number that is another one after any change, by whatever process, to what `resolve` reads.

        A few µs, never blocks: safe to call from an event loop. It may change without such a change.
        """
        ...

    def get(self, name: str) -> Model:
        """Return the model; raises ModelNotFound."""
        ...

    def list_page(self, after: str | None, limit: int) -> Sequence[Model]:
        """Return at most `limit` models that follow the one named `after`, by name."""
        ...

    def set_alias(self, name: str, alias: str, version: int) -> Model:
        """Let the alias point at the version, at once for everybody, and return the model; raises ModelNotFound."""
        ...

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove the alias, not what it points at; raises ModelNotFound."""
        ...

    def delete_version(self, name: str, version: int) -> None:
        """Remove the version and its files; its number is never given again. Files that are open can be read on.

        Raises ModelNotFound; ModelInUse (an alias points at it, or an unfinished run starts from it).
        """
        ...

    def open_bundle(self, version: ModelVersion) -> BundleReader:
        """Open the files of the version; raises ModelDamaged, and ModelNotFound if it was deleted meanwhile."""
        ...

    def has_weights(self, version: ModelVersion) -> bool:
        """Tell whether the bundle holds the weights that training can start from."""
        ...

    def weights(self, version: ModelVersion) -> tuple[Path, Path]:
        """Return the weights and the subword model that training can start from, both checked.

        Raises ModelDamaged, also if the bundle holds no weights.
        """
        ...

    def bundle_dir(self, version: ModelVersion) -> Path:
        """Return the folder of the published bundle."""
        ...

    def published_bundle(self, version: ModelVersion) -> Path:
        """Return the folder of the published bundle; raises ModelDamaged if its manifest is not the one that was
        published as this version."""
        ...


class Launcher(Protocol):
    """Starts workers as programs of their own, which outlive this one."""

    def start(self, run_id: str, attempt: int, processes: int) -> None:
        """Start a worker of so many processes; raises OSError if the program cannot be started at all."""
        ...

    def is_running(self, run_id: str, attempt: int, worker: ProcessIdentity | None) -> bool:
        """Tell whether the attempt's worker lives. `worker` is what it claimed with, if it has; a worker that this
        process started is known without it."""
        ...

    def last_beat(self, run_id: str, attempt: int) -> int | None:
        """Return a number that changes at least every few seconds while the attempt's worker is alive, whatever it
        does; None if nothing is known."""
        ...

    def living(self) -> Set[tuple[str, int]]:
        """Return the (run_id, attempt) of which processes live, whoever started them; the runs may be gone."""
        ...

    def kill(self, run_id: str, attempt: int, worker: ProcessIdentity | None) -> bool:
        """End at once whatever is left of the attempt's processes, whoever started them, and wait a little for their
        end; return whether none is left. Only then may another attempt work in the run's folder.

        `worker` is what the attempt was claimed with, if it was.
        """
        ...

    def exit_description(self, run_id: str, attempt: int) -> str:
        """Say how the attempt's worker ended, as far as it is known: "exit status 1", "killed by signal 9", or ""."""
        ...

    def log_tail(self, run_id: str, attempt: int) -> str:
        """Return the last lines of the attempt's log, at most 8 KiB."""
        ...


class Reporter(Protocol):
    """How a training engine speaks: every call returns at once, records become durable in order soon after."""

    def step(self, metrics: StepMetrics) -> None:
        """Report an update."""
        ...

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        ...

    def decay_plan(self, plan: DecayPlan) -> None:
        """Report a planned decay of the learning rate; it belongs to the series."""
        ...

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Make a remark. With `repeats` it belongs to the series, like every step and validation."""
        ...

    def resume(self, reports: int) -> None:
        """Say that the work goes on from a point before which the series had this many reports.

        The series is a function of recipe, corpus and seed, so what was reported after that point by an earlier attempt
        will be reported again; the reporter drops as many reports of the series as are durable already.
        """
        ...

    def flush(self) -> None:
        """Wait until everything that was reported is durable. Raises what `check` does if it cannot be."""
        ...

    def check(self) -> None:
        """Raise RunCancelled or AttemptFenced if the work is no longer wanted, PauseRequested or StopRequested if it is
        not wanted for now, and whatever keeps reports from being stored: DiskIsFull, StoreUnavailable. Call it between
        steps and in every long loop."""
        ...


class TrainingEngine(Protocol):
    """Trains."""

    def train(self, job: TrainingJob, reporter: Reporter) -> TrainedModel:
        """Train until the recipe's limit, from the newest checkpoint in the job's folder if there is one.

        Raises TrainingFailed, DiskIsFull, and what Reporter.check raises; a checkpoint is left before PauseRequested
        and StopRequested are passed on.
        """
        ...


class Translator(Protocol):
    """Something that translates a batch of sentences and returns when all are done."""

    def max_sentence_tokens(self) -> int:
        """Return the longest source sentence, in subwords with the end symbol."""
        ...

    def translate(
        self, sentences: Sequence[str], options: SearchOptions, token: CancelToken
    ) -> tuple[Sequence[Translation], Timings]:
        """Translate, in order. Options are checked already. Raises InvalidSentence with every violation (field
        "sentences[i]"), Cancelled, DeadlineExceeded."""
        ...


class TranslationEngine(Translator, Protocol):
    """A loaded model that translates many callers' sentences at once. Safe to call from every thread until closed."""

    def memory_bytes(self) -> int:
        """Return how much memory the loaded model takes; the same at every call."""
        ...

    def compute_type(self) -> ComputeType:
        """Return the arithmetic that the model is computed in; the same at every call."""
        ...

    def cache_bytes(self) -> int:
        """Return how much memory the sentences in flight take now, or have taken and is kept for the next ones."""
        ...

    def drop_caches(self) -> None:
        """Free, soon, what is kept for the next sentences; waits for nothing, and harms nothing in flight."""
        ...

    def warm_up(self) -> None:
        """Do what makes the first translation slower than the others; called once, before any translation."""
        ...

    def close(self) -> None:
        """Free what the model holds; called once, when nobody translates any more and nobody will. Must not fail."""
        ...

    def prepare(self, sentence: str, prefix: str, options: SearchOptions) -> PreparedSentence:
        """Normalise a sentence and the words that its translation must begin with, and split both into subwords.

        Some 20 µs: for more than a few sentences call it outside the event loop. Raises InvalidSentence, its fields
        "sentence" and "prefix".
        """
        ...

    def prepare_all(
        self, sentences: Sequence[str], prefixes: Sequence[str], options: SearchOptions
    ) -> Sequence[PreparedSentence]:
        """Prepare sentences, each with its prefix, or all without if there are no prefixes; faster than one by one.

        Raises InvalidSentence with every violation, fields "sentences[i]" and "target_prefixes[i]".
        """
        ...

    def submit(self, work: Sequence[SentenceWork]) -> None:
        """Queue sentences and return at once; safe to call from an event loop.

        Each `done` is called exactly once, from a thread of the engine, or from this call for an empty sentence; its
        timings.text_ns hold the sentence's own. A token that is cancelled, or past its deadline, ends a waiting
        sentence soon and a running one at its next step.
        """
        ...


class SentenceSplitter(Protocol):
    """Finds the sentences of a text."""

    def split(self, text: str, language: str) -> Sequence[str]:
        """Cut the text, in the language of the BCP 47 tag, into pieces that joined are the text again: each is one
        sentence with the white space around it, or white space alone. Never fails: of a language that it does not know
        it takes the most common rules."""
        ...


class ModelExporter(Protocol):
    """Turns trained weights into a bundle."""

    def export(self, trained: TrainedModel, lineage: ModelLineage, bundle: Path) -> None:
        """Write the bundle's files and manifest into the empty folder `bundle`, every file fsynced."""
        ...

    def bleu(self, translations: Sequence[str], references: Sequence[str], target_language: str) -> float:
        """Return sacreBLEU (cased, with the language's tokenizer) of the translations, 0 to 100."""
        ...

    def settle_int8(self, bundle: Path, scores: Int8Scores, *, keep: bool) -> None:
        """Write into an exported bundle what its int8 graphs cost, and remove them unless they are kept."""
        ...

    def reference(self, trained: TrainedModel) -> Translator:
        """Return a translator that runs the trained weights directly, to check the bundle against."""
        ...


class LoadObserver(Protocol):
    """Is told of the models that are loaded. Returns at once, and raises nothing."""

    def loaded(self, seconds: float) -> None:
        """Take note of a model that was loaded and warmed up."""
        ...

    def failed(self) -> None:
        """Take note of a model that could not be loaded."""
        ...


class LaunchObserver(Protocol):
    """Is told of the workers that are started. Returns at once, and raises nothing."""

    def started(self) -> None:
        """Take note of a worker that was started."""
        ...

    def failed_to_start(self) -> None:
        """Take note of a worker whose program could not be started."""
        ...

    def failed_to_supervise(self) -> None:
        """Take note of a look at the runs that ended with an unexpected error."""
        ...


class FolderOwnership(Protocol):
    """Tells whether this process is the one that may change the runs of the data folder. Raises nothing."""

    def is_held(self) -> bool:
        """Return False while the path does not lead to the folder that this process owns."""
        ...

    def is_lost(self) -> bool:
        """Return True once another folder has taken its place."""
        ...


class StoreProbe(Protocol):
    """Looks whether the store can be used."""

    def look(self) -> StoreState:
        """Return what can be done with it now; may take as long as a transaction may wait, and raises nothing."""
        ...


class BundleLoader(Protocol):
    """Loads bundles for translating."""

    def load(self, bundle: Path, compute_type: ComputeType | None = None) -> TranslationEngine:
        """Check every digest and load, as the loader is configured or in the compute type that is named; raises
        ModelDamaged. The bundle's files may be removed afterwards."""
        ...
