"""TranslationService."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import grpc

from ferryman.v1 import translation_pb2, translation_pb2_grpc
from ferryman_service.application.translating import StreamRequest, TranslateResult, TranslationUseCases
from ferryman_service.application.translation_stream import StreamResult, TranslationStream
from ferryman_service.domain.errors import QueueFull
from ferryman_service.domain.models import ModelVersion
from ferryman_service.domain.threads import Threads
from ferryman_service.domain.translation import Hypothesis, Translation
from ferryman_service.observability.translation import TranslationMetrics
from ferryman_service.rpc import convert
from ferryman_service.rpc.messages import DEFAULT_THREADS
from ferryman_service.rpc.peers import peer_host
from ferryman_service.rpc.shutdown import Shutdown
from ferryman_service.rpc.translation_watch import DEFAULT_WATCH, TranslationWatch

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
ACCEPTED_KEY: Final = "ferryman-model"
"""The initial metadata of a stream whose configuration is accepted: the version that translates."""
_QUICK_PARTS: Final = 256
"""What an event loop can afford to convert."""
_Requests: TypeAlias = "AsyncIterator[translation_pb2.StreamTranslateRequest]"
_Responses: TypeAlias = "Iterator[translation_pb2.StreamTranslateResponse]"


class TranslationServicer(translation_pb2_grpc.TranslationServiceServicer):
    """Adapts TranslationUseCases; see the contract for what each call means."""

    def __init__(
        self,
        use_cases: TranslationUseCases,
        metrics: TranslationMetrics,
        shutdown: Shutdown,
        watch: TranslationWatch = DEFAULT_WATCH,
        threads: Threads = DEFAULT_THREADS,
    ) -> None:
        """Store; `threads` build what is large."""
        self._use_cases = use_cases
        self._metrics = metrics
        self._shutdown = shutdown
        self._watch = watch
        self._threads = threads

    async def Translate(
        self, request: translation_pb2.TranslateRequest, context: Context
    ) -> translation_pb2.TranslateResponse:
        """Translate sentences; the caller's deadline and cancellation end the work."""
        work = convert.translate_request_from_wire(request, context.time_remaining())
        self._watch.model_named(work.model)
        self._watch.sentences_read(work.sentences)
        with self._metrics.in_flight("Translate"):
            try:
                result = await self._use_cases.translate(work, peer_host(context.peer()))
            except QueueFull:
                self._metrics.rejected()
                raise
        self._watch.call_translated(result)
        self._metrics.observe_call(result.timings, result.mean_batch_rows)
        if _parts(result.translations) + len(result.sentences) <= _QUICK_PARTS:
            return self._answer(result)
        return await self._threads.run(self._answer, result)

    async def StreamTranslate(
        self, requests: _Requests, context: Context
    ) -> AsyncIterator[translation_pb2.StreamTranslateResponse]:
        """Translate sentences as they come, until the caller half-closes and all are translated."""
        messages = aiter(requests)
        async with self._shutdown.ends_wait():
            first = await anext(messages, None)
        work = convert.stream_request_from_wire(first, context.time_remaining())
        self._watch.model_named(work.model)
        with self._metrics.in_flight("StreamTranslate"), self._watch.stream() as watch:
            opened = self._use_cases.stream(work, peer_host(context.peer()))
            async with opened as stream, _reading(messages, work, stream, self._watch):
                watch.accepted(stream.version)
                await context.send_initial_metadata(((ACCEPTED_KEY, stream.version.reference),))
                while True:
                    async with self._shutdown.ends_wait():
                        results = await stream.results()
                    if not results:
                        return
                    watch.translated(results)
                    responses = self._responses(stream.version, results)
                    while response := await self._next(responses, _parts_of_results(results)):
                        yield response

    async def _next(self, responses: _Responses, parts: int) -> translation_pb2.StreamTranslateResponse | None:
        if parts <= _QUICK_PARTS:
            return next(responses, None)
        return await self._threads.run(next, responses, None)

    def _answer(self, result: TranslateResult) -> translation_pb2.TranslateResponse:
        self._metrics.observe_sentences(result.translations, result.sentences)
        return convert.result_to_wire(result)

    def _responses(self, version: ModelVersion, results: Sequence[StreamResult]) -> _Responses:
        for result in results:
            translations = [result.outcome] if isinstance(result.outcome, Translation) else []
            self._metrics.observe_sentences(translations, result.timings)
        yield from convert.stream_responses_to_wire(version, results)


def _parts(translations: Iterable[Translation]) -> int:
    """Return how many parts the translations have on the wire, about; to convert a hundred takes a millisecond."""
    return sum(1 + len(each.source_pieces) + sum(map(_hypothesis_parts, each.hypotheses)) for each in translations)


def _parts_of_results(results: Sequence[StreamResult]) -> int:
    translations = [each.outcome for each in results if isinstance(each.outcome, Translation)]
    return _parts(translations) + sum(len(each.timings) for each in results)


def _hypothesis_parts(hypothesis: Hypothesis) -> int:
    return 1 + len(hypothesis.pieces)


@contextlib.asynccontextmanager
async def _reading(
    messages: _Requests, work: StreamRequest, stream: TranslationStream, watch: TranslationWatch
) -> AsyncIterator[None]:
    """Read the caller's messages beside the block, each only when the window has room for a sentence."""

    async def read() -> None:
        try:
            await stream.wait_for_room()
            async for message in messages:
                sentences = convert.stream_sentences_from_wire(message, split_sentences=work.split_sentences)
                watch.sentences_read(sentence.sentence for sentence in sentences)
                await stream.put(sentences)
                await stream.wait_for_room()
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends the stream, in the task that writes)
            stream.end_input(error)
        else:
            stream.end_input()

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
