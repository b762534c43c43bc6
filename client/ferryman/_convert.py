"""Where the wire begins: requests from arguments, dataclasses from responses. Written once for both clients.

A `Call` says which RPC to make, with what, and how to read the answer; how it is made is the client's business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar
from uuid import uuid4

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from ferryman import types
from ferryman._mapping import enum_number, fill_message, from_message
from ferryman._upload import Piece
from ferryman.errors import InvalidArgument, InvalidRecipe, InvalidRequest, Violation
from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, training_pb2, translation_pb2

T = TypeVar("T")

TRAINING: Final = "/ferryman.v1.TrainingService/"
CORPUS: Final = "/ferryman.v1.CorpusService/"
MODEL: Final = "/ferryman.v1.ModelService/"
TRANSLATION: Final = "/ferryman.v1.TranslationService/"


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One RPC: its (first) request, and how to read its response, or each of its responses."""

    path: str
    request: Message
    response_type: type[Message]
    read: Callable[[Any], T]


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list; `next_page_token` is empty on the last."""

    items: Sequence[T]
    next_page_token: str


Pages = Callable[[str], Call[Page[T]]]
"""A list: from a page token to the call that fetches the page."""


def encode(message: Message) -> bytes:
    """Return the bytes of a request."""
    return message.SerializeToString()


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """What StartTraining may be told beside corpus, model and recipe; the names are those of StartTrainingRequest."""

    request_id: str | None
    validate_only: bool
    initial_model: str | None
    keep_optimizer: bool
    processes: int | None


def start_training(
    corpus_id: str, model_name: str, recipe: types.Recipe | None, options: StartOptions
) -> Call[types.TrainingRun]:
    """StartTraining. Without a request_id one is made, so that the channel may retry.

    Raises InvalidRecipe, InvalidRequest.
    """
    request = training_pb2.StartTrainingRequest(corpus_id=corpus_id, model_name=model_name)
    _fill(options, request, "", InvalidRequest)
    request.request_id = request.request_id or str(uuid4())
    if recipe is not None:
        request.recipe.SetInParent()
        _fill(recipe, request.recipe, "recipe", InvalidRecipe)
    return Call(
        path=TRAINING + "StartTraining", request=request, response_type=training_pb2.StartTrainingResponse, read=_run
    )


def get_training_run(run_id: str) -> Call[types.TrainingRun]:
    """GetTrainingRun."""
    request = training_pb2.GetTrainingRunRequest(run_id=run_id)
    return Call(
        path=TRAINING + "GetTrainingRun", request=request, response_type=training_pb2.GetTrainingRunResponse, read=_run
    )


def cancel_training(run_id: str) -> Call[types.TrainingRun]:
    """CancelTraining."""
    request = training_pb2.CancelTrainingRequest(run_id=run_id)
    return Call(
        path=TRAINING + "CancelTraining", request=request, response_type=training_pb2.CancelTrainingResponse, read=_run
    )


def pause_training(run_id: str) -> Call[types.TrainingRun]:
    """PauseTraining."""
    request = training_pb2.PauseTrainingRequest(run_id=run_id)
    return Call(
        path=TRAINING + "PauseTraining", request=request, response_type=training_pb2.PauseTrainingResponse, read=_run
    )


def resume_training(run_id: str) -> Call[types.TrainingRun]:
    """ResumeTraining."""
    request = training_pb2.ResumeTrainingRequest(run_id=run_id)
    return Call(
        path=TRAINING + "ResumeTraining", request=request, response_type=training_pb2.ResumeTrainingResponse, read=_run
    )


def list_checkpoints(run_id: str) -> Call[list[types.Checkpoint]]:
    """ListCheckpoints."""
    return Call(
        path=TRAINING + "ListCheckpoints",
        request=training_pb2.ListCheckpointsRequest(run_id=run_id),
        response_type=training_pb2.ListCheckpointsResponse,
        read=lambda response: [from_message(types.Checkpoint, message) for message in response.checkpoints],
    )


def delete_training_run(run_id: str) -> Call[None]:
    """DeleteTrainingRun."""
    return Call(
        path=TRAINING + "DeleteTrainingRun",
        request=training_pb2.DeleteTrainingRunRequest(run_id=run_id),
        response_type=training_pb2.DeleteTrainingRunResponse,
        read=lambda _: None,
    )


def list_training_runs(
    states: Iterable[types.RunState | str], model_name: str, order: types.RunOrder | str
) -> Pages[types.TrainingRun]:
    """ListTrainingRuns. Raises InvalidRequest for a word that is no state or order."""
    state_numbers = [_number(metrics_pb2.RunState.DESCRIPTOR, types.RunState, state, "states") for state in states]
    order_number = _number(training_pb2.RunOrder.DESCRIPTOR, types.RunOrder, order, "order")

    def page(token: str) -> Call[Page[types.TrainingRun]]:
        return Call(
            path=TRAINING + "ListTrainingRuns",
            request=training_pb2.ListTrainingRunsRequest(
                states=state_numbers, model_name=model_name, order=order_number, page_token=token
            ),
            response_type=training_pb2.ListTrainingRunsResponse,
            read=lambda response: _page(types.TrainingRun, response.runs, response),
        )

    return page


def get_lr_schedule(
    schedule: types.LearningRateSchedule | None,
    recipe: types.Recipe | None,
    run_id: str | None,
    steps: tuple[int | None, int | None],
    max_points: int | None,
) -> Call[types.LearningRateCurve]:
    """GetLRSchedule of the subject that is not None. Raises InvalidRecipe."""
    if [schedule, recipe, run_id].count(None) != 2:
        description = "exactly one of schedule, recipe and run_id must be given"
        violation = Violation(field="subject", description=description, reason="REQUIRED")
        raise InvalidRequest(f"subject: {description}", violations=[violation])
    # Zero is the wire's "default".
    first_step, last_step = (step or 0 for step in steps)
    request = training_pb2.GetLRScheduleRequest(first_step=first_step, last_step=last_step, max_points=max_points or 0)
    if schedule is not None:
        request.schedule.SetInParent()
        _fill(schedule, request.schedule, "schedule", InvalidRecipe)
    if recipe is not None:
        request.recipe.SetInParent()
        _fill(recipe, request.recipe, "recipe", InvalidRecipe)
    if run_id is not None:
        request.run_id = run_id
    return Call(
        path=TRAINING + "GetLRSchedule",
        request=request,
        response_type=training_pb2.GetLRScheduleResponse,
        read=lambda response: from_message(types.LearningRateCurve, response),
    )


def stream_metrics(run_id: str, after_sequence: int, history_only: bool) -> Call[types.MetricRecord | types.Heartbeat]:
    """StreamMetrics; each response is a record or a heartbeat."""
    return Call(
        path=TRAINING + "StreamMetrics",
        request=training_pb2.StreamMetricsRequest(
            run_id=run_id, after_sequence=after_sequence, history_only=history_only
        ),
        response_type=training_pb2.StreamMetricsResponse,
        read=_stream_item,
    )


# --- Corpora ----------------------------------------------------------------------------------------------------------


def upload_corpus(
    display_name: str, source_language: str, target_language: str, request_id: str | None
) -> Call[types.Corpus]:
    """UploadCorpus; the call's request is the header."""
    header = corpus_pb2.UploadHeader(
        request_id=request_id or str(uuid4()),
        display_name=display_name,
        source_language=source_language,
        target_language=target_language,
    )
    return Call(
        path=CORPUS + "UploadCorpus",
        request=corpus_pb2.UploadCorpusRequest(header=header),
        response_type=corpus_pb2.UploadCorpusResponse,
        read=_corpus,
    )


