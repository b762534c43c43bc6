import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryman_service.search.topk import k_best


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    vocabulary=st.integers(4, 700),
    k=st.integers(1, 12),
    levels=st.sampled_from([None, 1, 20]),
    share_of_minus_infinity=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_equals_sorting_everything(seed, rows, vocabulary, k, levels, share_of_minus_infinity):
    generator = np.random.default_rng(seed)
    values_RV = generator.normal(size=(rows, vocabulary)).astype(np.float32)
    if levels:
        values_RV = np.round(values_RV * levels) / np.float32(levels)
    values_RV[generator.random(values_RV.shape) < share_of_minus_infinity] = -np.inf
    k = min(k, vocabulary)
    expected = [sorted(range(vocabulary), key=lambda token, row=row: (-row[token], token))[:k] for row in values_RV]
    assert k_best(values_RV, k).tolist() == expected
