"""Signs that a corpus is not what its caller meant, counted while its lines are checked, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ferryman_service.domain.corpora import CorpusWarning, Side, Split, shortened

MAX_COMPARED_PAIRS: Final = 10_000
_OVERLAP_DIVISOR: Final = 5


class CorpusSigns:
    """What is known of all splits: give it the validation pairs first, then the training pairs."""

    def __init__(self) -> None:
        self._validation: dict[int, bool] = {}
        """The hashes of the first different validation pairs, and whether a training pair has it too."""
        self._example = ""

    def add(self, split: Split, source: str, target: str) -> None:
        """Look at a pair."""
        key = hash((source, target))
        if split is Split.VALIDATION:
            if len(self._validation) < MAX_COMPARED_PAIRS:
                self._validation[key] = False
        elif self._validation.get(key) is False:
            self._validation[key] = True
            self._example = self._example or f"{source} → {target}"

    def warnings(self) -> Iterator[CorpusWarning]:
        """Yield what concerns several splits."""
        count, total = sum(self._validation.values()), len(self._validation)
        if count and _OVERLAP_DIVISOR * count >= total:
            yield CorpusWarning(
                code="VALIDATION_IN_TRAINING",
                field=Split.VALIDATION.value,
                message=f"{count:,} of {total:,} different validation pairs are training pairs too: the validation "
                "scores will say little about other text; keep the two apart",
                count=count,
                total=total,
                example=shortened(self._example),
            )


class SplitSigns:
    """What is known of one split."""

    def __init__(self, split: Split, signs: CorpusSigns | None) -> None:
        self._split = split
        self._signs = signs
        self._total = 0
        self._same = _Sign(
            "SAME_ON_BOTH_SIDES",
            "source and target are equal in {count} of {total} pairs: give the source and the target text",
        )
        self._of_sides = {side: _signs_of_side() for side in Side}

    def add(self, source: str, target: str) -> None:
        """Look at a pair with text on both sides."""
        self._total += 1
        if source == target:
            self._same.add(source)
        for side, text in ((Side.SOURCE, source), (Side.TARGET, target)):
            tabs, markup = self._of_sides[side]
            content = text.strip().removesuffix(",")
            if "\t" in content:
                tabs.add(text)
            if (content[:1], content[-1:]) in (("<", ">"), ("{", "}")):
                markup.add(text)
        if self._signs is not None:
            self._signs.add(self._split, source, target)

    def warnings(self) -> Iterator[CorpusWarning]:
        """Yield what is so of most pairs."""
        yield from self._same.warnings(self._split.value, self._total)
        for side, signs in self._of_sides.items():
            for sign in signs:
                yield from sign.warnings(f"{self._split}.{side}", self._total)


class _Sign:
    """One sign: how often it was seen, and where first."""

    def __init__(self, code: str, message: str) -> None:
        self._code, self._message = code, message
        self._count = 0
        self._example = ""

    def add(self, example: str) -> None:
        self._count += 1
        if self._count == 1:
            self._example = example

    def warnings(self, field: str, total: int) -> Iterator[CorpusWarning]:
        if 2 * self._count > total:
            yield CorpusWarning(
                code=self._code,
                field=field,
                message=self._message.format(count=f"{self._count:,}", total=f"{total:,}"),
                count=self._count,
                total=total,
                example=shortened(self._example),
            )


def _signs_of_side() -> tuple[_Sign, _Sign]:
    tabs = "{count} of {total} lines hold tabs: cut a table into a source and a target file, one sentence a line"
    markup = "{count} of {total} lines look like XML or JSON: take the sentences out of it, one a line"
    return _Sign("TABS", tabs), _Sign("MARKUP", markup)
