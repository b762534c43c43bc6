import dataclasses
import itertools
import time

import pytest
import torch

from ferryman_service.domain.recipe import SelectionMetric, resolve_schedule
from ferryman_service.domain.schedule import ScheduleKind, learning_rate
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.data import learn_subwords, tokenise_training_pairs, tokenise_validation_pairs
from ferryman_service.training.loop import LoopParts, TrainingLoop
from ferryman_service.training.pairs import open_pairs
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.reporting import Series
from ferryman_service.training.step import PendingOutcome, new_trainee
from ferryman_service.training.updates import SentUpdate, StepMeter
from ferryman_service.training.validate import Validator
from tests.service.training.conftest import RecordingReporter, make_small_recipe, write_reverse_corpus

CPU = torch.device("cpu")
RANKS = Ranks(rank=0, world_size=1, device=CPU)


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    """Returns subwords, training pairs and validation pairs of the corpus of reversed sentences."""
    folder, recipe = tmp_path_factory.mktemp("tokenised"), make_small_recipe()
    corpus, check = write_reverse_corpus(folder), RecordingReporter().check
    subwords = learn_subwords(corpus, recipe.data, folder / "model", seed=1, check=check)
    tokenise_training_pairs(corpus, subwords, recipe.data, folder / "pairs", check, threads=1)
    return subwords, open_pairs(folder / "pairs"), tokenise_validation_pairs(corpus, subwords, recipe.data, threads=1)


@pytest.fixture
def make_parts(tmp_path, tokenised, reporter):
    """Makes the parts of a loop with new weights."""
    subwords, pairs, validation = tokenised

    def make(recipe, clock=time.monotonic):
        checkpoints = tmp_path / "checkpoints"
        checkpoints.mkdir()
        torch.manual_seed(recipe.seed)
        model = Transformer(TransformerConfig.from_recipe(recipe, subwords.size)).train()
        return LoopParts(
            trainee=new_trainee(model, recipe, RANKS),
            pairs=lambda epoch: pairs,
            recipe=recipe,
            validator=Validator(validation, subwords, recipe, CPU, reporter.check),
            series=Series(reporter),
            checkpoints=checkpoints,
            budget=TimeBudget(recipe.stop.max_duration_s, clock),
        )

    return make


def test_validations_come_at_the_interval_and_at_the_end(make_parts, small_recipe, reporter):
    TrainingLoop(make_parts(small_recipe(stop={"max_steps": 25}))).run()
    assert [step.step for step in reporter.steps] == list(range(1, 26))
    assert [validation.step for validation in reporter.validations] == [10, 20, 25]
    assert reporter.messages("LIMIT_REACHED") == ["stop.max_steps: 25 updates are done"]


def test_loop_stops_after_the_last_epoch(make_parts, small_recipe, reporter):
    parts = make_parts(small_recipe(stop={"max_steps": 0, "max_epochs": 2}))
    loop = TrainingLoop(parts)
    loop.run()
    tokens = int(parts.pairs(1).target.lengths_P.sum())
    for epoch in (1, 2):
        assert sum(step.target_tokens for step in reporter.steps if step.epoch == epoch) == tokens
    assert loop.position.epoch == 2


def test_loop_stops_when_the_score_does_not_improve(make_parts, small_recipe, reporter):
    recipe = small_recipe(
        stop={"max_steps": 1000, "patience": 3}, validation={"interval_steps": 1}, schedule={"factor": 1e-9}
    )
    TrainingLoop(make_parts(recipe)).run()
    assert len(reporter.messages("EARLY_STOP")) == 1
    best_at = [validation.best for validation in reporter.validations]
    assert best_at[-3:] == [False] * 3
    assert best_at[-4]


def test_loop_leaves_time_for_the_last_validations(make_parts, small_recipe, reporter):
    """On a clock that goes on by a second whenever it is read."""
    ticks = itertools.count()
    recipe = small_recipe(stop={"max_steps": 0, "max_duration_s": 100.0}, validation={"interval_steps": 5})
    TrainingLoop(make_parts(recipe, clock=lambda: float(next(ticks)))).run()
    (message,) = reporter.messages("LIMIT_REACHED")
    assert message.startswith("stop.max_duration")
    assert 80 < next(ticks) <= 110
    assert reporter.validations[-1].step == reporter.steps[-1].step


def test_step_metrics_are_within_their_bounds(make_parts, small_recipe, reporter):
    parts = make_parts(small_recipe())
    TrainingLoop(parts).run()
    for step in reporter.steps:
        assert 0 < step.target_tokens <= 512
        assert 0 <= step.padding_share < 0.4
        assert step.memory_bytes > 10**7
        assert step.gradient_norm > 0
        assert step.perplexity == pytest.approx(2.718281828**step.nll_per_token, rel=1e-6)
    first, last = reporter.steps[0], reporter.steps[-1]
    assert last.loss < first.loss
    assert reporter.validations[-1].translated_pairs == 40


