"""A fake Ferryman for your own tests: a real gRPC server on a loopback port, with nothing behind it.

    from ferryman import Client
    from ferryman.testing import FakeFerryman

    with FakeFerryman(translate=str.upper) as fake, Client(fake.target) as client:
        fake.add_model("en-de")
        assert client.translate("en-de", "hallo").translations[0].text == "HALLO"

Corpora are kept in memory; a run "trains" at once, along a script of records; a run that succeeds publishes a model;
every model translates with your function, can be downloaded, and is in memory from its first translation on. A run that
`hold_after` holds can be paused, resumed and cancelled. It checks no more of a request than it needs, resolves no
recipe, and answers GetLRSchedule with one and the same function of the step whatever the schedule.
"""

# ruff: noqa: N802  (gRPC names the methods of a servicer)

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_status import rpc_status

from ferryman import errors, types
from ferryman._convert import SearchOptions, record_to_message
from ferryman._mapping import fill_message, from_message
from ferryman._rpc_errors import ACCEPTED_KEY, REQUEST_ID_KEY, status_from_error
from ferryman.types import RunState
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

T = TypeVar("T")
M = TypeVar("M", bound=Message)
Pair = tuple[str, str]

_PAGE_SIZE: Final = 50
_LAST_STEP: Final = 50_000
_HEARTBEAT_INTERVAL_S: Final = 0.1
_CHUNK_BYTES: Final = 1 << 20
_MODEL_BYTES: Final = 4_000_000
# As the service's: requests of 4 MiB, a ping every ten seconds, and no port for two.
_SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
)


def noam_learning_rate(step: int) -> float:
    """Return the learning rate of "Attention Is All You Need", section 5.3, for d_model 512 and 4,000 warmup steps."""
    return float(512**-0.5 * min(step**-0.5, step * 4000**-1.5))


def training_script(
    steps: int = 4, learning_rate: Callable[[int], float] = noam_learning_rate
) -> list[types.MetricPayload]:
    """Return the records of a run that does `steps` updates, validates once and succeeds."""
    loss = [8.0 / (1 + step) for step in range(steps + 1)]
    updates = [
        types.StepMetrics(
            step=step,
            epoch=1,
            loss=loss[step],
            nll_per_token=loss[step] / 2,
            perplexity=2.0 ** loss[step],
            learning_rate=learning_rate(step),
            gradient_norm=1.0,
            target_tokens=1000,
            target_tokens_per_second=20_000.0,
            duration_s=0.05,
            padding_share=0.02,
            memory_bytes=10**8,
        )
        for step in range(1, steps + 1)
    ]
    validation = types.ValidationMetrics(
        step=steps,
        epoch=1,
        loss=loss[steps],
        nll_per_token=loss[steps] / 2,
        perplexity=2.0 ** loss[steps],
        bleu=31.5,
        chrf=55.0,
        translated_pairs=2,
        duration_s=0.5,
        best=True,
    )
    return [
        types.StateChange(state=RunState.QUEUED),
        types.StateChange(state=RunState.STARTING, attempt=1),
        types.StateChange(state=RunState.RUNNING, attempt=1),
        *updates,
        validation,
        types.StateChange(state=RunState.EXPORTING, attempt=1),
        types.StateChange(state=RunState.SUCCEEDED, attempt=1),
    ]


