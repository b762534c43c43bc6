"""What is asked for as one translation: a sentence, or a text whose sentences are translated one by one.

The sentences of a text are joined again by what stood between them if that held a line break, as between paragraphs,
and otherwise by a space, or by nothing in a language whose sentences have none between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ferryman_service.application.ports import SentenceSplitter, TranslationEngine
from ferryman_service.domain.errors import InvalidSentence, Violation
from ferryman_service.domain.scripts import sentence_space
from ferryman_service.domain.translation import (
    Hypothesis,
    PreparedSentence,
    SearchOptions,
    SentenceResult,
    Timings,
    Translation,
)
from ferryman_service.text.normalise import is_too_large, mark_violations

MAX_SPLIT_SENTENCES: Final = 16_384
"""Sentences that the texts of one request may have together."""
MAX_TEXT_BYTES: Final = 256 * 2**10
"""The longest text that is split into sentences, bytes of UTF-8."""
_MOST_VIOLATIONS: Final = 20
"""Violations of a request that are described; the others are counted."""

_QUICK_TEXTS: Final = 4
_QUICK_CHARACTERS: Final = 512
# What text/normalise.py takes for white space, without the control characters: those are to be found, not stripped.
_SPACE: Final = "\t\n\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_NOTHING_FOUND: Final = Hypothesis(text="", score=0.0, log_probability=0.0, target_tokens=0, finished=False)
_LINE_BREAKS: Final = frozenset("\n\r\u2028\u2029")


class Entry:
    """One translation in the making. `sentences` are to be translated; `timings` are those of the ones that were."""

    def __init__(self, sentences: Sequence[PreparedSentence], gaps: Sequence[str], options: SearchOptions) -> None:
        """Store; `gaps` are the texts between the sentences' translations, one fewer than sentences."""
        assert len(gaps) == len(sentences) - 1, "a gap stands between two sentences"
        self.sentences = sentences
        self.timings: list[Timings] = []
        self._gaps = gaps
        self._length_penalty = options.length_penalty
        self._translations: list[Translation | None] = [None] * len(sentences)

    def accept(self, place: int, result: SentenceResult) -> bool:
        """Take the result of a sentence, which must have no error; tell whether it was the last one missing."""
        assert self._translations[place] is None, "a sentence has one result"
        self._translations[place] = result.translation
        self.timings.append(result.timings)
        return len(self.timings) == len(self.sentences)

    def translation(self) -> Translation:
        """Return the translation of all, once nothing is missing."""
        parts = [part for part in self._translations if part is not None]
        assert len(parts) == len(self.sentences), "something is missing"
        return parts[0] if len(parts) == 1 else self._joined(parts)

    def _joined(self, parts: Sequence[Translation]) -> Translation:
        best = [part.hypotheses[0] if part.hypotheses else _NOTHING_FOUND for part in parts]
        log_probability = sum(hypothesis.log_probability for hypothesis in best)
        target_tokens = sum(hypothesis.target_tokens for hypothesis in best)
        hypothesis = Hypothesis(
            text=best[0].text + "".join(gap + part.text for gap, part in zip(self._gaps, best[1:], strict=True)),
            score=log_probability / target_tokens**self._length_penalty if target_tokens else 0.0,
            log_probability=log_probability,
            target_tokens=target_tokens,
            finished=all(hypothesis.finished for hypothesis in best),
        )
        return Translation(hypotheses=[hypothesis], source_tokens=sum(part.source_tokens for part in parts))


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a caller's entries become sentences of a model. Without a splitter every entry is one sentence. `language` is
    the BCP 47 tag of the source, `target_language` that of the translation. Safe to use from every thread."""

    engine: TranslationEngine
    options: SearchOptions
    language: str = ""
    target_language: str = ""
    splitter: SentenceSplitter | None = None

    def is_quick(self, texts: Sequence[str], prefixes: Sequence[str]) -> bool:
        """Tell whether these texts take so little time that an event loop can afford it (about 0.1 ms)."""
        return self.splitter is None and is_quick(texts, prefixes)

    def entries(self, texts: Sequence[str], prefixes: Sequence[str]) -> list[Entry]:
        """Prepare texts, each with its prefix, or all without. Raises InvalidSentence with every violation, fields
        "sentences[i]" and "target_prefixes[i]"."""
        if self.splitter is None:
            prepared = self.engine.prepare_all(texts, prefixes, self.options)
            return [Entry([sentence], (), self.options) for sentence in prepared]
        entries: list[Entry] = []
        violations: list[Violation] = []
        count = total = 0
        for index, text in enumerate(texts):
            try:
                entries.append(self.entry(text, "", most=MAX_SPLIT_SENTENCES - count))
                count += len(entries[-1].sentences)
            except InvalidSentence as error:
                total += error.total
                described = error.violations[: _MOST_VIOLATIONS - len(violations)]
                violations += [_of_entry(index, violation) for violation in described]
        if violations:
            raise InvalidSentence(violations, total)
        return entries

    def entry(self, text: str, prefix: str, most: int = MAX_SPLIT_SENTENCES) -> Entry:
        """Prepare one text of at most so many sentences; raises InvalidSentence, fields "sentence" and "prefix"."""
        if self.splitter is None:
            return Entry([self.engine.prepare(text, prefix, self.options)], (), self.options)
        if violations := _too_large("sentence", text) or mark_violations("sentence", text):
            raise InvalidSentence(violations)
        sentences, gaps = split_text(text, self.language, self.splitter, sentence_space(self.target_language))
        if len(sentences) > most:
            description = (
                f"has {len(sentences):,} sentences, the texts of a request may have {MAX_SPLIT_SENTENCES:,} together: "
                "send it in several requests, or stream it"
            )
            raise InvalidSentence([Violation(field="sentence", description=description, reason="TOO_MANY_SENTENCES")])
        prepared: list[PreparedSentence] = []
        total = 0
        for number, sentence in enumerate(sentences, start=1):
            try:
                prepared.append(self.engine.prepare(sentence, "", self.options))
            except InvalidSentence as error:
                total += error.total
                described = error.violations[: _MOST_VIOLATIONS - len(violations)]
                violations += [_of_sentence(number, len(sentences), violation) for violation in described]
        if violations:
            raise InvalidSentence(violations, total)
        return Entry(prepared, gaps, self.options)


def is_quick(texts: Sequence[str], prefixes: Sequence[str]) -> bool:
    """Tell whether these texts, each of one sentence, take so little time that an event loop can afford it."""
    return len(texts) <= _QUICK_TEXTS and sum(map(len, (*texts, *prefixes))) <= _QUICK_CHARACTERS


def split_text(text: str, language: str, splitter: SentenceSplitter, between: str = " ") -> tuple[list[str], list[str]]:
    """Return the sentences of a text, at least one, and what will stand between their translations: `between`, or the
    white space of the text if that holds a line break."""
    sentences: list[str] = []
    gaps: list[str] = []
    space = ""
    for piece in splitter.split(text, language):
        sentence = piece.strip(_SPACE)
        if not sentence:
            space += piece
            continue
        begin = piece.index(sentence)
        if sentences:
            gap = space + piece[:begin]
            gaps.append(between if _LINE_BREAKS.isdisjoint(gap) else gap)
        sentences.append(sentence)
        space = piece[begin + len(sentence) :]
    return sentences or [""], gaps


def _too_large(field: str, text: str) -> list[Violation]:
    if not is_too_large(text, MAX_TEXT_BYTES):
        return []
    description = f"has more than {MAX_TEXT_BYTES:,} bytes of UTF-8: cut the text between paragraphs"
    return [Violation(field=field, description=description, reason="TEXT_TOO_LONG")]


def _of_entry(index: int, violation: Violation) -> Violation:
    return Violation(field=f"sentences[{index}]", description=violation.description, reason=violation.reason)


def _of_sentence(number: int, count: int, violation: Violation) -> Violation:
    description = f"sentence {number} of {count} {violation.description}"
    return Violation(field="sentence", description=description, reason=violation.reason)
