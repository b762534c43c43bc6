"""Pairs that are segmented anew in each epoch: another form of the same text, and the same one for the same epoch."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.domain.recipe import SubwordAlgorithm
from ferryman_service.domain.tokens import BOS, EOS, PAD, UNK
from ferryman_service.domain.training import RunCancelled
from ferryman_service.text.subwords import Subwords, train_subwords
from ferryman_service.training import sampling as sampling_module
from ferryman_service.training.prepared import prepare_corpus
from ferryman_service.training.sampling import WordSampler, epoch_source
from tests.service.training.conftest import make_small_recipe

LIKE_SYMBOLS = ["<s>", "a<s>b", "b</s>", "a<pad>", "bats</s>ab"]
MARKS = ["b<s", "</", "t<pad", "da>", "s>"]
SYLLABLES = ["ab", "ba", "abs", "ta", "ast", "da", "dab", "s"]


def sentences(count, seed):
    """Sentences of made-up words of few syllables, which have many segmentations, and of marks."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(SYLLABLES, k=1 + i % 5)) for i in range(300)]
    return [" ".join(generator.choices(words + 20 * (LIKE_SYMBOLS + MARKS), k=1 + i % 7)) for i in range(count)]


ALGORITHMS = {
    SubwordAlgorithm.UNIGRAM: {"subword_regularization_alpha": 0.2},
    SubwordAlgorithm.BPE: {"bpe_dropout": 0.4},
}


TEXT = list(zip(sentences(250, seed=1), sentences(250, seed=2), strict=True))


def data_recipe(algorithm, **data):
    return make_small_recipe(
        data={"vocabulary_size": 60, "subword_algorithm": algorithm, **ALGORITHMS[algorithm], **data}
    )


@pytest.fixture(scope="module", params=SubwordAlgorithm)
def learnt(request, tmp_path_factory):
    """An algorithm and subwords that it has learnt."""
    path = tmp_path_factory.mktemp("sampling") / "m"
    options = {"vocabulary_size": 60, "character_coverage": 1.0, "seed": 1}
    return request.param, train_subwords(sentences(400, seed=1), path, algorithm=request.param, **options)


@pytest.fixture
def prepare(job, write_corpus, reporter, tmp_path):
    """Prepares the pairs of TEXT; returns them, their subwords and what makes sources of epochs."""
    corpus = write_corpus(TEXT, TEXT[:1])

    def run(recipe):
        work = job(recipe, corpus)
        prepared = prepare_corpus(work, reporter, threads=1)
        subwords = Subwords.load(prepared.subwords)

        def source(folder="epochs", **options):
            return epoch_source(work, prepared, subwords, tmp_path / folder, **options)

        return prepared.pairs(), subwords, source

    return run


def all_sentences(pairs):
    return [side.sentence(i) for side in (pairs.source, pairs.target) for i in range(len(pairs))]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_epoch_is_the_same_text_in_other_pieces(prepare, algorithm):
    pairs, subwords, source = prepare(data_recipe(algorithm))
    plain = all_sentences(pairs)
    text = [subwords.decode(sentence) for sentence in plain]
    assert set(text) == set(itertools.chain(*TEXT))
    pairs_of_epoch = source()
    epochs = [all_sentences(pairs_of_epoch(epoch)) for epoch in (1, 2, 3)]
    for sentences in epochs:
        assert [subwords.decode(sentence) for sentence in sentences] == text
        assert all(sentence[-1] == EOS and sentence.count(EOS) == 1 for sentence in sentences)
        assert not {PAD, UNK, BOS} & set(itertools.chain(*sentences))
        assert sum(mine != original for mine, original in zip(sentences, plain, strict=True)) > len(plain) / 2
    for one, other in itertools.combinations(epochs, 2):
        assert sum(mine != theirs for mine, theirs in zip(one, other, strict=True)) > len(plain) / 2


