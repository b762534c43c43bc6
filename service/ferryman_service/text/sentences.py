"""Finding the sentences of a text, with sentencex (Wikimedia; rules and abbreviations for some 300 languages)."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from typing import Final

_log = logging.getLogger(__name__)
_LINE_BREAK: Final = re.compile("[\x0b\x0c\x85\u2028\u2029]")
_OTHER_SPACE: Final = re.compile(r"[^\S\n\t ]")


# Where no white space stands between the sentences, the library's time is quadratic in the length of the text, and no
# other thread runs meanwhile. Of a text of over 10,000 characters it loses line breaks. So it is given a window at a
# time, a larger one only where a sentence is longer.
_WINDOW_CHARACTERS: Final = 4096
_MAX_WINDOW_CHARACTERS: Final = 8192


class SentencexSplitter:
    """A SentenceSplitter."""

    def split(self, text: str, language: str) -> Sequence[str]:
        """Cut the text into pieces that joined are the text again: sentences with the white space around them. A
        sentence of more than 8,192 characters is cut there."""
        # The library panics at white space of several bytes after some full stops: give it one byte for each, and cut
        # ourselves.
        plain = _OTHER_SPACE.sub(" ", _LINE_BREAK.sub("\n", text))
        code = language.partition("-")[0].lower()
        cut: list[str] = []
        begin, size = 0, _WINDOW_CHARACTERS
        while begin < len(text):
            lengths = _piece_lengths(plain[begin : begin + size], code)
            if begin + size < len(text):  # the last sentence, or a quotation, may go on beyond the window
                if len(lengths) == 1 and size < _MAX_WINDOW_CHARACTERS:
                    size *= 2
                    continue
                ends = itertools.accumulate(lengths)
                lengths = lengths[: max(1, sum(end <= size // 2 for end in ends))]
            for length in lengths:
                cut.append(text[begin : begin + length])
                begin += length
            size = _WINDOW_CHARACTERS
        return cut


def _piece_lengths(plain: str, language: str) -> list[int]:
    """Return the lengths of the pieces, characters; that of the whole where the library fails."""
    import sentencex  # here, because few processes ever split

    try:
        pieces = sentencex.segment(language, plain)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        _log.warning("the sentence splitter failed on a text of %d characters: %s", len(plain), error)
        return [len(plain)]
    if "".join(pieces) != plain:
        _log.warning("the sentence splitter changed a text of %d characters, which is left whole", len(plain))
        return [len(plain)]
    return [len(piece) for piece in pieces if piece]