def upload_requests(call: Call[types.Corpus], pieces: Iterable[Piece], failures: list[Exception]) -> Iterator[Message]:
    """Yield all requests of an upload: the header, then the text, piece by piece.

    What reading a piece raises is put into `failures`. gRPC would log it and cancel the call, and a server may take a
    cancelled upload for a complete one; a last request without any item makes it refuse the upload instead.
    """
    yield call.request
    try:
        yield from map(_upload_request, pieces)
    except Exception as error:  # noqa: BLE001 (whatever the caller's files or iterable raise, the caller gets it back)
        failures.append(error)
        yield corpus_pb2.UploadCorpusRequest()


def _upload_request(piece: Piece) -> Message:
    split = corpus_pb2.SPLIT_TRAIN if piece.split == "train" else corpus_pb2.SPLIT_VALIDATION
    if piece.side is None:
        pairs = [corpus_pb2.SentencePair(source=source, target=target) for source, target in piece.pairs]
        return corpus_pb2.UploadCorpusRequest(pairs=corpus_pb2.PairBatch(split=split, pairs=pairs))
    side = corpus_pb2.SIDE_SOURCE if piece.side == "source" else corpus_pb2.SIDE_TARGET
    return corpus_pb2.UploadCorpusRequest(chunk=corpus_pb2.FileChunk(split=split, side=side, data=piece.data))


def get_corpus(corpus_id: str) -> Call[types.Corpus]:
    """GetCorpus."""
    request = corpus_pb2.GetCorpusRequest(corpus_id=corpus_id)
    return Call(path=CORPUS + "GetCorpus", request=request, response_type=corpus_pb2.GetCorpusResponse, read=_corpus)


