"""The synchronous client."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import grpc
from google.protobuf.message import Message

from ferryman import _checks, _convert, types
from ferryman._channel import ChannelOptions, channel_options
from ferryman._convert import Call, Pages, encode
from ferryman._download import ModelFolder
from ferryman._rpc_errors import error_from_rpc
from ferryman._stream import Sentence, SentenceReader, StreamBuffer, StreamCalls
from ferryman._tail import MetricsTail
from ferryman._tracing import call_span
from ferryman._upload import CorpusText, read_pieces
from ferryman.errors import Unavailable

T = TypeVar("T")


class Client:
    """A connection to a Ferryman service. It is thread-safe; close it, or use it in a `with` block.

    Every method raises errors of `ferryman.errors`. While the server is unavailable, calls that are safe to retry are
    attempted up to four times within about a second. If the target's name has several addresses, calls are balanced
    over all reachable ones.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 60.0,
        options: ChannelOptions = (),
    ) -> None:
        """Connect to `target` at the first call; without `credentials` the connection is not encrypted.

        `target` is "host:port" or any gRPC name, such as "dns:///ferryman-serving-headless:50051" or
        "ipv4:10.0.0.1:50051,10.0.0.2:50051". `timeout_s` is the deadline of every call except uploads, downloads and
        streams. `options` are gRPC channel options; they override the client's defaults. Loopback addresses bypass
        proxies.
        Raises InvalidRequest for an invalid target, and for a deadline outside 0 to 1e9 seconds.
        """
        checked = _checks.check_connection(target, credentials, timeout_s, options)
        self._target = target
        self._timeout_s = float(timeout_s)
        self._is_closed = False
        all_options = channel_options(checked, target)
        self._channel = (
            grpc.insecure_channel(target, all_options)
            if credentials is None
            else grpc.secure_channel(target, credentials, all_options)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight end with Cancelled."""
        self._is_closed = True
        self._channel.close()

    # --- Training -----------------------------------------------------------------------------------------------------

    def start_training(
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
        """Start a run that publishes the next version of `model_name`; return without waiting for it.

        `request_id` is a UUID that makes the call idempotent: repeated with the same arguments, it returns the same
        run. By default the client generates one. `validate_only` validates the request without starting a run.
        `initial_model`, a reference such as "en-de/7", is the model to fine-tune; with `keep_optimizer` training also
        starts from its optimizer state (Adam's moments). `processes` is the number of data-parallel processes.
        Raises CorpusNotFound, InvalidRecipe, InvalidRequest, RequestIdReused, TooManyRuns, RoleNotServed,
        ModelNotFound, ModelHasNoWeights, OptimizerNotKept.
        """
        options = _convert.StartOptions(
            request_id=request_id,
            validate_only=validate_only,
            initial_model=initial_model,
            keep_optimizer=keep_optimizer,
            processes=processes,
        )
        return self._call(_convert.start_training(corpus_id, model_name, recipe, options))

    def get_training_run(self, run_id: str) -> types.TrainingRun:
        """Return the run. Raises RunNotFound."""
        return self._call(_convert.get_training_run(run_id))

    def list_training_runs(
        self,
        *,
        states: Iterable[types.RunState | str] = (),
        model_name: str = "",
        order: types.RunOrder | str = types.RunOrder.NEWEST_FIRST,
    ) -> Iterator[types.TrainingRun]:
        """Yield the runs, filtered by `states` and `model_name`; an empty filter matches all."""
        return self._items(_convert.list_training_runs(states, model_name, order))

    def cancel_training(self, run_id: str) -> types.TrainingRun:
        """Request cancellation. The returned run is CANCELLED, or `cancel_requested` is set.

        Raises RunNotFound, IllegalTransition.
        """
        return self._call(_convert.cancel_training(run_id))

    def pause_training(self, run_id: str) -> types.TrainingRun:
        """Request a pause: the run writes a checkpoint and its worker stops.

        The returned run is PAUSED, or `pause_requested` is set. Raises RunNotFound, IllegalTransition.
        """
        return self._call(_convert.pause_training(run_id))

    def resume_training(self, run_id: str) -> types.TrainingRun:
        """Resume a paused run from its last checkpoint. Raises RunNotFound, IllegalTransition."""
        return self._call(_convert.resume_training(run_id))

    def list_checkpoints(self, run_id: str) -> list[types.Checkpoint]:
        """Return the complete checkpoints of the run, ordered by step. Raises RunNotFound."""
        return self._call(_convert.list_checkpoints(run_id))

    def delete_training_run(self, run_id: str) -> None:
        """Delete a run that is terminal or unreadable; the model version that it published remains.

        Raises RunNotFound, RunNotFinished, RunStillNeeded.
        """
        self._call(_convert.delete_training_run(run_id))

    @overload
    def stream_metrics(
        self,
        run_id: str,
        after_sequence: int = 0,
        *,
        follow: bool = True,
        heartbeats: Literal[False] = False,
        reconnect_timeout_s: float = 60.0,
    ) -> Generator[types.MetricRecord]: ...

    @overload
    def stream_metrics(
        self,
        run_id: str,
        after_sequence: int = 0,
        *,
        follow: bool = True,
        heartbeats: Literal[True],
        reconnect_timeout_s: float = 60.0,
    ) -> Generator[types.MetricRecord | types.Heartbeat]: ...

    def stream_metrics(
        self,
        run_id: str,
        after_sequence: int = 0,
        *,
        follow: bool = True,
        heartbeats: bool = False,
        reconnect_timeout_s: float = 60.0,
    ) -> Generator[Any]:
        """Replay the run's records after `after_sequence`, then stream live updates until its terminal state.

        With `follow` False the stream ends after the history. If the connection breaks or the server restarts, the
        client reconnects and continues after the last record, without gap or duplicate. `heartbeats` also yields the
        server's heartbeats.
        Raises RunNotFound, SequenceOutOfRange, and Unavailable once no call has reached the server for
        `reconnect_timeout_s`.
        """
        tail = MetricsTail(run_id, after_sequence, follow=follow, reconnect_timeout_s=reconnect_timeout_s)
        while True:
            try:
                with contextlib.closing(self._stream(tail.call())) as stream:
                    for item in stream:
                        if tail.accept(item) and (heartbeats or isinstance(item, types.MetricRecord)):
                            yield item
            except Unavailable as error:
                delay_s = tail.next_delay_s(error)
            else:
                return
            time.sleep(delay_s)

    def wait(
        self,
        run_id: str,
        on_record: Callable[[types.MetricRecord], object] | None = None,
        *,
        reconnect_timeout_s: float = 60.0,
    ) -> types.TrainingRun:
        """Wait until the run is terminal and return it; call `on_record` with every record."""
        _checks.check_callback(on_record)
        with contextlib.closing(self.stream_metrics(run_id, reconnect_timeout_s=reconnect_timeout_s)) as records:
            for record in records:
                if on_record is not None:
                    on_record(record)
        return self.get_training_run(run_id)

    def get_lr_schedule(
        self,
        *,
        schedule: types.LearningRateSchedule | None = None,
        recipe: types.Recipe | None = None,
        run_id: str | None = None,
        first_step: int | None = None,
        last_step: int | None = None,
        max_points: int | None = None,
    ) -> types.LearningRateCurve:
        """Return the learning-rate curve of exactly one of `schedule`, `recipe` and `run_id`.

        Training computes its rates with the same function. By default the curve has 1,000 points, from step 1 to the
        end of the schedule, or to step 50,000 if it has none. Raises InvalidRecipe, InvalidRequest, RunNotFound.
        """
        return self._call(_convert.get_lr_schedule(schedule, recipe, run_id, (first_step, last_step), max_points))

    # --- Corpora ------------------------------------------------------------------------------------------------------

    def upload_corpus(
        self,
        display_name: str,
        source_language: str,
        target_language: str,
        *,
        train: CorpusText,
        validation: CorpusText,
        request_id: str | None = None,
    ) -> types.Corpus:
        """Upload a parallel corpus; the upload is atomic.

        `train` and `validation` are each a tuple (source file, target file), plain or .gz, UTF-8, one sentence a line;
        or an iterable of (source, target) sentence pairs. The text is streamed, not held in memory. `request_id` is a
        UUID that makes the call idempotent. The call has no deadline.
        Raises InvalidCorpus, InvalidRequest, CorpusTooLarge, DiskFull, RequestIdReused; OSError for an unreadable file.
        """
        call = _convert.upload_corpus(
            display_name, source_language, target_language, request_id, train=train, validation=validation
        )
        failures: list[Exception] = []
        requests = _convert.upload_requests(call, read_pieces(train, validation), failures)
        return self._upload(call, requests, failures)

    def get_corpus(self, corpus_id: str) -> types.Corpus:
        """Return the corpus. Raises CorpusNotFound, RowUnreadable."""
        return self._call(_convert.get_corpus(corpus_id))

    def delete_corpus(self, corpus_id: str) -> None:
        """Delete the corpus; finished runs and models remain. The server's operator can restore its text for 7 days.

        Raises CorpusNotFound, CorpusInUse (unfinished runs train on it).
        """
        self._call(_convert.delete_corpus(corpus_id))

    def list_corpora(self) -> Iterator[types.Corpus]:
        """Yield all corpora, newest first; if the server cannot read a corpus, its `unreadable` says why."""
        return self._items(_convert.list_corpora)

    # --- Models and translation ---------------------------------------------------------------------------------------

    def list_models(self) -> Iterator[types.Model]:
        """Yield all models, ordered by name."""
        return self._items(_convert.list_models)

    def get_model(self, model: str) -> types.ModelDetails:
        """Return a model and one of its versions: "name" is the latest, "name/7" version 7, "name@production" an alias.

        Raises ModelNotFound, InvalidRequest.
        """
        return self._call(_convert.get_model(model))

    def set_model_alias(self, name: str, alias: str, version: int, *, timeout_s: float | None = None) -> types.Model:
        """Point `name@alias` at `version`, without failing any request. Setting the current version again is a no-op.

        If the server has the previous version in memory, it loads the new one first. That can take longer than the
        client's deadline; `timeout_s` overrides it. Raises ModelNotFound, InvalidRequest, ModelDamaged, ModelTooLarge.
        """
        return self._call(_convert.set_model_alias(name, alias, version), timeout_s)

    def delete_model_alias(self, name: str, alias: str) -> None:
        """Delete the alias; its version remains. Raises ModelNotFound, InvalidRequest."""
        self._call(_convert.delete_model_alias(name, alias))

    def delete_model_version(self, model: str) -> None:
        """Delete the version "name/version" permanently; its number is not reused.

        Raises ModelInUse (an alias points at it, or an unfinished run starts from it), ModelNotFound, InvalidRequest.
        """
        self._call(_convert.delete_model_version(model))

    def download_model(self, model: str, folder: str | os.PathLike[str]) -> types.ModelVersion:
        """Download a model version into the new folder `folder`, and return the version.

        The client verifies size and digest of every file, and creates the folder only if all match. To publish it on
        another server, use `ferryman-service import-model`. The call has no deadline.
        Raises ModelNotFound, InvalidRequest, ModelDamaged; FileExistsError and other OSErrors of the folder.
        """
        with ModelFolder(folder) as target:
            with contextlib.closing(self._stream(_convert.download_model(model))) as stream:
                for item in stream:
                    target.accept(item)
            return target.finish()

    def load_model(self, model: str, *, timeout_s: float | None = None) -> types.LoadedModel:
        """Load a model version into the server's memory and warm it up; return when it is ready.

        After DeadlineExceeded the server continues loading. Raises ModelNotFound, InvalidRequest, ModelDamaged,
        ModelTooLarge, RoleNotServed.
        """
        return self._call(_convert.load_model(model), timeout_s)

    def unload_model(self, model: str, *, timeout_s: float | None = None) -> bool:
        """Unload a model version from the server's memory; return whether it was loaded.

        The call waits for the translations in progress. Raises ModelNotFound, InvalidRequest, RoleNotServed.
        """
        return self._call(_convert.unload_model(model), timeout_s)

    def list_loaded_models(self) -> list[types.LoadedModel]:
        """Return the models in the server's memory, most recently used first. Raises RoleNotServed."""
        return self._call(_convert.list_loaded_models())

    def translate(
        self,
        model: str,
        sentences: str | Sequence[str],
        *,
        target_prefixes: str | Sequence[str] = (),
        split_sentences: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[types.TranslateOptions],
    ) -> types.TranslationResult:
        """Translate one or more sentences with the model "name" (latest version), "name/version" or "name@alias".

        `options` are those of `ferryman.TranslateOptions`, such as `beam_size=1` or `sampling=Sampling(top_k=10)`. None
        selects the service's default: beam size 5, one hypothesis, length penalty 1, at most 2n + 10 subwords for a
        source of n. `target_prefixes` are the target prefixes of the translations, one for each sentence.
        `split_sentences` splits each item into sentences, translates them separately, and joins the translations.
        Raises ModelNotFound, InvalidSentence, InvalidRequest, QueueFull, DeadlineExceeded, ModelDamaged, ModelTooLarge,
        RoleNotServed.
        """
        call = _convert.translate(model, sentences, target_prefixes, split_sentences, options)
        return self._call(call, timeout_s)

    def translate_stream(
        self,
        model: str,
        sentences: Iterable[Sentence],
        *,
        in_order: bool = False,
        split_sentences: bool = False,
        window: int | None = None,
        timeout_s: float | None = None,
        reconnect_timeout_s: float = 60.0,
        **options: Unpack[types.TranslateOptions],
    ) -> Generator[types.StreamTranslation]:
        """Translate any number of sentences in bounded memory; yield results as they finish, or `in_order`.

        A sentence is a string, an (id, sentence) pair or a `StreamSentence`. A result has the id of its sentence; the
        id of a string is its number, from 0. A sentence that cannot be translated has a result with an error.
        A thread reads `sentences`, at most two windows ahead of the results that you have received; `window` (default
        256) limits the sentences on the server. An exception of `sentences` is raised here, after the results of the
        sentences before it. There is no deadline unless `timeout_s` is given.
        If the connection breaks, the client sends the unanswered sentences again, to the same model version, so that
        each sentence has exactly one result. To stop early, close the generator, e.g. with `contextlib.closing`.
        Raises the errors of `translate` except QueueFull (a stream waits) and InvalidSentence; also Unavailable once no
        call has reached a server for `reconnect_timeout_s`.
        """
        _checks.check_open(is_closed=self._is_closed)
        _checks.check_sentences(sentences, may_be_async=False)
        call = _convert.translate_stream(model, split_sentences, window, options)
        calls = StreamCalls(call, timeout_s=timeout_s, reconnect_timeout_s=reconnect_timeout_s)
        reader = SentenceReader(sentences, StreamBuffer(window, in_order=in_order))
        method = self._channel.stream_stream(call.path, encode, call.response_type.FromString)
        with contextlib.closing(reader):
            while True:
                _checks.check_open(is_closed=self._is_closed)
                with call_span(call.path) as span:
                    responses = method(reader.requests(calls.call), timeout=calls.remaining_s(), metadata=span.metadata)
                    try:
                        for response in responses:
                            calls.response_received()
                            yield from reader.results(call.read(response))
                        break
                    except grpc.RpcError as error:
                        span.record_failure(error)
                        delay_s = calls.next_delay_s(
                            error_from_rpc(error, self._target), dict(responses.initial_metadata() or ())
                        )
                    finally:
                        responses.cancel()
                time.sleep(delay_s)
            if reader.failure is not None:
                raise reader.failure

    # --- How calls are made -------------------------------------------------------------------------------------------

    def _call(self, call: Call[T], timeout_s: float | None = None) -> T:
        _checks.check_open(is_closed=self._is_closed)
        deadline_s = self._timeout_s if timeout_s is None else _checks.checked_timeout_s(timeout_s)
        method = self._channel.unary_unary(call.path, encode, call.response_type.FromString)
        with call_span(call.path) as span:
            try:
                response = method(call.request, timeout=deadline_s, metadata=span.metadata)
            except grpc.RpcError as error:
                raise error_from_rpc(error, self._target) from error
        return call.read(response)

    def _items(self, pages: Pages[T]) -> Iterator[T]:
        token = ""
        while True:
            page = self._call(pages(token))
            yield from page.items
            token = page.next_page_token
            if not token:
                return

    def _stream(self, call: Call[T]) -> Generator[T]:
        _checks.check_open(is_closed=self._is_closed)
        method = self._channel.unary_stream(call.path, encode, call.response_type.FromString)
        with call_span(call.path) as span:
            responses = method(call.request, metadata=span.metadata)
            try:
                for response in responses:
                    yield call.read(response)
            except grpc.RpcError as error:
                raise error_from_rpc(error, self._target) from error
            finally:
                responses.cancel()

    def _upload(self, call: Call[T], requests: Iterator[Message], failures: list[Exception]) -> T:
        _checks.check_open(is_closed=self._is_closed)
        method = self._channel.stream_unary(call.path, encode, call.response_type.FromString)
        with call_span(call.path) as span:
            future = method.future(requests, metadata=span.metadata)
            try:
                response = future.result()
            except grpc.RpcError as error:
                if failures:
                    raise failures[0]  # noqa: B904 (it has its own cause; the server only refused the truncated upload)
                raise error_from_rpc(error, self._target) from error
            finally:
                future.cancel()
        return call.read(response)
