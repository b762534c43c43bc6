"""Wire <-> domain. A field that is not set stays out of the overrides; an enumeration's zero is not set."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, recipe_pb2, training_pb2, translation_pb2
from ferryman_service.application.metrics_feed import Heartbeat
from ferryman_service.application.training import Curve
from ferryman_service.application.translating import StreamRequest, TranslateRequest, TranslateResult
from ferryman_service.application.translation_stream import SentenceError, StreamResult, StreamSentence
from ferryman_service.domain.corpora import Corpus, CorpusHeader, SentencePair, Side, Split, SplitStatistics
from ferryman_service.domain.errors import InvalidRequest, RowUnreadable, Violation
from ferryman_service.domain.models import (
    BundleFile,
    Int8Outcome,
    LoadedModel,
    Model,
    ModelAlias,
    ModelVersion,
    PublishedWeights,
)
from ferryman_service.domain.recipe import (
    Activation,
    Averaging,
    NormPlacement,
    Positions,
    Precision,
    Preset,
    Recipe,
    SelectionMetric,
    SubwordAlgorithm,
)
from ferryman_service.domain.records import (
    EventLevel,
    Record,
    RunEvent,
    RunState,
    StateChange,
    StepMetrics,
    ValidationMetrics,
)
from ferryman_service.domain.runs import CheckpointInfo, RunProgress, TrainingRun
from ferryman_service.domain.schedule import DecayPlan, DecayReason, DecayShape, LearningRateSchedule, ScheduleKind
from ferryman_service.domain.stored import UnreadableRow
from ferryman_service.domain.translation import EarlyStopping, Hypothesis, Sampling, SearchOptions, Translation
from ferryman_service.rpc.answer_budget import LARGEST_ANSWER_BYTES, answer_too_large
from ferryman_service.rpc.bounds import MAX_STREAM_SENTENCES

E = TypeVar("E", bound=enum.StrEnum)

_MAX_ID_BYTES: Final = 128
_RESPONSE_BYTES: Final = 1 << 20

_MISFITS: Final = (ValueError, TypeError, OverflowError)
"""What protobuf raises for a value that a field cannot hold, such as 2**40 in an int32."""

_ENUMS: Final[Mapping[type[enum.StrEnum], tuple[Any, str]]] = {
    Preset: (recipe_pb2.Preset, "PRESET_"),
    NormPlacement: (recipe_pb2.NormPlacement, "NORM_PLACEMENT_"),
    SubwordAlgorithm: (recipe_pb2.SubwordAlgorithm, "SUBWORD_ALGORITHM_"),
    ScheduleKind: (recipe_pb2.ScheduleKind, "SCHEDULE_KIND_"),
    SelectionMetric: (recipe_pb2.SelectionMetric, "SELECTION_METRIC_"),
    Activation: (recipe_pb2.Activation, "ACTIVATION_"),
    Positions: (recipe_pb2.Positions, "POSITIONS_"),
    Precision: (recipe_pb2.Precision, "PRECISION_"),
    Averaging: (recipe_pb2.Averaging, "AVERAGING_"),
    RunState: (metrics_pb2.RunState, "RUN_STATE_"),
    EventLevel: (metrics_pb2.EventLevel, "EVENT_LEVEL_"),
    Split: (corpus_pb2.Split, "SPLIT_"),
    Side: (corpus_pb2.Side, "SIDE_"),
    DecayShape: (recipe_pb2.DecayShape, "DECAY_SHAPE_"),
    DecayReason: (metrics_pb2.DecayReason, "DECAY_REASON_"),
    PublishedWeights: (model_pb2.PublishedWeights, "PUBLISHED_WEIGHTS_"),
    EarlyStopping: (translation_pb2.EarlyStopping, "EARLY_STOPPING_"),
}
_RECIPE_ENUMS: Final[Mapping[str, type[enum.StrEnum]]] = {
    "preset": Preset,
    "norm": NormPlacement,
    "subword_algorithm": SubwordAlgorithm,
    "kind": ScheduleKind,
    "metric": SelectionMetric,
    "activation": Activation,
    "positions": Positions,
    "precision": Precision,
    "averaging": Averaging,
    "decay_shape": DecayShape,
}


def enum_to_wire(value: enum.StrEnum) -> Any:  # noqa: ANN401 - each enumeration has a wire type of its own
    """Return the wire's number of a domain enumeration's member."""
    wrapper, prefix = _ENUMS[type(value)]
    return wrapper.Value(prefix + value.name)


def enum_from_wire(kind: type[E], number: int, field: str, violations: list[Violation]) -> E | None:
    """Return the member, None for 0; also None, with a violation, for a number that the contract does not know."""
    if number == 0:
        return None
    wrapper, prefix = _ENUMS[kind]
    if number not in wrapper.values():
        violations.append(_not_one_of(wrapper.keys()[1:], number, field))
        return None
    return kind[wrapper.Name(number).removeprefix(prefix)]


def required_enum(kind: type[E], number: int, field: str, violations: list[Violation]) -> E | None:
    """Return the member; None, with a violation, for 0 and for a number that the contract does not know."""
    if number == 0:
        names = ", ".join(_ENUMS[kind][0].keys()[1:])
        violations.append(Violation(field=field, description=f"must be one of {names}", reason="REQUIRED"))
    return enum_from_wire(kind, number, field, violations)


def _not_one_of(names: Iterable[str], number: int, field: str) -> Violation:
    text = f"is {number}, must be one of {', '.join(names)}"
    return Violation(field=field, description=text, reason="UNKNOWN_ENUM_VALUE")


def recipe_overrides(wire: Message, path: str, violations: list[Violation]) -> dict[str, Any]:
    """Return the fields of a Recipe or a LearningRateSchedule that are set, as domain.recipe wants them.

    Enumeration values that the contract does not know are left out, with a violation each.
    """
    found: dict[str, Any] = {}
    for descriptor, value in wire.ListFields():
        field = f"{path}.{descriptor.name}"
        if descriptor.message_type is Duration.DESCRIPTOR:
            found[f"{descriptor.name}_s"] = _seconds_from_wire(value, field, violations)
        elif descriptor.message_type is not None:
            found[descriptor.name] = recipe_overrides(value, field, violations)
        elif descriptor.enum_type is not None:
            member = enum_from_wire(_RECIPE_ENUMS[descriptor.name], value, field, violations)
            if member is not None:
                found[descriptor.name] = member
        else:
            found[descriptor.name] = value
    return found


def _seconds_from_wire(wire: Duration, field: str, violations: list[Violation]) -> float:
    """Return a duration's seconds; 0, with a violation, for what is none."""
    if abs(wire.nanos) >= 10**9 or wire.seconds * wire.nanos < 0:
        text = f"has {wire.seconds} seconds and {wire.nanos} nanos, must have the same sign and less than 10^9 nanos"
        violations.append(Violation(field=field, description=text, reason="INVALID_DURATION"))
        return 0.0
    return (wire.seconds * 10**9 + wire.nanos) / 1e9


