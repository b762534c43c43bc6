"""When the learning rate of a run with WSD begins to decay, on a clock of the test's own."""

import dataclasses

import pytest

from ferryman_service.domain.recipe import SelectionMetric, resolve_recipe
from ferryman_service.domain.schedule import DecayPlan, DecayReason, ScheduleKind
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.checkpoint import Position
from ferryman_service.training.decay import DecayPlanner, high_rate
from ferryman_service.training.scores import ValidationScores

WARMUP = 10


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Run:
    """A run that does nothing but take its time; the planner decides about its decay."""

    def __init__(self, recipe, *, update_s=1.0, validation_s=0.0, known=(), reported_step=0):
        self.clock = Clock()
        self.recipe, self.update_s, self.validation_s = recipe, update_s, validation_s
        self.budget = TimeBudget(recipe.stop.max_duration_s, self.clock)
        self.planner = DecayPlanner(recipe, self.budget, known, reported_step)
        self.position = Position()

    def go(self, last_step=100_000):
        """Do updates until the decay has ended, or up to a step."""
        while self.position.step < last_step:
            if (plan := self.planner.next_plan(self.position)) is not None:
                self.position = dataclasses.replace(self.position, decays=(*self.position.decays, plan))
            end = self.planner.last_step(self.position)
            if end is not None and self.position.step >= end:
                return
            self.clock.now_s += self.update_s
            self.budget.note_update(self.update_s)
            self.position = dataclasses.replace(self.position, step=self.position.step + 1, validated=None)
            if self.validation_s and self.position.step % self.recipe.validation.interval_steps == 0:
                self.clock.now_s += self.validation_s
                self.budget.validation_s = self.validation_s


def recipe_of(*, share=0.3, validation=None, **stop):
    schedule = {"kind": ScheduleKind.WSD, "warmup_steps": WARMUP, "peak_learning_rate": 0.004, "decay_share": share}
    return resolve_recipe({"schedule": schedule, "stop": stop, "validation": validation or {}})


def scores(bleu=0.0, nll=1.0):
    return ValidationScores(loss=nll, nll_per_token=nll, bleu=bleu, chrf=bleu, translated_pairs=10)


