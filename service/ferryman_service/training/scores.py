"""What a validation finds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ferryman_service.domain.recipe import SelectionMetric


@dataclass(frozen=True, kw_only=True)
class ValidationScores:
    """Losses per target token in nats over all validation pairs; BLEU and chrF of the first ones.

    `statistics` are those of each translated pair from which the recipe's metric is computed (see
    `training.significance`), one pair after the other; empty where the metric is the loss.
    """

    loss: float
    nll_per_token: float
    bleu: float
    chrf: float
    translated_pairs: int
    statistics: tuple[int, ...] = ()

    def rank(self, metric: SelectionMetric) -> tuple[float, ...]:
        """Return what scores are compared by: higher is better, equal BLEU or chrF is decided by the likelihood.

        What is not a number is worse than every number.
        """
        likelihood = -math.inf if math.isnan(self.nll_per_token) else -self.nll_per_token
        match metric:
            case SelectionMetric.LOSS:
                return (likelihood,)
            case SelectionMetric.BLEU:
                return (self.bleu, likelihood)
            case SelectionMetric.CHRF:
                return (self.chrf, likelihood)


def perplexity(nll_per_token: float) -> float:
    """Return exp(nll_per_token), infinite where a float cannot hold it."""
    try:
        return math.exp(nll_per_token)
    except OverflowError:
        return math.inf
