"""What the check of an exported model counts as the same, and what int8 is measured on."""

import pytest

from ferryman_service.application.verification import check_export, translate_held_out
from ferryman_service.domain.models import Int8Scores
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.training import RunCancelled
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
    verdict = check_export(reference=Dictionary(), exported=Dictionary(), sentences=["a", "b", "c"], check=lambda: None)
    assert verdict == "the exported model gave the same tokens as the trained one in 6 of 6 translations"


@pytest.mark.parametrize("beam_size", [1, 5])
def test_another_translation_is_a_mismatch_that_names_the_sentence(beam_size):
    other = Dictionary(**{f"b{beam_size}": ((8,), -1.01)})
    with pytest.raises(TrainingFailed, match=rf"'b' \(beam {beam_size}\) as 'b \(8,\)'") as caught:
        check_export(reference=Dictionary(), exported=other, sentences=["a", "b", "c"], check=lambda: None)
    assert caught.value.reason is FailureReason.EXPORT_MISMATCH


def test_a_tie_is_no_mismatch_but_not_the_same():
    other = Dictionary(b5=((8,), -1.0005), c1=((), -0.9995))
    assert "in 4 of 6" in check_export(
        reference=Dictionary(), exported=other, sentences=["a", "b", "c"], check=lambda: None
    )


def test_no_sentences_no_mismatch():
    assert "0 of 0" in check_export(reference=Dictionary(), exported=Dictionary(), sentences=[], check=lambda: None)


def test_held_out_sentences_are_translated_greedily_in_order_and_in_portions():
    checks = []
    found = translate_held_out(
        Dictionary(**{"901": ((5,), -1.0)}), [str(number) for number in range(100)], lambda: checks.append(1)
    )
    assert found == [f"{number} {(5,) if number == 90 else (7,)}" for number in range(100)]
    assert len(checks) >= 4, "a hundred sentences are not one piece of work"


def test_the_check_may_end_it():
    def stop():
        raise RunCancelled("run_x")

    with pytest.raises(RunCancelled):
        translate_held_out(Dictionary(), ["a"], stop)
    with pytest.raises(RunCancelled):
        check_export(reference=Dictionary(), exported=Dictionary(), sentences=["a"], check=stop)


def test_scores_are_of_pairs():
    assert Int8Scores(pairs=2, fp32_bleu=39.0, int8_bleu=38.0).loss == 1.0
    assert Int8Scores(pairs=0).loss is None
    for wrong in ({"pairs": 0, "fp32_bleu": 1.0, "int8_bleu": 1.0}, {"pairs": 2}, {"pairs": 2, "fp32_bleu": 1.0}):
        with pytest.raises(AssertionError):
            Int8Scores(**wrong)
