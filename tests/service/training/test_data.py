import shutil
import unicodedata

import pytest
import sacrebleu

from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.training.data import learn_subwords, tokenise_training_pairs, tokenise_validation_pairs
from ferryman_service.training.pairs import open_pairs

WORDS = ["alo", "beki", "cumi", "dena", "efu", "gira", "hosola", "jupe"]
GOOD = [(f"{first} {second}", f"{second} {first}") for first in WORDS for second in WORDS]


@pytest.fixture
def tokenise(tmp_path, small_recipe, reporter):
    """Learns subwords from the training pairs and tokenises both parts; returns (training pairs, validation pairs)."""

    def run(corpus, **data):
        recipe = small_recipe(data={"vocabulary_size": 32} | data).data
        subwords = learn_subwords(corpus, recipe, tmp_path / "subwords.model", seed=1, check=reporter.check)
        drops = tokenise_training_pairs(corpus, subwords, recipe, tmp_path / "pairs", reporter.check, threads=1)
        if drops:
            reporter.event(None, "PAIRS_DROPPED", f"dropped training pairs: {drops}")
        return open_pairs(tmp_path / "pairs"), tokenise_validation_pairs(corpus, subwords, recipe, threads=1), subwords

    return run


def test_usable_pairs_keep_their_order_and_text(tokenise, write_corpus, reporter):
    pairs, validation, subwords = tokenise(write_corpus(GOOD, [*GOOD[:2], ("ila  alo", "alo\u00a0ila  ")]))
    assert [
        (subwords.decode(pairs.source.sentence(i)), subwords.decode(pairs.target.sentence(i)))
        for i in range(len(pairs))
    ] == GOOD
    assert validation.sources == [GOOD[0][0], GOOD[1][0], "ila alo"]
    assert validation.references == [GOOD[0][1], GOOD[1][1], "alo ila"]
    assert len(validation.tokens) == 3
    assert reporter.events == []
    assert validation.dropped == ""


WORDS_WITH_MARKS = [
    *["été", "café", "forêt", "Noël", "où", "garçon", "élève", "hôtel", "sûr", "goût", "maïs", "pêche"],
    *["ज़मीन", "सड़क", "पढ़ना", "क़लम", "फ़िल्म", "घर", "पानी", "किताब", "शहर"],
]


@pytest.mark.parametrize("form", ["", "NFD"])
def test_perfect_translations_score_100_in_every_form_of_unicode(tokenise, write_corpus, form):
    """A model writes what it was taught: normalised text. Hindi's letters with a nukta are two characters there."""
    words = [unicodedata.normalize(form, word) if form else word for word in WORDS_WITH_MARKS]
    lines = [f" {one}  {other} {one} {other}" for one in words for other in words]
    pairs = list(zip(lines, lines, strict=True))
    _, validation, subwords = tokenise(write_corpus(pairs, pairs), vocabulary_size=64)
    target = validation.tokens.target
    perfect = [subwords.decode(target.sentence(index)) for index in range(len(pairs))]
    assert sacrebleu.corpus_bleu(perfect, [validation.references]).score == pytest.approx(100)
    assert sacrebleu.corpus_chrf(perfect, [validation.references]).score == pytest.approx(100)


def test_long_and_unlike_pairs_are_dropped_and_counted(tokenise, write_corpus, reporter):
    train = [*GOOD, (" ".join(["alo"] * 60), "efu"), ("alo", " ".join(["efu"] * 12)), ("", "alo"), GOOD[0]]
    pairs, validation, _ = tokenise(write_corpus(train, train), max_sentence_tokens=40, max_length_ratio=3)
    assert len(pairs) == len(GOOD)
    assert reporter.messages("PAIRS_DROPPED") == [
        "dropped training pairs: 4 of 68 (1 EMPTY, 1 DUPLICATE, 1 TOO_LONG, 1 LENGTH_RATIO)"
    ]
    assert validation.dropped == "2 of 68 (1 EMPTY, 1 TOO_LONG)"


def test_the_end_symbol_counts_for_the_longest_sentence(tokenise, write_corpus, tmp_path):
    train = [*GOOD, *((f"{source} {source}", target) for source, target in GOOD)]
    pairs, _, _ = tokenise(write_corpus(train, train))
    longest = int(max(pairs.source.lengths_P.max(), pairs.target.lengths_P.max()))
    for limit, is_kept in ((longest, True), (longest - 1, False)):
        shutil.rmtree(tmp_path / "pairs")
        pairs, _, _ = tokenise(write_corpus(train, [("alo", "alo")]), max_sentence_tokens=limit)
        assert (len(pairs) == len(train)) is is_kept


def test_no_usable_validation_pair_is_a_failure(tokenise, write_corpus):
    with pytest.raises(TrainingFailed, match="no validation pair is usable") as caught:
        tokenise(write_corpus(GOOD, [("", "alo")]))
    assert caught.value.reason is FailureReason.NO_VALIDATION_PAIRS


def test_no_usable_training_pair_is_a_failure(tokenise, write_corpus):
    with pytest.raises(TrainingFailed, match="no training pair is usable") as caught:
        tokenise(write_corpus([(f"{pair[0]} " * 20, pair[1]) for pair in GOOD], GOOD), max_length_ratio=1)
    assert caught.value.reason is FailureReason.NO_TRAINING_PAIRS
