"""The overhead benchmark of the search, in small."""

import numpy as np

from bench.search_overhead import ReadyAnswers, measure
from ferryman_service.domain.tokens import EOS


def test_sentences_leave_and_join_while_it_measures():
    measured = measure(sentences=8, width=2, steps=300)
    assert 0 < measured["step_us"] < measured["turn_us"] * 100
    assert 1 <= measured["sentences_per_turn"] <= 8


def test_the_answers_are_candidates():
    batch = ReadyAnswers(sentences=16, width=3, k=6)
    seen = [batch.step(np.zeros((16, 3), dtype=np.int64), np.zeros((16, 3), dtype=np.int64), 6) for _ in range(20)]
    for answer in seen:
        assert answer.tokens_SWK.shape == answer.log_probs_SWK.shape == (16, 3, 6)
        assert (np.diff(answer.log_probs_SWK, axis=2) <= 0).all() and (answer.log_probs_SWK < 0).all()
        assert all(len(set(row)) == 6 for row in answer.tokens_SWK.reshape(-1, 6).tolist())
    ends = np.mean([(answer.tokens_SWK == EOS).any(axis=2).mean() for answer in seen])
    assert 0.1 < ends < 0.4
    assert any(not np.array_equal(answer.tokens_SWK, seen[0].tokens_SWK) for answer in seen)