def test_overlapping_updates_have_their_own_times(small_recipe):
    """As on a GPU, where an update is sent before the one before it is known."""
    recipe = small_recipe()
    meter = StepMeter(CPU, recipe.optimization, TransformerConfig.from_recipe(recipe, 36))
    pending = PendingOutcome(torch.zeros(3), 0.001, split=False)
    seconds = []
    for started_s, known_s in ((0.0, 2.0), (1.0, 4.0), (3.0, 6.0), (10.0, 11.0)):
        sent = SentUpdate(1, 1, 100, 0.0, 0.0, started_s, pending)
        metrics = meter.metrics(sent, pending.read(), known_s)
        seconds.append(metrics.duration_s)
        assert metrics.target_tokens_per_second == 100 / metrics.duration_s
    assert seconds == [2.0, 2.0, 2.0, 1.0]


class FitsOnly(torch.nn.Module):
    """Fails, as a full device does, on more sentences than these while nothing is trained."""

    def __init__(self, sentences):
        super().__init__()
        self.sentences = sentences

    def forward(self, x):
        if not self.training and len(x) > self.sentences:
            raise torch.OutOfMemoryError
        return x


def test_a_validation_that_does_not_fit_is_halved_and_told(make_parts, small_recipe, reporter):
    parts = make_parts(small_recipe(stop={"max_steps": 1}))
    parts.trainee.model.encoder_norm = FitsOnly(7)
    TrainingLoop(parts).run()
    (message,) = reporter.messages("OUT_OF_MEMORY_SPLIT")
    assert message.startswith("validation at step 1")
    assert reporter.validations[-1].translated_pairs == 40


def wsd(small_recipe, **stop):
    schedule = {"kind": ScheduleKind.WSD, "warmup_steps": 5, "peak_learning_rate": 0.004, "decay_share": 0.3}
    validation = {"interval_steps": 5, "max_translated_pairs": 4}
    recipe = small_recipe(stop={"max_steps": 0, **stop}, validation=validation)
    resolved = resolve_schedule(schedule)
    return dataclasses.replace(recipe, schedule=resolved)


def test_decay_within_a_time_limit_follows_its_durable_plan(make_parts, small_recipe, reporter):
    """On a clock that goes on by a second whenever it is read.

    The plan is flushed, durable, before the first update with a decayed rate."""
    log = []
    flush, step, decay_plan = reporter.flush, reporter.step, reporter.decay_plan
    reporter.flush = lambda: (log.append("flush"), flush())
    reporter.step = lambda metrics: (log.append(metrics.step), step(metrics))
    reporter.decay_plan = lambda plan: (log.append(plan), decay_plan(plan))
    ticks = itertools.count()
    recipe = wsd(small_recipe, max_duration_s=200.0)
    TrainingLoop(make_parts(recipe, clock=lambda: float(next(ticks)))).run()
    plans = reporter.decays
    assert plans and next(ticks) <= 1.05 * 200 + 10
    assert reporter.steps[-1].step == plans[-1].last_step == reporter.validations[-1].step
    assert reporter.steps[-1].learning_rate == 0.0
    for step in reporter.steps:
        assert step.learning_rate == learning_rate(recipe.schedule, step.step, plans)
    assert reporter.messages("DECAY_ENDED") and not reporter.messages("LEARNING_RATE_STILL_HIGH")
    at = log.index(plans[0])
    assert log[at + 1 : at + 3] == ["flush", plans[0].first_step]


def test_target_score_ends_a_run_whose_schedule_has_no_decay(make_parts, small_recipe, reporter):
    recipe = small_recipe(
        stop={"max_steps": 1000, "target_score": 100.0},
        validation={"metric": SelectionMetric.LOSS, "interval_steps": 5},
    )
    TrainingLoop(make_parts(recipe)).run()
    assert reporter.steps[-1].step == 5
    assert reporter.messages("TARGET_REACHED") == ["stop.target_score: 100 is reached at step 5"]
    assert len(reporter.messages("LEARNING_RATE_STILL_HIGH")) == 0  # 5 of 60 warmup steps: below a tenth of the peak


def test_target_score_lets_the_rate_decay_with_wsd(make_parts, small_recipe, reporter):
    recipe = wsd(small_recipe, max_steps=0, max_duration_s=1e6, target_score=100.0)
    recipe = dataclasses.replace(
        recipe, validation=dataclasses.replace(recipe.validation, metric=SelectionMetric.LOSS, interval_steps=14)
    )
    TrainingLoop(make_parts(recipe)).run()
    assert [(plan.first_step, plan.last_step) for plan in reporter.decays] == [(15, 20)]
    assert [step.step for step in reporter.steps] == list(range(1, 21))
    assert reporter.steps[-1].learning_rate == 0.0
