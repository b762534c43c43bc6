"""When the learning rate of a run with WSD begins to decay
(docs/decisions/0008-decays-are-planned-while-training.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ferryman_service.domain.recipe import Averaging, Recipe, SelectionMetric
from ferryman_service.domain.records import EventLevel
from ferryman_service.domain.schedule import (
    DecayPlan,
    DecayReason,
    ScheduleKind,
    learning_rate,
    scheduled_decay_step,
)
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.checkpoint import Position
from ferryman_service.training.scores import ValidationScores

LATE_SHARE: Final = 0.05
"""A decay that would pass the limit of time by more than this share of it is shortened."""

HIGH_SHARE: Final = 0.1
"""A run that ends with its learning rate above this share of the peak says so."""


class DecayPlanner:
    """Decides between two updates whether a decay begins with the next one. Rank 0 asks.

    `known` are the decays that earlier attempts planned: they are followed before new ones are made. No decay is
    planned for a step up to `reported_step`, whose rate an earlier attempt has reported.
    """

    def __init__(
        self, recipe: Recipe, budget: TimeBudget, known: Sequence[DecayPlan] = (), reported_step: int = 0
    ) -> None:
        self._recipe = recipe
        self._schedule = recipe.schedule
        self._budget = budget
        self._known = list(known)
        self._reported_step = reported_step

    def next_plan(self, position: Position) -> DecayPlan | None:
        """Return the decay that begins with the step after `position`; None if none does. A new one is known from now
        on.

        At the same position there is one new plan at most: a decay is not shortened before its first step is done.
        """
        if position.ending is not None:
            return None
        if len(self._known) > len(position.decays):
            known = self._known[len(position.decays)]
            return known if known.first_step == position.step + 1 else None
        if self._schedule.kind is not ScheduleKind.WSD or position.step < max(1, self._reported_step):
            return None
        plan = self._new_plan(position)
        if plan is not None:
            self._known.append(plan)
        return plan

    def is_waiting(self, position: Position) -> bool:
        """Tell whether a known decay has yet to begin, as after a return to a checkpoint before it."""
        return len(self._known) > len(position.decays)

    def last_step(self, position: Position) -> int | None:
        """Return the step with which the run ends because its decay does; None if it has not begun to decay."""
        if position.decays:
            return position.decays[-1].last_step
        scheduled = scheduled_decay_step(self._schedule)
        has_begun = scheduled is not None and position.step + 1 >= scheduled
        return self._schedule.total_steps if has_begun else None

    def _new_plan(self, position: Position) -> DecayPlan | None:
        last_step = self.last_step(position)
        if last_step is not None:
            return self._shortened(position, last_step)
        stop = self._recipe.stop
        if stop.max_steps and position.step >= stop.max_steps:
            return None
        if position.validated is not None and reaches_target(self._recipe, position.validated):
            return self._early(position, DecayReason.TARGET_SCORE)
        if stop.patience and position.validations_since_best >= stop.patience:
            return self._early(position, DecayReason.PATIENCE)
        assert self._schedule.decay_share is not None
        left_s = self._left_s()
        if left_s <= self._schedule.decay_share * self._budget.limit_s and self._budget.update_s() is not None:
            return self._plan(position, self._steps_within(left_s), DecayReason.TIME)
        return None

    def _early(self, position: Position, reason: DecayReason) -> DecayPlan:
        """Return a decay that takes its share of what the run becomes by it, or less where the limits leave less."""
        share = self._schedule.decay_share
        assert share is not None
        steps: float = round(position.step * share / (1.0 - share))
        if self._budget.update_s() is not None:
            steps = min(steps, self._steps_within(self._left_s()))
        return self._plan(position, steps, reason)

    def _shortened(self, position: Position, last_step: int) -> DecayPlan | None:
        to_come = last_step - position.step
        update_s = self._budget.update_s()
        if self._budget.limit_s == 0 or to_come <= 1 or update_s is None:
            return None
        if position.decays and position.decays[-1].first_step > position.step:
            return None
        late_s = to_come * self._pace_s(update_s) - self._left_s()
        steps = self._steps_within(self._left_s())
        if late_s <= LATE_SHARE * self._budget.limit_s or steps >= to_come:
            return None
        return self._plan(position, steps, DecayReason.TIME)

    def _plan(self, position: Position, steps: float, reason: DecayReason) -> DecayPlan:
        limits = [limit for limit in (self._schedule.total_steps, self._recipe.stop.max_steps) if limit]
        last_step = min(position.step + max(1.0, steps), *limits, math.inf)
        return DecayPlan(first_step=position.step + 1, last_step=int(last_step), reason=reason)

    def _steps_within(self, left_s: float) -> float:
        """Return how many updates, with their share of the periodic validations, fit into the time."""
        update_s = self._budget.update_s()
        assert update_s is not None
        return left_s if math.isinf(left_s) else left_s // self._pace_s(update_s)

    def _pace_s(self, update_s: float) -> float:
        return update_s + (self._budget.validation_s or 0.0) / self._recipe.validation.interval_steps

    def _left_s(self) -> float:
        """Return the time for updates: at the end the last state is validated, and an average if one is made."""
        averages = self._recipe.validation.averaging is not Averaging.NONE and self._recipe.validation.keep_last > 1
        return self._budget.left_s(1 + averages)


def reaches_target(recipe: Recipe, scores: ValidationScores) -> bool:
    """Tell whether the scores reach the recipe's `stop.target_score`, if it has one."""
    target = recipe.stop.target_score
    match recipe.validation.metric:
        case SelectionMetric.LOSS:
            return target > 0 and scores.nll_per_token <= target
        case SelectionMetric.BLEU:
            return 0 < target <= scores.bleu
        case SelectionMetric.CHRF:
            return 0 < target <= scores.chrf


def high_rate(recipe: Recipe, position: Position) -> tuple[EventLevel, str, str] | None:
    """Return the event of a run that ends at `position` with its learning rate high; None if the rate is low."""
    if position.step == 0:
        return None
    schedule = recipe.schedule
    last = learning_rate(schedule, position.step, position.decays)
    peak = learning_rate(schedule, schedule.warmup_steps)
    if last <= max(HIGH_SHARE * peak, schedule.minimum_learning_rate or 0.0):
        return None
    text = f"the learning rate is {last:.3g} at step {position.step}, the last one: {last / peak:.0%} of its peak"
    match schedule.kind:
        case ScheduleKind.LINEAR | ScheduleKind.COSINE | ScheduleKind.WSD:
            cure = "The schedule was cut off before its end: give the run more time, fewer steps, or the schedule WSD"
            return EventLevel.WARNING, "SCHEDULE_CUT_OFF", f"{text}. {cure}"
        case _:
            cure = "A decay that ends with the run usually gives better weights: use the schedule WSD"
            return EventLevel.INFO, "LEARNING_RATE_STILL_HIGH", f"{text}. {cure}"
