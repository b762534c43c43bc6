"""The gRPC servicers of the fake service."""

# ruff: noqa: N802  (gRPC names the methods of a servicer)

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from ferryman import errors, types
from ferryman._convert import SearchOptions, record_to_message
from ferryman._mapping import fill_message, from_message
from ferryman._rpc_errors import ACCEPTED_KEY, REQUEST_ID_KEY, status_from_error
from ferryman.testing._backend import Pair, found, model_files
from ferryman.v1 import (
    corpus_pb2,
    corpus_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    translation_pb2,
    translation_pb2_grpc,
)

if TYPE_CHECKING:
    from ferryman.testing._fake import FakeFerryman

T = TypeVar("T")
M = TypeVar("M", bound=Message)

_PAGE_SIZE: Final = 50
_LAST_STEP: Final = 50_000
_HEARTBEAT_INTERVAL_S: Final = 0.1
_CHUNK_BYTES: Final = 1 << 20


def _rpc(method: Callable[[Any, Any, grpc.ServicerContext], M]) -> Callable[[Any, Any, grpc.ServicerContext], M]:
    """Wrap a method with one response: record the call, and convert the SDK's errors to statuses."""

    @functools.wraps(method)
    def answer(self: _Servicer, request: Any, context: grpc.ServicerContext) -> M:  # noqa: ANN401
        try:
            self.fake.record_call(method.__name__)
            return method(self, request, context)
        except errors.FerrymanError as error:
            _abort(context, error)

    return answer


class _Servicer:
    def __init__(self, fake: FakeFerryman) -> None:
        self.fake = fake
        self.backend = fake.backend