def recipe_to_wire(recipe: Recipe) -> recipe_pb2.Recipe:
    """Return the resolved recipe, every field set."""
    return recipe_pb2.Recipe(
        preset=enum_to_wire(recipe.preset),
        model=recipe_pb2.ModelRecipe(**_plain(recipe.model)),
        data=recipe_pb2.DataRecipe(**_plain(recipe.data)),
        schedule=schedule_to_wire(recipe.schedule),
        optimization=recipe_pb2.OptimizationRecipe(**_plain(recipe.optimization)),
        stop=recipe_pb2.StopRecipe(**_plain(recipe.stop)),
        validation=recipe_pb2.ValidationRecipe(**_plain(recipe.validation)),
        seed=recipe.seed,
    )


def schedule_to_wire(schedule: LearningRateSchedule) -> recipe_pb2.LearningRateSchedule:
    """Return the resolved schedule; fields that its kind does not know stay unset."""
    return recipe_pb2.LearningRateSchedule(**_plain(schedule))


def _plain(part: object) -> dict[str, Any]:
    """Return a dataclass's fields for the message of the same field names, None left out. Seconds `x_s` are the
    duration `x`."""
    return dict(_wire_field(name, value) for name, value in vars(part).items() if value is not None)


def _wire_field(name: str, value: Any) -> tuple[str, Any]:  # noqa: ANN401 - fields have values of every type
    if isinstance(value, enum.StrEnum):
        return name, enum_to_wire(value)
    return (name.removesuffix("_s"), _seconds(value)) if name.endswith("_s") else (name, value)


