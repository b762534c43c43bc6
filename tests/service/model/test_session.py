"""Decoding with the Transformer: the same numbers as the whole forward pass, whatever the rows do."""

import numpy as np
import pytest
import torch

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.model.session import TorchDecoder
from ferryman_service.search.beam import BeamOptions, search

SOURCES = [[5, 6, 7, 8, 9, EOS], [10, 11, EOS], [12, EOS]]


def expected(transformer, source, prefix):
    logits = transformer(torch.tensor([source]), torch.tensor([prefix]))[0, -1]
    return logits.log_softmax(dim=-1).detach().numpy()


def test_rows_may_branch_swap_and_leave(transformer):
    session = TorchDecoder(transformer).encode(SOURCES)
    session.step(np.array([BOS] * 3), np.arange(3), 4)
    rows = [(0, [BOS, 20]), (0, [BOS, 21]), (2, [BOS, 22]), (2, [BOS, 23])]
    parents = np.array([0, 0, 2, 2])
    for later_parents in (np.array([1, 0, 3, 3]), np.array([2, 3]), np.array([0, 1])):
        answer = session.step(np.array([prefix[-1] for _, prefix in rows]), parents, 60)
        for row, (sentence, prefix) in enumerate(rows):
            log_probs = expected(transformer, SOURCES[sentence], prefix)
            np.testing.assert_allclose(answer.log_probs_RK[row], log_probs[answer.tokens_RK[row]], atol=1e-5)
            assert sorted(answer.tokens_RK[row]) == list(range(60))
        parents = later_parents
        rows = [(rows[parent][0], [*rows[parent][1], 30 + i]) for i, parent in enumerate(parents)]


def test_rows_of_a_sentence_must_stand_together(transformer):
    session = TorchDecoder(transformer).encode(SOURCES)
    session.step(np.array([BOS] * 3), np.arange(3), 4)
    with pytest.raises(AssertionError, match="together"):
        session.step(np.array([20] * 4), np.array([0, 1, 0, 1]), 4)


def test_equal_candidates_stand_by_token(make_transformer):
    transformer = make_transformer()
    with torch.no_grad():
        transformer.embedding.weight[10:40] = transformer.embedding.weight[10]
    session = TorchDecoder(transformer).encode([[10, EOS]])
    answer = session.step(np.array([BOS]), np.arange(1), 7)
    everything = TorchDecoder(transformer).encode([[10, EOS]]).step(np.array([BOS]), np.arange(1), 60)
    assert answer.tokens_RK[0].tolist() == everything.tokens_RK[0, :7].tolist()
    keys = list(zip((-everything.log_probs_RK[0]).tolist(), everything.tokens_RK[0].tolist(), strict=True))
    assert keys == sorted(keys)
    twins = [token for token in everything.tokens_RK[0].tolist() if 10 <= token < 40]
    assert twins == list(range(10, 40))


def test_a_sentence_is_translated_alone_as_in_company(transformer):
    decoder, options = TorchDecoder(transformer), BeamOptions(beam_size=3, n_best=2, length_penalty=1.0)
    limits = np.array([8, 9, 10])
    together = search(decoder.encode(SOURCES), options, limits, lambda: None)
    for index, source in enumerate(SOURCES):
        [alone] = search(decoder.encode([source]), options, limits[index : index + 1], lambda: None)
        assert [hypothesis.tokens for hypothesis in alone] == [hypothesis.tokens for hypothesis in together[index]]


def test_a_network_in_training_is_refused(make_transformer):
    with pytest.raises(AssertionError, match="eval"):
        TorchDecoder(make_transformer().train()).encode(SOURCES)


def test_padding_is_never_asked(make_transformer):
    transformer = make_transformer()
    session = TorchDecoder(transformer).encode(SOURCES)
    before = session.step(np.array([BOS] * 3), np.arange(3), 3)
    with torch.no_grad():
        transformer.embedding.weight[PAD] += 5.0
    after = TorchDecoder(transformer).encode(SOURCES).step(np.array([BOS] * 3), np.arange(3), 60)
    for row in range(3):
        kept = [token for token in after.tokens_RK[row] if token != PAD]
        assert kept[:2] == [token for token in before.tokens_RK[row] if token != PAD][:2]
