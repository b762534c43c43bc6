"""What the check of an exported model counts as the same, and what int8 is measured on."""

import pytest

from ferryman_service.application.verification import check_export, measure_int8
from ferryman_service.domain.models import Int8Scores
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.translation import Hypothesis, Timings, Translation


class Dictionary:
    """A Translator that finds the words: {(sentence, beam size): (tokens, score)}; others are (7,), -1."""

    def __init__(self, **words):
        self._words = words

    def translate(self, sentences, options, token):
        translations = []
        for sentence in sentences:
            tokens, score = self._words.get(f"{sentence}{options.beam_size}", ((7,), -1.0))
            hypothesis = Hypothesis(
                text=f"{sentence} {tokens}",
                score=score,
                log_probability=score,
                target_tokens=1,
                finished=True,
                tokens=tokens,
            )
            translations.append(Translation(hypotheses=[hypothesis], source_tokens=1))
        return translations, Timings()


def test_equal_translations_are_counted():
    verdict = check_export(reference=Dictionary(), exported=Dictionary(), sentences=["a", "b", "c"])
    assert verdict == "the exported model gave the same tokens as the trained one in 6 of 6 translations"


@pytest.mark.parametrize("beam_size", [1, 5])
def test_another_translation_is_a_mismatch_that_names_the_sentence(beam_size):
    other = Dictionary(**{f"b{beam_size}": ((8,), -1.01)})
    with pytest.raises(TrainingFailed, match=rf"'b' \(beam {beam_size}\) as 'b \(8,\)'") as caught:
        check_export(reference=Dictionary(), exported=other, sentences=["a", "b", "c"])
    assert caught.value.reason is FailureReason.EXPORT_MISMATCH


def test_a_tie_is_no_mismatch_but_not_the_same():
    other = Dictionary(b5=((8,), -1.0005), c1=((), -0.9995))
    assert "in 4 of 6" in check_export(reference=Dictionary(), exported=other, sentences=["a", "b", "c"])


def test_no_sentences_no_mismatch():
    assert "0 of 0" in check_export(reference=Dictionary(), exported=Dictionary(), sentences=[])


def test_int8_is_measured_on_all_pairs_greedily_against_the_references():
    seen = []

    def bleu(translations, references):
        seen.append((translations, references))
        return 40.0 - len(seen)

    scores = measure_int8(
        exact=Dictionary(a1=((5,), -1.0)),
        int8=Dictionary(a1=((6,), -1.0)),
        pairs=[("a", "A"), ("b", "B")],
        bleu=bleu,
    )
    assert scores == Int8Scores(pairs=2, fp32_bleu=39.0, int8_bleu=38.0)
    assert scores.loss == 1.0
    assert seen == [(["a (5,)", "b (7,)"], ["A", "B"]), (["a (6,)", "b (7,)"], ["A", "B"])]
