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
from ferryman._stream import Sentence, SentencePump, StreamBook, StreamRoad
from ferryman._tail import MetricsTail
from ferryman._tracing import call_span
from ferryman._upload import CorpusText, read_pieces
from ferryman.errors import Unavailable

T = TypeVar("T")


class Client:
    """A connection to a Ferryman service. Safe to share between threads; close it, or use it in a `with` block.

    Every method raises errors of `ferryman.errors`. Calls that are safe to repeat are repeated, up to four times within
    about a second, while the server is unavailable. If the target's name has several addresses, calls are spread over
    all of them that can be reached.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 60.0,
        options: ChannelOptions = (),
    ) -> None:
        """Connect, lazily, to `target`; without `credentials` in plain text.

        `target` is "host:port" or any gRPC name, such as "dns:///ferryman-serving-headless:50051" or
        "ipv4:10.0.0.1:50051,10.0.0.2:50051".
        `timeout_s` is the deadline of every call but uploads, downloads and streams. `options` are gRPC channel
        options, which replace the client's of the same name. No proxy is asked for this machine's own addresses.
        Raises InvalidRequest for a target that is no address, and for a deadline that is not over 0 to 1e9 seconds.
        """
        given = _checks.check_connection(target, credentials, timeout_s, options)
        self._target = target
        self._timeout_s = float(timeout_s)
        self._is_closed = False
        all_options = channel_options(given, target)
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
        """Start a run that publishes the next version of `model_name`; returns at once.

        `request_id` is a UUID: the same one with the same arguments returns the same run, for ever. By default a new
        one is made. `validate_only` checks everything and starts nothing. `initial_model` (a reference, such as
        "en-de/7") is fine-tuned, with `keep_optimizer` from Adam's moments of the run that made it. `processes` train
        it together.
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
        """Yield the runs in one of `states` (none: in any) and for `model_name` (empty: for any)."""
        return self._all(_convert.list_training_runs(states, model_name, order))

    def cancel_training(self, run_id: str) -> types.TrainingRun:
        """Ask the run to stop; it is CANCELLED, or `cancel_requested` is set. Raises RunNotFound, IllegalTransition."""
        return self._call(_convert.cancel_training(run_id))

    def pause_training(self, run_id: str) -> types.TrainingRun:
        """Ask the run to rest; it is PAUSED, or `pause_requested` is set. Raises RunNotFound, IllegalTransition."""
        return self._call(_convert.pause_training(run_id))

    def resume_training(self, run_id: str) -> types.TrainingRun:
        """Let the run go on from its last checkpoint. Raises RunNotFound, IllegalTransition."""
        return self._call(_convert.resume_training(run_id))

    def list_checkpoints(self, run_id: str) -> list[types.Checkpoint]:
        """Return the complete checkpoints of the run, by rising step. Raises RunNotFound."""
        return self._call(_convert.list_checkpoints(run_id))

    def delete_training_run(self, run_id: str) -> None:
        """Remove a run that has ended, or that the server cannot read; what it published stays.

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
        """Yield the run's records after `after_sequence`, then live, until its terminal state.

        With `follow` False it ends after the history. A broken connection or a restarted server does not end it: it
        goes on after the last record, without gap or duplicate. `heartbeats` also yields the server's signs of life.
        Raises RunNotFound, SequenceOutOfRange, and Unavailable once no attempt reached the server for
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
                pause_s = tail.pause_s(error)
            else:
                return
            time.sleep(pause_s)

    def wait(
        self,
        run_id: str,
        on_record: Callable[[types.MetricRecord], object] | None = None,
        *,
        reconnect_timeout_s: float = 60.0,
    ) -> types.TrainingRun:
        """Return the run once it is terminal, SUCCEEDED or not; `on_record` sees every record on the way."""
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

        The numbers are those that training uses. Defaults: from step 1 to the schedule's end (else 50,000), 1,000
        points. Raises InvalidRecipe, InvalidRequest, RunNotFound.
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
        """Upload a parallel corpus; it is stored whole or not at all.

        `train` and `validation` are each a tuple (source file, target file), plain or .gz, UTF-8, one sentence a line;
        or an iterable of (source, target) sentence pairs. Either is streamed, never held in memory. With your own
        `request_id` (a UUID) the call may be repeated. No deadline.
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
        """Remove the corpus; runs that have ended and models keep working. The server's operator can bring its text
        back for 7 days. Raises CorpusNotFound, CorpusInUse (unfinished runs train on it)."""
        self._call(_convert.delete_corpus(corpus_id))

    def list_corpora(self) -> Iterator[types.Corpus]:
        """Yield all corpora, newest first; one that the server cannot read has `unreadable` set."""
        return self._all(_convert.list_corpora)

    # --- Models and translation ---------------------------------------------------------------------------------------

    def list_models(self) -> Iterator[types.Model]:
        """Yield all models, by name."""
        return self._all(_convert.list_models)

    def get_model(self, model: str) -> types.ModelDetails:
        """Return the model, and the version of it that the reference names: "name" the latest, "name/7" that one,
        "name@production" what the alias points at. Raises ModelNotFound, InvalidRequest."""
        return self._call(_convert.get_model(model))

    def set_model_alias(self, name: str, alias: str, version: int, *, timeout_s: float | None = None) -> types.Model:
        """Let `name@alias` be `version` of the model from now on; no request fails, whatever the alias was before.

        A server that has the alias's present version in memory loads the new one first, which may take longer than the
        client's deadline: `timeout_s`. Raises ModelNotFound, InvalidRequest, ModelDamaged, ModelTooLarge.
        """
        return self._call(_convert.set_model_alias(name, alias, version), timeout_s)

    def delete_model_alias(self, name: str, alias: str) -> None:
        """Remove the alias; what it points at stays. Raises ModelNotFound, InvalidRequest."""
        self._call(_convert.delete_model_alias(name, alias))

    def delete_model_version(self, model: str) -> None:
        """Remove the version "name/version" for ever; its number is not given again.

        Raises ModelInUse (an alias points at it, or an unfinished run starts from it), ModelNotFound, InvalidRequest.
        """
        self._call(_convert.delete_model_version(model))

    def download_model(self, model: str, folder: str | os.PathLike[str]) -> types.ModelVersion:
        """Download the version that the reference names into `folder`, which must not exist, and return it.

        Size and digest of every file are checked; the folder appears whole or not at all. `ferryman-service
        import-model` publishes it on another server. No deadline.
        Raises ModelNotFound, InvalidRequest, ModelDamaged; FileExistsError and other OSErrors of the folder.
        """
        with ModelFolder(folder) as target:
            with contextlib.closing(self._stream(_convert.download_model(model))) as stream:
                for item in stream:
                    target.accept(item)
            return target.finish()

    def load_model(self, model: str, *, timeout_s: float | None = None) -> types.LoadedModel:
        """Load the version that the reference names into the server's memory and warm it up; return when it is ready.

        After DeadlineExceeded the server goes on loading. Raises ModelNotFound, InvalidRequest, ModelDamaged,
        ModelTooLarge, RoleNotServed.
        """
        return self._call(_convert.load_model(model), timeout_s)

    def unload_model(self, model: str, *, timeout_s: float | None = None) -> bool:
        """Take the version that the reference names out of the server's memory; return whether it was there.

        Returns when the translations that it serves have ended. Raises ModelNotFound, InvalidRequest, RoleNotServed.
        """
        return self._call(_convert.unload_model(model), timeout_s)

    def list_loaded_models(self) -> list[types.LoadedModel]:
        """Return what is in the server's memory, the most recently used first. Raises RoleNotServed."""
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
        """Translate one sentence or several with "name" (latest version), "name/version" or "name@alias".

        `options`: `ferryman.TranslateOptions`, such as `beam_size=1` or `sampling=Sampling(top_k=10)`. What is not
        given, or None, takes the service's default: beam 5, the best hypothesis only, length penalty 1, a maximum
        length of two times the source plus 10 subwords. `target_prefixes`: words that each translation must begin with.
        `split_sentences`: the entries are texts, whose sentences are translated one by one and joined again.
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

        A sentence is a string, an (id, sentence) pair or a `StreamSentence`; a result has its sentence's id, a string's
        is its number from 0. `sentences` is read in another thread, at most two windows ahead of the results that you
        have taken; `window` (default 256) bounds what the server works on at a time. A sentence that cannot be
        translated has a result with an error. What `sentences` raises is raised here, after the results of what came
        before. No deadline unless `timeout_s`. When a server goes away half-way, what has no answer is sent again, to
        the same version: each sentence still has exactly one result. Who stops early closes it: `contextlib.closing`.
        Raises what `translate` does, but for QueueFull (a stream waits) and InvalidSentence; Unavailable also once no
        attempt to go on has reached a server for `reconnect_timeout_s`.
        """
        _checks.check_open(is_closed=self._is_closed)
        _checks.check_sentences(sentences, may_be_async=False)
        call = _convert.translate_stream(model, split_sentences, window, options)
        road = StreamRoad(call, timeout_s=timeout_s, reconnect_timeout_s=reconnect_timeout_s)
        pump = SentencePump(sentences, StreamBook(window, in_order=in_order))
        method = self._channel.stream_stream(call.path, encode, call.response_type.FromString)
        with contextlib.closing(pump):
            while True:
                _checks.check_open(is_closed=self._is_closed)
                with call_span(call.path) as span:
                    responses = method(pump.requests(road.call), timeout=road.remaining_s(), metadata=span.metadata)
                    try:
                        for response in responses:
                            road.sign_of_life()
                            yield from pump.results(call.read(response))
                        break
                    except grpc.RpcError as error:
                        span.failed(error)
                        pause_s = road.pause_s(
                            error_from_rpc(error, self._target), dict(responses.initial_metadata() or ())
                        )
                    finally:
                        responses.cancel()
                time.sleep(pause_s)
            if pump.failure is not None:
                raise pump.failure

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

    def _all(self, pages: Pages[T]) -> Iterator[T]:
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
                    raise failures[0]  # noqa: B904 (it has its own cause; the refusal only followed from it)
                raise error_from_rpc(error, self._target) from error
            finally:
                future.cancel()
        return call.read(response)
