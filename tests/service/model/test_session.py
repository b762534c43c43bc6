"""Decoding with the Transformer: the same numbers as the whole forward pass, whatever the rows do."""

import threading

import numpy as np
import pytest
import torch

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.domain.translation import SearchOptions
from ferryman_service.model.session import TorchDecoder
from ferryman_service.search.beam import search
from ferryman_service.search.sentence import SentenceSearch

SOURCES = [[5, 6, 7, 8, 9, EOS], [10, 11, EOS], [12, EOS]]


def expected(transformer, source, prefix):
    logits = transformer(torch.tensor([source]), torch.tensor([prefix]))[0, -1]
    return logits.log_softmax(dim=-1).detach().numpy()


def full_batch(transformer, width, sources=SOURCES, *, attention=False):
    batch = TorchDecoder(transformer).batch(width, attention=attention)
    batch.admit(sources)
    return batch


def first_tokens(sentences, width):
    return np.full((sentences, width), BOS), np.tile(np.arange(width), (sentences, 1))


def test_rows_may_branch_and_swap_and_sentences_leave(transformer):
    batch, sources = full_batch(transformer, 2), SOURCES
    batch.step(*first_tokens(3, 2), 4)
    prefixes = [[[BOS], [BOS]] for _ in sources]
    choices = [
        ([0, 1, 2], [[0, 0], [1, 0], [0, 1]]),
        ([0, 2], [[1, 1], [0, 1]]),
        ([0, 1], [[1, 0], [0, 0]]),
        ([1], [[1, 0]]),
    ]
    for step, (kept, parents) in enumerate(choices):
        if len(kept) < batch.sentences:
            batch.keep(np.array(kept))
        sources = [sources[sentence] for sentence in kept]
        prefixes = [
            [[*prefixes[sentence][parent], 20 + 5 * step + row] for row, parent in enumerate(of_sentence)]
            for sentence, of_sentence in zip(kept, parents, strict=True)
        ]
        answer = batch.step(np.array([[prefix[-1] for prefix in rows] for rows in prefixes]), np.array(parents), 60)
        assert batch.sentences == len(sources) == len(answer.tokens_SWK)
        for sentence, row in np.ndindex(len(sources), 2):
            log_probs = expected(transformer, sources[sentence], prefixes[sentence][row])
            tokens = answer.tokens_SWK[sentence, row]
            assert sorted(tokens) == list(range(60))
            np.testing.assert_allclose(answer.log_probs_SWK[sentence, row], log_probs[tokens], atol=1e-5)


def test_logits_are_those_of_the_whole_pass(transformer):
    batch = full_batch(transformer, 2)
    batch.step_logits(*first_tokens(3, 2))
    tokens_SW = np.array([[20, 21], [22, 23], [24, 25]])
    logits_SWV = batch.step_logits(tokens_SW, np.array([[0, 1]] * 3))
    assert logits_SWV.dtype == np.float32
    for sentence, row in np.ndindex(3, 2):
        prefix = torch.tensor([[BOS, tokens_SW[sentence, row]]])
        logits = transformer(torch.tensor([SOURCES[sentence]]), prefix)[0, -1].detach().numpy()
        np.testing.assert_allclose(logits_SWV[sentence, row], logits, atol=1e-5)


def weights_of_last_layer(transformer, source, prefix):
    """The attention of the whole pass, computed from the layer's own input."""
    seen = []
    attention = transformer.decoder_layers[-1].cross_attention
    handle = attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    transformer(torch.tensor([source]), torch.tensor([prefix]))
    handle.remove()
    [(x_1TD, keys_values, _)] = seen
    heads = []
    for keys, query in zip(keys_values.keys_BHSE[0], attention.query(x_1TD[0, -1]).chunk(4), strict=True):
        heads.append((keys @ query / len(query) ** 0.5).softmax(dim=-1))
    return torch.stack(heads).mean(dim=0).detach().numpy()