def curve_to_wire(curve: Curve) -> training_pb2.GetLRScheduleResponse:
    """Return the learning-rate curve."""
    wire = training_pb2.GetLRScheduleResponse(
        schedule=schedule_to_wire(curve.schedule),
        peak=training_pb2.LearningRatePoint(step=curve.peak[0], learning_rate=curve.peak[1]),
        decays=[metrics_pb2.DecayPlan(**_plain(decay)) for decay in curve.decays],
        provisional_from_step=curve.provisional_from_step,
    )
    # One by one: a message that is made of a list copies all of it without letting another thread run.
    for step, rate in curve.points:
        wire.points.add(step=step, learning_rate=rate)
    return wire


def record_to_wire(record: Record) -> metrics_pb2.MetricRecord:
    """Return a record; one with a value that the contract cannot hold is a remark which says so."""
    try:
        return _record_to_wire(record)
    except _MISFITS as error:
        event = metrics_pb2.RunEvent(
            level=metrics_pb2.EVENT_LEVEL_ERROR,
            code="RECORD_UNREADABLE",
            message=_why(f"record {record.sequence} cannot be read: {error}"),
        )
        return metrics_pb2.MetricRecord(sequence=record.sequence, event=event)


def _record_to_wire(record: Record) -> metrics_pb2.MetricRecord:
    wire = metrics_pb2.MetricRecord(sequence=record.sequence, time=_timestamp(record.time_ns))
    match record.payload:
        case StepMetrics():
            wire.step.CopyFrom(metrics_pb2.StepMetrics(**_plain(record.payload)))
        case ValidationMetrics():
            wire.validation.CopyFrom(metrics_pb2.ValidationMetrics(**_plain(record.payload)))
        case StateChange():
            wire.state_change.CopyFrom(metrics_pb2.StateChange(**_plain(record.payload)))
        case RunEvent():
            wire.event.CopyFrom(metrics_pb2.RunEvent(**_plain(record.payload)))
        case DecayPlan():
            wire.decay_plan.CopyFrom(metrics_pb2.DecayPlan(**_plain(record.payload)))
    return wire


def stream_item_to_wire(item: Record | Heartbeat) -> training_pb2.StreamMetricsResponse:
    """Return one message of a metrics stream."""
    if isinstance(item, Record):
        return training_pb2.StreamMetricsResponse(record=record_to_wire(item))
    heartbeat = metrics_pb2.Heartbeat(
        last_sequence=item.last_sequence,
        state=enum_to_wire(item.state),
        interval=_seconds(item.interval_s),
    )
    return training_pb2.StreamMetricsResponse(heartbeat=heartbeat)


def listed_run_to_wire(run: TrainingRun | UnreadableRow) -> training_pb2.TrainingRun:
    """Return a run as a list holds it: `unreadable` tells what cannot be read, or has a value that the contract cannot
    hold."""
    if isinstance(run, UnreadableRow):
        return training_pb2.TrainingRun(run_id=run.name, unreadable=run.why)
    try:
        return _run_to_wire(run)
    except _MISFITS as error:
        return training_pb2.TrainingRun(run_id=run.run_id, unreadable=_why(str(error)))