class FakeFerryman:
    """The fake service. What it holds outlives `stop`: a stopped fake that is started again is a restarted server."""

    def __init__(
        self,
        *,
        translate: Callable[[str], str] = str.upper,
        script: Sequence[types.MetricPayload] | None = None,
        hold_after: int | None = None,
        learning_rate: Callable[[int], float] = noam_learning_rate,
        host: str = "127.0.0.1",
        port: int = 0,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Store; `start` or a `with` block serves.

        `translate` translates a sentence; what it raises of `ferryman.errors` the caller gets, InvalidSentence in a
        stream as the error of that sentence. `script` is what every run records, by default `training_script()`.
        `hold_after`: runs stand still after so many records, until `release` or CancelTraining. `learning_rate` is the
        curve that GetLRSchedule answers with. A held run that is paused and resumed is still held. It
        listens on `host` and `port` (0: a free one); `options` are gRPC options of the server, such as a connection
        age.
        """
        self.translate = translate
        self.script = list(script) if script is not None else training_script(learning_rate=learning_rate)
        self.hold_after = hold_after
        self.learning_rate = learning_rate
        self.calls: list[str] = []
        """The names of the RPCs that arrived, failed ones too, in order."""
        self.translate_options: list[types.TranslateOptions] = []
        """The options that each Translate and StreamTranslate has set, in order."""
        self.pairs: dict[str, dict[str, list[Pair]]] = {}
        """The sentence pairs of each corpus: by corpus id, then by split ("train", "validation")."""
        self.backend = _Backend(self)
        self._failures: defaultdict[str, deque[errors.FerrymanError]] = defaultdict(deque)
        self._server: grpc.Server | None = None
        self._host = host
        self._port = port
        self._options = list({**dict(_SERVER_OPTIONS), **dict(options)}.items())

    @property
    def target(self) -> str:
        """The address to give to a client; the same after a restart."""
        return f"{self._host}:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Serve; after `stop`, on the port of before."""
        server = grpc.server(ThreadPoolExecutor(max_workers=16), options=self._options)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(_Training(self), server)
        corpus_pb2_grpc.add_CorpusServiceServicer_to_server(_Corpora(self), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(_Models(self), server)
        translation_pb2_grpc.add_TranslationServiceServicer_to_server(_Translations(self), server)
        self._port = server.add_insecure_port(self.target)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Break off every call and close the port. Harmless if it is not serving."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def release(self, run_id: str) -> None:
        """Let a held run go on to the end of its script."""
        self.backend.release(run_id)

    def add_model(self, name: str) -> types.ModelVersion:
        """Publish the next version of a model without any training."""
        return self.backend.publish(name, run_id="", corpus_id="", recipe=types.Recipe())

    def fail_next(self, rpc: str, error: errors.FerrymanError, times: int = 1) -> None:
        """Answer the next `times` calls of `rpc` (such as "Translate") with the error, its `request_id` too."""
        self._failures[rpc].extend([error] * times)

    def arrive(self, rpc: str) -> None:
        """Note a call; raise the error that `fail_next` holds for it."""
        self.calls.append(rpc)
        if self._failures[rpc]:
            raise self._failures[rpc].popleft()


@dataclass
class _FakeRun:
    """A run: what is still to be recorded, and what is."""

    run: types.TrainingRun
    pending: deque[types.MetricPayload]
    records: list[types.MetricRecord] = field(default_factory=list)
    paused_in: RunState = RunState.QUEUED

    def back_to_work(self) -> None:
        """Bring a resumed run, with a new attempt, back to the state that it was paused in."""
        states = [RunState.STARTING, RunState.RUNNING]
        if self.paused_in not in states:
            return
        script = [
            dataclasses.replace(payload, attempt=payload.attempt + 1)
            if isinstance(payload, types.StateChange)
            else payload
            for payload in self.pending
        ]
        changes = [
            types.StateChange(state=state, attempt=self.run.attempt + 1)
            for state in states[: states.index(self.paused_in) + 1]
        ]
        self.pending = deque([*changes, *script])
        for _ in changes:
            self.advance()

    def advance(self) -> None:
        """Record the next payload and change the run by it."""
        payload, now = self.pending.popleft(), datetime.now(UTC)
        record = types.MetricRecord(sequence=len(self.records) + 1, time=now, payload=payload)
        self.records.append(record)
        self.run = dataclasses.replace(self.run, last_sequence=record.sequence)
        match payload:
            case types.StateChange():
                self._change_state(payload, now)
            case types.StepMetrics():
                progress = dataclasses.replace(
                    self.run.progress,
                    step=payload.step,
                    epoch=payload.epoch,
                    target_tokens=self.run.progress.target_tokens + payload.target_tokens,
                    target_tokens_per_second=payload.target_tokens_per_second,
                    skipped_updates=self.run.progress.skipped_updates + payload.skipped,
                )
                self.run = dataclasses.replace(self.run, progress=progress, restarts=0)
            case types.ValidationMetrics(best=True):
                progress = dataclasses.replace(self.run.progress, best_validation=payload)
                self.run = dataclasses.replace(self.run, progress=progress)

    def _change_state(self, change: types.StateChange, now: datetime) -> None:
        state, before = change.state, self.run.state
        # Who waits again although nobody rested it has lost its worker.
        died = state is RunState.QUEUED and before not in (RunState.QUEUED, RunState.PAUSED)
        failed = types.RunError(reason="WORKER_DIED", message=change.message) if state is RunState.FAILED else None
        self.run = dataclasses.replace(
            self.run,
            state=state,
            attempt=change.attempt,
            error=failed,
            restarts=self.run.restarts + died,
            start_time=self.run.start_time or (now if state is RunState.RUNNING else None),
            end_time=now if state.is_terminal else None,
        )


class _Backend:
    """What the fake holds in memory. `changed` guards it and tells streams of news."""

    def __init__(self, fake: FakeFerryman) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.corpora: dict[str, types.Corpus] = {}
        self.models: dict[str, list[types.ModelVersion]] = {}
        self.aliases: defaultdict[str, dict[str, types.ModelAlias]] = defaultdict(dict)
        self.loaded: dict[str, types.LoadedModel] = {}
        self.runs: dict[str, _FakeRun] = {}
        self.requests: dict[str, tuple[bytes, str]] = {}
        self._fake = fake
        self._numbers = itertools.count(1)
        self._versions: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))

    def once(self, request_id: str, body: bytes, create: Callable[[], str]) -> str:
        """Return the id that `create` made for this request_id, now or earlier; raises RequestIdReused."""
        with self.changed:
            if request_id in self.requests:
                known_body, known_id = self.requests[request_id]
                if known_body != body:
                    raise errors.RequestIdReused(f"request_id {request_id} came before, with another body")
                return known_id
            made = create()
            if request_id:
                self.requests[request_id] = (body, made)
            return made

    def add_corpus(self, header: corpus_pb2.UploadHeader, pairs: dict[str, list[Pair]]) -> str:
        corpus_id = f"cor_{next(self._numbers):022}"
        self._fake.pairs[corpus_id] = pairs
        self.corpora[corpus_id] = types.Corpus(
            corpus_id=corpus_id,
            display_name=header.display_name,
            source_language=header.source_language,
            target_language=header.target_language,
            train=_statistics(pairs["train"]),
            validation=_statistics(pairs["validation"]),
            digest=hashlib.sha256(repr(pairs).encode()).hexdigest(),
            create_time=datetime.now(UTC),
        )
        return corpus_id

    def delete_corpus(self, corpus_id: str) -> None:
        with self.changed:
            _found(self.corpora, corpus_id, errors.CorpusNotFound, "corpus")
            users = [item for item in self.runs.values() if item.run.corpus_id == corpus_id]
            unfinished = [item.run.run_id for item in users if not item.run.state.is_terminal]
            if unfinished:
                named = ",".join(unfinished)
                raise errors.CorpusInUse(f"corpus {corpus_id} is trained on by {named}", metadata={"runs": named})
            for item in users:
                item.run = dataclasses.replace(item.run, corpus_deleted=True)
            del self.corpora[corpus_id]
            self.requests = {key: made for key, made in self.requests.items() if made[1] != corpus_id}

    def new_run(self, request: training_pb2.StartTrainingRequest) -> _FakeRun:
        run = types.TrainingRun(
            run_id="" if request.validate_only else f"run_{next(self._numbers):022}",
            state=RunState.QUEUED,
            corpus_id=request.corpus_id,
            model_name=request.model_name,
            recipe=from_message(types.Recipe, request.recipe),
            create_time=datetime.now(UTC),
            initial_model=self._initial_model(request),
            processes=request.processes or 1,
            keep_optimizer=request.keep_optimizer,
        )
        return _FakeRun(run, deque(self._fake.script))

    def _initial_model(self, request: training_pb2.StartTrainingRequest) -> str | None:
        """Return the version to start from, "name/7", None for none; raises what StartTraining does without it."""
        if not request.initial_model:
            if request.keep_optimizer:
                violation = errors.Violation(field="keep_optimizer", description="needs initial_model")
                raise errors.InvalidRequest("keep_optimizer: needs initial_model", violations=[violation])
            return None
        version = self.version(request.initial_model)
        if request.keep_optimizer and version.run_id not in self.runs:
            raise errors.OptimizerNotKept(f"the run that made {version.reference} is gone")
        return version.reference

    def add_run(self, request: training_pb2.StartTrainingRequest) -> str:
        run = self.new_run(request)
        self.runs[run.run.run_id] = run
        held = self._fake.hold_after
        self._advance(run, len(run.pending) if held is None else held)
        return run.run.run_id

    def release(self, run_id: str) -> None:
        with self.changed:
            run = self.run(run_id)
            self._advance(run, len(run.pending))

    def cancel(self, run_id: str) -> types.TrainingRun:
        with self.changed:
            run = self.run(run_id)
            if run.run.state is not RunState.CANCELLED:
                if run.run.state.is_terminal:
                    raise errors.IllegalTransition(f"run {run_id} is {run.run.state}: it cannot be cancelled")
                self._record(run, RunState.CANCELLED, run.run.attempt)
            return run.run

    def pause(self, run_id: str) -> types.TrainingRun:
        with self.changed:
            run = self.run(run_id)
            state = run.run.state
            if state is RunState.EXPORTING or state.is_terminal:
                raise errors.IllegalTransition(f"run {run_id} is {state}: it cannot be paused")
            if state is not RunState.PAUSED:
                run.paused_in = state
                self._record(run, RunState.PAUSED, run.run.attempt)
            return run.run

    def resume(self, run_id: str) -> types.TrainingRun:
        with self.changed:
            run = self.run(run_id)
            if run.run.state.is_terminal:
                raise errors.IllegalTransition(f"run {run_id} is {run.run.state}: it cannot be resumed")
            if run.run.state is RunState.PAUSED:
                self._record(run, RunState.QUEUED, run.run.attempt)
                queued = run.run
                run.back_to_work()
                self.changed.notify_all()
                return queued
            return run.run

    def delete(self, run_id: str) -> None:
        with self.changed:
            state = self.run(run_id).run.state
            if not state.is_terminal:
                raise errors.RunNotFinished(f"run {run_id} is {state}: it cannot be deleted")
            for needy in self.runs.values():
                if self._needs_optimizer(needy) and self._source(needy) == run_id:
                    raise errors.RunStillNeeded(f"run {needy.run.run_id} will start with the optimizer of {run_id}")
            del self.runs[run_id]
            self.requests = {key: made for key, made in self.requests.items() if made[1] != run_id}

    def _needs_optimizer(self, run: _FakeRun) -> bool:
        """Tell whether a run waits for the optimizer of another: a worker takes it over when it begins."""
        return run.run.keep_optimizer and not run.run.state.is_terminal and run.run.start_time is None

    def _source(self, run: _FakeRun) -> str:
        assert run.run.initial_model is not None, "no optimizer is kept without a model"
        return self.version(run.run.initial_model).run_id

    def checkpoints(self, run_id: str) -> list[types.Checkpoint]:
        """Return a checkpoint for each validation: one follows each."""
        run = self.run(run_id)
        best = run.run.progress.best_validation
        return [
            types.Checkpoint(
                step=payload.step,
                epoch=payload.epoch,
                create_time=record.time,
                size_bytes=12_000_000,
                best=payload == best,
                bleu=payload.bleu,
                chrf=payload.chrf,
                nll_per_token=payload.nll_per_token,
                translated_pairs=payload.translated_pairs,
            )
            for record in run.records
            if isinstance(payload := record.payload, types.ValidationMetrics)
        ]

    def run(self, run_id: str) -> _FakeRun:
        return _found(self.runs, run_id, errors.RunNotFound, "training run")

    def publish(self, name: str, *, run_id: str, corpus_id: str, recipe: types.Recipe) -> types.ModelVersion:
        with self.changed:
            corpus = self.corpora.get(corpus_id)
            number = next(self._versions[name])
            version = types.ModelVersion(
                name=name,
                version=number,
                source_language=corpus.source_language if corpus else "en",
                target_language=corpus.target_language if corpus else "de",
                run_id=run_id,
                corpus_id=corpus_id,
                recipe=recipe,
                scores=types.ModelScores(
                    bleu=31.5,
                    chrf=55.0,
                    nll_per_token=1.5,
                    weights=types.PublishedWeights.CHECKPOINT,
                    step=4,
                    translated_pairs=2,
                ),
                parameters=1_000_000,
                size_bytes=_MODEL_BYTES,
                digest=hashlib.sha256(_manifest(name, number)).hexdigest(),
                create_time=datetime.now(UTC),
                int8=types.Int8Outcome(pairs=1000, kept=True, fp32_bleu=31.5, int8_bleu=31.25),
            )
            self.models.setdefault(name, []).append(version)
            return version

    def model(self, name: str) -> types.Model:
        versions = _found(self.models, name, errors.ModelNotFound, "model")
        aliases = tuple(alias for _, alias in sorted(self.aliases[name].items()))
        numbers = tuple(version.version for version in versions)
        return types.Model(name=name, latest_version=versions[-1], versions=numbers, aliases=aliases)

    def version(self, reference: str) -> types.ModelVersion:
        named, _, alias = reference.partition("@")
        name, _, number = named.partition("/")
        versions = _found(self.models, name, errors.ModelNotFound, "model")
        if alias:
            number = str(_found(self.aliases[name], alias, errors.ModelNotFound, f"alias of model {name}").version)
        for version in versions[::-1]:
            if number in ("", str(version.version)):
                return version
        raise errors.ModelNotFound(f"no version {number} of model {name}")

    def set_alias(self, name: str, alias: str, number: int) -> types.Model:
        with self.changed:
            version = self.version(f"{name}/{number}")
            moved = types.ModelAlias(alias=alias, version=version.version, update_time=datetime.now(UTC))
            self.aliases[name][alias] = moved
            return self.model(name)

    def delete_alias(self, name: str, alias: str) -> None:
        with self.changed:
            self.version(f"{name}@{alias}")
            del self.aliases[name][alias]

    def delete_version(self, reference: str) -> None:
        with self.changed:
            version = self.version(reference)
            aliases = [
                alias for alias, target in self.aliases[version.name].items() if target.version == version.version
            ]
            if aliases:
                raise errors.ModelInUse(f"alias {aliases[0]} points at {reference}", metadata={"aliases": aliases[0]})
            self.models[version.name].remove(version)
            if not self.models[version.name]:
                del self.models[version.name]
            self.loaded.pop(version.reference, None)

    def load(self, version: types.ModelVersion) -> types.LoadedModel:
        with self.changed:
            loaded = types.LoadedModel(model=version.reference, memory_bytes=version.size_bytes, load_duration_s=0.5)
            self.loaded.pop(version.reference, None)  # the most recently used comes last
            return self.loaded.setdefault(version.reference, loaded)

    def _record(self, run: _FakeRun, state: RunState, attempt: int) -> None:
        run.pending.appendleft(types.StateChange(state=state, attempt=attempt))
        self._advance(run, 1)

    def _advance(self, run: _FakeRun, count: int) -> None:
        for _ in range(min(count, len(run.pending))):
            run.advance()
            state = run.run.state
            if state is RunState.SUCCEEDED:
                made = self.publish(
                    run.run.model_name, run_id=run.run.run_id, corpus_id=run.run.corpus_id, recipe=run.run.recipe
                )
                run.run = dataclasses.replace(run.run, model_version=made.version)
            if state.is_terminal:
                run.pending.clear()
                break
        self.changed.notify_all()


