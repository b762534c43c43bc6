"""The weights that training ends with: from which checkpoints they come, and what damaged checkpoints lead to."""

import dataclasses
import shutil

import pytest
import safetensors.torch
import torch

from ferryman_service.domain.models import PublishedWeights
from ferryman_service.domain.recipe import Averaging, SelectionMetric
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import InitialWeights, TrainingJob
from ferryman_service.training.average import average_checkpoints
from ferryman_service.training.checkpoint import checkpoint_path, load_checkpoint, load_weights, save_checkpoint
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.files import Disk
from tests.service.training.conftest import RecordingReporter, make_small_recipe, write_reverse_corpus

ENGINE = TorchTrainingEngine(EngineConfig(device="cpu", threads=1))


def make_recipe(averaging, **optimization):
    """Make a recipe whose rate jumps about so that averaging pays; validations of steps 10, 20, .. 60."""
    validation = {"keep_last": 3, "max_translated_pairs": 4, "metric": SelectionMetric.LOSS, "averaging": averaging}
    schedule = {"factor": 8.0, "warmup_steps": 20}
    return make_small_recipe(
        stop={"max_steps": 60}, schedule=schedule, validation=validation, optimization=optimization
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shared_prepared_dir):
    """Returns the job of a run that has ended, its reporter and its result; each recipe is trained once."""
    folder, known = tmp_path_factory.mktemp("finish"), {}
    corpus = write_reverse_corpus(folder)

    def finish(averaging):
        if averaging not in known:
            work = TrainingJob(
                run_id="run_1",
                recipe=make_recipe(averaging),
                corpus=corpus,
                run_dir=folder / averaging,
                prepared_dir=shared_prepared_dir,
                corpus_digest="reversed",
            )
            work.run_dir.mkdir()
            reporter = RecordingReporter()
            known[averaging] = work, reporter, ENGINE.train(work, reporter)
        return known[averaging]

    return finish


@pytest.fixture
def finish_again(finished, tmp_path):
    """Returns the job of a run whose worker died while training ended: all is there but the result."""

    def copy(averaging):
        work, _, trained = finished(averaging)
        run_dir = shutil.copytree(work.run_dir, tmp_path / "again")
        (run_dir / trained.weights.name).unlink()
        return dataclasses.replace(work, run_dir=run_dir, reported_step=60)

    return copy


def checkpoint_of(work, step):
    return checkpoint_path(work.run_dir / "checkpoints", step)


def end_of(work):
    return load_checkpoint(checkpoint_of(work, 60)).position