def run_to_wire(run: TrainingRun) -> training_pb2.TrainingRun:
    """Return a run; raises RowUnreadable if it has a value that the contract cannot hold."""
    try:
        return _run_to_wire(run)
    except _MISFITS as error:
        raise _row_unreadable(run.run_id, error) from error


def _run_to_wire(run: TrainingRun) -> training_pb2.TrainingRun:
    wire = training_pb2.TrainingRun(
        run_id=run.run_id,
        state=enum_to_wire(run.state),
        corpus_id=run.corpus_id,
        model_name=run.model_name,
        model_version=run.model_version or 0,
        recipe=recipe_to_wire(run.recipe),
        progress=_progress_to_wire(run.progress),
        cancel_requested=run.cancel_requested,
        attempt=run.attempt,
        last_sequence=run.last_sequence,
        create_time=_timestamp(run.create_time_ns),
        start_time=None if run.start_time_ns is None else _timestamp(run.start_time_ns),
        end_time=None if run.end_time_ns is None else _timestamp(run.end_time_ns),
        pause_requested=run.pause_requested,
        restarts=run.restarts,
        initial_model=run.initial_model,
        processes=run.processes,
        keep_optimizer=run.keep_optimizer,
        corpus_deleted=run.corpus_deleted,
    )
    if run.failure is not None:
        wire.error.CopyFrom(
            training_pb2.RunError(
                reason=run.failure.reason.value, message=run.failure.message, log_tail=run.failure.log_tail
            )
        )
    return wire


def _progress_to_wire(progress: RunProgress) -> training_pb2.RunProgress:
    remaining, best = progress.remaining_s, progress.best_validation
    return training_pb2.RunProgress(
        step=progress.step,
        epoch=progress.epoch,
        target_tokens=progress.target_tokens,
        target_tokens_per_second=progress.target_tokens_per_second,
        fraction=progress.fraction,
        remaining=None if remaining is None else _seconds(remaining),
        best_validation=None if best is None else metrics_pb2.ValidationMetrics(**_plain(best)),
        skipped_updates=progress.skipped_updates,
    )


def checkpoint_to_wire(checkpoint: CheckpointInfo) -> training_pb2.Checkpoint:
    """Return a checkpoint."""
    return training_pb2.Checkpoint(
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        create_time=_timestamp(checkpoint.create_time_ns),
        size_bytes=checkpoint.size_bytes,
        best=checkpoint.is_best,
        bleu=checkpoint.bleu,
        chrf=checkpoint.chrf,
        nll_per_token=checkpoint.nll_per_token,
        translated_pairs=checkpoint.translated_pairs,
    )


def header_from_wire(wire: corpus_pb2.UploadHeader) -> CorpusHeader:
    """Return what the caller says about a corpus."""
    return CorpusHeader(
        display_name=wire.display_name, source_language=wire.source_language, target_language=wire.target_language
    )


def pairs_from_wire(wire: Iterable[corpus_pb2.SentencePair]) -> list[SentencePair]:
    """Return sentence pairs."""
    return [SentencePair(source=pair.source, target=pair.target) for pair in wire]


def listed_corpus_to_wire(corpus: Corpus | UnreadableRow) -> corpus_pb2.Corpus:
    """Return a corpus as a list holds it: `unreadable` tells what cannot be read, or has a value that the contract
    cannot hold."""
    if isinstance(corpus, UnreadableRow):
        return corpus_pb2.Corpus(corpus_id=corpus.name, unreadable=corpus.why)
    try:
        return _corpus_to_wire(corpus)
    except _MISFITS as error:
        return corpus_pb2.Corpus(corpus_id=corpus.corpus_id, unreadable=_why(str(error)))


def corpus_to_wire(corpus: Corpus) -> corpus_pb2.Corpus:
    """Return a corpus; raises RowUnreadable if it has a value that the contract cannot hold."""
    try:
        return _corpus_to_wire(corpus)
    except _MISFITS as error:
        raise _row_unreadable(corpus.corpus_id, error) from error


