import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.training.batches import make_batch
from ferryman_service.training.pairs import PairWriter, TokenPairs, TokenSide, open_pairs


def test_a_batch_holds_the_target_shifted_right():
    pairs = TokenPairs(TokenSide.from_sentences([[7], [8, 9, 10]]), TokenSide.from_sentences([[11, 12, 13], [14]]))
    batch = make_batch(pairs, np.array([1, 0]))
    assert batch.source_BS.tolist() == [[8, 9, 10, EOS], [7, EOS, PAD, PAD]]
    assert batch.decoder_input_BT.tolist() == [[BOS, 14, PAD, PAD], [BOS, 11, 12, 13]]
    assert batch.labels_N.tolist() == [14, EOS, 11, 12, 13, EOS]
    assert batch.label_positions_N.tolist() == [0, 1, 4, 5, 6, 7]
    assert (batch.target_tokens, batch.positions, batch.padding_share) == (6, 16, pytest.approx(4 / 16))


def test_a_source_may_be_padded_to_a_multiple():
    """Attention on a GPU wants it; the padding counts as padding, and the labels stay where they were."""
    pairs = TokenPairs(TokenSide.from_sentences([[7], [8, 9, 10]]), TokenSide.from_sentences([[11, 12, 13], [14]]))
    batch, wider = (make_batch(pairs, np.array([1, 0]), multiple) for multiple in (1, 8))
    assert wider.source_BS.tolist() == [[8, 9, 10, EOS, *[PAD] * 4], [7, EOS, *[PAD] * 6]]
    for name in ("decoder_input_BT", "label_positions_N", "labels_N"):
        assert getattr(wider, name).tolist() == getattr(batch, name).tolist()
    assert (wider.source_tokens, wider.padding_share) == (6, pytest.approx(12 / 24))
    assert make_batch(pairs, np.array([1, 0]), 4).source_BS.shape == (2, 4)


@given(st.lists(st.tuples(*[st.lists(st.integers(4, 99), min_size=1, max_size=5)] * 2), min_size=1, max_size=20))
def test_pairs_survive_the_files(tmp_path_factory, sentences):
    folder = tmp_path_factory.mktemp("x") / "pairs"
    with PairWriter(folder) as writer:
        for source, target in sentences:
            writer.add([source], [target])
    pairs = open_pairs(folder)
    assert len(pairs) == len(sentences)
    for i, (source, target) in enumerate(sentences):
        assert (pairs.source.sentence(i), pairs.target.sentence(i)) == ([*source, EOS], [*target, EOS])
