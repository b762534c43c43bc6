"""Checks an exported model against the trained one, before anybody can use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from ferryman_service.application.ports import Translator
from ferryman_service.domain.models import Int8Scores
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.translation import CancelToken, Hypothesis, SearchOptions

_SEARCHES: Final = (SearchOptions(beam_size=1), SearchOptions(beam_size=5))
_GREEDY: Final = SearchOptions(beam_size=1)
MAX_INT8_LOSS: Final = 0.3
"""BLEU that int8 may lose before it is left out of the bundle."""
_TIE: Final = 1e-3
"""Two different translations whose scores differ by less are a tie that float32 rounding may break either way."""


def check_export(*, reference: Translator, exported: Translator, sentences: Sequence[str]) -> str:
    """Translate the sentences with both, greedily and with beam 5, and return a sentence saying how many are the same.

    Raises TrainingFailed(EXPORT_MISMATCH) if any translation differs by more than a tie.
    """
    same = total = 0
    for options in _SEARCHES:
        ours, _ = exported.translate(sentences, options, CancelToken())
        theirs, _ = reference.translate(sentences, options, CancelToken())
        for sentence, mine, wanted in zip(sentences, ours, theirs, strict=True):
            total += 1
            if mine.hypotheses[0].tokens == wanted.hypotheses[0].tokens:
                same += 1
            elif not _is_tie(mine.hypotheses[0], wanted.hypotheses[0]):
                raise TrainingFailed(
                    FailureReason.EXPORT_MISMATCH,
                    f"the exported model translates {sentence!r} (beam {options.beam_size}) as "
                    f"{mine.hypotheses[0].text!r}, the trained one as {wanted.hypotheses[0].text!r}; "
                    "nothing was published",
                )
    return f"the exported model gave the same tokens as the trained one in {same} of {total} translations"


def measure_int8(
    *,
    exact: Translator,
    int8: Translator,
    pairs: Sequence[tuple[str, str]],
    bleu: Callable[[Sequence[str], Sequence[str]], float],
) -> Int8Scores:
    """Translate held-out sources with both, greedily, and return what both score against the references."""
    sources, references = [source for source, _ in pairs], [reference for _, reference in pairs]

    def score(translator: Translator) -> float:
        translations, _ = translator.translate(sources, _GREEDY, CancelToken())
        return bleu([translation.hypotheses[0].text for translation in translations], references)

    return Int8Scores(pairs=len(pairs), fp32_bleu=score(exact), int8_bleu=score(int8))


def _is_tie(one: Hypothesis, other: Hypothesis) -> bool:
    return abs(one.score - other.score) < _TIE