def _rpc(method: Callable[[Any, Any, grpc.ServicerContext], M]) -> Callable[[Any, Any, grpc.ServicerContext], M]:
    """Wrap a method with one response: note the call, turn the SDK's errors into statuses."""

    @functools.wraps(method)
    def answer(self: _Servicer, request: Any, context: grpc.ServicerContext) -> M:  # noqa: ANN401
        try:
            self.fake.arrive(method.__name__)
            return method(self, request, context)
        except errors.FerrymanError as error:
            _abort(context, error)

    return answer


class _Servicer:
    def __init__(self, fake: FakeFerryman) -> None:
        self.fake = fake
        self.backend = fake.backend


class _Training(_Servicer, training_pb2_grpc.TrainingServiceServicer):
    @_rpc
    def StartTraining(
        self, request: training_pb2.StartTrainingRequest, context: grpc.ServicerContext
    ) -> training_pb2.StartTrainingResponse:
        _found(self.backend.corpora, request.corpus_id, errors.CorpusNotFound, "corpus")
        if request.validate_only:
            run = self.backend.new_run(request).run
        else:
            body = training_pb2.StartTrainingRequest()
            body.CopyFrom(request)
            body.ClearField("request_id")
            content = body.SerializeToString(deterministic=True)
            run_id = self.backend.once(request.request_id, content, lambda: self.backend.add_run(request))
            run = self.backend.run(run_id).run
        return _filled(training_pb2.StartTrainingResponse(), "run", run)

    def StreamMetrics(
        self, request: training_pb2.StreamMetricsRequest, context: grpc.ServicerContext
    ) -> Iterator[training_pb2.StreamMetricsResponse]:
        try:
            self.fake.arrive("StreamMetrics")
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
                news, ended = run.records[sent:], run.run.state.is_terminal
                if not (news or ended or request.history_only):
                    self.backend.changed.wait(_HEARTBEAT_INTERVAL_S)
            for record in news:
                yield training_pb2.StreamMetricsResponse(record=record_to_message(record))
            sent += len(news)
            if ended or request.history_only:
                return
            if not news:
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
        wanted = [
            message
            for message in messages
            if (not request.states or message.state in request.states)
            and request.model_name in ("", message.model_name)
        ]
        if request.order != training_pb2.RUN_ORDER_OLDEST_FIRST:
            wanted.reverse()
        page, token = _page(wanted, request)
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


