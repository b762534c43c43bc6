"""Builds requests from arguments and reads responses into dataclasses, for both clients.

A `Call` holds the RPC, its request, and the conversion of its response; the clients make it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from enum import StrEnum
from typing import Any, Final, Generic, TypeAlias, TypeVar
from uuid import uuid4

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from ferryman import types
from ferryman._checks import LARGEST_REQUEST_BYTES, raise_any
from ferryman._mapping import enum_number, fill_fields, fill_message, fill_part, from_message, is_iterable, wrong
from ferryman._upload import CorpusText, Piece, text_violations
from ferryman.errors import InvalidRecipe, InvalidRequest, InvalidSentence, UnknownOption, Violation
from ferryman.v1 import corpus_pb2, metrics_pb2, model_pb2, training_pb2, translation_pb2

T = TypeVar("T")
M = TypeVar("M", bound=Message)

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

    def __post_init__(self) -> None:
        """Raises InvalidRequest for a request above the service's limit; gRPC's own error would not name the cause."""
        size = self.request.ByteSize()
        if size > LARGEST_REQUEST_BYTES:
            text = f"has {size:,} bytes, may have {LARGEST_REQUEST_BYTES:,} at most: is an argument far too long?"
            raise_any([Violation(field="request", description=text, reason="REQUEST_TOO_LARGE")])


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """One page of a list; `next_page_token` is empty on the last."""

    items: Sequence[T]
    next_page_token: str


Pages = Callable[[str], Call[Page[T]]]
"""A list: from a page token to the call that fetches the page."""


WireSentence: TypeAlias = translation_pb2.StreamSentence
"""A sentence of a stream as it is sent."""


def encode(message: Message) -> bytes:
    """Return the bytes of a request."""
    return message.SerializeToString()


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """Options of StartTraining; the names are those of StartTrainingRequest."""

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
    request = training_pb2.StartTrainingRequest()
    violations = fill_fields(request, {"corpus_id": corpus_id, "model_name": model_name})
    violations += fill_message(options, request)
    request.request_id = request.request_id or str(uuid4())
    in_recipe = [] if recipe is None else fill_part(types.Recipe, recipe, request.recipe, "recipe")
    raise_any(violations + in_recipe, InvalidRecipe if in_recipe else InvalidRequest)
    return Call(
        path=TRAINING + "StartTraining", request=request, response_type=training_pb2.StartTrainingResponse, read=_run
    )


def get_training_run(run_id: str) -> Call[types.TrainingRun]:
    """GetTrainingRun."""
    request = _request(training_pb2.GetTrainingRunRequest, run_id=run_id)
    return Call(
        path=TRAINING + "GetTrainingRun", request=request, response_type=training_pb2.GetTrainingRunResponse, read=_run
    )


def cancel_training(run_id: str) -> Call[types.TrainingRun]:
    """CancelTraining."""
    request = _request(training_pb2.CancelTrainingRequest, run_id=run_id)
    return Call(
        path=TRAINING + "CancelTraining", request=request, response_type=training_pb2.CancelTrainingResponse, read=_run
    )


def pause_training(run_id: str) -> Call[types.TrainingRun]:
    """PauseTraining."""
    request = _request(training_pb2.PauseTrainingRequest, run_id=run_id)
    return Call(
        path=TRAINING + "PauseTraining", request=request, response_type=training_pb2.PauseTrainingResponse, read=_run
    )


def resume_training(run_id: str) -> Call[types.TrainingRun]:
    """ResumeTraining."""
    request = _request(training_pb2.ResumeTrainingRequest, run_id=run_id)
    return Call(
        path=TRAINING + "ResumeTraining", request=request, response_type=training_pb2.ResumeTrainingResponse, read=_run
    )


def list_checkpoints(run_id: str) -> Call[list[types.Checkpoint]]:
    """ListCheckpoints."""
    return Call(
        path=TRAINING + "ListCheckpoints",
        request=_request(training_pb2.ListCheckpointsRequest, run_id=run_id),
        response_type=training_pb2.ListCheckpointsResponse,
        read=lambda response: [from_message(types.Checkpoint, message) for message in response.checkpoints],
    )


def delete_training_run(run_id: str) -> Call[None]:
    """DeleteTrainingRun."""
    return Call(
        path=TRAINING + "DeleteTrainingRun",
        request=_request(training_pb2.DeleteTrainingRunRequest, run_id=run_id),
        response_type=training_pb2.DeleteTrainingRunResponse,
        read=lambda _: None,
    )


def list_training_runs(
    states: Iterable[types.RunState | str], model_name: str, order: types.RunOrder | str
) -> Pages[types.TrainingRun]:
    """ListTrainingRuns. Raises InvalidRequest for an unknown state or order."""
    filled = training_pb2.ListTrainingRunsRequest()
    violations: list[Violation] = []
    if isinstance(states, str | bytes | Mapping) or not is_iterable(states):
        violations.append(wrong("states", states, 'a list of states, such as ["queued"]'))
    else:
        for index, state in enumerate(states):
            field = f"states[{index}]"
            filled.states.append(_number(metrics_pb2.RunState.DESCRIPTOR, types.RunState, state, field, violations))
    filled.order = _number(training_pb2.RunOrder.DESCRIPTOR, types.RunOrder, order, "order", violations)
    raise_any(violations + fill_fields(filled, _given(model_name=model_name)))

    def page(token: str) -> Call[Page[types.TrainingRun]]:
        request = training_pb2.ListTrainingRunsRequest()
        request.CopyFrom(filled)
        request.page_token = token
        return Call(
            path=TRAINING + "ListTrainingRuns",
            request=request,
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
    """GetLRSchedule of the subject that is not None. Raises InvalidRecipe, InvalidRequest."""
    request = training_pb2.GetLRScheduleRequest()
    violations: list[Violation] = []
    if [schedule, recipe, run_id].count(None) != 2:
        description = "exactly one of schedule, recipe and run_id must be given"
        violations.append(Violation(field="subject", description=description, reason="REQUIRED"))
    first, last = steps
    given = _given(first_step=first, last_step=last, max_points=max_points, run_id=run_id)
    violations += fill_fields(request, given)
    in_recipe: list[Violation] = []
    if schedule is not None:
        in_recipe += fill_part(types.LearningRateSchedule, schedule, request.schedule, "schedule")
    if recipe is not None:
        in_recipe += fill_part(types.Recipe, recipe, request.recipe, "recipe")
    raise_any(violations + in_recipe, InvalidRecipe if in_recipe else InvalidRequest)
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
        request=_request(
            training_pb2.StreamMetricsRequest, run_id=run_id, after_sequence=after_sequence, history_only=history_only
        ),
        response_type=training_pb2.StreamMetricsResponse,
        read=_stream_item,
    )


# --- Corpora ----------------------------------------------------------------------------------------------------------


def upload_corpus(
    display_name: str,
    source_language: str,
    target_language: str,
    request_id: str | None,
    *,
    train: CorpusText,
    validation: CorpusText,
) -> Call[types.Corpus]:
    """UploadCorpus; the call's request is the header. Raises InvalidRequest, also for texts of another shape."""
    header = corpus_pb2.UploadHeader()
    fields = {
        "request_id": str(uuid4()) if request_id is None or request_id == "" else request_id,
        "display_name": display_name,
        "source_language": source_language,
        "target_language": target_language,
    }
    raise_any(fill_fields(header, fields) + text_violations(train, validation))
    return Call(
        path=CORPUS + "UploadCorpus",
        request=corpus_pb2.UploadCorpusRequest(header=header),
        response_type=corpus_pb2.UploadCorpusResponse,
        read=_corpus,
    )


