import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.tokens import EOS
from ferryman_service.training.pairs import PairWriter, TokenFile, TokenSide, open_pairs

SENTENCES = st.lists(st.lists(st.integers(4, 200_000), min_size=1, max_size=9), min_size=1, max_size=20)


@given(SENTENCES, st.data())
def test_tokens_that_stay_in_their_file_are_those_in_memory(tmp_path_factory, sentences, data):
    in_memory = TokenSide.from_sentences(sentences)
    path = tmp_path_factory.mktemp("x") / "tokens"
    path.write_bytes(in_memory.tokens_N.tobytes())
    side = TokenSide.from_lengths(TokenFile(path), in_memory.lengths_P)
    assert [side.sentence(index) for index in range(len(sentences))] == [[*tokens, EOS] for tokens in sentences]
    index_B = np.array(data.draw(st.lists(st.integers(0, len(sentences) - 1), min_size=1, max_size=9)))
    assert side.padded(index_B).tolist() == in_memory.padded(index_B).tolist()


def test_a_small_corpus_is_read_and_a_large_one_stays_in_its_files(tmp_path):
    with PairWriter(tmp_path / "pairs") as writer:
        writer.add([[7, 8]], [[9]])
    assert isinstance(open_pairs(tmp_path / "pairs").source.tokens_N, np.ndarray)
    sentences = 17
    for side in ("source", "target"):
        os.truncate(tmp_path / "pairs" / f"{side}.tokens", sentences << 22)
        np.full(sentences, 1 << 20, np.int32).tofile(tmp_path / "pairs" / f"{side}.lengths")
    pairs = open_pairs(tmp_path / "pairs")
    assert isinstance(pairs.source.tokens_N, TokenFile)
    assert len(pairs) == sentences
    assert pairs.source.sentence(0)[:4] == [7, 8, EOS, 0]


def test_files_that_do_not_belong_together_are_not_opened(tmp_path):
    with PairWriter(tmp_path / "pairs") as writer:
        writer.add([[7, 8]], [[9]])
    os.truncate(tmp_path / "pairs" / "source.tokens", 8)
    with pytest.raises(AssertionError):
        open_pairs(tmp_path / "pairs")


def test_no_pairs_survive_the_files(tmp_path):
    with PairWriter(tmp_path / "pairs"):
        pass
    assert len(open_pairs(tmp_path / "pairs")) == 0