def list_corpora(token: str) -> Call[Page[types.Corpus]]:
    """ListCorpora, the page of the token."""
    return Call(
        path=CORPUS + "ListCorpora",
        request=corpus_pb2.ListCorporaRequest(page_token=token),
        response_type=corpus_pb2.ListCorporaResponse,
        read=lambda response: _page(types.Corpus, response.corpora, response),
    )


# --- Models -----------------------------------------------------------------------------------------------------------


def list_models(token: str) -> Call[Page[types.Model]]:
    """ListModels, the page of the token."""
    return Call(
        path=MODEL + "ListModels",
        request=model_pb2.ListModelsRequest(page_token=token),
        response_type=model_pb2.ListModelsResponse,
        read=lambda response: _page(types.Model, response.models, response),
    )


def get_model(model: str) -> Call[types.ModelDetails]:
    """GetModel."""
    return Call(
        path=MODEL + "GetModel",
        request=model_pb2.GetModelRequest(model=model),
        response_type=model_pb2.GetModelResponse,
        read=lambda response: from_message(types.ModelDetails, response),
    )


def set_model_alias(name: str, alias: str, version: int) -> Call[types.Model]:
    """SetModelAlias."""
    return Call(
        path=MODEL + "SetModelAlias",
        request=model_pb2.SetModelAliasRequest(name=name, alias=alias, version=version),
        response_type=model_pb2.SetModelAliasResponse,
        read=lambda response: from_message(types.Model, response.model),
    )


def delete_model_alias(name: str, alias: str) -> Call[None]:
    """DeleteModelAlias."""
    return Call(
        path=MODEL + "DeleteModelAlias",
        request=model_pb2.DeleteModelAliasRequest(name=name, alias=alias),
        response_type=model_pb2.DeleteModelAliasResponse,
        read=lambda _: None,
    )


def delete_model_version(model: str) -> Call[None]:
    """DeleteModelVersion."""
    return Call(
        path=MODEL + "DeleteModelVersion",
        request=model_pb2.DeleteModelVersionRequest(model=model),
        response_type=model_pb2.DeleteModelVersionResponse,
        read=lambda _: None,
    )


def download_model(model: str) -> Call[types.DownloadHeader | types.DownloadChunk]:
    """DownloadModel; the first response is the header."""
    return Call(
        path=MODEL + "DownloadModel",
        request=model_pb2.DownloadModelRequest(model=model),
        response_type=model_pb2.DownloadModelResponse,
        read=_download_item,
    )


def load_model(model: str) -> Call[types.LoadedModel]:
    """LoadModel."""
    return Call(
        path=MODEL + "LoadModel",
        request=model_pb2.LoadModelRequest(model=model),
        response_type=model_pb2.LoadModelResponse,
        read=lambda response: from_message(types.LoadedModel, response.loaded_model),
    )


def unload_model(model: str) -> Call[bool]:
    """UnloadModel."""
    return Call(
        path=MODEL + "UnloadModel",
        request=model_pb2.UnloadModelRequest(model=model),
        response_type=model_pb2.UnloadModelResponse,
        read=lambda response: bool(response.was_loaded),
    )


def list_loaded_models() -> Call[list[types.LoadedModel]]:
    """ListLoadedModels."""
    return Call(
        path=MODEL + "ListLoadedModels",
        request=model_pb2.ListLoadedModelsRequest(),
        response_type=model_pb2.ListLoadedModelsResponse,
        read=lambda response: [from_message(types.LoadedModel, message) for message in response.loaded_models],
    )


# --- Translation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of a translation; the names are those of TranslateOptions."""

    beam_size: int | None = None
    n_best: int | None = None
    length_penalty: float | None = None
    max_length: int | None = None
    max_length_ratio: float | None = None
    min_length: int | None = None
    patience: float | None = None
    early_stopping: types.EarlyStopping | str | None = None
    sampling: types.Sampling | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    return_token_scores: bool | None = None
    return_alignment: bool | None = None


def translate(
    model: str,
    sentences: str | Sequence[str],
    target_prefixes: Sequence[str],
    split_sentences: bool,
    options: types.TranslateOptions,
) -> Call[types.TranslationResult]:
    """Translate; a single string is one sentence. Raises InvalidRequest."""
    request = translation_pb2.TranslateRequest(
        model=model,
        sentences=[sentences] if isinstance(sentences, str) else sentences,
        target_prefixes=[target_prefixes] if isinstance(target_prefixes, str) else target_prefixes,
        split_sentences=split_sentences,
    )
    _fill(SearchOptions(**options), request.options, "options", InvalidRequest)
    return Call(
        path=TRANSLATION + "Translate",
        request=request,
        response_type=translation_pb2.TranslateResponse,
        read=lambda response: from_message(types.TranslationResult, response),
    )


