"""What a worker does with its attempt: claim, train, export, check, publish; and what it writes when that fails."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.application.ports import (
    BundleLoader,
    CorpusStore,
    ModelExporter,
    ModelStore,
    RunCancelled,
    RunFolders,
    RunStore,
    TrainedModel,
    TrainingEngine,
    TrainingJob,
)
from ferryman_service.application.reporting import ReporterConfig, SilentReporter, StoreReporter
from ferryman_service.application.verification import check_export
from ferryman_service.domain.errors import AttemptFenced, DiskFull, ModelDamaged, ModelNotFound, StoreUnavailable
from ferryman_service.domain.models import ModelLineage, parse_model_reference
from ferryman_service.domain.records import EventLevel, RunEvent, RunState
from ferryman_service.domain.runs import FailureReason, ProcessIdentity, RunFailure, TrainingFailed, TrainingRun
from ferryman_service.domain.training import DiskIsFull, InitialWeights, PauseRequested, StopRequested

_log = logging.getLogger(__name__)
_CLAIM_POLL_S: Final = 0.1
_DISK_POLL_S: Final = 1.0
_DISK_PATIENCE_S: Final = 600.0


@dataclass(frozen=True, kw_only=True)
class WorkerPorts:
    """Everything a worker needs of the world.

    `log_tail(run_id, attempt)` reads its own log; `stop_requested` tells whether this process was told to end;
    `initial(run)` says what fine-tuning starts from.
    """

    runs: RunStore
    corpora: CorpusStore
    models: ModelStore
    engine: TrainingEngine
    exporter: ModelExporter
    loader: BundleLoader
    log_tail: Callable[[str, int], str]
    reporter: ReporterConfig
    prepared_dir: Path
    initial: Callable[[TrainingRun], InitialWeights | None] = lambda run: None
    stop_requested: Callable[[], bool] = lambda: False


def execute_attempt(ports: WorkerPorts, run_id: str, attempt: int, worker: ProcessIdentity, run_dir: Path) -> bool:
    """Do the attempt to its end. Return whether the run SUCCEEDED.

    A failure that another attempt would repeat leaves the run FAILED, a full disk leaves it PAUSED. An unexpected one
    (a bug) leaves this function as an exception; the worker dies, and the supervisor lets another try.
    """
    try:
        run = ports.runs.claim_attempt(run_id, attempt, worker)
    except AttemptFenced as error:
        _log.warning("this attempt is not wanted any more: %s", error)
        return False
    try:
        _train_and_publish(ports, run, run_dir)
    except RunCancelled:
        ports.runs.change_state(run_id, attempt, RunState.CANCELLED, "cancelled by the caller")
    except PauseRequested:
        ports.runs.change_state(run_id, attempt, RunState.PAUSED, "paused by the caller")
    except StopRequested:
        text = "the worker was told to stop; another goes on from its checkpoint"
        ports.runs.requeue(run_id, attempt, text, restarts=run.restarts, not_before_ns=0)
    except AttemptFenced as error:
        _log.warning("this attempt was overtaken: %s", error)
    except TrainingFailed as error:
        _log.exception("the attempt failed")
        failure = RunFailure(reason=error.reason, message=error.message, log_tail=ports.log_tail(run_id, attempt))
        ports.runs.change_state(run_id, attempt, RunState.FAILED, error.message, failure)
    except (DiskIsFull, DiskFull, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _log.exception("the disk is full")
        _pause_for_room(ports, run_id, attempt, error)
    else:
        return True
    return False


def follow_attempt(ports: WorkerPorts, run_id: str, attempt: int, run_dir: Path) -> None:
    """Train beside rank 0, which alone claims, reports and publishes; return at once if the attempt is over."""
    while True:
        run = ports.runs.get(run_id)
        if run.attempt != attempt or run.state.is_terminal:
            return
        if run.state is RunState.RUNNING:
            break
        time.sleep(_CLAIM_POLL_S)
    with contextlib.suppress(RunCancelled):
        ports.engine.train(_job(ports, run, run_dir), SilentReporter())


def _job(ports: WorkerPorts, run: TrainingRun, run_dir: Path) -> TrainingJob:
    return TrainingJob(
        run_id=run.run_id,
        recipe=run.recipe,
        corpus=ports.corpora.files(run.corpus_id),
        corpus_digest=ports.corpora.get(run.corpus_id).digest,
        run_dir=run_dir,
        prepared_dir=ports.prepared_dir,
        reported_step=run.progress.step,
        initial=ports.initial(run),
    )


def initial_weights(models: ModelStore, folders: RunFolders, run: TrainingRun) -> InitialWeights | None:
    """Return what a run starts from; None: random weights. Raises TrainingFailed if it is gone or damaged."""
    if not run.initial_model:
        return None
    try:
        version = models.resolve(parse_model_reference(run.initial_model))
        weights, subwords = models.weights(version)
    except (ModelNotFound, ModelDamaged) as error:
        raise TrainingFailed(FailureReason.INITIAL_MODEL_UNUSABLE, error.message) from error
    checkpoint = folders.last_checkpoint(version.lineage.run_id) if run.keep_optimizer else None
    if run.keep_optimizer and checkpoint is None:
        text = f"the checkpoints of run {version.lineage.run_id}, with the optimizer of {run.initial_model}, are gone"
        raise TrainingFailed(FailureReason.INITIAL_MODEL_UNUSABLE, text)
    return InitialWeights(weights=weights, subwords=subwords, checkpoint=checkpoint)


def _train_and_publish(ports: WorkerPorts, run: TrainingRun, run_dir: Path) -> None:
    reporter = StoreReporter(ports.runs, run, ports.reporter, ports.stop_requested)
    reporter.start()
    try:
        trained = ports.engine.train(_job(ports, run, run_dir), reporter)
    except BaseException:
        _close_quietly(reporter)
        raise
    reporter.close()
    run = ports.runs.change_state(run.run_id, run.attempt, RunState.EXPORTING)
    exporting = StoreReporter(ports.runs, run, ports.reporter, ports.stop_requested)
    exporting.start()
    try:
        staged = _export(ports, run, trained, exporting)
    except BaseException:
        # On a full disk the half-written bundle would leave no room to record what happened.
        ports.models.discard_staging(run.run_id)
        _close_quietly(exporting)
        raise
    exporting.close()
    ports.models.publish(run.run_id, run.attempt, staged)


def _export(ports: WorkerPorts, run: TrainingRun, trained: TrainedModel, reporter: StoreReporter) -> Path:
    corpus = ports.corpora.get(run.corpus_id)
    lineage = ModelLineage(
        run_id=run.run_id,
        corpus_id=run.corpus_id,
        corpus_digest=corpus.digest,
        source_language=corpus.header.source_language,
        target_language=corpus.header.target_language,
        recipe=run.recipe,
    )
    staged = ports.models.staging_dir(run.run_id)
    ports.exporter.export(trained, lineage, staged)
    reporter.check()
    verdict = check_export(
        reference=ports.exporter.reference(trained),
        exported=ports.loader.load(staged),
        sentences=trained.check_sentences,
    )
    reporter.event(EventLevel.INFO, "EXPORT_CHECKED", verdict)
    return staged


def _close_quietly(reporter: StoreReporter) -> None:
    """Write what was reported; the error that is on its way already says what went wrong."""
    try:
        reporter.close()
    except (AttemptFenced, DiskIsFull, RunCancelled, TrainingFailed) as error:
        _log.info("while closing: %r", error)


def _pause_for_room(ports: WorkerPorts, run_id: str, attempt: int, cause: Exception) -> None:
    """Leave the run PAUSED, as soon as the database has the little room that this takes."""
    text = f"the disk is full: {cause}. Free some space, then resume the run: it goes on from its last checkpoint"
    remark = RunEvent(level=EventLevel.ERROR, code="DISK_FULL", message=text)
    try:
        _when_there_is_room(lambda: ports.runs.append(run_id, attempt, [remark], None))
        _when_there_is_room(lambda: ports.runs.change_state(run_id, attempt, RunState.PAUSED, text))
    except AttemptFenced as error:
        _log.warning("this attempt was overtaken: %s", error)


def _when_there_is_room(write: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + _DISK_PATIENCE_S
    while True:
        try:
            write()
        except (DiskFull, StoreUnavailable):
            if time.monotonic() > give_up_s:
                raise
            time.sleep(_DISK_POLL_S)
        else:
            return
