import os
import re
import subprocess
import sys

import pytest

from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.tokens import BOS, EOS, PAD, UNK
from ferryman_service.text.subwords import Subwords, train_subwords

SYLLABLES = ["der", "ka", "tze", "lä", "uft", "sin", "gen", "mor", "hun", "de", "vo", "gel"]
WORDS = [SYLLABLES[i % 12] + SYLLABLES[i * i % 11] + SYLLABLES[i // 12] for i in range(144)]
LINES = [" ".join(WORDS[(31 * i + j * j) % len(WORDS)] for j in range(3 + i % 7)) for i in range(400)]

# Some thousand different words, so that each of the trainer's threads sums many frequencies.
MANY_LINES = [" ".join(WORDS[(i * j) % 144] + WORDS[(i + 7 * j) % 144] for j in range(1, 9)) for i in range(2000)]


def train(path, lines=LINES, **changes):
    options = {
        "vocabulary_size": 64,
        "algorithm": SubwordAlgorithm.UNIGRAM,
        "character_coverage": 1.0,
        "seed": 1,
    }
    return train_subwords(lines, path, **options | changes)


def pieces(subwords):
    return [(subwords.piece(token), subwords.score(token)) for token in range(subwords.size)]


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


ON_CPUS = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
from pathlib import Path
from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.text.subwords import train_subwords

lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
train_subwords(lines, Path(sys.argv[3]), vocabulary_size=300, algorithm=SubwordAlgorithm(sys.argv[4]),
               character_coverage=1.0, seed=1)
"""


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_the_model_does_not_depend_on_the_number_of_cpus(tmp_path, algorithm):
    cpus = sorted(os.sched_getaffinity(0))
    (tmp_path / "lines").write_text("\n".join(MANY_LINES), encoding="utf-8")
    models = []
    for count in (1, 2):
        path = tmp_path / f"model-{count}"
        allowed = ",".join(map(str, cpus[:count]))
        arguments = [allowed, str(tmp_path / "lines"), str(path), algorithm.value]
        subprocess.run([sys.executable, "-c", ON_CPUS, *arguments], check=True, timeout=120)
        models.append(path.read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_ids_do_not_depend_on_the_number_of_threads(tmp_path, algorithm):
    subwords = train(tmp_path / "m", algorithm=algorithm)
    alone = subwords.encode(LINES)
    assert all(subwords.encode(LINES, threads=threads) == alone for threads in (2, 3, 16, 64))


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_a_vocabulary_that_the_corpus_cannot_fill_names_the_largest_that_it_can(tmp_path, algorithm):
    with pytest.raises(TrainingFailed) as caught:
        train(tmp_path / "m", vocabulary_size=9000, algorithm=algorithm)
    assert caught.value.reason is FailureReason.VOCABULARY_TOO_LARGE
    largest = int(re.search(r"at most (\d+)", caught.value.message)[1])
    subwords = train(tmp_path / "m", vocabulary_size=largest, algorithm=algorithm)
    assert subwords.size == largest
    reduced = train(tmp_path / "reduced", vocabulary_size=9000, algorithm=algorithm, reduce_vocabulary=True)
    assert pieces(reduced) == pieces(subwords)


@pytest.mark.parametrize("algorithm", SubwordAlgorithm)
def test_the_smallest_text_can_be_learnt(tmp_path, algorithm):
    assert train(tmp_path / "m", lines=["a"], vocabulary_size=6, algorithm=algorithm).size == 6
    reduced = train(tmp_path / "m", lines=["a"], vocabulary_size=8000, algorithm=algorithm, reduce_vocabulary=True)
    assert reduced.decode(reduced.encode(["a"])[0]) == "a"


def test_a_vocabulary_smaller_than_the_alphabet_names_the_need(tmp_path):
    with pytest.raises(TrainingFailed, match="characters alone need") as caught:
        train(tmp_path / "m", vocabulary_size=20)
    assert caught.value.reason is FailureReason.VOCABULARY_TOO_SMALL


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(TrainingFailed) as caught:
        train(tmp_path / "m", lines=["", ""])
    assert caught.value.reason is FailureReason.NO_TRAINING_PAIRS
