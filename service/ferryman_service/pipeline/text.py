"""From text to what a model takes, and from what search found back to text."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Final

from ferryman_service.domain.errors import InvalidSentence, Violation
from ferryman_service.domain.tokens import EOS, UNK
from ferryman_service.domain.translation import Hypothesis, PreparedSentence, SearchOptions, Translation
from ferryman_service.search.sentence import RawHypothesis
from ferryman_service.text.normalise import has_control_characters, mark_violations, normalise, size_violations
from ferryman_service.text.subwords import Subwords

_MAX_NAMED: Final = 10
"""Unknown characters of a prefix that a violation names."""


class SentenceText:
    """The text side of one model. Safe to use from several threads at once."""

    def __init__(self, subwords: Subwords, max_sentence_tokens: int, max_translation_tokens: int = 0) -> None:
        """Store the model's subwords, its longest source and the longest translation, both in subwords with the end
        symbol; 0: no translation is longer than the longest source."""
        self._subwords = subwords
        self.max_sentence_tokens = max_sentence_tokens
        self._max_translation_tokens = max_translation_tokens or max_sentence_tokens

    def prepare(self, sentence: str, prefix: str, options: SearchOptions) -> PreparedSentence:
        """Normalise a sentence and split it into subwords; raises InvalidSentence with every violation, whose fields
        are "sentence" and "prefix"."""
        prepared, violations = self._prepare([sentence], [prefix], options, ("sentence", "prefix"))
        if violations:
            raise InvalidSentence(violations)
        return prepared[0]

    def prepare_all(
        self, sentences: Sequence[str], prefixes: Sequence[str], options: SearchOptions
    ) -> Sequence[PreparedSentence]:
        """Do so with many; `prefixes` is empty or as long. The fields are "sentences[i]" and "target_prefixes[i]"."""
        prefixes = prefixes or [""] * len(sentences)
        prepared, violations = self._prepare(sentences, prefixes, options, ("sentences[{}]", "target_prefixes[{}]"))
        if violations:
            raise InvalidSentence(violations)
        return prepared

    def translation(
        self, sentence: PreparedSentence, found: Sequence[RawHypothesis], options: SearchOptions
    ) -> Translation:
        """Return the translation that the hypotheses are; none were sought for an empty sentence."""
        with_pieces = options.return_token_scores or options.return_alignment
        if not sentence.source:
            nothing = self._nothing(sentence.prefix, options, with_pieces=with_pieces)
            return Translation(hypotheses=[nothing], source_tokens=0)
        return Translation(
            hypotheses=[self._hypothesis(raw, with_pieces=with_pieces) for raw in found],
            source_tokens=len(sentence.source),
            source_pieces=self._pieces(sentence.source) if with_pieces else (),
        )

    def _prepare(
        self, sentences: Sequence[str], prefixes: Sequence[str], options: SearchOptions, fields: tuple[str, str]
    ) -> tuple[list[PreparedSentence], list[Violation]]:
        started_ns = time.perf_counter_ns()
        normalised, bad_sentences = _normalised(sentences, fields[0], "SENTENCE_TOO_LONG", self.max_sentence_tokens)
        sources = self._subwords.encode(normalised)
        normalised_prefixes, bad_prefixes = _normalised(
            prefixes, fields[1], "PREFIX_TOO_LONG", self._max_translation_tokens
        )
        forced = self._subwords.encode(normalised_prefixes) if any(prefixes) else [[]] * len(sources)
        text_ns = (time.perf_counter_ns() - started_ns) // max(1, len(sentences))
        prepared: list[PreparedSentence] = []
        violations: list[Violation] = []
        for index, (text, ids, prefix) in enumerate(zip(normalised, sources, forced, strict=True)):
            source = (*ids, EOS) if text else ()
            max_length = self._max_length(max(1, len(source)), options)
            sentence_field, prefix_field = (field.format(index) for field in fields)
            violations += bad_sentences[index] + bad_prefixes[index]
            violations += self._too_long(sentence_field, len(source))
            too_long = _no_room(prefix_field, len(prefix), max_length)
            violations += too_long or self._unknown_characters(prefix_field, normalised_prefixes[index], prefix)
            prepared.append(
                PreparedSentence(
                    source=source,
                    prefix=tuple(prefix),
                    min_length=min(options.min_length, max_length - 1),
                    max_length=max_length,
                    text_ns=text_ns,
                )
            )
        return prepared, violations

    def _max_length(self, source_tokens: int, options: SearchOptions) -> int:
        longest = options.max_length or min(2 * source_tokens + 10, self.max_sentence_tokens)
        longest = min(longest, self._max_translation_tokens)
        if options.max_length_ratio is not None:
            longest = min(longest, math.ceil(options.max_length_ratio * source_tokens))
        return max(1, longest)

    def _too_long(self, field: str, source_tokens: int) -> list[Violation]:
        if source_tokens <= self.max_sentence_tokens:
            return []
        text = (
            f"has {source_tokens} subwords with the end symbol, the model takes at most {self.max_sentence_tokens}: "
            "split the sentence, or ask for split_sentences"
        )
        return [Violation(field=field, description=text, reason="SENTENCE_TOO_LONG")]

    def _unknown_characters(self, field: str, prefix: str, tokens: Sequence[int]) -> list[Violation]:
        """Name the characters for which the prefix would not come back as it is."""
        if not prefix or (UNK not in tokens and self._subwords.decode(tokens) == prefix):
            return []
        different = list(dict.fromkeys(prefix))
        encoded = zip(different, self._subwords.encode(different), strict=True)
        characters = [character for character, tokens in encoded if not self._is_known(character, tokens)]
        if not characters:  # what it holds besides is no text, and is named for that
            return []
        named = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in characters[:_MAX_NAMED])
        more = f" and {len(characters) - _MAX_NAMED} more" if len(characters) > _MAX_NAMED else ""
        text = (
            f"holds {named}{more}, which the model's vocabulary does not have, so that no translation can begin with "
            "this prefix: remove or replace what is named"
        )
        return [Violation(field=field, description=text, reason="UNKNOWN_CHARACTER")]

    def _is_known(self, character: str, tokens: Sequence[int]) -> bool:
        return (
            character == " "
            or has_control_characters(character)
            or (UNK not in tokens and self._subwords.decode(tokens) == character)
        )

    def _nothing(self, prefix: tuple[int, ...], options: SearchOptions, *, with_pieces: bool) -> Hypothesis:
        """Return the translation of an empty sentence: the words that it must begin with, which cost no probability."""
        return Hypothesis(
            text=self._subwords.decode(prefix),
            score=0.0,
            log_probability=0.0,
            target_tokens=len(prefix),
            finished=True,
            tokens=prefix,
            pieces=tuple(self._pieces(prefix)) if with_pieces else (),
            token_log_probabilities=(0.0,) * len(prefix) if options.return_token_scores else (),
        )

    def _hypothesis(self, raw: RawHypothesis, *, with_pieces: bool) -> Hypothesis:
        return Hypothesis(
            text=self._subwords.decode(raw.tokens),
            score=raw.score,
            log_probability=raw.log_probability,
            target_tokens=raw.length,
            finished=raw.finished,
            tokens=raw.tokens,
            pieces=self._pieces((*raw.tokens, EOS) if raw.finished else raw.tokens) if with_pieces else (),
            token_log_probabilities=raw.token_log_probs,
            alignment=raw.alignment,
        )

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self._subwords.piece(token) for token in tokens]


def _normalised(
    texts: Sequence[str], field: str, too_long: str, most_tokens: int
) -> tuple[list[str], list[list[Violation]]]:
    """Return each text, normalised, and what is wrong with it before that: "" for one that must not be looked at any
    further. `too_long` and `most_tokens`: see `size_violations`."""
    normalised: list[str] = []
    violations: list[list[Violation]] = []
    for index, text in enumerate(texts):
        found = size_violations(field.format(index), text, too_long, most_tokens)
        found = found or mark_violations(field.format(index), text)
        normalised.append("" if found else normalise(text))
        violations.append(found or _control_characters(field.format(index), text))
    return normalised, violations


def _control_characters(field: str, text: str) -> list[Violation]:
    if not has_control_characters(text):
        return []
    description = "holds control characters other than tab and line breaks: remove them"
    return [Violation(field=field, description=description, reason="CONTROL_CHARACTER")]


def _no_room(field: str, prefix_tokens: int, max_length: int) -> list[Violation]:
    if prefix_tokens < max_length:
        return []
    text = f"has {prefix_tokens} subwords, the translation at most {max_length} with the end symbol: shorten the prefix"
    return [Violation(field=field, description=text, reason="PREFIX_TOO_LONG")]
