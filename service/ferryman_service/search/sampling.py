"""Drawing tokens at random.

A row's random number is a function of the sentence's seed, the row and the position, so a sample depends neither on
neighbours nor on when its sentence joined.

Shape suffixes: R rows, V vocabulary, K tokens of a row in question, best first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.search.topk import k_best

_HEAD: Final = 256
"""So many most probable tokens are looked at first; they nearly always hold all that a filter lets through."""


@dataclass(frozen=True)
class Filters:
    """How each row is sampled; see domain.translation.Sampling."""

    temperature_R: NDArray[np.float64]
    top_k_R: NDArray[np.int64]
    top_p_R: NDArray[np.float64]

    def of(self, row_N: NDArray[np.int64]) -> Filters:
        """Return those of some rows."""
        return Filters(self.temperature_R[row_N], self.top_k_R[row_N], self.top_p_R[row_N])


def uniform(seed_R: NDArray[np.uint64], row_R: NDArray[np.int64], position_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each (seed, row, position), by splitmix64 (Steele et al., 2014)."""
    hash_R = _mix(_mix(_mix(seed_R) + row_R.astype(np.uint64)) + position_R.astype(np.uint64))
    # 52 bits, not 53: times any sum of probabilities this stays below the sum.
    return (hash_R >> np.uint64(12)).astype(np.float64) * 2.0**-52


def draw(log_probs_RV: NDArray[np.float32], filters: Filters, uniform_R: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return a token for each row, drawn by inverting the distribution's cumulative sum: in the order of tokens if
    nothing is filtered, else from the most probable on. Log-probabilities of -inf are never drawn; a row that has
    nothing else gets any token."""
    best_R1 = log_probs_RV.max(axis=1, keepdims=True)
    best_R1 = np.where(np.isfinite(best_R1), best_R1, 0.0)
    with np.errstate(over="ignore"):  # a temperature close to 0
        scaled_RV = (log_probs_RV.astype(np.float64) - best_R1) / filters.temperature_R[:, None]
    weight_RV = np.exp(scaled_RV)
    filtered_R = (filters.top_k_R > 0) | (filters.top_p_R < 1.0)
    token_R = np.zeros(len(log_probs_RV), dtype=np.int64)
    plain_N, filtered_N = np.flatnonzero(~filtered_R), np.flatnonzero(filtered_R)
    token_R[plain_N] = _invert(weight_RV[plain_N], uniform_R[plain_N])
    head = min(_HEAD, log_probs_RV.shape[1])
    while len(filtered_N):
        drawn_N, sure_N = _draw_filtered(
            log_probs_RV[filtered_N], weight_RV[filtered_N], filters.of(filtered_N), uniform_R[filtered_N], head
        )
        token_R[filtered_N] = drawn_N
        filtered_N, head = filtered_N[~sure_N], log_probs_RV.shape[1]
    return token_R


def _draw_filtered(
    log_probs_RV: NDArray[np.float32],
    weight_RV: NDArray[np.float64],
    filters: Filters,
    uniform_R: NDArray[np.float64],
    head: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return a token for each row from its `head` best, and whether they held all that the filters let through."""
    token_RK = k_best(log_probs_RV, head)
    weight_RK = np.take_along_axis(weight_RV, token_RK, axis=1)
    top_k_R1 = np.where(filters.top_k_R > 0, filters.top_k_R, log_probs_RV.shape[1])[:, None]
    weight_RK[np.arange(head) >= top_k_R1] = 0.0
    sum_RK = weight_RK.cumsum(axis=1)
    mass_R = np.where(filters.top_k_R > 0, sum_RK[:, -1], weight_RV.sum(axis=1))
    limit_R = np.where(filters.top_p_R < 1.0, filters.top_p_R * mass_R, np.inf)
    weight_RK[:, 1:][sum_RK[:, :-1] >= limit_R[:, None]] = 0.0
    sure_R = np.where(filters.top_k_R > 0, filters.top_k_R <= head, sum_RK[:, -1] >= limit_R)
    sure_R |= head == log_probs_RV.shape[1]
    place_R = _invert(weight_RK, uniform_R)
    return token_RK[np.arange(len(token_RK)), place_R], sure_R


def _invert(weight_RK: NDArray[np.float64], uniform_R: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the first place at which the sum of the weights exceeds the row's share of their whole."""
    sum_RK = weight_RK.cumsum(axis=1)
    place_R: NDArray[np.int64] = np.argmax(sum_RK > (uniform_R * sum_RK[:, -1])[:, None], axis=1)
    return place_R


def _mix(x_R: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x_R = x_R + np.uint64(0x9E3779B97F4A7C15)
    x_R = (x_R ^ (x_R >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_R = (x_R ^ (x_R >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_R ^ (x_R >> np.uint64(31))
