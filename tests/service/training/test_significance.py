"""Whether a difference in BLEU or chrF is more than chance."""

import random

import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.scoring import scoring_of
from ferryman_service.training.significance import compare, sentence_statistics

PLAIN = scoring_of("")
REFERENCES = [" ".join(random.Random(seed).choices("abcdefghij", k=8)) for seed in range(100)]


def damaged(share, seed):
    """The references, of which a share has its words turned round."""
    generator = random.Random(seed)
    return [" ".join(reversed(line.split())) if generator.random() < share else line for line in REFERENCES]


def scores(metric, translations, nll):
    scorer = {SelectionMetric.BLEU: BLEU, SelectionMetric.CHRF: CHRF, SelectionMetric.LOSS: BLEU}[metric]()
    score = scorer.corpus_score(translations, [REFERENCES]).score
    return ValidationScores(
        loss=nll,
        nll_per_token=nll,
        bleu=score,
        chrf=score,
        translated_pairs=len(translations),
        statistics=tuple(sentence_statistics(metric, PLAIN, translations, REFERENCES)),
    )


@pytest.mark.parametrize(("metric", "scorer"), [(SelectionMetric.BLEU, BLEU()), (SelectionMetric.CHRF, CHRF())])
def test_statistics_add_up_to_the_public_score(metric, scorer):
    translations = damaged(0.4, seed=1)
    statistics = sentence_statistics(metric, PLAIN, translations, REFERENCES)
    width = len(statistics) // len(REFERENCES)
    sums = [sum(statistics[column::width]) for column in range(width)]
    expected = scorer.corpus_score(translations, [REFERENCES]).score
    assert scorer._compute_score_from_stats(sums).score == pytest.approx(expected)


@pytest.mark.parametrize("metric", [SelectionMetric.BLEU, SelectionMetric.CHRF])
def test_large_difference_is_decided_by_the_metric(metric):
    good, bad = scores(metric, damaged(0.05, seed=1), nll=9.0), scores(metric, damaged(0.6, seed=2), nll=0.1)
    comparison = compare(good, bad, metric, seed=1)
    assert comparison.is_better
    assert comparison.rule.startswith("by BLEU" if metric is SelectionMetric.BLEU else "by chrF")
    assert not compare(bad, good, metric, seed=1).is_better


def test_small_difference_is_decided_by_the_loss():
    """As in a run whose last checkpoint had a BLEU of 96.49 and its average 96.43, with a far lower loss."""
    ours, theirs = damaged(0.10, seed=1), damaged(0.11, seed=2)
    checkpoint, average = scores(SelectionMetric.BLEU, ours, nll=0.138), scores(SelectionMetric.BLEU, theirs, nll=0.093)
    comparison = compare(average, checkpoint, SelectionMetric.BLEU, seed=1)
    assert comparison.is_better
    assert "by the loss, as the difference in BLEU may be chance" in comparison.rule
    assert not compare(checkpoint, average, SelectionMetric.BLEU, seed=1).is_better


def test_equal_translations_are_decided_by_the_loss():
    one, other = (scores(SelectionMetric.BLEU, REFERENCES, nll=nll) for nll in (0.2, 0.1))
    assert compare(other, one, SelectionMetric.BLEU, seed=1).is_better
    assert not compare(one, other, SelectionMetric.BLEU, seed=1).is_better


def test_comparison_is_a_function_of_the_seed():
    one, other = (scores(SelectionMetric.BLEU, damaged(0.3, seed=seed), nll=0.1) for seed in (1, 2))
    rules = {seed: compare(one, other, SelectionMetric.BLEU, seed).rule for seed in range(5)}
    assert rules == {seed: compare(one, other, SelectionMetric.BLEU, seed).rule for seed in range(5)}


def test_loss_needs_no_resampling():
    one, other = (scores(SelectionMetric.LOSS, REFERENCES, nll=nll) for nll in (0.2, 0.1))
    assert other.statistics == ()
    assert compare(other, one, SelectionMetric.LOSS, seed=1).is_better
    assert compare(other, one, SelectionMetric.LOSS, seed=1).rule == "by the loss"


def test_scores_without_statistics_are_decided_by_the_loss():
    plain = [
        ValidationScores(loss=nll, nll_per_token=nll, bleu=bleu, chrf=bleu, translated_pairs=9)
        for nll, bleu in ((0.1, 10.0), (0.2, 90.0))
    ]
    assert compare(plain[0], plain[1], SelectionMetric.BLEU, seed=1).is_better


@pytest.mark.parametrize(("language", "line"), [("zh-Hans", "一只狗在公园里跑步{}。"), ("th", "สุนัขวิ่งในสวน{}")])
def test_languages_without_spaces_are_compared_by_their_own_tokens(language, line):
    """With the tokens of 13a both have BLEU 0, and the difference is always chance."""
    scoring, metric = scoring_of(language), SelectionMetric.BLEU
    references = [line.format(number) for number in range(40)]

    def scored(wrong, nll):
        translations = [text[3:] + text[:3] if index < wrong else text for index, text in enumerate(references)]
        bleu = scoring.bleu_score(translations, references)
        statistics = tuple(sentence_statistics(metric, scoring, translations, references))
        return ValidationScores(
            loss=nll, nll_per_token=nll, bleu=bleu, chrf=0.0, translated_pairs=40, statistics=statistics
        )

    good, bad = scored(wrong=4, nll=2.0), scored(wrong=30, nll=1.0)
    assert 0 < bad.bleu < good.bleu < 100
    assert compare(good, bad, metric, seed=1).rule.startswith("by BLEU")
    assert compare(good, bad, metric, seed=1).is_better