class TrainingServicer(_Servicer, training_pb2_grpc.TrainingServiceServicer):
    @_rpc
    def StartTraining(
        self, request: training_pb2.StartTrainingRequest, context: grpc.ServicerContext
    ) -> training_pb2.StartTrainingResponse:
        found(self.backend.corpora, request.corpus_id, errors.CorpusNotFound, "corpus")
        if request.validate_only:
            run = self.backend.new_run(request).run
        else:
            body = training_pb2.StartTrainingRequest()
            body.CopyFrom(request)
            body.ClearField("request_id")
            content = body.SerializeToString(deterministic=True)
            run_id = self.backend.once(request.request_id, content, lambda: self._start(request))
            run = self.backend.run(run_id).run
        return _filled(training_pb2.StartTrainingResponse(), "run", run)

    def _start(self, request: training_pb2.StartTrainingRequest) -> str:
        return self.backend.add_run(request, self.fake.script, self.fake.hold_after)

    def StreamMetrics(
        self, request: training_pb2.StreamMetricsRequest, context: grpc.ServicerContext
    ) -> Iterator[training_pb2.StreamMetricsResponse]:
        try:
            self.fake.record_call("StreamMetrics")
            yield from self._stream(request, context)
        except errors.FerrymanError as error:
            _abort(context, error)

    def _stream(
        self, request: training_pb2.StreamMetricsRequest, context: grpc.ServicerContext
    ) -> Iterator[training_pb2.StreamMetricsResponse]:
        run, sent = self.backend.run(request.run_id), request.after_sequence
        if sent > len(run.records):
            raise errors.SequenceOutOfRange(f"the run has {len(run.records)} records, after_sequence is {sent}")
        while context.is_active():
            with self.backend.changed:
                new, ended = run.records[sent:], run.run.state.is_terminal
                if not (new or ended or request.history_only):
                    self.backend.changed.wait(_HEARTBEAT_INTERVAL_S)
            for record in new:
                yield training_pb2.StreamMetricsResponse(record=record_to_message(record))
            sent += len(new)
            if ended or request.history_only:
                return
            if not new:
                heartbeat = types.Heartbeat(last_sequence=sent, state=run.run.state, interval_s=_HEARTBEAT_INTERVAL_S)
                yield _filled(training_pb2.StreamMetricsResponse(), "heartbeat", heartbeat)

    @_rpc
    def GetLRSchedule(
        self, request: training_pb2.GetLRScheduleRequest, context: grpc.ServicerContext
    ) -> training_pb2.GetLRScheduleResponse:
        if request.HasField("run_id"):
            self.backend.run(request.run_id)
        first, last = request.first_step or 1, request.last_step or _LAST_STEP
        count = min(request.max_points or 1000, last - first + 1)
        steps = [first + (last - first) * i // max(1, count - 1) for i in range(count)]
        points = [types.LearningRatePoint(step=step, learning_rate=self.fake.learning_rate(step)) for step in steps]
        curve = types.LearningRateCurve(
            points=tuple(points),
            schedule=from_message(types.LearningRateSchedule, request.schedule),
            peak=max(points, key=lambda point: point.learning_rate),
        )
        response = training_pb2.GetLRScheduleResponse()
        _checked(fill_message(curve, response))
        return response

    @_rpc
    def GetTrainingRun(
        self, request: training_pb2.GetTrainingRunRequest, context: grpc.ServicerContext
    ) -> training_pb2.GetTrainingRunResponse:
        return _filled(training_pb2.GetTrainingRunResponse(), "run", self.backend.run(request.run_id).run)

    @_rpc
    def ListTrainingRuns(
        self, request: training_pb2.ListTrainingRunsRequest, context: grpc.ServicerContext
    ) -> training_pb2.ListTrainingRunsResponse:
        messages = [
            _filled(training_pb2.GetTrainingRunResponse(), "run", item.run).run for item in self.backend.runs.values()
        ]
        matching = [
            message
            for message in messages
            if (not request.states or message.state in request.states)
            and request.model_name in ("", message.model_name)
        ]
        if request.order != training_pb2.RUN_ORDER_OLDEST_FIRST:
            matching.reverse()
        page, token = _page(matching, request)
        return training_pb2.ListTrainingRunsResponse(runs=page, next_page_token=token)

    @_rpc
    def CancelTraining(
        self, request: training_pb2.CancelTrainingRequest, context: grpc.ServicerContext
    ) -> training_pb2.CancelTrainingResponse:
        return _filled(training_pb2.CancelTrainingResponse(), "run", self.backend.cancel(request.run_id))

    @_rpc
    def PauseTraining(
        self, request: training_pb2.PauseTrainingRequest, context: grpc.ServicerContext
    ) -> training_pb2.PauseTrainingResponse:
        return _filled(training_pb2.PauseTrainingResponse(), "run", self.backend.pause(request.run_id))

    @_rpc
    def ResumeTraining(
        self, request: training_pb2.ResumeTrainingRequest, context: grpc.ServicerContext
    ) -> training_pb2.ResumeTrainingResponse:
        return _filled(training_pb2.ResumeTrainingResponse(), "run", self.backend.resume(request.run_id))

    @_rpc
    def ListCheckpoints(
        self, request: training_pb2.ListCheckpointsRequest, context: grpc.ServicerContext
    ) -> training_pb2.ListCheckpointsResponse:
        response = training_pb2.ListCheckpointsResponse()
        for checkpoint in self.backend.checkpoints(request.run_id):
            _checked(fill_message(checkpoint, response.checkpoints.add()))
        return response

    @_rpc
    def DeleteTrainingRun(
        self, request: training_pb2.DeleteTrainingRunRequest, context: grpc.ServicerContext
    ) -> training_pb2.DeleteTrainingRunResponse:
        self.backend.delete(request.run_id)
        return training_pb2.DeleteTrainingRunResponse()


class CorpusServicer(_Servicer, corpus_pb2_grpc.CorpusServiceServicer):
    @_rpc
    def UploadCorpus(
        self, request_iterator: Iterator[corpus_pb2.UploadCorpusRequest], context: grpc.ServicerContext
    ) -> corpus_pb2.UploadCorpusResponse:
        header = next(request_iterator).header
        pairs = _read_upload(request_iterator)
        body = repr((header.display_name, header.source_language, header.target_language, pairs)).encode()
        corpus_id = self.backend.once(header.request_id, body, lambda: self.backend.add_corpus(header, pairs))
        return _filled(corpus_pb2.UploadCorpusResponse(), "corpus", self.backend.corpora[corpus_id])

    @_rpc
    def GetCorpus(
        self, request: corpus_pb2.GetCorpusRequest, context: grpc.ServicerContext
    ) -> corpus_pb2.GetCorpusResponse:
        corpus = found(self.backend.corpora, request.corpus_id, errors.CorpusNotFound, "corpus")
        return _filled(corpus_pb2.GetCorpusResponse(), "corpus", corpus)

    @_rpc
    def ListCorpora(
        self, request: corpus_pb2.ListCorporaRequest, context: grpc.ServicerContext
    ) -> corpus_pb2.ListCorporaResponse:
        page, token = _page(list(self.backend.corpora.values())[::-1], request)
        corpora = [_filled(corpus_pb2.GetCorpusResponse(), "corpus", corpus).corpus for corpus in page]
        return corpus_pb2.ListCorporaResponse(corpora=corpora, next_page_token=token)

    @_rpc
    def DeleteCorpus(
        self, request: corpus_pb2.DeleteCorpusRequest, context: grpc.ServicerContext
    ) -> corpus_pb2.DeleteCorpusResponse:
        self.backend.delete_corpus(request.corpus_id)
        return corpus_pb2.DeleteCorpusResponse()


class ModelServicer(_Servicer, model_pb2_grpc.ModelServiceServicer):
    @_rpc
    def ListModels(
        self, request: model_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListModelsResponse:
        page, token = _page(sorted(self.backend.models), request)
        models = [_filled(model_pb2.GetModelResponse(), "model", self.backend.model(name)).model for name in page]
        return model_pb2.ListModelsResponse(models=models, next_page_token=token)

    @_rpc
    def GetModel(self, request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        version = self.backend.version(request.model)
        response = _filled(model_pb2.GetModelResponse(), "model", self.backend.model(version.name))
        return _filled(response, "version", version)

    @_rpc
    def SetModelAlias(
        self, request: model_pb2.SetModelAliasRequest, context: grpc.ServicerContext
    ) -> model_pb2.SetModelAliasResponse:
        model = self.backend.set_alias(request.name, request.alias, request.version)
        return _filled(model_pb2.SetModelAliasResponse(), "model", model)

    @_rpc
    def DeleteModelAlias(
        self, request: model_pb2.DeleteModelAliasRequest, context: grpc.ServicerContext
    ) -> model_pb2.DeleteModelAliasResponse:
        self.backend.delete_alias(request.name, request.alias)
        return model_pb2.DeleteModelAliasResponse()

    @_rpc
    def DeleteModelVersion(
        self, request: model_pb2.DeleteModelVersionRequest, context: grpc.ServicerContext
    ) -> model_pb2.DeleteModelVersionResponse:
        self.backend.delete_version(request.model)
        return model_pb2.DeleteModelVersionResponse()

    def DownloadModel(
        self, request: model_pb2.DownloadModelRequest, context: grpc.ServicerContext
    ) -> Iterator[model_pb2.DownloadModelResponse]:
        try:
            self.fake.record_call("DownloadModel")
            version = self.backend.version(request.model)
        except errors.FerrymanError as error:
            _abort(context, error)
        contents = model_files(version.name, version.version)
        files = tuple(
            types.DownloadFile(name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        )
        header = types.DownloadHeader(version=version, files=files)
        yield _filled(model_pb2.DownloadModelResponse(), "header", header)
        for number, content in enumerate(contents.values()):
            for offset in range(0, len(content), _CHUNK_BYTES):
                data = content[offset : offset + _CHUNK_BYTES]
                yield model_pb2.DownloadModelResponse(
                    chunk=model_pb2.DownloadChunk(file=number, offset=offset, data=data)
                )

    @_rpc
    def LoadModel(
        self, request: model_pb2.LoadModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.LoadModelResponse:
        loaded = self.backend.load(self.backend.version(request.model))
        return _filled(model_pb2.LoadModelResponse(), "loaded_model", loaded)

    @_rpc
    def UnloadModel(
        self, request: model_pb2.UnloadModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.UnloadModelResponse:
        version = self.backend.version(request.model)
        was_loaded = self.backend.loaded.pop(version.reference, None) is not None
        return model_pb2.UnloadModelResponse(was_loaded=was_loaded)

    @_rpc
    def ListLoadedModels(
        self, request: model_pb2.ListLoadedModelsRequest, context: grpc.ServicerContext
    ) -> model_pb2.ListLoadedModelsResponse:
        response = model_pb2.ListLoadedModelsResponse()
        for loaded in reversed(list(self.backend.loaded.values())):
            _checked(fill_message(loaded, response.loaded_models.add()))
        return response


class TranslationServicer(_Servicer, translation_pb2_grpc.TranslationServiceServicer):
    @_rpc
    def Translate(
        self, request: translation_pb2.TranslateRequest, context: grpc.ServicerContext
    ) -> translation_pb2.TranslateResponse:
        version = self.backend.version(request.model)
        self.backend.load(version)
        self.fake.translate_options.append(_set_options(request.options))
        prefixes = request.target_prefixes or [""] * len(request.sentences)
        result = types.TranslationResult(
            model=version.reference,
            translations=tuple(
                self._translation(sentence, prefix, request.options)
                for sentence, prefix in zip(request.sentences, prefixes, strict=True)
            ),
            timings=types.TranslateTimings(
                queue_s=0.0, text_s=0.001, encode_s=0.002, decode_s=0.004, total_s=0.007, steps=5, mean_batch_rows=5.0
            ),
        )
        response = translation_pb2.TranslateResponse()
        _checked(fill_message(result, response))
        return response

    def StreamTranslate(
        self, request_iterator: Iterator[translation_pb2.StreamTranslateRequest], context: grpc.ServicerContext
    ) -> Iterator[translation_pb2.StreamTranslateResponse]:
        """Answer each message with one message in reverse order, since clients must not rely on the order."""
        try:
            # Read the message before a refusal: grpc.aio loses the status of a call that ends while it sends.
            config = next(request_iterator).config
            self.fake.record_call("StreamTranslate")
            version = self.backend.version(config.model)
            self.backend.load(version)
            self.fake.translate_options.append(_set_options(config.options))
        except errors.FerrymanError as error:
            _abort(context, error)
        context.send_initial_metadata(((ACCEPTED_KEY, version.reference),))
        for request in request_iterator:
            results = [self._outcome(sentence, config.options) for sentence in reversed(request.sentences.sentences)]
            answer = types.StreamTranslateResponse(model=version.reference, translations=tuple(results))
            response = translation_pb2.StreamTranslateResponse()
            _checked(fill_message(answer, response))
            yield response

    def _outcome(
        self, item: translation_pb2.StreamSentence, options: translation_pb2.TranslateOptions
    ) -> types.StreamTranslation:
        try:
            translation = self._translation(item.sentence, item.target_prefix, options)
        except errors.InvalidSentence as error:
            reason = error.violations[0].reason if error.violations else error.reason
            return types.StreamTranslation(id=item.id, error=types.SentenceError(reason=reason, message=error.message))
        return types.StreamTranslation(id=item.id, translation=translation)

    def _translation(self, sentence: str, prefix: str, options: translation_pb2.TranslateOptions) -> types.Translation:
        """Return the requested number of hypotheses, equal except for their scores; one for an empty sentence."""
        text = " ".join(part for part in (prefix, self.fake.translate(sentence) if sentence else "") if part)
        pieces = (*text.split(), "</s>")
        has_pieces = options.return_token_scores or options.return_alignment
        hypotheses = [
            types.Hypothesis(
                text=text,
                score=-0.1 * rank,
                log_probability=-0.1 * rank * len(pieces),
                target_tokens=len(pieces),
                finished=True,
                pieces=pieces if has_pieces else (),
                token_log_probabilities=(-0.1 * rank,) * len(pieces) if options.return_token_scores else (),
                alignment=tuple(range(len(pieces))) if options.return_alignment else (),
            )
            for rank in range(1, ((options.n_best or 1) if sentence else 1) + 1)
        ]
        source = (*sentence.split(), "</s>") if sentence else ()
        return types.Translation(
            hypotheses=tuple(hypotheses), source_tokens=len(source), source_pieces=source if has_pieces else ()
        )


def _set_options(message: translation_pb2.TranslateOptions) -> types.TranslateOptions:
    values = vars(from_message(SearchOptions, message))
    return cast("types.TranslateOptions", {name: value for name, value in values.items() if value is not None})


def _read_upload(requests: Iterable[corpus_pb2.UploadCorpusRequest]) -> dict[str, list[Pair]]:
    """Return the pairs of both splits; raises InvalidCorpus (different line counts), InvalidRequest."""
    names = {corpus_pb2.SPLIT_TRAIN: "train", corpus_pb2.SPLIT_VALIDATION: "validation"}
    pairs: dict[str, list[Pair]] = {name: [] for name in names.values()}
    files: defaultdict[tuple[str, int], bytearray] = defaultdict(bytearray)
    for request in requests:
        if request.HasField("pairs"):
            pairs[names[request.pairs.split]] += [(pair.source, pair.target) for pair in request.pairs.pairs]
        elif request.HasField("chunk"):
            files[names[request.chunk.split], request.chunk.side] += request.chunk.data
        else:
            violation = errors.Violation(
                field="upload_part", description="is missing; set pairs or chunk", reason="REQUIRED"
            )
            raise errors.InvalidRequest("upload_part: is missing; set pairs or chunk", violations=[violation])
    for name in pairs:
        source, target = (
            files[name, side].decode().removesuffix("\n").split("\n") if (name, side) in files else []
            for side in (corpus_pb2.SIDE_SOURCE, corpus_pb2.SIDE_TARGET)
        )
        if len(source) != len(target):
            description = f"has {len(source)} source lines and {len(target)} target lines"
            raise errors.InvalidCorpus(
                f"{name}: {description}", violations=[errors.Violation(field=name, description=description)]
            )
        pairs[name] += zip(source, target, strict=True)
    return pairs


def _page(items: Sequence[T], request: Any) -> tuple[Sequence[T], str]:  # noqa: ANN401 (three kinds of requests)
    start = int(request.page_token or 0)
    end = start + (request.page_size or _PAGE_SIZE)
    return items[start:end], str(end) if end < len(items) else ""


def _filled(response: M, name: str, value: object) -> M:
    part = getattr(response, name)
    part.SetInParent()
    _checked(fill_message(value, part))
    return response


def _checked(violations: Sequence[errors.Violation]) -> None:
    assert not violations, violations


def _abort(context: grpc.ServicerContext, error: errors.FerrymanError) -> NoReturn:
    status = rpc_status.to_status(status_from_error(error))
    request_id = ((REQUEST_ID_KEY, error.request_id),) if error.request_id else ()
    context.set_trailing_metadata((*status.trailing_metadata, *request_id))
    context.abort(status.code, status.details)
    raise AssertionError("abort raises")
