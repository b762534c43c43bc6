"""The state of the fake service: corpora, runs and models in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, TypeVar

from ferryman import errors, types
from ferryman._mapping import from_message
from ferryman.testing._script import BLEU_SIGNATURE
from ferryman.types import RunState
from ferryman.v1 import corpus_pb2, training_pb2

T = TypeVar("T")
Pair = tuple[str, str]

_MODEL_BYTES: Final = 4_000_000


@dataclass
class FakeRun:
    """A run: the payloads still to record, and its records."""

    run: types.TrainingRun
    pending: deque[types.MetricPayload]
    records: list[types.MetricRecord] = field(default_factory=list)
    paused_in: RunState = RunState.QUEUED

    def restart(self) -> None:
        """Return a resumed run, with a new attempt, to the state in which it was paused."""
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
        """Record the next payload and update the run."""
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
        # A run that is queued again without a pause has lost its worker.
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


class Backend:
    """The data of the fake. `changed` guards it and wakes streams."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.corpora: dict[str, types.Corpus] = {}
        self.pairs: dict[str, dict[str, list[Pair]]] = {}
        self.models: dict[str, list[types.ModelVersion]] = {}
        self.aliases: defaultdict[str, dict[str, types.ModelAlias]] = defaultdict(dict)
        self.loaded: dict[str, types.LoadedModel] = {}
        self.runs: dict[str, FakeRun] = {}
        self.requests: dict[str, tuple[bytes, str]] = {}
        self._numbers = itertools.count(1)
        self._versions: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))

    def once(self, request_id: str, body: bytes, create: Callable[[], str]) -> str:
        """Return the id that `create` made for this request_id, now or earlier; raises RequestIdReused."""
        with self.changed:
            if request_id in self.requests:
                known_body, known_id = self.requests[request_id]
                if known_body != body:
                    raise errors.RequestIdReused(
                        f"request_id {request_id} was used before with other arguments; use a new one"
                    )
                return known_id
            made = create()
            if request_id:
                self.requests[request_id] = (body, made)
            return made

    def add_corpus(self, header: corpus_pb2.UploadHeader, pairs: dict[str, list[Pair]]) -> str:
        corpus_id = f"cor_{next(self._numbers):022}"
        self.pairs[corpus_id] = pairs
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
            found(self.corpora, corpus_id, errors.CorpusNotFound, "corpus")
            users = [item for item in self.runs.values() if item.run.corpus_id == corpus_id]
            unfinished = [item.run.run_id for item in users if not item.run.state.is_terminal]
            if unfinished:
                named = ",".join(unfinished)
                raise errors.CorpusInUse(f"corpus {corpus_id} is used by {named}", metadata={"runs": named})
            for item in users:
                item.run = dataclasses.replace(item.run, corpus_deleted=True)
            del self.corpora[corpus_id]
            self.requests = {key: made for key, made in self.requests.items() if made[1] != corpus_id}

    def new_run(
        self, request: training_pb2.StartTrainingRequest, script: Sequence[types.MetricPayload] = ()
    ) -> FakeRun:
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
        return FakeRun(run, deque(script))

    def _initial_model(self, request: training_pb2.StartTrainingRequest) -> str | None:
        """Return the version to start from, "name/7", or None. Raises InvalidRequest, OptimizerNotKept."""
        if not request.initial_model:
            if request.keep_optimizer:
                violation = errors.Violation(field="keep_optimizer", description="needs initial_model")
                raise errors.InvalidRequest("keep_optimizer: needs initial_model", violations=[violation])
            return None
        version = self.version(request.initial_model)
        if request.keep_optimizer and version.run_id not in self.runs:
            raise errors.OptimizerNotKept(f"the run that made {version.reference} is gone")
        return version.reference

    def add_run(
        self,
        request: training_pb2.StartTrainingRequest,
        script: Sequence[types.MetricPayload],
        hold_after: int | None,
    ) -> str:
        run = self.new_run(request, script)
        self.runs[run.run.run_id] = run
        self._advance(run, len(run.pending) if hold_after is None else hold_after)
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
                    raise errors.IllegalTransition(f"run {run_id} is {run.run.state}; it cannot be cancelled")
                self._record(run, RunState.CANCELLED, run.run.attempt)
            return run.run

    def pause(self, run_id: str) -> types.TrainingRun:
        with self.changed:
            run = self.run(run_id)
            state = run.run.state
            if state is RunState.EXPORTING or state.is_terminal:
                raise errors.IllegalTransition(f"run {run_id} is {state}; it cannot be paused")
            if state is not RunState.PAUSED:
                run.paused_in = state
                self._record(run, RunState.PAUSED, run.run.attempt)
            return run.run

    def resume(self, run_id: str) -> types.TrainingRun:
        with self.changed:
            run = self.run(run_id)
            if run.run.state.is_terminal:
                raise errors.IllegalTransition(f"run {run_id} is {run.run.state}; it cannot be resumed")
            if run.run.state is RunState.PAUSED:
                self._record(run, RunState.QUEUED, run.run.attempt)
                queued = run.run
                run.restart()
                self.changed.notify_all()
                return queued
            return run.run

    def delete(self, run_id: str) -> None:
        with self.changed:
            state = self.run(run_id).run.state
            if not state.is_terminal:
                raise errors.RunNotFinished(f"run {run_id} is {state}; it cannot be deleted")
            for other in self.runs.values():
                if self._needs_optimizer(other) and self._source_run(other) == run_id:
                    raise errors.RunStillNeeded(f"run {other.run.run_id} still needs the optimizer of {run_id}")
            del self.runs[run_id]
            self.requests = {key: made for key, made in self.requests.items() if made[1] != run_id}

    def _needs_optimizer(self, run: FakeRun) -> bool:
        """Whether the run has yet to copy the optimizer state of another run."""
        return run.run.keep_optimizer and not run.run.state.is_terminal and run.run.start_time is None

    def _source_run(self, run: FakeRun) -> str:
        assert run.run.initial_model is not None, "keep_optimizer needs initial_model"
        return self.version(run.run.initial_model).run_id

    def checkpoints(self, run_id: str) -> list[types.Checkpoint]:
        """Return the checkpoints: one after each validation."""
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

    def run(self, run_id: str) -> FakeRun:
        return found(self.runs, run_id, errors.RunNotFound, "training run")

    def publish(
        self, name: str, *, run_id: str, corpus_id: str, recipe: types.Recipe, initial_model: str | None = None
    ) -> types.ModelVersion:
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
                    loss_pairs=2,
                    bleu_signature=BLEU_SIGNATURE,
                ),
                initial_model=initial_model,
                parameters=1_000_000,
                size_bytes=_MODEL_BYTES,
                digest=hashlib.sha256(_manifest(name, number)).hexdigest(),
                create_time=datetime.now(UTC),
                int8=types.Int8Outcome(pairs=1000, kept=True, fp32_bleu=31.5, int8_bleu=31.25),
            )
            self.models.setdefault(name, []).append(version)
            return version

    def model(self, name: str) -> types.Model:
        versions = found(self.models, name, errors.ModelNotFound, "model")
        aliases = tuple(alias for _, alias in sorted(self.aliases[name].items()))
        numbers = tuple(version.version for version in versions)
        return types.Model(name=name, latest_version=versions[-1], versions=numbers, aliases=aliases)

    def version(self, reference: str) -> types.ModelVersion:
        named, _, alias = reference.partition("@")
        name, _, number = named.partition("/")
        versions = found(self.models, name, errors.ModelNotFound, "model")
        if alias:
            number = str(found(self.aliases[name], alias, errors.ModelNotFound, f"alias of model {name}").version)
        for version in versions[::-1]:
            if number in ("", str(version.version)):
                return version
        raise errors.ModelNotFound(f"model {name!r} has no version {number}")

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

    def _record(self, run: FakeRun, state: RunState, attempt: int) -> None:
        run.pending.appendleft(types.StateChange(state=state, attempt=attempt))
        self._advance(run, 1)

    def _advance(self, run: FakeRun, count: int) -> None:
        for _ in range(min(count, len(run.pending))):
            run.advance()
            state = run.run.state
            if state is RunState.SUCCEEDED:
                made = self.publish(
                    run.run.model_name,
                    run_id=run.run.run_id,
                    corpus_id=run.run.corpus_id,
                    recipe=run.run.recipe,
                    initial_model=run.run.initial_model,
                )
                run.run = dataclasses.replace(run.run, model_version=made.version)
            if state.is_terminal:
                run.pending.clear()
                break
        self.changed.notify_all()


def _manifest(name: str, version: int) -> bytes:
    return f"the manifest of the fake model {name}/{version}".encode()


def model_files(name: str, version: int) -> dict[str, bytes]:
    """Return the files of a downloaded fake model, by name. They cannot translate."""
    manifest = _manifest(name, version)
    subwords = f"the subwords of the fake model {name}/{version}".encode()
    return {
        "manifest.json": manifest,
        "decoder.onnx": b"",
        "encoder.onnx": bytes(_MODEL_BYTES - len(manifest) - len(subwords)),
        "subwords.model": subwords,
    }


def _statistics(pairs: Sequence[Pair]) -> types.SplitStatistics:
    return types.SplitStatistics(
        pairs=len(pairs),
        source_words=sum(len(source.split()) for source, _ in pairs),
        target_words=sum(len(target.split()) for _, target in pairs),
        empty_pairs=sum(not (source.strip() and target.strip()) for source, target in pairs),
        samples=tuple(types.SentencePair(source=source, target=target) for source, target in pairs[:3]),
    )


def found(table: dict[str, T], key: str, error: type[errors.NotFound], what: str) -> T:
    if key not in table:
        raise error(f"{what} {key!r} not found", metadata={"id": key})
    return table[key]
