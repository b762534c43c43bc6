"""The use cases of training runs: start, look, list, cancel, and the learning-rate curve."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ferryman_service.application.paging import Page, Pager
from ferryman_service.application.ports import CorpusStore, RequestKey, RunStore
from ferryman_service.application.requests import request_id_violations, required
from ferryman_service.domain.errors import InvalidRecipe, InvalidRequest, RoleNotServed, Violation
from ferryman_service.domain.ids import RUN_PREFIX, is_model_name, new_id
from ferryman_service.domain.recipe import Overrides, Recipe, resolve_recipe, resolve_schedule
from ferryman_service.domain.records import RunState
from ferryman_service.domain.runs import RunFilter, TrainingRun
from ferryman_service.domain.schedule import LearningRateSchedule, curve, learning_rate, sample_steps

_DEFAULT_CURVE_STEPS: Final = 50_000
_MAX_STEP: Final = 10**9
_DEFAULT_POINTS: Final = 1000
_MAX_POINTS: Final = 100_000


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """What StartTraining is asked. `recipe` holds the fields that the caller set."""

    request_id: str
    corpus_id: str
    model_name: str
    recipe: Overrides
    validate_only: bool


@dataclass(frozen=True, kw_only=True)
class CurveRequest:
    """What GetLRSchedule is asked: exactly one subject; 0 is the default of the others."""

    schedule: Overrides | None
    recipe: Overrides | None
    run_id: str | None
    first_step: int
    last_step: int
    max_points: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """(step, learning rate) points, the resolved schedule, and its highest point."""

    points: Sequence[tuple[int, float]]
    schedule: LearningRateSchedule
    peak: tuple[int, float]


class TrainingUseCases:
    """What TrainingService does, but for StreamMetrics, which is the MetricsFeed's."""

    def __init__(
        self, *, runs: RunStore, corpora: CorpusStore, pager: Pager, served: bool, max_queued_runs: int
    ) -> None:
        """Store the ports; `served` tells whether this process may start and cancel runs."""
        self._runs = runs
        self._corpora = corpora
        self._pager = pager
        self._served = served
        self._max_queued_runs = max_queued_runs

    def start(self, request: StartRequest) -> TrainingRun:
        """Check everything, then record the run; see StartTraining in the contract."""
        self._require_role()
        recipe = self._check(request)
        self._corpora.get(request.corpus_id)
        run = TrainingRun(
            run_id="" if request.validate_only else new_id(RUN_PREFIX),
            state=RunState.QUEUED,
            corpus_id=request.corpus_id,
            model_name=request.model_name,
            recipe=recipe,
            create_time_ns=time.time_ns(),
        )
        if request.validate_only:
            return run
        return self._runs.create(run, _request_key(request), self._max_queued_runs)

    def get(self, run_id: str) -> TrainingRun:
        """Return a run; raises InvalidRequest (empty id), RunNotFound."""
        _require(run_id, "run_id")
        return self._runs.get(run_id)

    def list_page(self, wanted: RunFilter, page_size: int, page_token: str) -> Page[TrainingRun]:
        """Return a page of runs."""
        listing = json.dumps(["runs", sorted(set(wanted.states)), wanted.model_name, wanted.oldest_first])
        return self._pager.page(
            listing=listing,
            page_size=page_size,
            page_token=page_token,
            fetch=lambda after, limit: self._runs.list_page(wanted, after, limit),
            key_of=lambda run: run.run_id,
        )

    def cancel(self, run_id: str) -> TrainingRun:
        """Ask a run to stop; raises RunNotFound, IllegalTransition."""
        self._require_role()
        _require(run_id, "run_id")
        return self._runs.request_cancel(run_id)

    def learning_rate_curve(self, request: CurveRequest) -> Curve:
        """Return the curve that the trainer follows, to the last bit."""
        schedule, horizon = self._schedule(request)
        first = request.first_step or 1
        last = request.last_step or max(first, schedule.total_steps or horizon or _DEFAULT_CURVE_STEPS)
        points = request.max_points or _DEFAULT_POINTS
        violations = [
            Violation(field=field, description=f"is {value}, must be from {low:,} to {high:,}", reason="OUT_OF_RANGE")
            for field, value, low, high in (
                ("first_step", first, 1, _MAX_STEP),
                ("last_step", last, max(1, first), _MAX_STEP),
                ("max_points", points, 2, _MAX_POINTS),
            )
            if not low <= value <= high
        ]
        if violations:
            raise InvalidRequest(violations)
        peak = schedule.warmup_steps
        steps = sample_steps(schedule, first, last, points)
        return Curve(points=curve(schedule, steps), schedule=schedule, peak=(peak, learning_rate(schedule, peak)))

    def _schedule(self, request: CurveRequest) -> tuple[LearningRateSchedule, int]:
        if request.schedule is not None:
            return resolve_schedule(request.schedule), 0
        if request.recipe is not None:
            recipe = resolve_recipe(request.recipe)
        elif request.run_id is not None:
            recipe = self.get(request.run_id).recipe
        else:
            text = "is required: one of schedule, recipe and run_id"
            raise InvalidRequest([Violation(field="subject", description=text, reason="REQUIRED")])
        return recipe.schedule, recipe.stop.max_steps

    def _require_role(self) -> None:
        if not self._served:
            raise RoleNotServed("this server does not train; start one with --roles training", role="training")

    def _check(self, request: StartRequest) -> Recipe:
        violations = [*request_id_violations(request.request_id), *required(request.corpus_id, "corpus_id")]
        if not is_model_name(request.model_name):
            legal = '1 to 64 of a-z, 0-9, "-", "_" and ".", the first a letter or digit'
            text = f"is {request.model_name[:80]!r}, must be {legal}"
            violations.append(Violation(field="model_name", description=text, reason="INVALID_MODEL_NAME"))
        try:
            recipe = resolve_recipe(request.recipe)
        except InvalidRecipe as error:
            raise InvalidRecipe([*violations, *error.violations]) from None
        if violations:
            raise InvalidRequest(violations)
        return recipe


def _request_key(request: StartRequest) -> RequestKey | None:
    if not request.request_id:
        return None
    body = json.dumps([request.corpus_id, request.model_name, request.recipe], sort_keys=True)
    return RequestKey(request_id=request.request_id.lower(), body_digest=hashlib.sha256(body.encode()).hexdigest())


def _require(value: str, field: str) -> None:
    if violations := list(required(value, field)):
        raise InvalidRequest(violations)
