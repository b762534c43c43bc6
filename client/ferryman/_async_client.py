"""The asynchronous client: the methods of `ferryman.Client`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar, Unpack, overload

import grpc
from google.protobuf.message import Message

from ferryman import _checks, _convert, types
from ferryman._channel import ChannelOptions, channel_options
from ferryman._convert import Call, Pages, encode
from ferryman._download import ModelFolder
from ferryman._rpc_errors import ACCEPTED_KEY, error_from_rpc
from ferryman._stream import Sentence, StreamBuffer, StreamCalls, read_in_thread
from ferryman._tail import MetricsTail
from ferryman._tracing import Metadata, call_span
from ferryman._upload import CorpusText, read_pieces
from ferryman.errors import Unavailable

T = TypeVar("T")


StreamCall: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"


class AsyncClient:
    """A connection to a Ferryman service, for asyncio. Use it in one event loop; close it, or use `async with`.

    Every method has the arguments, results and errors of the method of `ferryman.Client`; docstrings give differences.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 60.0,
        options: ChannelOptions = (),
    ) -> None:
        """See `ferryman.Client`."""
        checked = _checks.check_connection(target, credentials, timeout_s, options)
        self._target = target
        self._timeout_s = float(timeout_s)
        self._is_closed = False
        all_options = channel_options(checked, target)
        self._channel = (
            grpc.aio.insecure_channel(target, all_options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, all_options)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._is_closed = True
        await self._channel.close()

    # --- Training -----------------------------------------------------------------------------------------------------

    async def start_training(
        self,
        corpus_id: str,
        model_name: str,
        recipe: types.Recipe | None = None,
        *,
        request_id: str | None = None,
        validate_only: bool = False,
        initial_model: str | None = None,
        keep_optimizer: bool = False,
        processes: int | None = None,
    ) -> types.TrainingRun:
        """See `Client.start_training`."""
        options = _convert.StartOptions(
            request_id=request_id,
            validate_only=validate_only,
            initial_model=initial_model,
            keep_optimizer=keep_optimizer,
            processes=processes,
        )
        return await self._call(_convert.start_training(corpus_id, model_name, recipe, options))

    async def get_training_run(self, run_id: str) -> types.TrainingRun:
        """See `Client.get_training_run`."""
        return await self._call(_convert.get_training_run(run_id))

    def list_training_runs(
        self,
        *,
        states: Iterable[types.RunState | str] = (),
        model_name: str = "",
        order: types.RunOrder | str = types.RunOrder.NEWEST_FIRST,
    ) -> AsyncIterator[types.TrainingRun]:
        """See `Client.list_training_runs`; iterate with `async for`."""
        return self._items(_convert.list_training_runs(states, model_name, order))

    async def cancel_training(self, run_id: str) -> types.TrainingRun:
        """See `Client.cancel_training`."""
        return await self._call(_convert.cancel_training(run_id))

    async def pause_training(self, run_id: str) -> types.TrainingRun:
        """See `Client.pause_training`."""
        return await self._call(_convert.pause_training(run_id))

    async def resume_training(self, run_id: str) -> types.TrainingRun:
        """See `Client.resume_training`."""
        return await self._call(_convert.resume_training(run_id))

    async def list_checkpoints(self, run_id: str) -> list[types.Checkpoint]:
        """See `Client.list_checkpoints`."""
        return await self._call(_convert.list_checkpoints(run_id))

    async def delete_training_run(self, run_id: str) -> None:
        """See `Client.delete_training_run`."""
        await self._call(_convert.delete_training_run(run_id))

    @overload
    def stream_metrics(
        self,
        run_id: str,
        after_sequence: int = 0,
        *,
        follow: bool = True,
        heartbeats: Literal[False] = False,
        reconnect_timeout_s: float = 60.0,
    ) -> AsyncGenerator[types.MetricRecord]: ...

    @overload
    def stream_metrics(
        self,
        run_id: str,
        after_sequence: int = 0,
        *,
        follow: bool = True,
        heartbeats: Literal[True],
        reconnect_timeout_s: float = 60.0,
    ) -> AsyncGenerator[types.MetricRecord | types.Heartbeat]: ...

    async def stream_metrics(
        self,
        run_id: str,
        after_sequence: int = 0,
        *,
        follow: bool = True,
        heartbeats: bool = False,
        reconnect_timeout_s: float = 60.0,
    ) -> AsyncGenerator[Any]:
        """See `Client.stream_metrics`; iterate with `async for`. To stop early, use `contextlib.aclosing`."""
        tail = MetricsTail(run_id, after_sequence, follow=follow, reconnect_timeout_s=reconnect_timeout_s)
        while True:
            try:
                async with contextlib.aclosing(self._stream(tail.call())) as stream:
                    async for item in stream:
                        if tail.accept(item) and (heartbeats or isinstance(item, types.MetricRecord)):
                            yield item
            except Unavailable as error:
                delay_s = tail.next_delay_s(error)
            else:
                return
            await asyncio.sleep(delay_s)

    async def wait(
        self,
        run_id: str,
        on_record: Callable[[types.MetricRecord], object] | None = None,
        *,
        reconnect_timeout_s: float = 60.0,
    ) -> types.TrainingRun:
        """See `Client.wait`; `on_record` is an ordinary function and must not block."""
        _checks.check_callback(on_record)
        stream = self.stream_metrics(run_id, reconnect_timeout_s=reconnect_timeout_s)
        async with contextlib.aclosing(stream) as records:
            async for record in records:
                if on_record is not None:
                    on_record(record)
        return await self.get_training_run(run_id)

    async def get_lr_schedule(
        self,
        *,
        schedule: types.LearningRateSchedule | None = None,
        recipe: types.Recipe | None = None,
        run_id: str | None = None,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int | None = None,
    ) -> types.LearningRateCurve:
        """See `Client.get_lr_schedule`."""
        return await self._call(_convert.get_lr_schedule(schedule, recipe, run_id, (first_step, last_step), max_points))

    # --- Corpora ------------------------------------------------------------------------------------------------------

    async def upload_corpus(
        self,
        display_name: str,
        source_language: str,
        target_language: str,
        *,
        train: CorpusText,
        validation: CorpusText,
        request_id: str | None = None,
    ) -> types.Corpus:
        """See `Client.upload_corpus`; a thread reads files and iterables, so the event loop is not blocked."""
        call = _convert.upload_corpus(
            display_name, source_language, target_language, request_id, train=train, validation=validation
        )
        failures: list[Exception] = []
        requests = _convert.upload_requests(call, read_pieces(train, validation), failures)
        return await self._upload(call, requests, failures)

    async def get_corpus(self, corpus_id: str) -> types.Corpus:
        """See `Client.get_corpus`."""
        return await self._call(_convert.get_corpus(corpus_id))

    async def delete_corpus(self, corpus_id: str) -> None:
        """See `Client.delete_corpus`."""
        await self._call(_convert.delete_corpus(corpus_id))

    def list_corpora(self) -> AsyncIterator[types.Corpus]:
        """See `Client.list_corpora`; iterate with `async for`."""
        return self._items(_convert.list_corpora)

    # --- Models and translation ---------------------------------------------------------------------------------------

    def list_models(self) -> AsyncIterator[types.Model]:
        """See `Client.list_models`; iterate with `async for`."""
        return self._items(_convert.list_models)

    async def get_model(self, model: str) -> types.ModelDetails:
        """See `Client.get_model`."""
        return await self._call(_convert.get_model(model))

    async def set_model_alias(
        self, name: str, alias: str, version: int, *, timeout_s: float | None = None
    ) -> types.Model:
        """See `Client.set_model_alias`."""
        return await self._call(_convert.set_model_alias(name, alias, version), timeout_s)

    async def delete_model_alias(self, name: str, alias: str) -> None:
        """See `Client.delete_model_alias`."""
        await self._call(_convert.delete_model_alias(name, alias))

    async def delete_model_version(self, model: str) -> None:
        """See `Client.delete_model_version`."""
        await self._call(_convert.delete_model_version(model))

    async def download_model(self, model: str, folder: str | os.PathLike[str]) -> types.ModelVersion:
        """See `Client.download_model`; a thread writes the files, so the event loop is not blocked."""
        with ModelFolder(folder) as target:
            async with contextlib.aclosing(self._stream(_convert.download_model(model))) as stream:
                async for item in stream:
                    await _run_to_completion(target.accept, item)
            return await _run_to_completion(target.finish)

    async def load_model(self, model: str, *, timeout_s: float | None = None) -> types.LoadedModel:
        """See `Client.load_model`."""
        return await self._call(_convert.load_model(model), timeout_s)

    async def unload_model(self, model: str, *, timeout_s: float | None = None) -> bool:
        """See `Client.unload_model`."""
        return await self._call(_convert.unload_model(model), timeout_s)

    async def list_loaded_models(self) -> list[types.LoadedModel]:
        """See `Client.list_loaded_models`."""
        return await self._call(_convert.list_loaded_models())

    async def translate(
        self,
        model: str,
        sentences: str | Sequence[str],
        *,
        target_prefixes: str | Sequence[str] = (),
        split_sentences: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[types.TranslateOptions],
    ) -> types.TranslationResult:
        """See `Client.translate`; cancelling the task cancels the translation on the server."""
        call = _convert.translate(model, sentences, target_prefixes, split_sentences, options)
        return await self._call(call, timeout_s)

    async def translate_stream(
        self,
        model: str,
        sentences: Iterable[Sentence] | AsyncIterable[Sentence],
        *,
        in_order: bool = False,
        split_sentences: bool = False,
        window: int | None = None,
        timeout_s: float | None = None,
        reconnect_timeout_s: float = 60.0,
        **options: Unpack[types.TranslateOptions],
    ) -> AsyncGenerator[types.StreamTranslation]:
        """See `Client.translate_stream`; `sentences` may be an asynchronous iterable, and a thread reads any other.

        To stop early, use `contextlib.aclosing`.
        """
        _checks.check_sentences(sentences, may_be_async=True)
        call = _convert.translate_stream(model, split_sentences, window, options)
        calls = StreamCalls(call, timeout_s=timeout_s, reconnect_timeout_s=reconnect_timeout_s)
        buffer = StreamBuffer(window, in_order=in_order)
        changed = asyncio.Event()
        reading = asyncio.create_task(_add_all(sentences, buffer, changed))
        reading.add_done_callback(lambda _: changed.set())
        try:
            while True:
                with call_span(call.path) as span:
                    responses = self._stream_translate(calls, buffer, reading, changed, span.metadata)
                    try:
                        async for response in responses:
                            calls.response_received()
                            for result in buffer.accept(call.read(response)):
                                buffer.mark_delivered()
                                changed.set()
                                yield result
                        break
                    except grpc.aio.AioRpcError as error:
                        span.record_failure(error)
                        delay_s = calls.next_delay_s(
                            error_from_rpc(error, self._target), dict(error.initial_metadata() or ())
                        )
                    finally:
                        responses.cancel()
                        changed.set()
                await asyncio.sleep(delay_s)
            await reading
        finally:
            reading.cancel()
            await asyncio.wait((reading,))

    def _stream_translate(
        self,
        calls: StreamCalls,
        buffer: StreamBuffer,
        reading: asyncio.Task[None],
        changed: asyncio.Event,
        metadata: Metadata,
    ) -> StreamCall:
        """Make the next call of a stream: send all unanswered sentences, then the new ones."""
        _checks.check_open(is_closed=self._is_closed)
        buffer.requeue()
        started: asyncio.Future[StreamCall] = asyncio.get_running_loop().create_future()
        method = self._channel.stream_stream(calls.call.path, encode, calls.call.response_type.FromString)
        requests = _stream_requests(calls.call, started, buffer, reading, changed)
        responses = method(requests, timeout=calls.remaining_s(), metadata=metadata)
        started.set_result(responses)
        return responses

    # --- How calls are made -------------------------------------------------------------------------------------------

    async def _call(self, call: Call[T], timeout_s: float | None = None) -> T:
        _checks.check_open(is_closed=self._is_closed)
        deadline_s = self._timeout_s if timeout_s is None else _checks.checked_timeout_s(timeout_s)
        method = self._channel.unary_unary(call.path, encode, call.response_type.FromString)
        with call_span(call.path) as span:
            try:
                response = await method(call.request, timeout=deadline_s, metadata=span.metadata)
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error, self._target) from error
        return call.read(response)

    async def _items(self, pages: Pages[T]) -> AsyncIterator[T]:
        token = ""
        while True:
            page = await self._call(pages(token))
            for item in page.items:
                yield item
            token = page.next_page_token
            if not token:
                return

    async def _stream(self, call: Call[T]) -> AsyncGenerator[T]:
        _checks.check_open(is_closed=self._is_closed)
        method = self._channel.unary_stream(call.path, encode, call.response_type.FromString)
        with call_span(call.path) as span:
            responses = method(call.request, metadata=span.metadata)
            try:
                async for response in responses:
                    yield call.read(response)
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error, self._target) from error
            finally:
                responses.cancel()

    async def _upload(self, call: Call[T], requests: Iterator[Message], failures: list[Exception]) -> T:
        _checks.check_open(is_closed=self._is_closed)
        method = self._channel.stream_unary(call.path, encode, call.response_type.FromString)
        with call_span(call.path) as span:
            pending = method(_read_in_thread(requests), metadata=span.metadata)
            try:
                response = await pending
            except grpc.aio.AioRpcError as error:
                if failures:
                    raise failures[0]  # noqa: B904 (it has its own cause; the server only refused the truncated upload)
                raise error_from_rpc(error, self._target) from error
            finally:
                pending.cancel()
        return call.read(response)


