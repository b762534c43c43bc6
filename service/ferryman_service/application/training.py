"""The use cases of training runs: start, look, list, pause, resume, cancel, delete, and the learning-rate curve.

`unknown` is everywhere what a request holds that the contract does not know: enumeration values, which the parsed
request leaves out. They are told together with all else that is wrong.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from ferryman_service.application.paging import Page, Pager
from ferryman_service.application.ports import CorpusStore, ModelStore, RequestKey, RunFolders, RunStore
from ferryman_service.application.requests import request_id_violations, required
from ferryman_service.application.run_limits import RunLimits, limit_violations
from ferryman_service.domain.errors import (
    InvalidRecipe,
    InvalidRequest,
    ModelHasNoWeights,
    ModelNotFound,
    OptimizerNotKept,
    RoleNotServed,
    RowUnreadable,
    RunStillNeeded,
    Violation,
)
from ferryman_service.domain.ids import RUN_PREFIX, is_model_name, new_id
from ferryman_service.domain.models import ModelVersion, parse_model_reference
from ferryman_service.domain.recipe import Overrides, Recipe, StopRecipe, resolve_recipe, resolve_schedule
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import CheckpointInfo, RunFilter, TrainingRun
from ferryman_service.domain.schedule import (
    DecayPlan,
    LearningRateSchedule,
    ScheduleKind,
    curve,
    learning_rate,
    sample_steps,
    scheduled_decay_step,
)
from ferryman_service.domain.stored import UnreadableRow, readable

_DEFAULT_CURVE_STEPS: Final = 50_000
_MAX_STEP: Final = 10**9
_DEFAULT_POINTS: Final = 1000
_MAX_POINTS: Final = 100_000

_Resolved = TypeVar("_Resolved")


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """What StartTraining is asked. `recipe` holds the fields that the caller set; `trace_context` is TrainingRun's, and
    no part of what makes a request the same as another."""

    request_id: str
    corpus_id: str
    model_name: str
    recipe: Overrides
    validate_only: bool
    initial_model: str = ""
    keep_optimizer: bool = False
    processes: int = 0
    trace_context: str = ""
    unknown: Sequence[Violation] = ()


@dataclass(frozen=True, kw_only=True)
class CurveRequest:
    """What GetLRSchedule is asked: exactly one subject; 0 is the default of the others."""

    schedule: Overrides | None
    recipe: Overrides | None
    run_id: str | None
    first_step: int
    last_step: int
    max_points: int
    unknown: Sequence[Violation] = ()


@dataclass(frozen=True, kw_only=True)
class Curve:
    """(step, learning rate) points, the resolved schedule, its highest point, and the decays that the run has planned.

    Rates from `provisional_from_step` on may still change; 0: none may.
    """

    points: Sequence[tuple[int, float]]
    schedule: LearningRateSchedule
    peak: tuple[int, float]
    decays: Sequence[DecayPlan] = ()
    provisional_from_step: int = 0


@dataclass(frozen=True, kw_only=True)
class _CurveSubject:
    """What a curve is of: a schedule, the limits that it runs under, and how far its run is. `stop` is None where
    nothing is known of a run."""

    schedule: LearningRateSchedule
    stop: StopRecipe | None = None
    decays: tuple[DecayPlan, ...] = ()
    step: int = 0
    is_over: bool = False

    @property
    def max_steps(self) -> int:
        return self.stop.max_steps if self.stop is not None else 0

    def provisional_from_step(self) -> int:
        """Return the first step whose rate may still change; 0 if there is none.

        Before its decay a run may begin it at any step, and a run with a limit of time may shorten its decay.
        """
        if self.schedule.kind is not ScheduleKind.WSD or self.is_over:
            return 0
        stop, scheduled = self.stop, scheduled_decay_step(self.schedule)
        decays_by_itself = stop is not None and bool(stop.max_duration_s or stop.target_score or stop.patience)
        has_begun = bool(self.decays) or (scheduled is not None and self.step + 1 >= scheduled)
        if scheduled is not None and not decays_by_itself:
            return 0
        if has_begun and not (stop is not None and stop.max_duration_s):
            return 0
        return self.step + 1


class TrainingUseCases:
    """What TrainingService does, but for StreamMetrics, which is the MetricsFeed's."""

    def __init__(
        self,
        *,
        runs: RunStore,
        folders: RunFolders,
        corpora: CorpusStore,
        models: ModelStore,
        pager: Pager,
        served: bool,
        limits: RunLimits,
        require_space: Callable[[], None] = lambda: None,
    ) -> None:
        """Store the ports; `served` tells whether this process may start, stop and delete runs, `require_space` raises
        DiskFull while the disk has no room for another run."""
        self._require_space = require_space
        self._runs = runs
        self._folders = folders
        self._corpora = corpora
        self._models = models
        self._pager = pager
        self._served = served
        self._limits = limits
        self._needs = threading.Lock()
        """Held while it is decided whether a run may start with another's checkpoint, or that other one be deleted."""
        self._leaving: set[str] = set()

    def start(self, request: StartRequest) -> TrainingRun:
        """Check everything, then record the run; see StartTraining in the contract.

        What has changed since the first call of a request_id must not matter, so a known one is found before anything
        else is looked at.
        """
        self._require_role()
        key = _request_key(request)
        if key is not None and (known := self._runs.find(key)) is not None:
            return self._told(known)
        recipe, initial = self._check(request)
        self._corpora.get(request.corpus_id)
        run = TrainingRun(
            run_id="" if request.validate_only else new_id(RUN_PREFIX),
            state=RunState.QUEUED,
            corpus_id=request.corpus_id,
            model_name=request.model_name,
            recipe=recipe,
            create_time_ns=time.time_ns(),
            processes=request.processes or self._limits.processes,
            initial_model="" if initial is None else initial.reference,
            keep_optimizer=request.keep_optimizer,
            trace_context=request.trace_context,
        )
        with self._needs:
            if initial is not None:
                self._check_files(initial, keep_optimizer=request.keep_optimizer)
            if request.validate_only:
                self._runs.check_capacity(self._limits.max_queued, self._limits.max_unfinished)
                return run
            self._require_space()
            return self._runs.create(run, key, self._limits.max_queued, self._limits.max_unfinished)

    def get(self, run_id: str) -> TrainingRun:
        """Return a run; raises InvalidRequest (empty id), RunNotFound, RowUnreadable."""
        _require(run_id, "run_id")
        return self._told(self._runs.get(run_id))

    def list_page(
        self,
        wanted: RunFilter,
        page_size: int,
        page_token: str,
        takes: Callable[[TrainingRun | UnreadableRow], bool],
        unknown: Sequence[Violation] = (),
    ) -> Page[TrainingRun | UnreadableRow]:
        """Return a page of runs; `takes` is the Pager's. Raises InvalidRequest."""
        listing = json.dumps(["runs by place", sorted(set(wanted.states)), wanted.model_name, wanted.oldest_first])

        def fetch(after: str | None, limit: int) -> Sequence[TrainingRun | UnreadableRow]:
            runs = [] if unknown else self._runs.list_page(wanted, after, limit)
            present = self._corpora.present({run.corpus_id for run in readable(runs)})
            return [_with_corpus(run, present) for run in runs]

        try:
            page = self._pager.page(
                listing=listing,
                page_size=page_size,
                page_token=page_token,
                fetch=fetch,
                key_of=lambda run: run.place,
                takes=takes,
            )
        except InvalidRequest as error:
            raise InvalidRequest([*unknown, *error.violations]) from None
        if unknown:
            raise InvalidRequest(unknown)
        return page

    def _told(self, run: TrainingRun) -> TrainingRun:
        return replace(run, corpus_deleted=not self._corpora.present([run.corpus_id]))

    def cancel(self, run_id: str) -> TrainingRun:
        """Ask a run to stop; raises RunNotFound, IllegalTransition."""
        self._require_role()
        _require(run_id, "run_id")
        return self._runs.request_cancel(run_id)

    def pause(self, run_id: str) -> TrainingRun:
        """Ask a run to rest; raises RunNotFound, IllegalTransition."""
        self._require_role()
        _require(run_id, "run_id")
        return self._runs.request_pause(run_id)

    def resume(self, run_id: str) -> TrainingRun:
        """Let a paused run go on; raises RunNotFound, IllegalTransition."""
        self._require_role()
        _require(run_id, "run_id")
        return self._runs.request_resume(run_id)

    def checkpoints(self, run_id: str) -> Sequence[CheckpointInfo]:
        """Return the complete checkpoints of a run, by rising step; raises RunNotFound."""
        run = self.get(run_id)
        return self._folders.checkpoints(run.run_id)

    def delete(self, run_id: str) -> None:
        """Remove a run that has ended; raises RunNotFound, RunNotFinished, RunStillNeeded.

        The row goes first: a folder without one is an orphan, which the next start of the service removes.
        """
        self._require_role()
        _require(run_id, "run_id")
        with self._needs:
            self._check_not_needed(run_id)
            self._leaving.add(run_id)
        try:
            self._runs.delete(run_id)
        finally:
            self._leaving.discard(run_id)
        self._folders.delete(run_id)

    def learning_rate_curve(self, request: CurveRequest) -> Curve:
        """Return the curve that the trainer follows, to the last bit. Raises InvalidRecipe, InvalidRequest; then
        RunNotFound."""
        subject = self._curve_subject(request, list(_bounds_violations(request)))
        schedule, decays = subject.schedule, subject.decays
        first = request.first_step or 1
        end = decays[-1].last_step if decays else schedule.total_steps or subject.max_steps or _DEFAULT_CURVE_STEPS
        last = request.last_step or max(first, end)
        peak = schedule.warmup_steps
        steps = sample_steps(schedule, first, last, request.max_points or _DEFAULT_POINTS, decays)
        return Curve(
            points=curve(schedule, steps, decays),
            schedule=schedule,
            peak=(peak, learning_rate(schedule, peak)),
            decays=decays,
            provisional_from_step=subject.provisional_from_step(),
        )

    def _curve_subject(self, request: CurveRequest, violations: list[Violation]) -> _CurveSubject:
        """Return what the curve is of. Raises what the curve does, with these violations too."""
        subject, found = None, list[Violation]()
        if request.schedule is not None:
            schedule, found = _resolve(resolve_schedule, request.schedule, request.unknown)
            subject = None if schedule is None else _CurveSubject(schedule=schedule)
        elif request.recipe is not None:
            recipe, found = _resolve(resolve_recipe, request.recipe, request.unknown)
            subject = None if recipe is None else _CurveSubject(schedule=recipe.schedule, stop=recipe.stop)
        elif request.run_id is not None:
            violations = [*required(request.run_id, "run_id"), *violations]
        else:
            text = "is required: one of schedule, recipe and run_id"
            violations = [Violation(field="subject", description=text, reason="REQUIRED"), *violations]
        _raise_any(violations, found)
        if subject is not None:
            return subject
        assert request.run_id is not None, "another subject is known by now, or has violations"
        run = self._runs.get(request.run_id)
        return _CurveSubject(
            schedule=run.recipe.schedule,
            stop=run.recipe.stop,
            decays=run.progress.decays,
            step=run.progress.step,
            is_over=run.state.is_terminal,
        )

    def _require_role(self) -> None:
        if not self._served:
            raise RoleNotServed("this server does not train; start one with --roles training", role="training")

    def _check_files(self, initial: ModelVersion, *, keep_optimizer: bool) -> None:
        if not self._models.has_weights(initial):
            raise ModelHasNoWeights(
                f"{initial.reference} was published without the weights that training starts from: train and publish "
                "it again, or leave initial_model out",
                model=initial.reference,
            )
        if keep_optimizer and not self._keeps_checkpoint(initial.lineage.run_id):
            raise OptimizerNotKept(
                f"the checkpoints of run {initial.lineage.run_id}, which made {initial.reference}, are gone: leave "
                "keep_optimizer out",
                model=initial.reference,
            )

    def _keeps_checkpoint(self, run_id: str) -> bool:
        # The folder of a run that is being deleted, or was a moment ago, may still be there.
        known = run_id not in self._leaving and run_id in self._runs.heads([run_id])
        return known and self._folders.last_checkpoint(run_id) is not None

    def _check_not_needed(self, run_id: str) -> None:
        """Raise RunStillNeeded if a run has yet to take over the optimizer of this one."""
        for run in readable(self._runs.unfinished()):
            waits = run.keep_optimizer and self._folders.last_checkpoint(run.run_id) is None
            if waits and self._source(run) == run_id:
                raise RunStillNeeded(
                    f"run {run.run_id}, which is {run.state}, will start with the optimizer of run {run_id}: wait "
                    "until it has a checkpoint of its own, or cancel it, then delete this one",
                    run_id=run_id,
                    needed_by=run.run_id,
                )

    def _source(self, run: TrainingRun) -> str | None:
        """Return the id of the run that made the version that a fine-tuning run starts from."""
        try:
            return self._models.resolve(parse_model_reference(run.initial_model)).lineage.run_id
        except (InvalidRequest, ModelNotFound, RowUnreadable):
            return None

    def _check(self, request: StartRequest) -> tuple[Recipe, ModelVersion | None]:
        """Return the recipe and the version to start from. Raises InvalidRecipe or InvalidRequest with every violation;
        then ModelNotFound."""
        violations = list(self._violations(request))
        overrides, initial, missing = request.recipe, None, None
        try:
            initial = self._initial_model(request)
        except InvalidRequest as error:
            violations += error.violations
        except ModelNotFound as error:
            missing = error
        if initial is not None:
            overrides, mismatches = _on_top_of(initial, overrides)
            violations += mismatches
        recipe, found = _resolve(resolve_recipe, overrides, request.unknown)
        if not request.unknown:  # an unknown value may stand for a smaller one
            found += limit_violations(overrides, request.processes, self._limits)
        _raise_any(violations, found)
        if missing is not None:
            raise missing
        assert recipe is not None, "a recipe without violations is resolved"
        return recipe, initial

    def _initial_model(self, request: StartRequest) -> ModelVersion | None:
        if not request.initial_model:
            return None
        return self._models.resolve(parse_model_reference(request.initial_model, "initial_model"))

    def _violations(self, request: StartRequest) -> Iterator[Violation]:
        yield from request_id_violations(request.request_id)
        yield from required(request.corpus_id, "corpus_id")
        if not is_model_name(request.model_name):
            legal = '1 to 64 of a-z, 0-9, "-", "_" and ".", the first a letter or digit'
            text = f"is {request.model_name[:80]!r}, must be {legal}"
            yield Violation(field="model_name", description=text, reason="INVALID_MODEL_NAME")
        most = self._limits.max_processes
        if not 0 <= request.processes <= most:
            text = f"is {request.processes}, must be from 0 to {most}, which is this server's --max-processes-per-run"
            yield Violation(field="processes", description=text, reason="OUT_OF_RANGE")
        if request.keep_optimizer and not request.initial_model:
            text = "needs initial_model: there is no optimizer to keep without one"
            yield Violation(field="keep_optimizer", description=text, reason="CONFLICT")


