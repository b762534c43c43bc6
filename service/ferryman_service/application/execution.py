"""What a worker does with its attempt: claim, train, export, check, publish; and what it writes when that fails."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    Translator,
)
from ferryman_service.application.reporting import ReporterConfig, SilentReporter, StoreReporter
from ferryman_service.application.verification import (
    FP16_PAIRS,
    MAX_FP16_LOSS,
    MAX_INT8_LOSS,
    NothingTranslated,
    check_export,
    translate_held_out,
)
from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.corpora import Corpus
from ferryman_service.domain.errors import (
    AttemptFenced,
    CorpusNotFound,
    DatabaseDamaged,
    DiskFull,
    ModelDamaged,
    ModelNotFound,
    RowUnreadable,
    RunNotFound,
    StoreUnavailable,
)
from ferryman_service.domain.log_context import MAY_HOLD_TEXT, logging_with
from ferryman_service.domain.models import Int8Scores, ModelLineage, parse_model_reference
from ferryman_service.domain.os_errors import NO_SPACE
from ferryman_service.domain.records import EventLevel, RunEvent, RunState
from ferryman_service.domain.runs import (
    FailureReason,
    Handover,
    ProcessIdentity,
    RunFailure,
    TrainingFailed,
    TrainingRun,
    disk_full_handover,
)
from ferryman_service.domain.tracing import NULL_TRACER, Attributes, Span, Tracer
from ferryman_service.domain.training import DiskIsFull, InitialWeights, PauseRequested, StopRequested
from ferryman_service.domain.translation import ComputeType

_log = logging.getLogger(__name__)
_CLAIM_POLL_S: Final = 0.1
_LEAVE_TIME_S: Final = 2.0
"""What a worker that was told to end gets to be gone before the next one starts; doubles while none gets further."""
_MAX_LEAVE_TIME_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class WorkerPorts:
    """Everything a worker needs of the world.

    `log_tail(run_id, attempt)` reads its own log; `stop_requested` tells whether this process was told to end;
    `initial(run)` says what fine-tuning starts from; `free_reserve` frees a little room on a disk that has none. The
    spans of the tracer belong to the one that the run was started in.
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
    trash_dir: Path | None = None
    initial: Callable[[TrainingRun], InitialWeights | None] = lambda run: None
    stop_requested: Callable[[], bool] = lambda: False
    free_reserve: Callable[[], None] = lambda: None
    tracer: Tracer = NULL_TRACER


def execute_attempt(ports: WorkerPorts, run_id: str, attempt: int, worker: ProcessIdentity, run_dir: Path) -> bool:
    """Do the attempt to its end. Return whether the run SUCCEEDED.

    A failure that another attempt would repeat leaves the run FAILED, a full disk leaves it PAUSED. An unexpected one
    (a bug), and a store that stays out of reach, leave this function as an exception; the worker dies, and the
    supervisor lets another try.
    """
    try:
        run = ports.runs.claim_attempt(run_id, attempt, worker)
    except (AttemptFenced, RunNotFound) as error:
        _log.warning("this attempt is not wanted any more: %s", error)
        return False
    of_attempt: Attributes = {
        "ferryman.run": run.run_id,
        "ferryman.attempt": run.attempt,
        "ferryman.model_name": run.model_name,
    }
    try:
        with ports.tracer.span("attempt", of_attempt, stored=run.trace_context) as span, _logging_with_trace(span):
            _train_and_publish(ports, run, run_dir)
            _log.info("the model is published")
    except (AttemptFenced, RunNotFound) as error:
        _log.warning("this attempt was overtaken: %s", error)
    except (RunCancelled, PauseRequested, StopRequested, TrainingFailed, DiskIsFull, DiskFull, OSError) as error:
        _conclude(ports, run, error)
    else:
        return True
    return False


def _logging_with_trace(span: Span) -> contextlib.AbstractContextManager[None]:
    return logging_with(trace_id=span.trace_id) if span.trace_id else contextlib.nullcontext()


def follow_attempt(ports: WorkerPorts, run_id: str, attempt: int, run_dir: Path) -> bool:
    """Train beside rank 0, which alone claims, reports and publishes; return at once if the attempt is over.

    Return whether rank 0 has said that it is the end. If not, it may still wait for this process, which must then end
    with a failure, so that the first one ends them all. What fails here may fail on this rank alone: it is written
    down, unless rank 0 was faster.
    """
    while (run := ports.runs.get(run_id)).state is RunState.STARTING and run.attempt == attempt:
        time.sleep(_CLAIM_POLL_S)
    if run.state is not RunState.RUNNING or run.attempt != attempt:
        return False
    try:
        ports.engine.train(_job(ports, run, run_dir), SilentReporter())
    except RunCancelled as error:
        _log.info("the training is over: %s", error)
    except (TrainingFailed, DiskIsFull, DiskFull, OSError) as error:
        _conclude(ports, run, error)
        return False
    return True