async def _read_in_thread(requests: Iterator[Message]) -> AsyncIterator[Message]:
    """Yield the requests; a thread reads each."""
    while isinstance(request := await asyncio.to_thread(next, requests, None), Message):
        yield request


async def _add_all(
    sentences: Iterable[Sentence] | AsyncIterable[Sentence], buffer: StreamBuffer, changed: asyncio.Event
) -> None:
    """Add all sentences to the buffer, as capacity permits. Raises the errors of the iterable."""
    async for item in sentences if isinstance(sentences, AsyncIterable) else read_in_thread(sentences):
        await _until(lambda: buffer.has_capacity, changed)
        buffer.add(item)
        changed.set()


async def _stream_requests(
    call: Call[types.StreamTranslateResponse],
    started: asyncio.Future[StreamCall],
    buffer: StreamBuffer,
    reading: asyncio.Task[None],
    changed: asyncio.Event,
) -> AsyncIterator[Message]:
    """Yield the requests of a stream: the configuration and, once it is accepted, sentences as they are read.

    The wait for acceptance is needed: grpc.aio loses the status of a call that ends while a message is being sent.
    """
    yield call.request
    responses = await started
    if ACCEPTED_KEY not in {key for key, _ in await responses.initial_metadata()}:
        await responses.code()
        return
    while True:
        await _until(lambda: buffer.has_pending or reading.done() or responses.done(), changed)
        if responses.done() or not buffer.has_pending:
            return
        yield buffer.next_request()


async def _until(condition: Callable[[], bool], changed: asyncio.Event) -> None:
    """Wait until the condition holds; evaluate it after every change. Several tasks may wait for one event."""
    while not condition():
        changed.clear()
        await changed.wait()


async def _run_to_completion(work: Callable[..., T], *arguments: object) -> T:
    """Run `work` in a thread. A cancellation waits for it, so that no thread writes to a removed folder."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