def upload_requests(call: Call[types.Corpus], pieces: Iterable[Piece], failures: list[Exception]) -> Iterator[Message]:
    """Yield all requests of an upload: the header, then the text, piece by piece.

    An exception of `pieces` is appended to `failures`. gRPC would log it and cancel the call, and a server may mistake
    a cancelled upload for a complete one; so a last request without an item makes it refuse the upload.
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
    request = _request(corpus_pb2.GetCorpusRequest, corpus_id=corpus_id)
    return Call(path=CORPUS + "GetCorpus", request=request, response_type=corpus_pb2.GetCorpusResponse, read=_corpus)


def delete_corpus(corpus_id: str) -> Call[None]:
    """DeleteCorpus."""
    return Call(
        path=CORPUS + "DeleteCorpus",
        request=_request(corpus_pb2.DeleteCorpusRequest, corpus_id=corpus_id),
        response_type=corpus_pb2.DeleteCorpusResponse,
        read=lambda _: None,
    )


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
        request=_request(model_pb2.GetModelRequest, model=model),
        response_type=model_pb2.GetModelResponse,
        read=lambda response: from_message(types.ModelDetails, response),
    )


def set_model_alias(name: str, alias: str, version: int) -> Call[types.Model]:
    """SetModelAlias."""
    return Call(
        path=MODEL + "SetModelAlias",
        request=_request(model_pb2.SetModelAliasRequest, name=name, alias=alias, version=version),
        response_type=model_pb2.SetModelAliasResponse,
        read=lambda response: from_message(types.Model, response.model),
    )


def delete_model_alias(name: str, alias: str) -> Call[None]:
    """DeleteModelAlias."""
    return Call(
        path=MODEL + "DeleteModelAlias",
        request=_request(model_pb2.DeleteModelAliasRequest, name=name, alias=alias),
        response_type=model_pb2.DeleteModelAliasResponse,
        read=lambda _: None,
    )


def delete_model_version(model: str) -> Call[None]:
    """DeleteModelVersion."""
    return Call(
        path=MODEL + "DeleteModelVersion",
        request=_request(model_pb2.DeleteModelVersionRequest, model=model),
        response_type=model_pb2.DeleteModelVersionResponse,
        read=lambda _: None,
    )


def download_model(model: str) -> Call[types.DownloadHeader | types.DownloadChunk]:
    """DownloadModel; the first response is the header."""
    return Call(
        path=MODEL + "DownloadModel",
        request=_request(model_pb2.DownloadModelRequest, model=model),
        response_type=model_pb2.DownloadModelResponse,
        read=_download_item,
    )


def load_model(model: str) -> Call[types.LoadedModel]:
    """LoadModel."""
    return Call(
        path=MODEL + "LoadModel",
        request=_request(model_pb2.LoadModelRequest, model=model),
        response_type=model_pb2.LoadModelResponse,
        read=lambda response: from_message(types.LoadedModel, response.loaded_model),
    )


def unload_model(model: str) -> Call[bool]:
    """UnloadModel."""
    return Call(
        path=MODEL + "UnloadModel",
        request=_request(model_pb2.UnloadModelRequest, model=model),
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
    beam_patience: float | None = None
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
    request = translation_pb2.TranslateRequest()
    prefixes = [target_prefixes] if isinstance(target_prefixes, str) else target_prefixes
    fields = {
        "model": model,
        "sentences": [sentences] if isinstance(sentences, str) else sentences,
        **_given(target_prefixes=prefixes, split_sentences=split_sentences),
    }
    violations = fill_fields(request, fields)
    violations += fill_message(_search_options(options), request.options, "options")
    raise_any(violations or _size_violations(request))
    return Call(
        path=TRANSLATION + "Translate",
        request=request,
        response_type=translation_pb2.TranslateResponse,
        read=lambda response: from_message(types.TranslationResult, response),
    )


def _search_options(options: types.TranslateOptions) -> SearchOptions:
    legal = [field.name for field in dataclasses.fields(SearchOptions)]
    if unknown := [name for name in options if name not in legal]:
        text = f"is no option of a translation; the options are {', '.join(legal)}"
        raise_any([Violation(field=name, description=text, reason="UNKNOWN_FIELD") for name in unknown], UnknownOption)
    return SearchOptions(**options)


def _size_violations(request: translation_pb2.TranslateRequest) -> list[Violation]:
    """Return what makes the request larger than the service takes: sentences that fit no request, or all together."""
    total = request.ByteSize()
    if total <= LARGEST_REQUEST_BYTES:
        return []
    limit = f"a request may have {LARGEST_REQUEST_BYTES:,}"
    sizes = [(index, len(sentence.encode())) for index, sentence in enumerate(request.sentences)]
    if too_large := [(index, size) for index, size in sizes if size > LARGEST_REQUEST_BYTES]:
        return [
            Violation(
                field=f"sentences[{index}]",
                description=f"has {size:,} bytes, {limit}: send the text in parts",
                reason="REQUEST_TOO_LARGE",
            )
            for index, size in too_large
        ]
    text = f"have {total:,} bytes together, {limit}: send them in several calls, or use translate_stream"
    return [Violation(field="sentences", description=text, reason="REQUEST_TOO_LARGE")]


def translate_stream(
    model: str, split_sentences: bool, window: int | None, options: types.TranslateOptions
) -> Call[types.StreamTranslateResponse]:
    """StreamTranslate; the call's request is the configuration. Raises InvalidRequest."""
    request = translation_pb2.StreamTranslateRequest()
    config = request.config
    violations = fill_fields(config, {"model": model, **_given(split_sentences=split_sentences, window=window)})
    violations += fill_message(_search_options(options), config.options, "options")
    # On the wire they are below "config", of which the caller knows nothing.
    raise_any(violations)
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