def _with_corpus(run: TrainingRun | UnreadableRow, present: Set[str]) -> TrainingRun | UnreadableRow:
    """Return the run, which says whether its corpus is among those that are there."""
    return run if isinstance(run, UnreadableRow) else replace(run, corpus_deleted=run.corpus_id not in present)


def _on_top_of(initial: ModelVersion, overrides: Overrides) -> tuple[Overrides, list[Violation]]:
    """Return the overrides with the model's own network and subwords in them, and where the two differ."""
    recipe = initial.lineage.recipe
    fixed: dict[str, dict[str, Any]] = {
        "model": {name: value for name, value in vars(recipe.model).items() if "dropout" not in name},
        "data": {
            "vocabulary_size": recipe.data.vocabulary_size,
            "subword_algorithm": recipe.data.subword_algorithm,
            "split_digits": recipe.data.split_digits,
        },
    }
    mismatches = [
        Violation(
            field=f"recipe.{part}.{name}",
            description=f"is {wanted}, but {initial.reference} has {values[name]}: leave it out",
            reason="CONFLICT",
        )
        for part, values in fixed.items()
        for name, wanted in overrides.get(part, {}).items()
        if name in values and wanted != values[name]
    ]
    # What differs is told once, as a mismatch: the rest of the recipe is checked with the model's values.
    return {**overrides, **{part: {**overrides.get(part, {}), **values} for part, values in fixed.items()}}, mismatches