class _Corpora(_Servicer, corpus_pb2_grpc.CorpusServiceServicer):
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
        corpus = _found(self.backend.corpora, request.corpus_id, errors.CorpusNotFound, "corpus")
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


class _Models(_Servicer, model_pb2_grpc.ModelServiceServicer):
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
            self.fake.arrive("DownloadModel")
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


class _Translations(_Servicer, translation_pb2_grpc.TranslationServiceServicer):
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
        """Answer each message with one, its last sentence first: as from any server, order is not to be relied on."""
        try:
            # A refusal before the message is read may reach grpc.aio while it sends, which then drops the status.
            config = next(request_iterator).config
            self.fake.arrive("StreamTranslate")
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
        """Return as many hypotheses as asked for, all the same but for their scores; one for an empty sentence."""
        text = " ".join(part for part in (prefix, self.fake.translate(sentence) if sentence else "") if part)
        pieces = (*text.split(), "</s>")
        asked = options.return_token_scores or options.return_alignment
        hypotheses = [
            types.Hypothesis(
                text=text,
                score=-0.1 * rank,
                log_probability=-0.1 * rank * len(pieces),
                target_tokens=len(pieces),
                finished=True,
                pieces=pieces if asked else (),
                token_log_probabilities=(-0.1 * rank,) * len(pieces) if options.return_token_scores else (),
                alignment=tuple(range(len(pieces))) if options.return_alignment else (),
            )
            for rank in range(1, ((options.n_best or 1) if sentence else 1) + 1)
        ]
        source = (*sentence.split(), "</s>") if sentence else ()
        return types.Translation(
            hypotheses=tuple(hypotheses), source_tokens=len(source), source_pieces=source if asked else ()
        )