def _corpus_to_wire(corpus: Corpus) -> corpus_pb2.Corpus:
    return corpus_pb2.Corpus(
        corpus_id=corpus.corpus_id,
        display_name=corpus.header.display_name,
        source_language=corpus.header.source_language,
        target_language=corpus.header.target_language,
        train=_statistics_to_wire(corpus.train),
        validation=_statistics_to_wire(corpus.validation),
        digest=corpus.digest,
        create_time=_timestamp(corpus.create_time_ns),
        warnings=[corpus_pb2.CorpusWarning(**_plain(warning)) for warning in corpus.warnings],
    )


def _statistics_to_wire(statistics: SplitStatistics) -> corpus_pb2.SplitStatistics:
    samples = [corpus_pb2.SentencePair(source=pair.source, target=pair.target) for pair in statistics.samples]
    return corpus_pb2.SplitStatistics(
        pairs=statistics.pairs,
        source_words=statistics.source_words,
        target_words=statistics.target_words,
        empty_pairs=statistics.empty_pairs,
        samples=samples,
    )


def model_to_wire(model: Model) -> model_pb2.Model:
    """Return a model; `unreadable` tells what of it cannot be read."""
    return model_pb2.Model(
        name=model.name,
        latest_version=_listed_version_to_wire(model.name, model.versions[-1], model.latest_version),
        versions=model.versions,
        aliases=[_alias_to_wire(alias) for alias in model.aliases],
        unreadable=model.unreadable,
    )


def _listed_version_to_wire(name: str, number: int, version: ModelVersion | UnreadableRow) -> model_pb2.ModelVersion:
    if isinstance(version, UnreadableRow):
        return model_pb2.ModelVersion(name=name, version=number, unreadable=version.why)
    try:
        return _version_to_wire(version)
    except _MISFITS as error:
        return model_pb2.ModelVersion(name=name, version=number, unreadable=_why(str(error)))


def _alias_to_wire(alias: ModelAlias) -> model_pb2.ModelAlias:
    return model_pb2.ModelAlias(alias=alias.alias, version=alias.version, update_time=_timestamp(alias.update_time_ns))


def version_to_wire(version: ModelVersion) -> model_pb2.ModelVersion:
    """Return a version of a model; raises RowUnreadable if it has a value that the contract cannot hold."""
    try:
        return _version_to_wire(version)
    except _MISFITS as error:
        raise _row_unreadable(version.reference, error) from error


def _version_to_wire(version: ModelVersion) -> model_pb2.ModelVersion:
    return model_pb2.ModelVersion(
        name=version.name,
        version=version.version,
        source_language=version.lineage.source_language,
        target_language=version.lineage.target_language,
        run_id=version.lineage.run_id,
        corpus_id=version.lineage.corpus_id,
        recipe=recipe_to_wire(version.lineage.recipe),
        scores=model_pb2.ModelScores(**_plain(version.scores)),
        parameters=version.parameters,
        size_bytes=version.size_bytes,
        digest=version.digest,
        create_time=_timestamp(version.create_time_ns),
        int8=None if version.int8 is None else _int8_to_wire(version.int8),
        initial_model=version.lineage.initial_model,
    )


def _int8_to_wire(int8: Int8Outcome) -> model_pb2.Int8Outcome:
    return model_pb2.Int8Outcome(**_plain(int8.scores), kept=int8.kept)


def download_header_to_wire(version: ModelVersion, files: Iterable[BundleFile]) -> model_pb2.DownloadModelResponse:
    """Return the first message of a download."""
    wire = [model_pb2.DownloadFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256) for file in files]
    header = model_pb2.DownloadHeader(version=version_to_wire(version), files=wire)
    return model_pb2.DownloadModelResponse(header=header)


def loaded_model_to_wire(loaded: LoadedModel) -> model_pb2.LoadedModel:
    """Return a model that is in memory."""
    return model_pb2.LoadedModel(
        model=loaded.reference, memory_bytes=loaded.memory_bytes, load_duration=_duration(loaded.load_time_ns)
    )


