"""Finding the sentences of a text, with sentencex (Wikimedia; rules and abbreviations for some 300 languages)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Final

_log = logging.getLogger(__name__)
_LINE_BREAK: Final = re.compile("[\x0b\x0c\x85\u2028\u2029]")
_OTHER_SPACE: Final = re.compile(r"[^\S\n\t ]")


class SentencexSplitter:
    """A SentenceSplitter."""

    def split(self, text: str, language: str) -> Sequence[str]:
        """Cut the text into pieces that joined are the text again: sentences with the white space around them."""
        import sentencex  # here, because few processes ever split

        # It panics at white space of several bytes after some full stops: give it one byte for each, and cut ourselves.
        plain = _OTHER_SPACE.sub(" ", _LINE_BREAK.sub("\n", text))
        try:
            pieces = sentencex.segment(language.partition("-")[0].lower(), plain)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            _log.warning("the sentence splitter failed on a text of %d characters: %s", len(text), error)
            return [text]
        cut: list[str] = []
        begin = 0
        for piece in pieces:
            cut.append(text[begin : begin + len(piece)])
            begin += len(piece)
        assert begin == len(text), "the pieces are the text"
        return cut