@given(
    st.lists(st.sampled_from(LIKE_SYMBOLS) | st.text("abst</>", min_size=1, max_size=6), max_size=6), st.integers(0, 63)
)
def test_no_word_changes_its_text_or_turns_into_a_symbol(learnt, words, number):
    algorithm, subwords = learnt
    sampler = WordSampler(subwords, data_recipe(algorithm).data, 1)
    for word in words:
        [tokens] = subwords.encode([word])
        drawn = sampler.draw(tuple(tokens), number / 64)
        assert subwords.decode(drawn) == word
        assert not {PAD, UNK, BOS, EOS} & set(drawn)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_word_that_the_vocabulary_cannot_express_stays_as_it_was(learnt, algorithm):
    _, subwords = learnt
    [tokens] = subwords.encode(["abΩab"])
    assert UNK in tokens
    sampler = WordSampler(subwords, data_recipe(algorithm).data, 1)
    assert all(sampler.draw(tuple(tokens), number) == tuple(tokens) for number in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_epoch_is_a_function_of_seed_and_number(prepare, algorithm):
    """Whatever came before it, and in whichever rank's folder."""
    recipe = data_recipe(algorithm)
    _, _, source = prepare(recipe)
    one, other = source("0"), source("1")
    first, second = all_sentences(one(1)), all_sentences(one(2))
    assert all_sentences(other(2)) == second
    assert all_sentences(other(1)) == first
    _, _, source = prepare(make_small_recipe(data=vars(recipe.data), seed=2))
    assert all_sentences(source()(1)) != first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_sampling_all_epochs_are_the_prepared_pairs(prepare, algorithm, tmp_path):
    pairs, _, source = prepare(data_recipe(algorithm, subword_regularization_alpha=0.0, bpe_dropout=0.0))
    pairs_of_epoch = source()
    assert pairs_of_epoch(1) is pairs_of_epoch(2)
    assert all_sentences(pairs_of_epoch(1)) == all_sentences(pairs)
    assert not (tmp_path / "epochs").exists()


def frequencies(sampler, word, draws=20_000):
    """Return how often each segmentation comes when the numbers lie evenly between 0 and 1."""
    drawn = Counter(sampler.draw(word, (number + 0.5) / draws) for number in range(draws))
    return {segmentation: count / draws for segmentation, count in drawn.items()}


def all_segmentations(subwords, text):
    """Yield every way to write a text in subwords."""
    pieces = {subwords.piece(token): token for token in range(4, subwords.size)}
    if not text:
        yield ()
    for end in range(1, len(text) + 1):
        if text[:end] in pieces:
            yield from ((pieces[text[:end]], *rest) for rest in all_segmentations(subwords, text[end:]))


@pytest.mark.parametrize("learnt", [SubwordAlgorithm.UNIGRAM], indirect=True)
@pytest.mark.parametrize("word", ["abba", "babba"])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_segmentations_come_as_often_as_their_probability_to_the_power_of_alpha(learnt, word, alpha):
    _, subwords = learnt
    recipe = data_recipe(SubwordAlgorithm.UNIGRAM, subword_regularization_alpha=alpha).data
    weights = {
        segmentation: math.exp(alpha * sum(map(subwords.score, segmentation)))
        for segmentation in all_segmentations(subwords, f"\u2581{word}")
    }
    assert 3 < len(weights) <= 64  # all of them may be drawn
    [tokens] = subwords.encode([word])
    found = frequencies(WordSampler(subwords, recipe, 1), tuple(tokens))
    expected = {segmentation: weight / sum(weights.values()) for segmentation, weight in weights.items()}
    for segmentation, share in expected.items():
        assert found.get(segmentation, 0.0) == pytest.approx(share, abs=2e-4), segmentation
    assert found.keys() <= expected.keys()


@pytest.mark.parametrize("learnt", [SubwordAlgorithm.UNIGRAM], indirect=True)
def test_the_larger_alpha_the_more_often_the_best_segmentation_comes(learnt):
    _, subwords = learnt
    for word in ("abba", "babba", "aabbs"):
        best = tuple(subwords.encode([word])[0])
        samplers = [
            WordSampler(subwords, data_recipe(SubwordAlgorithm.UNIGRAM, subword_regularization_alpha=alpha).data, 1)
            for alpha in (0.1, 0.3, 1.0)
        ]
        shares = [frequencies(sampler, best)[best] for sampler in samplers]
        assert shares == sorted(set(shares))


@pytest.mark.parametrize("learnt", [SubwordAlgorithm.BPE], indirect=True)
def test_bpe_that_drops_nothing_is_plain_and_more_dropout_makes_more_pieces(learnt):
    _, subwords = learnt
    words = [*LIKE_SYMBOLS, "bababab", "sss", "<<s>>", "ab<s>ba"]
    plain = [tuple(tokens) for tokens in subwords.encode(words)]
    pieces = []
    for dropout in (1e-12, 0.1, 0.4, 0.9):
        sampler = WordSampler(subwords, data_recipe(SubwordAlgorithm.BPE, bpe_dropout=dropout).data, 1)
        drawn = [[sampler.draw(word, (number + 0.5) / 64) for number in range(64)] for word in plain]
        pieces.append(np.mean([len(tokens) for tokens in itertools.chain(*drawn)]))
        if dropout == 1e-12:
            assert all(set(each) == {word} for each, word in zip(drawn, plain, strict=True))
    assert all(fewer < more for fewer, more in itertools.pairwise(pieces))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_sentence_that_would_become_too_long_stays_as_it_was(prepare, algorithm):
    """The limit is the longest sentence there is: for many, hardly any other segmentation fits."""
    longest = max(map(len, all_sentences(prepare(data_recipe(algorithm))[0])))
    pairs, _, source = prepare(data_recipe(algorithm, max_sentence_tokens=longest))
    plain = all_sentences(pairs)
    sampled = all_sentences(source()(1))
    assert max(map(len, sampled)) == longest
    at_limit = [(mine, original) for mine, original in zip(sampled, plain, strict=True) if len(original) == longest]
    assert any(mine == original for mine, original in at_limit)
    free = all_sentences(prepare(data_recipe(algorithm, max_sentence_tokens=longest + 40))[2]()(1))
    for mine, original, unlimited in zip(sampled, plain, free, strict=True):
        assert mine == (unlimited if len(unlimited) <= longest else original)
    assert sum(len(unlimited) > longest for unlimited in free) > 3


def test_sampling_checks_now_and_then_and_resumes_after_an_abort(prepare, reporter, monkeypatch):
    monkeypatch.setattr(sampling_module, "CHUNK_PAIRS", 90)
    pairs, _, source = prepare(data_recipe(SubwordAlgorithm.UNIGRAM))
    expected = all_sentences(source("other")(1))
    pairs_of_epoch = source(check=reporter.check)
    reporter.checks_left, reporter.error = 3, RunCancelled()
    with pytest.raises(RunCancelled):
        pairs_of_epoch(1)
    assert all_sentences(pairs_of_epoch(1)) == expected
    assert reporter.checks_left == -math.ceil(len(pairs) / 90)


def test_the_files_of_earlier_epochs_are_removed(prepare, tmp_path):
    _, _, source = prepare(data_recipe(SubwordAlgorithm.UNIGRAM))
    pairs_of_epoch = source()
    first = pairs_of_epoch(1)
    expected = all_sentences(first)
    pairs_of_epoch(2)
    assert [path.name for path in (tmp_path / "epochs").iterdir()] == ["2"]
    assert all_sentences(first) == expected  # whoever still reads them can go on
