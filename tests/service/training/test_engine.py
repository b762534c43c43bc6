import dataclasses
import errno
import os
import shutil

import pytest
import safetensors.torch
import torch

from ferryman_service.domain.corpora import Side, Split
from ferryman_service.domain.models import PublishedWeights
from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import learning_rate
from ferryman_service.domain.training import DiskIsFull, RunCancelled
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.engine import EngineConfig, TorchTrainingEngine
from ferryman_service.training.scoring import scoring_of
from ferryman_service.trash import list_trash

ENGINE = TorchTrainingEngine(EngineConfig(device="cpu", threads=1))


def test_run_learns_to_translate_and_its_weights_load_into_a_model(job, small_recipe, reporter):
    recipe = small_recipe(stop={"max_steps": 400}, validation={"interval_steps": 200})
    trained = ENGINE.train(job(recipe), reporter)
    assert trained.scores.bleu > 80
    assert trained.scores.bleu >= max(validation.bleu for validation in reporter.validations)
    assert [step.learning_rate for step in reporter.steps] == [
        learning_rate(recipe.schedule, step) for step in range(1, 401)
    ]
    codes = [code for code, _ in reporter.events]
    at_the_start = ["SUBWORDS_TRAINED", "PAIRS_DROPPED", "TRAINING_STARTED"]
    assert codes == [*at_the_start, "LEARNING_RATE_STILL_HIGH", "LIMIT_REACHED", "WEIGHTS_CHOSEN"]
    subwords = Subwords.load(trained.subwords)
    model = Transformer(TransformerConfig.from_recipe(recipe, subwords.size))
    model.load_state_dict(safetensors.torch.load_file(trained.weights))
    assert trained.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert trained.recipe == recipe
    assert len(trained.check_sentences) == 40
    assert trained.scores.weights in PublishedWeights
    assert f"{trained.parameters:,} parameters" in reporter.messages("TRAINING_STARTED")[0]


@pytest.mark.parametrize(("language", "tokenizer"), [("zh", "zh"), ("ja", scoring_of("ja").tokenizer), ("de", "13a")])
def test_run_names_how_it_is_scored(job, small_recipe, reporter, language, tokenizer):
    work = job(small_recipe(stop={"max_steps": 4}, validation={"interval_steps": 2}))
    trained = ENGINE.train(dataclasses.replace(work, target_language=language), reporter)
    decides = {"BLEU": "BLEU", "CHRF": "chrF"}[scoring_of(language).metric(SelectionMetric.BLEU).name]
    [started] = reporter.messages("TRAINING_STARTED")
    assert f"; {decides} decides" in started
    assert f"BLEU is nrefs:1|case:mixed|eff:no|tok:{tokenizer}|" in started
    [chosen] = reporter.messages("WEIGHTS_CHOSEN")
    assert f"by {decides} (paired" in chosen or f"difference in {decides} may be" in chosen
    assert all(f"|tok:{tokenizer}|" in validation.bleu_signature for validation in reporter.validations)
    assert trained.recipe.validation.metric is SelectionMetric.BLEU


def test_weights_are_a_function_of_recipe_corpus_and_seed(job, small_recipe, reporter):
    def weights(**changes):
        torch.manual_seed(123)  # what the process did before does not matter
        recipe = small_recipe(
            model={"dropout": 0.3}, stop={"max_steps": 8}, validation={"interval_steps": 4, "max_translated_pairs": 4}
        )
        recipe = dataclasses.replace(recipe, **changes)
        work = job(recipe)
        shutil.rmtree(work.run_dir / "checkpoints", ignore_errors=True)  # else it would go on from there
        return ENGINE.train(work, reporter).weights.read_bytes()

    first = weights()
    assert weights() == first
    assert weights(seed=2) != first


@pytest.mark.parametrize("metric_changes", [{"keep_last": 1}, {"keep_last": 2, "interval_steps": 7}])
def test_leftover_checkpoints_of_a_crash_are_removed_or_in_the_trash(job, small_recipe, reporter, metric_changes):
    work = job(small_recipe(validation=metric_changes))
    work = dataclasses.replace(work, trash_dir=work.run_dir.parent / "trash")
    for name in ("step-0000000999", "partial-step-0000000010"):
        (work.run_dir / "checkpoints" / name).mkdir(parents=True)
    ENGINE.train(work, reporter)
    kept = sorted((work.run_dir / "checkpoints").iterdir())
    assert kept[-1].name == "step-0000000020"
    assert len(kept) <= max(2, metric_changes["keep_last"]) + 1
    assert "going back to the beginning" in reporter.messages("CHECKPOINT_DAMAGED")[0]
    assert [entry.origin for entry in list_trash(work.trash_dir)] == ["run/checkpoints/step-0000000999"]


def test_cancelled_run_stops_between_steps(job, small_recipe, reporter):
    reporter.checks_left, reporter.error = 30, RunCancelled()
    with pytest.raises(RunCancelled):
        ENGINE.train(job(small_recipe(stop={"max_steps": 10**6})), reporter)
    assert len(reporter.steps) < 40


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_its_own_error(job, small_recipe, reporter, code):
    reporter.checks_left, reporter.error = 10, OSError(code, os.strerror(code))
    work = job(small_recipe())
    with pytest.raises(DiskIsFull, match=str(work.run_dir)):
        ENGINE.train(work, reporter)


def test_too_large_a_vocabulary_fails_the_run(job, small_recipe, reporter):
    with pytest.raises(TrainingFailed, match="ask for at most") as caught:
        ENGINE.train(job(small_recipe(data={"vocabulary_size": 5000})), reporter)
    assert caught.value.reason is FailureReason.VOCABULARY_TOO_LARGE


def test_reduced_vocabulary_is_reported_with_its_size(job, small_recipe, reporter):
    trained = ENGINE.train(job(small_recipe(data={"vocabulary_size": 5000, "reduce_vocabulary": True})), reporter)
    size = Subwords.load(trained.subwords).size
    assert trained.recipe == small_recipe(data={"vocabulary_size": size})
    (told,) = reporter.messages("VOCABULARY_REDUCED")
    assert f"yields only {size} subwords" in told


def test_damaged_corpus_fails_the_run(job, small_recipe, reporter, reverse_corpus):
    reverse_corpus.files[Split.VALIDATION, Side.TARGET].write_bytes(b"\xff\n")
    with pytest.raises(TrainingFailed) as caught:
        ENGINE.train(job(small_recipe()), reporter)
    assert caught.value.reason is FailureReason.CORPUS_DAMAGED


def test_dropped_validation_pairs_are_reported(job, small_recipe, reporter, reverse_corpus):
    for side in Side:
        with reverse_corpus.files[Split.VALIDATION, side].open("a") as file:
            file.write("\n")
    ENGINE.train(job(small_recipe()), reporter)
    assert reporter.messages("VALIDATION_PAIRS_DROPPED") == ["dropped validation pairs: 1 of 41 (1 EMPTY)"]


@pytest.mark.parametrize("values", [{"device": "tpu"}, {"threads": 0}, {"compilation": "yes"}])
def test_wrong_config_is_refused(values):
    with pytest.raises(ValueError, match="must be"):
        EngineConfig(**values)