def leave_attempt(ports: WorkerPorts, run_id: str, attempt: int) -> None:
    """Leave the run to another attempt, from its last checkpoint; harmless if it was left or has ended already.

    The worker may have told itself to end, because another of its processes died. So an attempt that got no
    further than those before it counts as if it had died.
    """
    text = "the worker was told to end"
    with contextlib.suppress(AttemptFenced, RunNotFound):
        restarts = ports.runs.get(run_id).restarts
        pause_s = min(_LEAVE_TIME_S * 2.0**restarts, _MAX_LEAVE_TIME_S)
        goes_on = f"{text}. Another goes on from the last checkpoint in {pause_s:g} s"
        handover = Handover(
            state=RunState.QUEUED,
            message=text,
            remark=RunEvent(level=EventLevel.INFO, code="HANDED_OVER", message=goes_on),
            restarts=restarts + 1,
            forgiven=True,
            not_before_ns=time.time_ns() + int(pause_s * 1e9),
        )
        ports.runs.give_up_attempt(run_id, attempt, handover)


def _conclude(ports: WorkerPorts, run: TrainingRun, error: Exception) -> None:
    """Write down why the attempt ends, as soon as the database has the little room that this takes.

    Raises an OSError that is no full disk: the worker dies of it, and the supervisor lets another try.
    """
    if isinstance(error, OSError) and error.errno not in NO_SPACE:
        raise error
    if isinstance(error, TrainingFailed) and not _quotes_sentences(error):
        # What is wrong is known, and where in the code it was found tells the caller nothing.
        _log.error("the attempt failed: %s: %s", error.reason, error.message)
    elif not isinstance(error, RunCancelled | PauseRequested | StopRequested):
        _log.error("the attempt failed", exc_info=error, extra={MAY_HOLD_TEXT: _quotes_sentences(error)})
    while True:
        try:
            _write_end(ports, run, error)
        except (DiskFull, StoreUnavailable, DatabaseDamaged):
            if ports.stop_requested():
                raise  # the supervisor will see a dead worker when it can write again
            ports.free_reserve()
            time.sleep(ports.reporter.ack_interval_s)
        except (AttemptFenced, RunNotFound) as fenced:
            _log.warning("this attempt was overtaken: %s", fenced)
            return
        else:
            return


def _quotes_sentences(error: Exception) -> bool:
    return isinstance(error, TrainingFailed) and error.reason is FailureReason.EXPORT_MISMATCH


def _write_end(ports: WorkerPorts, run: TrainingRun, error: Exception) -> None:
    match error:
        case RunCancelled():
            ports.runs.change_state(run.run_id, run.attempt, RunState.CANCELLED, "cancelled by the caller")
        case PauseRequested():
            # The store makes it PAUSED, unless the caller has thought better of it meanwhile: then it keeps its place.
            withdrawn = "the pause was withdrawn"
            handover = Handover(state=RunState.QUEUED, message=withdrawn, not_before_ns=time.time_ns())
            ports.runs.give_up_attempt(run.run_id, run.attempt, handover)
        case StopRequested():
            leave_attempt(ports, run.run_id, run.attempt)
        case TrainingFailed(reason=reason, message=message):
            tail = ports.log_tail(run.run_id, run.attempt)
            failure = RunFailure(reason=reason, message=message, log_tail=tail)
            ports.runs.change_state(run.run_id, run.attempt, RunState.FAILED, message, failure)
        case _:
            ports.runs.give_up_attempt(run.run_id, run.attempt, disk_full_handover(str(error)))


def _check_corpus(ports: WorkerPorts, corpus_id: str) -> None:
    """Raise TrainingFailed unless the text is what was uploaded. Every attempt reads the validation part, and the first
    one all of it."""
    if damage := ports.corpora.find_damage(corpus_id):
        raise TrainingFailed(FailureReason.CORPUS_DAMAGED, f"{damage}: upload it again, and start a run on that")


def _corpus(ports: WorkerPorts, run: TrainingRun) -> Corpus:
    """Return the run's corpus; raises TrainingFailed if it is gone or cannot be read, for no other worker can."""
    try:
        return ports.corpora.get(run.corpus_id)
    except (CorpusNotFound, RowUnreadable) as error:
        raise TrainingFailed(FailureReason.CORPUS_DAMAGED, error.message) from error