def stream_sentence(item: types.StreamSentence, number: int) -> WireSentence:
    """Return a sentence of a stream as the wire has it, under its number. Raises InvalidSentence if no request can hold
    it: it is no UTF-8 text, or larger than the service takes."""
    wire = translation_pb2.StreamSentence(id=str(number))
    for name, text in (("sentence", item.sentence), ("target_prefix", item.target_prefix)):
        if violations := fill_fields(wire, {name: text}):
            description = "is not UTF-8 text: it holds half of a surrogate pair"
            raise_any([dataclasses.replace(violations[0], description=description, reason="NOT_UTF8")], InvalidSentence)
    size = stream_sentences([wire]).ByteSize()
    if size > LARGEST_REQUEST_BYTES:
        text = f"has {size:,} bytes, a request may have {LARGEST_REQUEST_BYTES:,}: send the text in parts"
        raise_any([Violation(field="sentence", description=text, reason="REQUEST_TOO_LARGE")], InvalidSentence)
    return wire


def stream_sentences(sentences: Iterable[WireSentence]) -> Message:
    """Return a further request of StreamTranslate."""
    return translation_pb2.StreamTranslateRequest(sentences=translation_pb2.StreamSentences(sentences=sentences))


# --- Reading and writing ----------------------------------------------------------------------------------------------


def record_from_message(message: metrics_pb2.MetricRecord) -> types.MetricRecord:
    """Return the record. An unknown payload becomes an event that says so."""
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


def _given(**fields: object) -> dict[str, object]:
    """Return the optional fields that are not None, which means the same as their default."""
    return {name: value for name, value in fields.items() if value is not None}


def _request(cls: type[M], **fields: object) -> M:
    """Return the request with the fields; raises InvalidRequest with all that do not fit."""
    request = cls()
    raise_any(fill_fields(request, fields))
    return request


def _number(
    descriptor: EnumDescriptor, cls: type[StrEnum], word: object, field: str, violations: list[Violation]
) -> Any:  # noqa: ANN401 (any enum)
    """Return the number that the word stands for; 0, with a violation, if there is none."""
    number = enum_number(descriptor, word) if isinstance(word, str) else None
    if number is None:
        legal = ", ".join(member for member in cls if member != "unknown")
        violations.append(dataclasses.replace(wrong(field, word, f"one of {legal}"), reason="OUT_OF_RANGE"))
    return number or 0


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
