"""The asynchronous client: the methods of `ferryman.Client`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import grpc
from google.protobuf.message import Message

from ferryman import _convert, types
from ferryman._channel import ChannelOptions, channel_options
from ferryman._convert import Call, Pages, SearchOptions, encode
from ferryman._rpc_errors import error_from_rpc
from ferryman._tail import MetricsTail
from ferryman._upload import CorpusText, read_pieces
from ferryman.errors import Unavailable

T = TypeVar("T")


class AsyncClient:
    """A connection to a Ferryman service, for asyncio. Made and used in one event loop; close it, or use `async with`.

    Arguments, results and errors of every method are those of `ferryman.Client`; only what differs is said here.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 30.0,
        options: ChannelOptions = (),
    ) -> None:
        """See `ferryman.Client`."""
        all_options = channel_options(options)
        self._channel = (
            grpc.aio.insecure_channel(target, all_options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, all_options)
        )
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
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
        return self._all(_convert.list_training_runs(states, model_name, order))

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
        """See `Client.stream_metrics`; iterate with `async for`. Who stops early closes it: `contextlib.aclosing`."""
        tail = MetricsTail(run_id, after_sequence, follow=follow, reconnect_timeout_s=reconnect_timeout_s)
        while True:
            try:
                async with contextlib.aclosing(self._stream(tail.call())) as stream:
                    async for item in stream:
                        if tail.accept(item) and (heartbeats or isinstance(item, types.MetricRecord)):
                            yield item
            except Unavailable as error:
                pause_s = tail.pause_s(error)
            else:
                return
            await asyncio.sleep(pause_s)

    async def wait(
        self,
        run_id: str,
        on_record: Callable[[types.MetricRecord], object] | None = None,
        *,
        reconnect_timeout_s: float = 60.0,
    ) -> types.TrainingRun:
        """See `Client.wait`; `on_record` is an ordinary function and must not block."""
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
        """See `Client.upload_corpus`; files and iterables are read in a thread, the loop is not blocked."""
        call = _convert.upload_corpus(display_name, source_language, target_language, request_id)
        failures: list[Exception] = []
        requests = _convert.upload_requests(call, read_pieces(train, validation), failures)
        return await self._upload(call, requests, failures)

    async def get_corpus(self, corpus_id: str) -> types.Corpus:
        """See `Client.get_corpus`."""
        return await self._call(_convert.get_corpus(corpus_id))

    def list_corpora(self) -> AsyncIterator[types.Corpus]:
        """See `Client.list_corpora`; iterate with `async for`."""
        return self._all(_convert.list_corpora)

    # --- Models and translation ---------------------------------------------------------------------------------------

    def list_models(self) -> AsyncIterator[types.Model]:
        """See `Client.list_models`; iterate with `async for`."""
        return self._all(_convert.list_models)

    async def get_model(self, model: str) -> types.ModelDetails:
        """See `Client.get_model`."""
        return await self._call(_convert.get_model(model))

    async def translate(
        self,
        model: str,
        sentences: str | Sequence[str],
        *,
        beam_size: int | None = None,
        n_best: int | None = None,
        length_penalty: float | None = None,
        max_length: int | None = None,
        timeout_s: float | None = None,
    ) -> types.TranslationResult:
        """See `Client.translate`; cancelling the task cancels the work on the server."""
        options = SearchOptions(
            beam_size=beam_size, n_best=n_best, length_penalty=length_penalty, max_length=max_length
        )
        return await self._call(_convert.translate(model, sentences, options), timeout_s)

    # --- How calls are made -------------------------------------------------------------------------------------------

    async def _call(self, call: Call[T], timeout_s: float | None = None) -> T:
        method = self._channel.unary_unary(call.path, encode, call.response_type.FromString)
        try:
            response = await method(call.request, timeout=self._timeout_s if timeout_s is None else timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return call.read(response)

    async def _all(self, pages: Pages[T]) -> AsyncIterator[T]:
        token = ""
        while True:
            page = await self._call(pages(token))
            for item in page.items:
                yield item
            token = page.next_page_token
            if not token:
                return

    async def _stream(self, call: Call[T]) -> AsyncGenerator[T]:
        method = self._channel.unary_stream(call.path, encode, call.response_type.FromString)
        responses = method(call.request)
        try:
            async for response in responses:
                yield call.read(response)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            responses.cancel()

    async def _upload(self, call: Call[T], requests: Iterator[Message], failures: list[Exception]) -> T:
        method = self._channel.stream_unary(call.path, encode, call.response_type.FromString)
        responding = method(_read_in_thread(requests))
        try:
            response = await responding
        except grpc.aio.AioRpcError as error:
            if failures:
                raise failures[0]  # noqa: B904 (it has its own cause; the refusal only followed from it)
            raise error_from_rpc(error) from error
        finally:
            responding.cancel()
        return call.read(response)


async def _read_in_thread(requests: Iterator[Message]) -> AsyncIterator[Message]:
    """Yield the requests, each read in a thread."""
    while isinstance(request := await asyncio.to_thread(next, requests, None), Message):
        yield request
