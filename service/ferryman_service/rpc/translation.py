"""TranslationService."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc

from ferryman.v1 import translation_pb2, translation_pb2_grpc
from ferryman_service.application.translating import StreamRequest, TranslationUseCases
from ferryman_service.application.translation_stream import TranslationStream
from ferryman_service.domain.errors import QueueFull
from ferryman_service.domain.translation import Translation
from ferryman_service.observability.translation import TranslationMetrics
from ferryman_service.rpc import convert
from ferryman_service.rpc.shutdown import Shutdown

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
ACCEPTED_KEY: Final = "ferryman-model"
"""The initial metadata of a stream whose configuration is accepted: the version that translates."""
_Requests: TypeAlias = "AsyncIterator[translation_pb2.StreamTranslateRequest]"


class TranslationServicer(translation_pb2_grpc.TranslationServiceServicer):
    """Adapts TranslationUseCases; see the contract for what each call means."""

    def __init__(self, use_cases: TranslationUseCases, metrics: TranslationMetrics, shutdown: Shutdown) -> None:
        self._use_cases = use_cases
        self._metrics = metrics
        self._shutdown = shutdown

    async def Translate(
        self, request: translation_pb2.TranslateRequest, context: Context
    ) -> translation_pb2.TranslateResponse:
        """Translate sentences; the caller's deadline and cancellation end the work."""
        work = convert.translate_request_from_wire(request, context.time_remaining())
        with self._metrics.in_flight("Translate"):
            try:
                result = await self._use_cases.translate(work)
            except QueueFull:
                self._metrics.rejected()
                raise
        self._metrics.observe_call(result.timings, result.mean_batch_rows)
        self._metrics.observe_sentences(result.translations, result.sentences)
        return convert.result_to_wire(result)

    async def StreamTranslate(
        self, requests: _Requests, context: Context
    ) -> AsyncIterator[translation_pb2.StreamTranslateResponse]:
        """Translate sentences as they come, until the caller half-closes and all are translated."""
        messages = aiter(requests)
        async with self._shutdown.ends_wait():
            first = await anext(messages, None)
        work = convert.stream_request_from_wire(first, context.time_remaining())
        with self._metrics.in_flight("StreamTranslate"):
            async with self._use_cases.stream(work) as stream, _reading(messages, work, stream):
                await context.send_initial_metadata(((ACCEPTED_KEY, stream.version.reference),))
                while True:
                    async with self._shutdown.ends_wait():
                        results = await stream.results()
                    if not results:
                        return
                    for result in results:
                        translations = [result.outcome] if isinstance(result.outcome, Translation) else []
                        self._metrics.observe_sentences(translations, result.timings)
                    for response in convert.stream_responses_to_wire(stream.version, results):
                        yield response


@contextlib.asynccontextmanager
async def _reading(messages: _Requests, work: StreamRequest, stream: TranslationStream) -> AsyncIterator[None]:
    """Read the caller's messages beside the block, each only when the window has room for a sentence."""

    async def read() -> None:
        try:
            await stream.wait_for_room()
            async for message in messages:
                await stream.put(convert.stream_sentences_from_wire(message, split_sentences=work.split_sentences))
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