def _set_options(message: translation_pb2.TranslateOptions) -> types.TranslateOptions:
    values = vars(from_message(SearchOptions, message))
    return cast("types.TranslateOptions", {name: value for name, value in values.items() if value is not None})


def _manifest(name: str, version: int) -> bytes:
    return f"the manifest of the fake model {name}/{version}".encode()


def model_files(name: str, version: int) -> dict[str, bytes]:
    """Return what a download of a fake model brings: files of the right names, and nothing that could translate."""
    manifest = _manifest(name, version)
    subwords = f"the subwords of the fake model {name}/{version}".encode()
    return {
        "manifest.json": manifest,
        "decoder.onnx": b"",
        "encoder.onnx": bytes(_MODEL_BYTES - len(manifest) - len(subwords)),
        "subwords.model": subwords,
    }


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
                field="upload_part", description="is missing, set pairs or chunk", reason="REQUIRED"
            )
            raise errors.InvalidRequest("upload_part: is missing, set pairs or chunk", violations=[violation])
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


def _statistics(pairs: Sequence[Pair]) -> types.SplitStatistics:
    return types.SplitStatistics(
        pairs=len(pairs),
        source_words=sum(len(source.split()) for source, _ in pairs),
        target_words=sum(len(target.split()) for _, target in pairs),
        empty_pairs=sum(not (source.strip() and target.strip()) for source, target in pairs),
        samples=tuple(types.SentencePair(source=source, target=target) for source, target in pairs[:3]),
    )


def _found(table: dict[str, T], key: str, error: type[errors.NotFound], what: str) -> T:
    if key not in table:
        raise error(f"no {what} {key!r}", metadata={"id": key})
    return table[key]


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
