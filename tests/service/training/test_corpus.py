import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.corpora import Side, Split
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.training.corpus import DropReason, SeenKeys, clean_pairs, describe_drops, read_pairs


def test_only_a_line_feed_ends_a_line(write_corpus):
    pairs = [("one\u2028still one", "eins\x85noch eins"), ("two\r", "zwei")]
    assert list(read_pairs(write_corpus(pairs, []), Split.TRAIN)) == pairs


def test_pairs_are_normalised_and_the_others_counted(write_corpus):
    train = [
        ("A  dog\u00a0barks. ", "Ein Hund  bellt. "),
        ("A dog barks.", "Ein Hund bellt."),  # the same, once normalised
        ("A dog barks.", "Der Hund bellt."),
        ("", "Nichts"),
        ("Nothing", " \u00a0"),
        ("be\x07ll", "Glocke"),
        ("many", "viele" + "\u0301" * 31),
    ]
    dropped = Counter()
    pairs = list(clean_pairs(write_corpus(train, train[:2]), Split.TRAIN, dropped))
    assert [(pair.source, pair.target) for pair in pairs] == [
        ("A dog barks.", "Ein Hund bellt."),
        ("A dog barks.", "Der Hund bellt."),
    ]
    reasons = DropReason.CONTROL_CHARACTERS, DropReason.TOO_MANY_MARKS, DropReason.DUPLICATE
    assert dropped == {DropReason.EMPTY: 2, **dict.fromkeys(reasons, 1)}
    assert describe_drops(dropped, 7) == "5 of 7 (2 EMPTY, 1 CONTROL_CHARACTERS, 1 TOO_MANY_MARKS, 1 DUPLICATE)"


def test_line_breaks_inside_a_line_are_white_space_and_a_byte_order_mark_is_dropped(write_corpus):
    dropped = Counter()
    corpus = write_corpus([("\ufeffone\x85two", "eins\vzwei\f"), ("three\rfour", "\ufeffdrei\u2028vier")], [])
    pairs = list(clean_pairs(corpus, Split.TRAIN, dropped))
    assert [(pair.source, pair.target) for pair in pairs] == [("one two", "eins zwei"), ("three four", "drei vier")]
    assert not dropped


def test_duplicates_stay_where_they_are_wanted(write_corpus):
    dropped = Counter()
    corpus = write_corpus([], [("a", "b"), ("a", "b")])
    assert len(list(clean_pairs(corpus, Split.VALIDATION, dropped, keep_duplicates=True))) == 2
    assert not dropped


def test_the_first_of_equal_pairs_is_kept_however_far_apart_they_are(write_corpus):
    generator = random.Random(1)
    train = [(str(generator.randrange(200)), str(generator.randrange(200))) for _ in range(40_000)]
    dropped = Counter()
    kept = [(pair.source, pair.target) for pair in clean_pairs(write_corpus(train, []), Split.TRAIN, dropped)]
    assert kept == list(dict.fromkeys(train))
    assert dropped == {DropReason.DUPLICATE: len(train) - len(kept)}


@given(st.lists(st.lists(st.integers(0, 60) | st.integers(2**64 - 3, 2**64 - 1), max_size=30), max_size=20))
def test_a_key_is_new_once(chunks):
    keys, seen = SeenKeys(), set()
    for chunk in chunks:
        expected = [key not in seen and not seen.add(key) for key in chunk]
        assert keys.add(np.array(chunk, np.uint64)).tolist() == expected


def test_many_keys_are_merged_into_few_levels():
    keys = SeenKeys()
    chunks = np.random.default_rng(1).integers(0, 2**64 - 1, (200, 500), np.uint64)
    assert all(keys.add(chunk).all() for chunk in chunks)
    assert keys.levels <= 8
    assert not any(keys.add(chunk).any() for chunk in chunks)


def damage_utf8(path):
    path.write_bytes(b"\xff\n\n")


def lose_a_line(path):
    path.write_bytes(b"a\n")


@pytest.mark.parametrize("damage", [damage_utf8, lose_a_line, lambda path: path.unlink()])
def test_a_damaged_corpus_is_said_to_be(write_corpus, damage):
    corpus = write_corpus([("a", "b"), ("c", "d")], [])
    damage(corpus.files[Split.TRAIN, Side.TARGET])
    with pytest.raises(TrainingFailed, match="train part of the corpus") as caught:
        list(read_pairs(corpus, Split.TRAIN))
    assert caught.value.reason is FailureReason.CORPUS_DAMAGED