def test_attention_is_that_of_the_last_layer(transformer):
    batch = full_batch(transformer, 2, attention=True)
    batch.step(*first_tokens(3, 2), 4)
    tokens_SW = np.array([[20, 21], [22, 23], [24, 25]])
    batch.step(tokens_SW, np.array([[0, 1]] * 3), 4)
    weights_SWL = batch.attention()
    assert weights_SWL.shape == (3, 2, 6)
    for sentence, row in np.ndindex(3, 2):
        source = SOURCES[sentence]
        weights = weights_of_last_layer(transformer, source, [BOS, tokens_SW[sentence, row]])
        np.testing.assert_allclose(weights_SWL[sentence, row, : len(source)], weights, atol=1e-5)
        assert (weights_SWL[sentence, row, len(source) :] == 0).all()
    assert not transformer.decoder_layers[-1].cross_attention._forward_pre_hooks


def test_attention_is_not_taken_from_another_thread(make_transformer):
    transformer = make_transformer()
    watching = full_batch(transformer, 1, attention=True)
    other = full_batch(transformer, 1, SOURCES[1:])

    def step_of_other(module, arguments):
        handle.remove()
        thread = threading.Thread(target=other.step, args=(*first_tokens(2, 1), 4))
        thread.start()
        thread.join()

    # While the watching batch takes its step, after it has seen its attention, another thread takes one.
    handle = transformer.decoder_layers[-1].feed_forward.register_forward_pre_hook(step_of_other)
    watching.step(*first_tokens(3, 1), 4)
    assert watching.attention().shape == (3, 1, 6)


def test_equal_candidates_stand_by_token(make_transformer):
    transformer = make_transformer()
    with torch.no_grad():
        transformer.embedding.weight[10:40] = transformer.embedding.weight[10]
    answer, everything = (full_batch(transformer, 1, [[10, EOS]]).step(*first_tokens(1, 1), k) for k in (7, 60))
    tokens, log_probs = everything.tokens_SWK[0, 0].tolist(), everything.log_probs_SWK[0, 0]
    assert answer.tokens_SWK[0, 0].tolist() == tokens[:7]
    keys = list(zip((-log_probs).tolist(), tokens, strict=True))
    assert keys == sorted(keys)
    assert [token for token in tokens if 10 <= token < 40] == list(range(10, 40))


def test_a_sentence_is_translated_alone_as_in_company(transformer):
    decoder, options = TorchDecoder(transformer), SearchOptions(beam_size=3, n_best=2, return_alignment=True)
    searches = [SentenceSearch(options=options, max_length=limit) for limit in (8, 9, 10)]
    together = search(decoder, SOURCES, searches, lambda: None)
    for source, one, found in zip(SOURCES, searches, together, strict=True):
        [alone] = search(decoder, [source], [one], lambda: None)
        assert [hypothesis.tokens for hypothesis in alone] == [hypothesis.tokens for hypothesis in found]
        assert [hypothesis.alignment for hypothesis in alone] == [hypothesis.alignment for hypothesis in found]


def test_a_network_in_training_is_refused(make_transformer):
    with pytest.raises(AssertionError, match="eval"):
        full_batch(make_transformer().train(), 1)


def test_sentences_join_an_empty_batch_only(make_transformer):
    transformer = make_transformer()
    batch = full_batch(transformer, 1)
    before = batch.step(*first_tokens(3, 1), 4)
    with pytest.raises(AssertionError, match="empty"):
        batch.admit(SOURCES)
    batch.keep(np.array([], dtype=np.int64))
    batch.admit(SOURCES)
    np.testing.assert_array_equal(batch.step(*first_tokens(3, 1), 4).tokens_SWK, before.tokens_SWK)


def test_padding_is_never_asked(make_transformer):
    transformer = make_transformer()
    before = full_batch(transformer, 1).step(*first_tokens(3, 1), 3)
    with torch.no_grad():
        transformer.embedding.weight[PAD] += 5.0
    after = full_batch(transformer, 1).step(*first_tokens(3, 1), 60)
    for sentence in range(3):
        kept = [token for token in after.tokens_SWK[sentence, 0] if token != PAD]
        assert kept[:2] == [token for token in before.tokens_SWK[sentence, 0] if token != PAD][:2]
