"""Checks an exported model against the trained one, before anybody can use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from ferryman_service.application.ports import Translator
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.translation import CancelToken, Hypothesis, SearchOptions

_SEARCHES: Final = (SearchOptions(beam_size=1), SearchOptions(beam_size=5))
_GREEDY: Final = SearchOptions(beam_size=1)
MAX_INT8_LOSS: Final = 0.3
"""BLEU that int8 may lose before it is left out of the bundle."""
FP16_PAIRS: Final = 100
"""Held-out pairs that fp16 is measured on, at most: the check has no GPU, and fp16 is no faster than fp32 without."""
MAX_FP16_LOSS: Final = 1.0
"""BLEU that fp16 may lose on so few pairs without a warning."""
_PORTION: Final = 32
_TIE: Final = 1e-3
"""Two different translations whose scores differ by less are a tie that float32 rounding may break either way."""


class NothingTranslated(TrainingFailed):
    """A model gave no translation of a sentence: its numbers are not finite."""

    def __init__(self) -> None:
        super().__init__(
            FailureReason.NON_FINITE_LOSS,
            "training has diverged: the model gives numbers that are not finite, and nothing was published. Lower the "
            "learning rate, warm up longer, or clip the gradient",
        )


def check_export(
    *, reference: Translator, exported: Translator, sentences: Sequence[str], check: Callable[[], None]
) -> str:
    """Translate the sentences with both, greedily and with beam 5, and return a sentence saying how many are the same.

    `check` is called again and again; it raises what ends the work. Raises TrainingFailed(EXPORT_MISMATCH) if any
    translation differs by more than a tie, NothingTranslated.
    """
    same = total = 0
    for options in _SEARCHES:
        ours = _translate(exported, sentences, options, check)
        theirs = _translate(reference, sentences, options, check)
        for sentence, mine, wanted in zip(sentences, ours, theirs, strict=True):
            total += 1
            if mine.tokens == wanted.tokens:
                same += 1
            elif not _is_tie(mine, wanted):
                raise TrainingFailed(
                    FailureReason.EXPORT_MISMATCH,
                    f"the exported model translates {sentence!r} (beam {options.beam_size}) as {mine.text!r}, the "
                    f"trained one as {wanted.text!r}; nothing was published",
                )
    return f"the exported model gave the same tokens as the trained one in {same} of {total} translations"


def translate_held_out(translator: Translator, sources: Sequence[str], check: Callable[[], None]) -> list[str]:
    """Translate held-out sources greedily, to be scored; `check` is called again and again, and may end it.

    Raises NothingTranslated.
    """
    return [hypothesis.text for hypothesis in _translate(translator, sources, _GREEDY, check)]


def _translate(
    translator: Translator, sentences: Sequence[str], options: SearchOptions, check: Callable[[], None]
) -> list[Hypothesis]:
    """Return the best hypothesis of each sentence. What has been begun cannot be stopped, so portions are small."""
    found: list[Hypothesis] = []
    for first in range(0, len(sentences), _PORTION):
        check()
        translations, _ = translator.translate(sentences[first : first + _PORTION], options, CancelToken())
        for translation in translations:
            if not translation.hypotheses:
                raise NothingTranslated
            found.append(translation.hypotheses[0])
    check()
    return found


def _is_tie(one: Hypothesis, other: Hypothesis) -> bool:
    return abs(one.score - other.score) < _TIE