def assert_weights_are(trained, expected):
    found = safetensors.torch.load_file(trained.weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def best_steps(reporter, count):
    return sorted(sorted(reporter.validations, key=lambda each: each.nll_per_token)[:count], key=lambda each: each.step)


@pytest.mark.parametrize("averaging", Averaging)
def test_weights_are_those_that_averaging_asks_for(finished, averaging):
    work, reporter, trained = finished(averaging)
    [best] = best_steps(reporter, 1)
    if averaging is Averaging.NONE:
        assert_weights_are(trained, load_weights(checkpoint_of(work, best.step)))
        assert (trained.scores.weights, trained.scores.step) == (PublishedWeights.CHECKPOINT, best.step)
        assert trained.scores.nll_per_token == best.nll_per_token
        assert "not the average" not in reporter.messages("WEIGHTS_CHOSEN")[0]
        return
    steps = {Averaging.LAST: [40, 50, 60], Averaging.BEST: [each.step for each in best_steps(reporter, 3)]}[averaging]
    assert [step for step, _ in end_of(work).candidates] == steps
    assert_weights_are(trained, average_checkpoints([checkpoint_of(work, step) for step in steps]))
    assert (trained.scores.weights, trained.scores.step) == (PublishedWeights.AVERAGE, 60)
    assert trained.scores.nll_per_token < best.nll_per_token
    assert f"the average of the {averaging} 3 checkpoints" in reporter.messages("WEIGHTS_CHOSEN")[0]


def test_average_worse_than_the_best_checkpoint_is_not_taken(job, small_recipe, reporter):
    """While a network learns fast, its mean with what it was is behind it."""
    work = job(small_recipe(stop={"max_steps": 60}, validation={"metric": SelectionMetric.LOSS, "keep_last": 6}))
    trained = ENGINE.train(work, reporter)
    assert_weights_are(trained, load_weights(checkpoint_of(work, 60)))
    assert (trained.scores.weights, trained.scores.step) == (PublishedWeights.CHECKPOINT, 60)
    assert "the checkpoint of step 60" in reporter.messages("WEIGHTS_CHOSEN")[0]
    assert "not the average of the last 6 checkpoints" in reporter.messages("WEIGHTS_CHOSEN")[0]


def test_moving_average_is_published(job, reporter):
    work = job(make_recipe(Averaging.NONE, ema_decay=0.9))
    trained = ENGINE.train(work, reporter)
    groups = load_checkpoint(checkpoint_of(work, trained.scores.step)).tensors
    assert_weights_are(trained, groups["ema"])
    assert not torch.equal(groups["ema"]["embedding.weight"], groups["weights"]["embedding.weight"])


def damage(path):
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(bytes(data))


def test_damaged_checkpoint_is_left_out_of_the_average(finish_again, reporter):
    work = finish_again(Averaging.LAST)
    damage(checkpoint_of(work, 50))
    trained = ENGINE.train(work, reporter)
    assert_weights_are(trained, average_checkpoints([checkpoint_of(work, step) for step in (40, 60)]))
    (message,) = reporter.messages("CHECKPOINT_DAMAGED")
    assert str(checkpoint_of(work, 50)) in message
    assert "the average of the last 2 checkpoints" in reporter.messages("WEIGHTS_CHOSEN")[0]


def test_last_checkpoint_replaces_a_damaged_best_one(job, small_recipe, reporter):
    """After the warm-up the rate is far too high: the first validation stays the best."""
    recipe = small_recipe(
        stop={"max_steps": 30},
        schedule={"factor": 100.0, "warmup_steps": 400},
        validation={"metric": SelectionMetric.LOSS, "keep_last": 3, "averaging": Averaging.NONE},
    )
    work = job(recipe)
    first = ENGINE.train(work, reporter)
    assert first.scores.step < 30
    reporter.events.clear()
    damage(checkpoint_of(work, first.scores.step))
    trained = ENGINE.train(dataclasses.replace(work, reported_step=30), reporter)
    assert_weights_are(trained, load_weights(checkpoint_of(work, 30)))
    last = reporter.validations[2]
    assert (trained.scores.step, trained.scores.nll_per_token) == (last.step, last.nll_per_token)
    assert len(reporter.messages("CHECKPOINT_DAMAGED")) == 1


def test_non_finite_weights_fail_the_run(job, small_recipe, reporter):
    """Every update is skipped, and training may skip as many as it makes: it ends as if all were well."""
    work = job(small_recipe(stop={"max_steps": 2}))
    trained = ENGINE.train(work, reporter)
    weights = safetensors.torch.load_file(trained.weights)
    weights["embedding.weight"][:] = torch.nan
    initial = work.run_dir / "not-finite.safetensors"
    safetensors.torch.save_file(weights, initial)
    recipe = small_recipe(stop={"max_steps": 4}, optimization={"max_skipped_updates": 100})
    again = dataclasses.replace(
        work,
        recipe=recipe,
        run_dir=work.run_dir.parent / "again",
        initial=InitialWeights(weights=initial, subwords=trained.subwords, keep_optimizer=False, checkpoint=None),
    )
    again.run_dir.mkdir()
    with pytest.raises(TrainingFailed, match="Lower the learning rate") as caught:
        ENGINE.train(again, reporter)
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS
    assert not (again.run_dir / "weights.safetensors").exists()


def test_non_finite_last_weights_give_way_to_an_earlier_checkpoint(finish_again, reporter):
    work = finish_again(Averaging.NONE)
    path = checkpoint_of(work, 60)
    end = load_checkpoint(path)
    scores = dataclasses.replace(end.position.validated, nll_per_token=float("nan"))
    best = checkpoint_of(work, 50)
    position = dataclasses.replace(
        end.position, validated=scores, best=load_checkpoint(best).position.validated, best_step=50
    )
    save_checkpoint(path.parent, dataclasses.replace(end, position=position), Disk())
    trained = ENGINE.train(work, reporter)
    assert trained.scores.step == 50
    assert_weights_are(trained, load_weights(best))
