import math

import pytest

from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.training.scores import ValidationScores, perplexity


def scores(nll_per_token, bleu=10.0, chrf=20.0):
    return ValidationScores(loss=nll_per_token, nll_per_token=nll_per_token, bleu=bleu, chrf=chrf, translated_pairs=1)


@pytest.mark.parametrize("metric", SelectionMetric)
def test_a_higher_rank_is_better_and_nan_is_the_worst(metric):
    ranks = [scores(nll).rank(metric) for nll in (math.nan, math.inf, 2.0, 1.0)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[2]


def test_the_score_that_was_asked_for_decides_first():
    assert scores(1.0, bleu=1.0).rank(SelectionMetric.BLEU) < scores(2.0, bleu=2.0).rank(SelectionMetric.BLEU)
    assert scores(1.0, chrf=1.0).rank(SelectionMetric.CHRF) < scores(2.0, chrf=2.0).rank(SelectionMetric.CHRF)
    assert scores(2.0, bleu=2.0).rank(SelectionMetric.LOSS) < scores(1.0, bleu=1.0).rank(SelectionMetric.LOSS)


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