def options_from_wire(wire: translation_pb2.TranslateOptions, path: str, violations: list[Violation]) -> SearchOptions:
    """Return the options, unset ones at their defaults. What the contract does not know, or forbids together, becomes a
    violation."""
    found = {descriptor.name: value for descriptor, value in wire.ListFields()}
    early_stopping = enum_from_wire(EarlyStopping, found.pop("early_stopping", 0), f"{path}.early_stopping", violations)
    if early_stopping is not None:
        found["early_stopping"] = early_stopping
    if "sampling" in found:
        found["sampling"] = Sampling(**{descriptor.name: value for descriptor, value in wire.sampling.ListFields()})
        if "beam_size" in found:
            text = f"is {found['beam_size']}, must not be set with sampling, which keeps no beam: n_best says how many"
            violations.append(Violation(field=f"{path}.beam_size", description=text, reason="CONFLICT"))
    return SearchOptions(**found)


def translate_request_from_wire(wire: translation_pb2.TranslateRequest, timeout_s: float | None) -> TranslateRequest:
    """Return what Translate is asked."""
    unknown: list[Violation] = []
    return TranslateRequest(
        model=wire.model,
        sentences=list(wire.sentences),
        options=options_from_wire(wire.options, "options", unknown),
        target_prefixes=list(wire.target_prefixes),
        split_sentences=wire.split_sentences,
        timeout_s=timeout_s,
        unknown=unknown,
    )


def stream_request_from_wire(
    wire: translation_pb2.StreamTranslateRequest | None, timeout_s: float | None
) -> StreamRequest:
    """Return what the first message of a stream says; raises InvalidRequest if it is no configuration, or missing."""
    if wire is None or not wire.HasField("config"):
        text = "is missing: the first message of a stream is its configuration"
        raise InvalidRequest([Violation(field="config", description=text, reason="REQUIRED")])
    unknown: list[Violation] = []
    config = wire.config
    return StreamRequest(
        model=config.model,
        options=options_from_wire(config.options, "config.options", unknown),
        split_sentences=config.split_sentences,
        window=config.window if config.HasField("window") else None,
        timeout_s=timeout_s,
        unknown=unknown,
    )


def stream_sentences_from_wire(
    wire: translation_pb2.StreamTranslateRequest, *, split_sentences: bool
) -> list[StreamSentence]:
    """Return the sentences of a message that is not the first; raises InvalidRequest with every violation."""
    kind = wire.WhichOneof("stream_part")
    if kind != "sentences":
        text = "comes once, as the first message" if kind else "is empty, must hold sentences"
        reason = "UNEXPECTED" if kind else "REQUIRED"
        raise InvalidRequest([Violation(field=kind or "stream_part", description=text, reason=reason)])
    sentences, violations = wire.sentences.sentences, list[Violation]()
    if not sentences:
        text = f"has no sentences, must have from 1 to {MAX_STREAM_SENTENCES:,}"
        violations.append(Violation(field="sentences.sentences", description=text, reason="OUT_OF_RANGE"))
    for index, sentence in enumerate(sentences):
        path = f"sentences.sentences[{index}]"
        size = len(sentence.id.encode())
        if size > _MAX_ID_BYTES:
            text = f"has {size:,} bytes, at most {_MAX_ID_BYTES} are allowed"
            violations.append(Violation(field=f"{path}.id", description=text, reason="TOO_LONG"))
        if split_sentences and sentence.target_prefix:
            text = "must be empty with split_sentences: a text's sentences cannot all begin with the same words"
            violations.append(Violation(field=f"{path}.target_prefix", description=text, reason="CONFLICT"))
    if violations:
        raise InvalidRequest(violations)
    return [StreamSentence(id=item.id, sentence=item.sentence, target_prefix=item.target_prefix) for item in sentences]