def _job(ports: WorkerPorts, run: TrainingRun, run_dir: Path) -> TrainingJob:
    corpus = _corpus(ports, run)
    return TrainingJob(
        run_id=run.run_id,
        recipe=run.recipe,
        corpus=ports.corpora.files(run.corpus_id),
        corpus_digest=corpus.digest,
        target_language=corpus.header.target_language,
        run_dir=run_dir,
        prepared_dir=ports.prepared_dir,
        trash_dir=ports.trash_dir,
        reported_step=run.progress.step,
        decays=run.progress.decays,
        initial=ports.initial(run),
    )


def initial_weights(models: ModelStore, folders: RunFolders, run: TrainingRun) -> InitialWeights | None:
    """Return what a run starts from; None: random weights. Raises TrainingFailed if it is gone or damaged."""
    if not run.initial_model:
        return None
    try:
        version = models.resolve(parse_model_reference(run.initial_model))
        weights, subwords = models.weights(version)
    except (ModelNotFound, ModelDamaged, RowUnreadable) as error:
        raise TrainingFailed(FailureReason.INITIAL_MODEL_UNUSABLE, error.message) from error
    checkpoint = folders.last_checkpoint(version.lineage.run_id) if run.keep_optimizer else None
    # Later attempts go on from a checkpoint of their own.
    if run.keep_optimizer and checkpoint is None and folders.last_checkpoint(run.run_id) is None:
        text = f"the checkpoints of run {version.lineage.run_id}, with the optimizer of {run.initial_model}, are gone"
        raise TrainingFailed(FailureReason.INITIAL_MODEL_UNUSABLE, text)
    return InitialWeights(weights=weights, subwords=subwords, keep_optimizer=run.keep_optimizer, checkpoint=checkpoint)


def _train_and_publish(ports: WorkerPorts, run: TrainingRun, run_dir: Path) -> None:
    reporter = StoreReporter(ports.runs, run, ports.reporter, ports.stop_requested)
    reporter.start()
    try:
        _check_corpus(ports, run.corpus_id)
        trained = ports.engine.train(_job(ports, run, run_dir), reporter)
    except BaseException:
        _close_quietly(reporter)
        raise
    reporter.close()
    run = ports.runs.change_state(run.run_id, run.attempt, RunState.EXPORTING)
    exporting = StoreReporter(ports.runs, run, ports.reporter, ports.stop_requested)
    exporting.start()
    try:
        with ports.tracer.span("export", {"ferryman.parameters": trained.parameters}):
            staged = _export(ports, run, trained, exporting)
        exporting.close()
        ports.models.publish(run.run_id, run.attempt, staged)
    except BaseException:
        # On a full disk the half-written bundle would leave no room to record what happened.
        clean_up(partial(ports.models.discard_staging, run.run_id))
        _close_quietly(exporting)
        raise


def _export(ports: WorkerPorts, run: TrainingRun, trained: TrainedModel, reporter: StoreReporter) -> Path:
    corpus = _corpus(ports, run)
    lineage = ModelLineage(
        run_id=run.run_id,
        corpus_id=run.corpus_id,
        corpus_digest=corpus.digest,
        source_language=corpus.header.source_language,
        target_language=corpus.header.target_language,
        recipe=trained.recipe,
        initial_model=run.initial_model or "",
    )
    staged = ports.models.staging_dir(run.run_id)
    ports.exporter.export(trained, lineage, staged)
    reporter.check()
    with contextlib.closing(ports.loader.load(staged, ComputeType.FP32)) as exported:
        verdict = check_export(
            reference=ports.exporter.reference(trained),
            exported=exported,
            sentences=trained.check_sentences,
            check=reporter.check,
        )
        reporter.event(EventLevel.INFO, "EXPORT_CHECKED", verdict)
        reporter.check()
        bleu = partial(ports.exporter.bleu, target_language=lineage.target_language)
        _judge_arithmetics(ports, trained, staged, exported, reporter, bleu)
    return staged


