"""The script that a language is written in: what joining and scoring of its sentences depend on."""

from __future__ import annotations

from itertools import takewhile
from typing import Final

HAN: Final = "Hani"
JAPANESE: Final = "Jpan"
KOREAN: Final = "Kore"
OTHER: Final = ""
_NO_SPACE_BETWEEN_WORDS: Final = frozenset({"Thai", "Laoo", "Khmr", "Mymr", "Tibt"})

_LANGUAGES: Final = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "wuu", "hak", "gan", "hsn", "lzh"), HAN),
    **dict.fromkeys(("ja", "jpn"), JAPANESE),
    **dict.fromkeys(("ko", "kor"), KOREAN),
    **dict.fromkeys(("th", "tha"), "Thai"),
    **dict.fromkeys(("lo", "lao"), "Laoo"),
    **dict.fromkeys(("km", "khm"), "Khmr"),
    **dict.fromkeys(("my", "mya", "bur"), "Mymr"),
    **dict.fromkeys(("bo", "bod", "tib", "dz", "dzo"), "Tibt"),
}
_SCRIPTS: Final = {
    **dict.fromkeys(("Hani", "Hans", "Hant", "Hanb", "Bopo"), HAN),
    **dict.fromkeys(("Jpan", "Hrkt", "Hira", "Kana"), JAPANESE),
    **dict.fromkeys(("Kore", "Hang"), KOREAN),
    **{script: script for script in _NO_SPACE_BETWEEN_WORDS},
}
_SCRIPT_LETTERS: Final = 4


def script_of(language: str) -> str:
    """Return the script of a BCP 47 tag (RFC 5646): HAN, JAPANESE, KOREAN, another one without spaces between words by
    its code in ISO 15924, or OTHER. A script subtag ("zh-Latn") comes before what is usual for the language."""
    first, *others = language.replace("_", "-").split("-")
    for part in takewhile(lambda subtag: len(subtag) > 1, others):  # what follows a singleton is no script
        if len(part) == _SCRIPT_LETTERS and part.isalpha():
            return _SCRIPTS.get(part.title(), OTHER)
    return _LANGUAGES.get(first.lower(), OTHER)


def has_words_without_spaces(language: str) -> bool:
    """Tell whether no space stands between the words of the language, and its script is neither Han nor Japanese."""
    return script_of(language) in _NO_SPACE_BETWEEN_WORDS


def sentence_space(language: str) -> str:
    """Return what stands between two sentences of the language: nothing in Chinese and Japanese, else a space; in
    Thai, Lao, Khmer, Burmese and Tibetan the space is what separates sentences."""
    return "" if script_of(language) in (HAN, JAPANESE) else " "