def translate_stream(
    model: str, split_sentences: bool, window: int | None, options: types.TranslateOptions
) -> Call[types.StreamTranslateResponse]:
    """StreamTranslate; the call's request is the configuration. Raises InvalidRequest."""
    request = translation_pb2.StreamTranslateRequest()
    config = request.config
    config.model, config.split_sentences = model, split_sentences
    if window is not None:
        config.window = window
    _fill(SearchOptions(**options), config.options, "config.options", InvalidRequest)
    return Call(
        path=TRANSLATION + "StreamTranslate",
        request=request,
        response_type=translation_pb2.StreamTranslateResponse,
        read=lambda response: from_message(types.StreamTranslateResponse, response),
    )


def stream_of_version(call: Call[types.StreamTranslateResponse], version: str) -> Call[types.StreamTranslateResponse]:
    """Return the same call of StreamTranslate with exactly this version, "name/7"."""
    request = translation_pb2.StreamTranslateRequest.FromString(encode(call.request))
    request.config.model = version
    return dataclasses.replace(call, request=request)


def stream_sentences(sentences: Iterable[types.StreamSentence]) -> Message:
    """Return a further request of StreamTranslate."""
    wire = [
        translation_pb2.StreamSentence(id=item.id, sentence=item.sentence, target_prefix=item.target_prefix)
        for item in sentences
    ]
    return translation_pb2.StreamTranslateRequest(sentences=translation_pb2.StreamSentences(sentences=wire))


# --- Reading and writing ----------------------------------------------------------------------------------------------


def record_from_message(message: metrics_pb2.MetricRecord) -> types.MetricRecord:
    """Return the record. A payload that is news to this client becomes an event that says so."""
    kind = message.WhichOneof("payload")
    payload: types.MetricPayload = (
        from_message(_PAYLOADS[kind], getattr(message, kind))
        if kind is not None
        else types.RunEvent(
            level=types.EventLevel.INFO, code="UNKNOWN_RECORD", message="a newer client can read this record"
        )
    )
    time = message.time.ToDatetime(tzinfo=UTC)
    return types.MetricRecord(sequence=message.sequence, time=time, payload=payload)


def record_to_message(record: types.MetricRecord) -> metrics_pb2.MetricRecord:
    """Return the message that `record_from_message` reads."""
    message = metrics_pb2.MetricRecord(sequence=record.sequence)
    message.time.FromDatetime(record.time)
    kind = next(name for name, cls in _PAYLOADS.items() if isinstance(record.payload, cls))
    part = getattr(message, kind)
    part.SetInParent()
    violations = fill_message(record.payload, part)
    assert not violations, violations
    return message


_PAYLOADS: Final[dict[str, type[types.MetricPayload]]] = {
    "step": types.StepMetrics,
    "validation": types.ValidationMetrics,
    "state_change": types.StateChange,
    "event": types.RunEvent,
    "decay_plan": types.DecayPlan,
}


def _fill(value: object, message: Message, path: str, error: type[InvalidArgument]) -> None:
    if violations := fill_message(value, message, path):
        raise error(f"{violations[0].field}: {violations[0].description}", violations=violations)


def _number(descriptor: EnumDescriptor, cls: type[StrEnum], word: str, field: str) -> Any:  # noqa: ANN401 (any enum)
    number = enum_number(descriptor, word)
    if number is None:
        legal = ", ".join(member for member in cls if member != "unknown")
        violation = Violation(
            field=field, description=f"is {str(word)!r}, must be one of {legal}", reason="OUT_OF_RANGE"
        )
        raise InvalidRequest(f"{field}: {violation.description}", violations=[violation])
    return number


def _run(response: Any) -> types.TrainingRun:  # noqa: ANN401 (three responses hold a run)
    return from_message(types.TrainingRun, response.run)


def _corpus(response: Any) -> types.Corpus:  # noqa: ANN401 (two responses hold a corpus)
    return from_message(types.Corpus, response.corpus)


def _page(cls: type[T], messages: Iterable[Message], response: Any) -> Page[T]:  # noqa: ANN401
    return Page(items=[from_message(cls, message) for message in messages], next_page_token=response.next_page_token)


def _download_item(response: model_pb2.DownloadModelResponse) -> types.DownloadHeader | types.DownloadChunk:
    if response.HasField("header"):
        return from_message(types.DownloadHeader, response.header)
    return from_message(types.DownloadChunk, response.chunk)


def _stream_item(response: training_pb2.StreamMetricsResponse) -> types.MetricRecord | types.Heartbeat:
    if response.HasField("heartbeat"):
        return from_message(types.Heartbeat, response.heartbeat)
    return record_from_message(response.record)
