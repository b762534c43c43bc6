import re

import pytest

from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.tokens import BOS, EOS, PAD, UNK
from ferryman_service.text.subwords import Subwords, train_subwords

SYLLABLES = ["der", "ka", "tze", "lä", "uft", "sin", "gen", "mor", "hun", "de", "vo", "gel"]
WORDS = [SYLLABLES[i % 12] + SYLLABLES[i * i % 11] + SYLLABLES[i // 12] for i in range(144)]
LINES = [" ".join(WORDS[(31 * i + j * j) % len(WORDS)] for j in range(3 + i % 7)) for i in range(400)]


def train(path, lines=LINES, **changes):
    options = {
        "vocabulary_size": 64,
        "algorithm": SubwordAlgorithm.UNIGRAM,
        "character_coverage": 1.0,
        "seed": 1,
    }
    return train_subwords(lines, path, **options | changes)


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_every_line_survives_the_round_trip(tmp_path, algorithm):
    subwords = train(tmp_path / "m", algorithm=algorithm)
    assert subwords.size == 64
    encoded = subwords.encode(LINES)
    assert [subwords.decode(tokens) for tokens in encoded] == LINES
    assert not {PAD, UNK, BOS, EOS} & {token for tokens in encoded for token in tokens}


def test_special_symbols_have_the_fixed_ids(tmp_path):
    subwords = train(tmp_path / "m")
    assert subwords.decode([BOS, *subwords.encode(["der hunde"])[0], EOS, PAD]) == "der hunde"
    assert UNK in subwords.encode(["Ω"])[0]
    assert "<s>" not in subwords.decode(subwords.encode(["<s>"])[0])  # text cannot name a symbol
    assert BOS not in subwords.encode(["<s>"])[0]


def test_the_loaded_model_is_the_trained_one(tmp_path):
    subwords = train(tmp_path / "m")
    assert Subwords.load(tmp_path / "m").encode(LINES, threads=2) == subwords.encode(LINES)


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_the_model_is_a_function_of_corpus_and_seed(tmp_path, algorithm):
    def model(name, **changes):
        train(tmp_path / name, algorithm=algorithm, **changes)
        return (tmp_path / name).read_bytes()

    assert model("a") == model("b")
    assert model("c", max_lines=100) == model("d", max_lines=100)
    assert model("e", max_lines=100) != model("f", max_lines=100, seed=2)


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_a_vocabulary_that_the_corpus_cannot_fill_names_the_largest_that_it_can(tmp_path, algorithm):
    with pytest.raises(TrainingFailed) as caught:
        train(tmp_path / "m", vocabulary_size=9000, algorithm=algorithm)
    assert caught.value.reason is FailureReason.VOCABULARY_TOO_LARGE
    largest = int(re.search(r"at most (\d+)", caught.value.message)[1])
    assert train(tmp_path / "m", vocabulary_size=largest, algorithm=algorithm).size == largest


def test_a_vocabulary_smaller_than_the_alphabet_names_the_need(tmp_path):
    with pytest.raises(TrainingFailed, match="characters alone need") as caught:
        train(tmp_path / "m", vocabulary_size=20)
    assert caught.value.reason is FailureReason.VOCABULARY_TOO_SMALL


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(TrainingFailed) as caught:
        train(tmp_path / "m", lines=["", ""])
    assert caught.value.reason is FailureReason.NO_TRAINING_PAIRS