@pytest.mark.parametrize("update_s", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("validation_s", [0.0, 20.0])
def test_decay_takes_its_share_of_the_time_on_any_machine(update_s, validation_s):
    recipe = recipe_of(max_duration_s=3000.0, validation={"interval_steps": 100})
    run = Run(recipe, update_s=update_s, validation_s=validation_s)
    run.go()
    (plan,) = run.position.decays
    assert plan.reason is DecayReason.TIME
    assert run.position.step == plan.last_step
    # Two validations follow: of the last state, and of the average.
    final_s = 2 * validation_s if validation_s and run.budget.validation_s else 0.05 * 3000
    assert 0.97 * 3000 <= run.clock.now_s + final_s <= 3001 + validation_s
    share = (plan.last_step - plan.first_step + 1) / plan.last_step
    assert share == pytest.approx(0.3, abs=0.03)


def test_slower_machine_shortens_the_decay_and_ends_in_time():
    run = Run(recipe_of(max_duration_s=1000.0))
    run.go(last_step=700)
    run.update_s = 3.0
    run.go()
    first, *shortened = run.position.decays
    assert shortened and shortened[-1].last_step < first.last_step
    assert run.position.step == shortened[-1].last_step
    assert run.clock.now_s <= 1.05 * 1000


def test_small_delay_changes_no_plan():
    run = Run(recipe_of(max_duration_s=1000.0))
    run.go(last_step=700)
    run.update_s = 1.1
    run.go()
    assert len(run.position.decays) == 1
    assert run.clock.now_s <= 1.05 * 1000


def test_without_a_limit_of_time_the_scheduled_decay_needs_no_plan():
    run = Run(recipe_of(max_steps=200))
    run.go()
    assert run.position.decays == ()
    assert run.position.step == 200


def test_time_that_ends_before_the_steps_do_brings_the_decay_forward():
    run = Run(recipe_of(max_steps=10_000, max_duration_s=1000.0))
    run.go()
    assert len(run.position.decays) == 1
    assert 900 <= run.clock.now_s <= 1000


def test_steps_that_end_before_the_time_does_need_no_plan():
    run = Run(recipe_of(max_steps=200, max_duration_s=1000.0))
    run.go()
    assert run.position.decays == ()
    assert run.position.step == 200


def test_target_score_begins_a_decay_of_its_share_of_the_run():
    run = Run(recipe_of(max_steps=10_000, target_score=30.0))
    run.go(last_step=700)
    run.position = dataclasses.replace(run.position, validated=scores(bleu=29.9))
    assert run.planner.next_plan(run.position) is None
    run.position = dataclasses.replace(run.position, validated=scores(bleu=30.0))
    run.go()
    assert run.position.decays == (DecayPlan(first_step=701, last_step=1000, reason=DecayReason.TARGET_SCORE),)


def test_target_score_of_the_loss_is_an_upper_bound():
    validation = {"metric": SelectionMetric.LOSS}
    run = Run(recipe_of(max_steps=10_000, target_score=0.5, validation=validation))
    run.go(last_step=70)
    for nll, begins in ((0.6, False), (float("nan"), False), (0.5, True)):
        run.position = dataclasses.replace(run.position, validated=scores(nll=nll))
        assert (run.planner.next_plan(run.position) is not None) is begins


def test_target_score_shortly_before_the_time_is_over_ends_in_time():
    run = Run(recipe_of(max_duration_s=1000.0, target_score=30.0, share=0.1))
    run.go(last_step=840)
    run.position = dataclasses.replace(run.position, validated=scores(bleu=31.0))
    run.go()
    assert run.position.decays[0].reason is DecayReason.TARGET_SCORE
    assert run.clock.now_s <= 1000


def test_patience_begins_the_decay():
    run = Run(recipe_of(max_steps=10_000, patience=3))
    run.go(last_step=70)
    run.position = dataclasses.replace(run.position, validated=scores(), validations_since_best=3)
    run.go()
    assert run.position.decays == (DecayPlan(first_step=71, last_step=100, reason=DecayReason.PATIENCE),)


def test_known_plans_are_followed_whatever_the_clock_says():
    known = (
        DecayPlan(first_step=51, last_step=80, reason=DecayReason.TIME),
        DecayPlan(first_step=61, last_step=70, reason=DecayReason.TIME),
    )
    run = Run(recipe_of(max_duration_s=100_000.0), known=known, reported_step=65)
    run.go()
    assert run.position.decays == known
    assert run.position.step == 70


def test_no_plan_changes_a_step_that_was_reported():
    """An attempt that is slower than the one before it gets to the end of its time earlier."""
    run = Run(recipe_of(max_duration_s=1000.0), update_s=10.0, reported_step=90)
    run.go()
    assert run.position.decays[0].first_step == 91


def test_time_that_is_over_at_once_still_gives_a_decay_that_ends():
    run = Run(recipe_of(max_duration_s=10.0), update_s=30.0)
    run.go()
    assert run.position.decays == (DecayPlan(first_step=2, last_step=2, reason=DecayReason.TIME),)


@pytest.mark.parametrize(
    ("schedule", "stop", "step", "level"),
    [
        ({"kind": ScheduleKind.LINEAR, "total_steps": 1000}, {"max_steps": 600}, 600, "warning"),
        ({"kind": ScheduleKind.LINEAR, "total_steps": 1000}, {"max_steps": 600}, 1000, None),
        ({"kind": ScheduleKind.WSD}, {"max_duration_s": 9.0}, 600, "warning"),
        ({"kind": ScheduleKind.CONSTANT}, {"max_steps": 600}, 600, "info"),
        ({"kind": ScheduleKind.NOAM}, {"max_steps": 600}, 600, "info"),
        ({"kind": ScheduleKind.NOAM}, {"max_steps": 600}, 0, None),
    ],
)
def test_run_that_ends_with_a_high_rate_says_so(schedule, stop, step, level):
    recipe = resolve_recipe({"schedule": {"warmup_steps": WARMUP, **schedule}, "stop": stop})
    event = high_rate(recipe, Position(step=step))
    assert (event[0] if event else None) == level
    assert event is None or ("WSD" in event[2])
    codes = {"warning": "SCHEDULE_CUT_OFF", "info": "LEARNING_RATE_STILL_HIGH", None: None}
    assert (event[1] if event else None) == codes[level]


def test_same_position_never_gives_a_second_plan():
    """Whatever the clock says: a loop that asks until there is no plan must end."""
    for spent_s in (0.0, 30.0, 45.0, 60.0, 600.0):
        run = Run(recipe_of(max_duration_s=60.0), update_s=0.3)
        run.go(last_step=100)
        run.budget.validation_s = 15.0
        run.clock.now_s = max(run.clock.now_s, spent_s)
        plans = 0
        while (plan := run.planner.next_plan(run.position)) is not None:
            run.position = dataclasses.replace(run.position, decays=(*run.position.decays, plan))
            plans += 1
            assert plans == 1


def test_run_that_has_ended_plans_nothing_any_more():
    run = Run(recipe_of(max_duration_s=1000.0, target_score=30.0))
    run.go(last_step=300)
    over = dataclasses.replace(run.position, validated=scores(bleu=31.0), ending=("LIMIT_REACHED", "stop.max_epochs"))
    assert run.planner.next_plan(over) is None


def test_plan_ends_no_later_than_max_steps():
    recipe = recipe_of(max_steps=500, max_duration_s=600.0)
    recipe = dataclasses.replace(recipe, schedule=dataclasses.replace(recipe.schedule, total_steps=1000))
    run = Run(recipe)
    run.go()
    assert run.position.step == run.position.decays[-1].last_step == 500


def test_one_slow_update_after_a_resume_shortens_nothing():
    known = (DecayPlan(first_step=701, last_step=1000, reason=DecayReason.TIME),)
    run = Run(recipe_of(max_duration_s=1000.0), known=known)
    run.position = Position(step=750, decays=known)
    run.clock.now_s = 700.0
    run.budget.resume(0.0, 1.0, 0.8)
    run.update_s = 40.0
    run.go(last_step=751)
    run.update_s = 0.8
    run.go()
    assert run.position.decays == known
    assert run.position.step == 1000


def test_known_decay_that_waits_is_no_end():
    known = (DecayPlan(first_step=701, last_step=1000, reason=DecayReason.TIME),)
    planner = Run(recipe_of(max_duration_s=1000.0), known=known).planner
    assert planner.is_waiting(Position(step=600))
    assert not planner.is_waiting(Position(step=750, decays=known))


def test_complete_schedule_with_a_high_minimum_was_not_cut_off():
    schedule = {"kind": ScheduleKind.LINEAR, "peak_learning_rate": 0.004, "minimum_learning_rate": 0.002}
    recipe = resolve_recipe({"schedule": schedule, "stop": {"max_steps": 1000}})
    assert high_rate(recipe, Position(step=1000)) is None
    assert high_rate(recipe, Position(step=900)) is not None
