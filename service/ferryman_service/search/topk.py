"""The best tokens of each row out of a whole vocabulary, and the best candidates of each sentence out of its rows'.

Shape suffixes: R rows, V vocabulary, K best tokens, B blocks of the vocabulary, N values that may be among the best; S
sentences, C candidates, M best candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def k_best(values_RV: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return tokens_RK, the k best of each row (at most V), best first, equal ones by the smaller token.

    The k-th best of the blocks' best values bounds the k-th best value from below, so only the few values at or above
    it are sorted.
    """
    rows, vocabulary = values_RV.shape
    assert k <= vocabulary, f"{k} of {vocabulary} tokens"
    block = vocabulary // (8 * k)
    if block < 2:
        return np.argsort(-values_RV, axis=1, kind="stable")[:, :k]
    blocks = vocabulary // block
    best_RB = values_RV[:, : blocks * block].reshape(rows, blocks, block).max(axis=2)
    bound_R = np.partition(best_RB, blocks - k, axis=1)[:, blocks - k]
    row_N, token_N = np.nonzero(values_RV >= bound_R[:, None])
    order_N = np.lexsort((token_N, -values_RV[row_N, token_N], row_N))
    first_R = np.searchsorted(row_N, np.arange(rows))
    best_RK: NDArray[np.int64] = token_N[order_N[first_R[:, None] + np.arange(k)]]
    return best_RK


def best_candidates(total_SC: NDArray[np.float64], m: int) -> NDArray[np.int64]:
    """Return the places_SM of the m best log-probabilities of each sentence (none above 0), best first, equal ones by
    the smaller place. Equal is what differs by less than one part in 2**40.

    A number that is not above 0 has the larger bits the smaller it is. With its place in its last bits each is another
    and whole numbers are sorted, which processors do several at a time: a stable sort takes three times as long.
    """
    place_C = np.arange(total_SC.shape[1])
    place_bits = (1 << len(place_C).bit_length()) - 1
    assert place_bits < 2**12, f"{len(place_C)} candidates of a sentence"
    key_SC = total_SC.view(np.int64) & (2**63 - 1 - place_bits)
    key_SC |= place_C
    key_SC.partition(m - 1, axis=1)
    key_SM = key_SC[:, :m]
    key_SM.sort(axis=1)
    key_SM &= place_bits
    return key_SM
