import itertools
import time

import pytest
import torch

from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.checkpoint import checkpoint_path, load_checkpoint
from ferryman_service.training.data import learn_subwords, tokenise_training_pairs, tokenise_validation_pairs
from ferryman_service.training.files import RunFiles
from ferryman_service.training.loop import LoopParts, TimeBudget, TrainingLoop
from ferryman_service.training.pairs import open_pairs
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.step import ScheduledRate, Trainee, new_trainee
from ferryman_service.training.validate import Validator

CPU = torch.device("cpu")
RANKS = Ranks(rank=0, world_size=1, device=CPU)


@pytest.fixture
def make_parts(tmp_path, reverse_corpus, reporter):
    """Makes the parts of a loop with new weights."""

    def make(recipe, clock=time.monotonic):
        files = RunFiles(tmp_path)
        files.start_afresh()
        subwords = learn_subwords(reverse_corpus, recipe.data, files, seed=1, check=reporter.check)
        tokenise_training_pairs(reverse_corpus, subwords, recipe.data, files, reporter, threads=1)
        validation = tokenise_validation_pairs(reverse_corpus, subwords, recipe.data, threads=1)
        torch.manual_seed(recipe.seed)
        model = Transformer(TransformerConfig.from_recipe(recipe, subwords.size)).train()
        return LoopParts(
            trainee=new_trainee(model, recipe, RANKS),
            pairs=open_pairs(files.pairs),
            recipe=recipe,
            validator=Validator(validation, subwords, recipe, CPU, reporter.check),
            reporter=reporter,
            checkpoints=files.checkpoints,
            budget=TimeBudget(recipe.stop.max_time_seconds, clock),
        )

    return make


def test_a_resumed_run_is_bit_identical_to_an_unbroken_one(make_parts, small_recipe, reporter):
    changes = {"model": {"dropout": 0.2, "attention_dropout": 0.1}, "optimization": {"batch_target_tokens": 1024}}
    unbroken = make_parts(small_recipe(stop={"max_steps": 20}, **changes))
    loop = TrainingLoop(unbroken)
    loop.run()
    steps = list(reporter.steps)
    assert steps[-1].epoch > 1  # the data order of a later epoch is resumed, too

    first_half = make_parts(small_recipe(stop={"max_steps": 10}, **changes))
    TrainingLoop(first_half).run()
    torch.manual_seed(99)
    parts = make_parts_like(first_half, small_recipe(stop={"max_steps": 20}, **changes))
    position = load_checkpoint(checkpoint_path(parts.checkpoints, 10), parts.trainee.model, parts.trainee.optimizer)
    resumed = TrainingLoop(parts, position)
    resumed.run()
    for name, weight in unbroken.trainee.model.state_dict().items():
        assert torch.equal(parts.trainee.model.state_dict()[name], weight), name
    assert [step.loss for step in reporter.steps[20:]] == [step.loss for step in steps]
    assert [step.learning_rate for step in reporter.steps[20:]] == [step.learning_rate for step in steps]
    assert resumed.position == loop.position


def make_parts_like(parts, recipe):
    """The same files, but new objects, as a new process has them; the schedule begins where the checkpoint ended."""
    model = Transformer(parts.trainee.model.config).train()
    fresh = new_trainee(model, recipe, RANKS)
    trainee = Trainee(model, fresh.optimizer, ScheduledRate(fresh.optimizer, recipe.schedule, 10), fresh.recipe, RANKS)
    return LoopParts(
        trainee=trainee,
        pairs=parts.pairs,
        recipe=recipe,
        validator=parts.validator,
        reporter=parts.reporter,
        checkpoints=parts.checkpoints,
        budget=TimeBudget(0),
    )


def test_validations_come_at_the_interval_and_at_the_end(make_parts, small_recipe, reporter):
    TrainingLoop(make_parts(small_recipe(stop={"max_steps": 25}))).run()
    assert [step.step for step in reporter.steps] == list(range(1, 26))
    assert [validation.step for validation in reporter.validations] == [10, 20, 25]
    assert reporter.messages("LIMIT_REACHED") == ["stop.max_steps: 25 updates are done"]


def test_it_stops_after_the_last_epoch(make_parts, small_recipe, reporter):
    parts = make_parts(small_recipe(stop={"max_steps": 0, "max_epochs": 2}))
    loop = TrainingLoop(parts)
    loop.run()
    tokens = int(parts.pairs.target.lengths_P.sum())
    for epoch in (1, 2):
        assert sum(step.target_tokens for step in reporter.steps if step.epoch == epoch) == tokens
    assert loop.position.epoch == 2


def test_it_stops_when_the_score_does_not_improve(make_parts, small_recipe, reporter):
    recipe = small_recipe(
        stop={"max_steps": 1000, "patience": 3}, validation={"interval_steps": 1}, schedule={"factor": 1e-9}
    )
    TrainingLoop(make_parts(recipe)).run()
    assert len(reporter.messages("EARLY_STOP")) == 1
    best_at = [validation.best for validation in reporter.validations]
    assert best_at[-3:] == [False] * 3
    assert best_at[-4]


def test_it_leaves_time_for_the_last_validations(make_parts, small_recipe, reporter):
    """On a clock that goes on by a second whenever it is read."""
    ticks = itertools.count()
    recipe = small_recipe(stop={"max_steps": 0, "max_time_seconds": 100.0}, validation={"interval_steps": 5})
    TrainingLoop(make_parts(recipe, clock=lambda: float(next(ticks)))).run()
    (message,) = reporter.messages("LIMIT_REACHED")
    assert message.startswith("stop.max_time_seconds")
    assert 80 < next(ticks) <= 100
    assert reporter.validations[-1].step == reporter.steps[-1].step


def test_metrics_say_what_they_promise(make_parts, small_recipe, reporter):
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