def result_to_wire(result: TranslateResult) -> translation_pb2.TranslateResponse:
    """Return the answer of Translate; raises AnswerTooLarge."""
    timings = translation_pb2.TranslateTimings(
        queue=_duration(result.timings.queue_ns),
        text=_duration(result.timings.text_ns),
        encode=_duration(result.timings.encode_ns),
        decode=_duration(result.timings.decode_ns),
        total=_duration(result.total_ns),
        steps=result.timings.steps,
        mean_batch_rows=result.mean_batch_rows,
    )
    wire = translation_pb2.TranslateResponse(model=result.version.reference, timings=timings)
    size_bytes = 0
    for translation in result.translations:  # one by one, as above
        added = _translation_to_wire(translation)
        size_bytes += added.ByteSize()
        if size_bytes > LARGEST_ANSWER_BYTES:
            raise answer_too_large(size_bytes)
        wire.translations.append(added)
    return wire


def stream_responses_to_wire(
    version: ModelVersion, results: Iterable[StreamResult]
) -> Iterator[translation_pb2.StreamTranslateResponse]:
    """Yield the results in few responses of about a megabyte at most; one result may be larger."""
    response = translation_pb2.StreamTranslateResponse(model=version.reference)
    size = 0
    for result in results:
        wire = _stream_result_to_wire(result)
        if response.translations and size + wire.ByteSize() > _RESPONSE_BYTES:
            yield response
            response, size = translation_pb2.StreamTranslateResponse(model=version.reference), 0
        response.translations.append(wire)
        size += wire.ByteSize()
    if response.translations:
        yield response


def _stream_result_to_wire(result: StreamResult) -> translation_pb2.StreamTranslation:
    if isinstance(result.outcome, SentenceError):
        error = translation_pb2.SentenceError(reason=result.outcome.reason, message=result.outcome.message)
        return translation_pb2.StreamTranslation(id=result.id, error=error)
    return translation_pb2.StreamTranslation(id=result.id, translation=_translation_to_wire(result.outcome))


def _translation_to_wire(translation: Translation) -> translation_pb2.Translation:
    return translation_pb2.Translation(
        hypotheses=[_hypothesis_to_wire(hypothesis) for hypothesis in translation.hypotheses],
        source_tokens=translation.source_tokens,
        source_pieces=translation.source_pieces,
    )


def _hypothesis_to_wire(hypothesis: Hypothesis) -> translation_pb2.Hypothesis:
    return translation_pb2.Hypothesis(
        text=hypothesis.text,
        score=hypothesis.score,
        log_probability=hypothesis.log_probability,
        target_tokens=hypothesis.target_tokens,
        finished=hypothesis.finished,
        pieces=hypothesis.pieces,
        token_log_probabilities=hypothesis.token_log_probabilities,
        alignment=hypothesis.alignment,
    )


def _row_unreadable(name: str, error: Exception) -> RowUnreadable:
    text = f"{name} cannot be read: in the database it has a value that no answer can hold ({error}). Delete it"
    return RowUnreadable(text, name=name)


def _why(text: str) -> str:
    return text.encode(errors="replace").decode()[:300]


def _timestamp(time_ns: int) -> Timestamp:
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def _duration(time_ns: int) -> Duration:
    return Duration(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def _seconds(value: float) -> Duration:
    wire = Duration()
    wire.FromNanoseconds(round(value * 1e9))
    return wire


def all_enums(kind: type[E], numbers: Iterable[int], field: str, violations: list[Violation]) -> list[E]:
    """Return the different members of a repeated enumeration; every bad element is left out, with a violation."""
    members = [required_enum(kind, number, f"{field}[{index}]", violations) for index, number in enumerate(numbers)]
    return list(dict.fromkeys(member for member in members if member is not None))


def known_number(wrapper: Any, number: int, field: str, violations: list[Violation]) -> int:  # noqa: ANN401 - protobuf has no common type
    """Return the number of an enumeration that has no domain type; 0, with a violation, if it is unknown."""
    if number in wrapper.values():
        return number
    violations.append(_not_one_of(wrapper.keys(), number, field))
    return 0