def _judge_arithmetics(
    ports: WorkerPorts,
    trained: TrainedModel,
    staged: Path,
    exported: Translator,
    reporter: StoreReporter,
    bleu: Callable[[Sequence[str], Sequence[str]], float],
) -> None:
    """Measure on held-out pairs what int8 and fp16 cost; without pairs, say that nobody has. `bleu` scores translations
    against references."""
    if not trained.held_out:
        ports.exporter.settle_int8(staged, Int8Scores(pairs=0), keep=True)
        text = "there are no held-out pairs: what int8 and fp16 cost is not known, the model has both all the same"
        reporter.event(EventLevel.WARNING, "ARITHMETICS_NOT_MEASURED", text)
        return
    sources = [source for source, _ in trained.held_out]
    exact = translate_held_out(exported, sources, reporter.check)
    _report_fp16(ports, trained, staged, exact, reporter, bleu)
    _judge_int8(ports, trained, staged, exact, reporter, bleu)


def _report_fp16(
    ports: WorkerPorts,
    trained: TrainedModel,
    staged: Path,
    exact: Sequence[str],
    reporter: StoreReporter,
    bleu: Callable[[Sequence[str], Sequence[str]], float],
) -> None:
    """Measure what the graphs for GPUs cost, on the CPU, and say so. A CPU that cannot run them fails no run."""
    pairs = trained.held_out[:FP16_PAIRS]
    references = [reference for _, reference in pairs]
    try:
        with contextlib.closing(ports.loader.load(staged, ComputeType.FP16)) as fp16:
            texts = translate_held_out(fp16, [source for source, _ in pairs], reporter.check)
    except NothingTranslated:
        text = (
            "the graphs for GPUs give no translation: numbers of the model are too large for 16 bits. Do not serve it "
            "on a GPU, or train it again with a lower learning rate"
        )
        reporter.event(EventLevel.WARNING, "FP16_LOSES", text)
        return
    except Exception as error:  # noqa: BLE001 (it is a report, and what ends the work goes its way)
        reporter.check()
        _log.warning("fp16 was not measured", exc_info=error, extra={MAY_HOLD_TEXT: True})
        text = f"the graphs for GPUs could not be tried on this CPU: {type(error).__name__}"
        reporter.event(EventLevel.WARNING, "FP16_NOT_MEASURED", text)
        return
    fp32_bleu, fp16_bleu = bleu(exact[: len(pairs)], references), bleu(texts, references)
    text = f"BLEU of {len(pairs)} held-out pairs, greedy, on a CPU: {fp32_bleu:.2f} in fp32, {fp16_bleu:.2f} in fp16"
    if fp32_bleu - fp16_bleu <= MAX_FP16_LOSS:
        reporter.event(EventLevel.INFO, "FP16_CHECKED", text)
    else:
        reporter.event(EventLevel.WARNING, "FP16_LOSES", f"{text}: over {MAX_FP16_LOSS} lost, which a GPU would serve")


def _judge_int8(
    ports: WorkerPorts,
    trained: TrainedModel,
    staged: Path,
    exact: Sequence[str],
    reporter: StoreReporter,
    bleu: Callable[[Sequence[str], Sequence[str]], float],
) -> None:
    """Measure what int8 costs, and leave it out of the bundle if that is too much."""
    sources, references = [source for source, _ in trained.held_out], [reference for _, reference in trained.held_out]
    try:
        with contextlib.closing(ports.loader.load(staged, ComputeType.INT8)) as int8:
            texts = translate_held_out(int8, sources, reporter.check)
    except NothingTranslated:
        ports.exporter.settle_int8(staged, Int8Scores(pairs=0), keep=False)
        text = "the int8 graphs give no translation, so the model has no int8"
        reporter.event(EventLevel.WARNING, "INT8_LEFT_OUT", text)
        return
    fp32_bleu, int8_bleu = bleu(exact, references), bleu(texts, references)
    keep = fp32_bleu - int8_bleu <= MAX_INT8_LOSS
    scores = Int8Scores(pairs=0)  # a manifest holds no NaN
    if math.isfinite(fp32_bleu) and math.isfinite(int8_bleu):
        scores = Int8Scores(pairs=len(references), fp32_bleu=fp32_bleu, int8_bleu=int8_bleu)
    ports.exporter.settle_int8(staged, scores, keep=keep)
    text = f"BLEU of {len(references)} held-out pairs, greedy: {fp32_bleu:.2f} in fp32, {int8_bleu:.2f} in int8"
    if keep:
        reporter.event(EventLevel.INFO, "INT8_CHECKED", text)
    else:
        reporter.event(
            EventLevel.WARNING, "INT8_LEFT_OUT", f"{text}: it loses over {MAX_INT8_LOSS}, so the model has no int8"
        )


def _close_quietly(reporter: StoreReporter) -> None:
    """Write what was reported; the error that is on its way already says what went wrong."""
    try:
        reporter.close()
    except Exception as error:  # noqa: BLE001
        _log.warning("the last records are not stored: %r", error)
