"""Drawing at random: the right frequencies, and nothing that was filtered out."""

import math

import numpy as np
import pytest

from ferryman_service.search.sampling import Filters, draw, uniform

DRAWS = 20_000
PROBABILITIES = np.array([0.0, 0.05, 0.4, 0.1, 0.25, 0.2])


def frequencies(probabilities, *, temperature=1.0, top_k=0, top_p=1.0):
    with np.errstate(divide="ignore"):
        log_probs_RV = np.tile(np.log(probabilities).astype(np.float32), (DRAWS, 1))
    number_R = np.arange(DRAWS)
    filters = Filters(np.full(DRAWS, temperature), np.full(DRAWS, top_k), np.full(DRAWS, top_p))
    uniform_R = uniform(np.full(DRAWS, 3, dtype=np.uint64), number_R % 10, number_R // 10)
    return np.bincount(draw(log_probs_RV, filters, uniform_R), minlength=len(probabilities)) / DRAWS


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"top_k": 2}, [0, 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.6}, [0, 0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.3}, [0, 0, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 1, 0, 0, 0]),
        ({"top_k": 100}, PROBABILITIES),
    ],
)
def test_tokens_come_as_often_as_they_should(filters, expected):
    np.testing.assert_allclose(frequencies(PROBABILITIES, **filters), expected, atol=4 * math.sqrt(0.25 / DRAWS))


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 700}, {"top_k": 700, "top_p": 0.5}])
def test_filters_that_let_many_tokens_through(filters):
    """More than are looked at first."""
    vocabulary, draws = 1000, 50_000
    log_probs_RV = np.linspace(-3.0, -4.0, vocabulary, dtype=np.float32)[None]
    filters = {"top_k": 0, "top_p": 1.0, **filters}
    arrays = Filters(*(np.array([value]) for value in (1.0, filters["top_k"], filters["top_p"])))
    weights = np.exp(np.linspace(-3.0, -4.0, vocabulary))
    weights[filters["top_k"] or vocabulary :] = 0
    weights[1:][weights.cumsum()[:-1] >= filters["top_p"] * weights.sum()] = 0
    shares = np.arange(draws) / draws
    drawn = [draw(log_probs_RV, arrays, shares[i : i + 1])[0] for i in range(0, draws, 50)]
    expected = np.searchsorted(weights.cumsum(), shares[::50] * weights.sum(), side="right")
    assert np.abs(np.array(drawn) - expected).max() <= 1


def test_random_numbers_are_spread_evenly_and_differ():
    number_R = np.arange(60_000)
    uniform_R = uniform(number_R.astype(np.uint64) % 3, number_R // 3 % 20, number_R // 60)
    assert len(set(uniform_R.tolist())) == len(number_R)
    assert uniform_R.min() >= 0.0 and uniform_R.max() < 1.0
    counts = np.histogram(uniform_R, bins=20, range=(0, 1))[0]
    np.testing.assert_allclose(counts, 3000, atol=5 * math.sqrt(3000))
    assert abs(np.corrcoef(uniform_R[:-1], uniform_R[1:])[0, 1]) < 0.02


def test_a_row_with_nothing_to_draw_gets_any_token():
    filters = Filters(np.ones(2), np.array([0, 2]), np.ones(2))
    drawn = draw(np.full((2, 6), -np.inf, dtype=np.float32), filters, np.array([0.5, 0.5]))
    assert ((drawn >= 0) & (drawn < 6)).all()
