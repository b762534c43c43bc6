"""Whether a difference in BLEU or chrF is more than noise: paired bootstrap resampling (Koehn, 2004).

Shape suffixes: P validation pairs, S statistics of a pair, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.scoring import Scoring

RESAMPLES: Final = 1000
SIGNIFICANCE: Final = 0.05
_FEWEST_PAIRS: Final = 2


@dataclass(frozen=True)
class Comparison:
    """Whether the first scores are better than the second ones, and the rule that decided, for a person."""

    is_better: bool
    rule: str


def sentence_statistics(
    metric: SelectionMetric, scoring: Scoring, translations: Sequence[str], references: Sequence[str]
) -> list[int]:
    """Return, pair after pair, the counts from which the metric of a set is computed by adding them up: S of them a
    pair. Of the loss there are none."""
    scorer = scoring.bleu() if metric is SelectionMetric.BLEU else _scorer(metric)
    if scorer is None or not translations:
        return []
    per_pair = scorer._extract_corpus_statistics(translations, [references])
    return [int(count) for counts in per_pair for count in counts]


def compare(ours: ValidationScores, theirs: ValidationScores, metric: SelectionMetric, seed: int) -> Comparison:
    """Compare two scores of the same validation pairs.

    The metric decides where the sign of the difference is the same in at least 95 % of the resamples, else the loss.
    The resamples are a function of the seed.
    """
    if metric is SelectionMetric.LOSS:
        return Comparison(ours.rank(metric) > theirs.rank(metric), "by the loss")
    name, score = ("BLEU", "bleu") if metric is SelectionMetric.BLEU else ("chrF", "chrf")
    pairs = ours.translated_pairs
    p_value = _p_value(ours, theirs, metric, seed)
    if p_value < SIGNIFICANCE:
        rule = f"by {name} (paired bootstrap on {pairs} pairs, p = {p_value:.3f})"
        return Comparison(getattr(ours, score) > getattr(theirs, score), rule)
    rule = (
        f"by the loss, as the difference in {name} may be chance (paired bootstrap on {pairs} pairs, p = {p_value:.2f})"
    )
    return Comparison(ours.rank(SelectionMetric.LOSS) > theirs.rank(SelectionMetric.LOSS), rule)


def _p_value(ours: ValidationScores, theirs: ValidationScores, metric: SelectionMetric, seed: int) -> float:
    """Return the share of resamples in which whoever has the better score on all pairs is not better; 1 where there is
    nothing to resample."""
    pairs = ours.translated_pairs
    is_comparable = pairs == theirs.translated_pairs and len(ours.statistics) == len(theirs.statistics) > 0
    if pairs < _FEWEST_PAIRS or not is_comparable:
        return 1.0
    weights_RP = np.random.default_rng(seed).multinomial(pairs, np.full(pairs, 1 / pairs), size=RESAMPLES)
    ours_R, theirs_R = (_resampled(weights_RP, scores, metric) for scores in (ours, theirs))
    better, worse = np.mean(ours_R > theirs_R), np.mean(ours_R < theirs_R)
    return float(1.0 - max(better, worse))


def _resampled(weights_RP: NDArray[np.int64], scores: ValidationScores, metric: SelectionMetric) -> NDArray[np.float64]:
    """Return the score of each resample, in which a pair occurs as often as its weight says."""
    scorer = _scorer(metric)
    statistics_PS = np.array(scores.statistics, dtype=np.int64).reshape(scores.translated_pairs, -1)
    sums_RS = weights_RP @ statistics_PS
    return np.array([scorer._compute_score_from_stats(sums_S.tolist()).score for sums_S in sums_RS])


def _scorer(metric: SelectionMetric) -> Any:  # noqa: ANN401 (sacrebleu's metrics have no public type for this)
    match metric:
        case SelectionMetric.BLEU:
            return BLEU()
        case SelectionMetric.CHRF:
            return CHRF()
        case SelectionMetric.LOSS:
            return None