def _resolve(
    resolve: Callable[[Overrides], _Resolved], overrides: Overrides, unknown: Sequence[Violation]
) -> tuple[_Resolved | None, list[Violation]]:
    """Return what the overrides resolve to, or None and everything that is wrong with them.

    A conflict beside an unknown value may be that value's fault, and is not told.
    """
    try:
        resolved, found = resolve(overrides), list[Violation]()
    except InvalidRecipe as error:
        resolved, found = None, list(error.violations)
    unclear = tuple(violation.field.rpartition(".")[0] + "." for violation in unknown)
    certain = [known for known in found if known.reason == "OUT_OF_RANGE" or not f"{known.field}.".startswith(unclear)]
    return None if unknown else resolved, [*unknown, *certain]


def _raise_any(violations: Sequence[Violation], of_recipe: Sequence[Violation]) -> None:
    """Raise InvalidRecipe or InvalidRequest with all violations, if there are any."""
    if of_recipe:
        raise InvalidRecipe([*violations, *of_recipe])
    if violations:
        raise InvalidRequest(violations)


def _bounds_violations(request: CurveRequest) -> Iterator[Violation]:
    """Yield what is wrong with the steps and points that the caller has set."""
    for field, value, low, high in (
        ("first_step", request.first_step, 1, _MAX_STEP),
        ("last_step", request.last_step, max(1, request.first_step), _MAX_STEP),
        ("max_points", request.max_points, 2, _MAX_POINTS),
    ):
        if value and not low <= value <= high:
            text = f"is {value}, must be from {low:,} to {high:,}"
            yield Violation(field=field, description=text, reason="OUT_OF_RANGE")


def _request_key(request: StartRequest) -> RequestKey | None:
    """Return what the first call of this request is known by; None if there is nothing, or the id is malformed."""
    if request.validate_only or not request.request_id or any(request_id_violations(request.request_id)):
        return None
    fields: list[object] = [request.corpus_id, request.model_name, request.recipe]
    fields += [request.initial_model, request.keep_optimizer, request.processes]
    # No run was ever started with a value that is unknown: the content is another, whatever the rest of it.
    fields += [[violation.field, violation.description] for violation in request.unknown]
    body = json.dumps(fields, sort_keys=True)
    return RequestKey(request_id=request.request_id.lower(), body_digest=hashlib.sha256(body.encode()).hexdigest())


def _require(value: str, field: str) -> None:
    if violations := list(required(value, field)):
        raise InvalidRequest(violations)
