"""The overhead benchmark of the search, in small."""

import numpy as np
import pytest

from bench.serving.search_overhead import AT_MOST, ReadyAnswers, measure, plainest_step
from ferryman_service.domain.tokens import EOS


def test_sentences_leave_and_join_during_measurement():
    measured = measure(sentences=8, width=2, steps=300)
    assert 0 < measured["step_us"] < measured["turn_us"] * 100
    assert 1 <= measured["sentences_per_turn"] <= 8


def test_answers_are_candidates():
    batch = ReadyAnswers(sentences=16, width=3, k=6)
    seen = [batch.step(np.zeros((16, 3), dtype=np.int64), np.zeros((16, 3), dtype=np.int64), 6) for _ in range(20)]
    for answer in seen:
        assert answer.tokens_SWK.shape == answer.log_probs_SWK.shape == (16, 3, 6)
        assert (np.diff(answer.log_probs_SWK, axis=2) <= 0).all() and (answer.log_probs_SWK < 0).all()
        assert all(len(set(row)) == 6 for row in answer.tokens_SWK.reshape(-1, 6).tolist())
    ends = np.mean([(answer.tokens_SWK == EOS).any(axis=2).mean() for answer in seen])
    assert 0.1 < ends < 0.4
    assert any(not np.array_equal(answer.tokens_SWK, seen[0].tokens_SWK) for answer in seen)


def test_plainest_step_finds_best_candidates():
    batch, generator = ReadyAnswers(sentences=4, width=3, k=6), np.random.default_rng(1)
    scores = -generator.random((4, 3)).astype(np.float32)
    score_SW, token_SW, parent_SW = plainest_step(batch.last, scores)
    for sentence in range(4):
        total_WK = scores[sentence][:, None] + batch.last.log_probs_SWK[sentence]
        tokens_WK = batch.last.tokens_SWK[sentence]
        rows = [(total_WK[row, k], row, tokens_WK[row, k]) for row in range(3) for k in range(6)]
        best = sorted(rows, reverse=True)[:3]
        found = zip(score_SW[sentence], parent_SW[sentence], token_SW[sentence], strict=True)
        assert [(float(s), int(p), int(t)) for s, p, t in found] == [(float(s), p, int(t)) for s, p, t in best]


def test_step_is_compared_with_plainest():
    measured = measure(sentences=8, width=2, steps=300)
    assert measured["ratio"] == pytest.approx(measured["step_us"] / measured["plain_us"], rel=0.05)
    assert set(AT_MOST) == {(1, 1), (64, 1), (1, 5), (64, 5)}
