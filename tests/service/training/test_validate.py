import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import RunCancelled
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import make_batch
from ferryman_service.training.data import ValidationPairs, learn_subwords, tokenise_validation_pairs
from ferryman_service.training.scores import ValidationScores, perplexity
from ferryman_service.training.validate import Validator

CPU = torch.device("cpu")


@pytest.fixture
def pieces(tmp_path, reverse_corpus, small_recipe, reporter):
    """Validation pairs, subwords, recipe, and an untrained model."""
    recipe = small_recipe(validation={"max_translated_pairs": 7})
    subwords = learn_subwords(reverse_corpus, recipe.data, tmp_path / "subwords.model", seed=1, check=reporter.check)
    pairs = tokenise_validation_pairs(reverse_corpus, subwords, recipe.data, threads=1)
    torch.manual_seed(1)
    return pairs, subwords, recipe, Transformer(TransformerConfig.from_recipe(recipe, subwords.size))


def validator(pairs, subwords, recipe, check=lambda: None):
    return Validator(pairs, subwords, recipe, CPU, check)


def test_losses_are_the_mean_over_all_target_tokens(pieces):
    pairs, subwords, recipe, model = pieces
    scores = validator(pairs, subwords, recipe).score(model.train())
    assert model.training
    model.eval()
    sums, tokens = np.zeros(2), 0
    with torch.no_grad():
        for i in range(len(pairs.sources)):
            batch = make_batch(pairs.tokens, np.array([i]))
            logits_TV = model(batch.source_BS, batch.decoder_input_BT)[0]
            sums += [
                F.cross_entropy(logits_TV, batch.labels_N, label_smoothing=smoothing, reduction="sum").item()
                for smoothing in (0.1, 0.0)
            ]
            tokens += batch.target_tokens
    assert [scores.loss, scores.nll_per_token] == pytest.approx(sums / tokens, rel=1e-4)
    assert scores.translated_pairs == 7


def test_scores_are_those_of_the_first_pairs_in_their_order(pieces):
    """References that are the model's own translations score 100; one pair out of place does not."""
    pairs, subwords, recipe, model = pieces
    own = validator(pairs, subwords, recipe)._translate(model.eval())
    assert len(set(own)) > 1
    references = [*own, *pairs.references[7:]]
    perfect = ValidationPairs(pairs.sources, references, pairs.tokens, "")
    scores = validator(perfect, subwords, recipe).score(model)
    assert (scores.bleu, scores.chrf) == (pytest.approx(100), pytest.approx(100))
    rotated = ValidationPairs(pairs.sources, [*references[1:7], references[0], *references[7:]], pairs.tokens, "")
    assert validator(rotated, subwords, recipe).score(model).chrf < 99


def test_a_cancelled_run_stops_validating(pieces):
    pairs, subwords, recipe, model = pieces

    def check():
        raise RunCancelled

    with pytest.raises(RunCancelled):
        validator(pairs, subwords, recipe, check).score(model.train())
    assert model.training


class FitsOnly(torch.nn.Module):
    """Fails, as a full device does, on more sentences than these."""

    def __init__(self, sentences):
        super().__init__()
        self.sentences = sentences

    def forward(self, x):
        if len(x) > self.sentences:
            raise torch.OutOfMemoryError
        return x


def test_a_batch_that_does_not_fit_is_scored_in_halves(pieces):
    pairs, subwords, recipe, model = pieces
    ours = validator(pairs, subwords, recipe)
    whole = ours.score(model)
    assert not ours.was_split
    model.encoder_norm = FitsOnly(3)
    halved = ours.score(model)
    assert ours.was_split
    assert (halved.bleu, halved.chrf, halved.translated_pairs) == (whole.bleu, whole.chrf, 7)
    assert halved.nll_per_token == pytest.approx(whole.nll_per_token, rel=1e-5)
    model.encoder_norm = torch.nn.Identity()
    ours.score(model)
    assert not ours.was_split


def test_a_pair_that_does_not_fit_fails_the_run_with_a_cure(pieces):
    pairs, subwords, recipe, model = pieces
    model.encoder_norm = FitsOnly(0)
    with pytest.raises(TrainingFailed, match=r"shape \(1, \d+\) to \(1, \d+\).*batch_target_tokens") as caught:
        validator(pairs, subwords, recipe).score(model.train())
    assert caught.value.reason is FailureReason.OUT_OF_MEMORY
    assert model.training


def scores(**changes):
    values = {"loss": 1.0, "nll_per_token": 1.0, "bleu": 30.0, "chrf": 50.0, "translated_pairs": 9}
    return ValidationScores(**values | changes)


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        (SelectionMetric.LOSS, scores(nll_per_token=0.9, bleu=0.0)),
        (SelectionMetric.BLEU, scores(nll_per_token=2.0, bleu=30.1)),
        (SelectionMetric.BLEU, scores(nll_per_token=0.9)),  # equal BLEU
        (SelectionMetric.CHRF, scores(bleu=0.0, chrf=50.1)),
    ],
)
def test_the_metric_decides_which_scores_are_better(metric, better):
    assert better.rank(metric) > scores().rank(metric)


def test_a_perplexity_that_no_float_holds_is_infinite():
    assert perplexity(1e4) == float("inf")
    assert perplexity(0.0) == 1.0
