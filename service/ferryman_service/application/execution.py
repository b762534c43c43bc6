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
    RunStore,
    TrainedModel,
    TrainingEngine,
    TrainingJob,
)
from ferryman_service.application.reporting import ReporterConfig, SilentReporter, StoreReporter
from ferryman_service.application.verification import check_export
from ferryman_service.domain.errors import AttemptFenced, DiskFull
from ferryman_service.domain.models import ModelLineage
from ferryman_service.domain.records import EventLevel, RunState
from ferryman_service.domain.runs import FailureReason, ProcessIdentity, RunFailure, TrainingFailed, TrainingRun

_log = logging.getLogger(__name__)
_CLAIM_POLL_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class WorkerPorts:
    """Everything a worker needs of the world. `log_tail(run_id, attempt)` reads its own log."""

    runs: RunStore
    corpora: CorpusStore
    models: ModelStore
    engine: TrainingEngine
    exporter: ModelExporter
    loader: BundleLoader
    log_tail: Callable[[str, int], str]
    reporter: ReporterConfig
    prepared_dir: Path


def execute_attempt(ports: WorkerPorts, run_id: str, attempt: int, worker: ProcessIdentity, run_dir: Path) -> bool:
    """Do the attempt to its end. Return whether the run SUCCEEDED.

    An expected failure leaves the run FAILED; an unexpected one (a bug) leaves this function as an exception, the
    worker dies with its stack trace in the log, and the supervisor writes both down.
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
    except AttemptFenced as error:
        _log.warning("this attempt was overtaken: %s", error)
    except (TrainingFailed, DiskFull, OSError) as error:
        _log.exception("the attempt failed")
        failed = _as_failure(error)
        failure = RunFailure(reason=failed.reason, message=failed.message, log_tail=ports.log_tail(run_id, attempt))
        ports.runs.change_state(run_id, attempt, RunState.FAILED, failed.message, failure)
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
    )


def _train_and_publish(ports: WorkerPorts, run: TrainingRun, run_dir: Path) -> None:
    reporter = StoreReporter(ports.runs, run.run_id, run.attempt, run.recipe.stop, ports.reporter)
    reporter.start()
    try:
        trained = ports.engine.train(_job(ports, run, run_dir), reporter)
    except BaseException:
        _close_quietly(reporter)
        raise
    reporter.close()
    ports.runs.change_state(run.run_id, run.attempt, RunState.EXPORTING)
    exporting = StoreReporter(ports.runs, run.run_id, run.attempt, run.recipe.stop, ports.reporter)
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
    except (RunCancelled, AttemptFenced, TrainingFailed) as error:
        _log.info("while closing: %r", error)


def _as_failure(error: TrainingFailed | DiskFull | OSError) -> TrainingFailed:
    """Tell the causes apart; an OSError that is not a full disk is unexpected and raised again."""
    if isinstance(error, TrainingFailed):
        return error
    if isinstance(error, DiskFull) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainingFailed(FailureReason.DISK_FULL, f"no space left on the disk: {error}; free some and start again")
    raise error
