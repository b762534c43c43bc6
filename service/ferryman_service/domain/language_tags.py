"""Language tags: BCP 47 (RFC 5646)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_PRIVATE_USE: Final = r"x(?:-[a-z0-9]{1,8})+"
_LANGUAGE_TAG: Final = re.compile(
    r"[a-z]{2,3}(?:-[a-z]{3}){0,3}"  # language and its extensions; RFC 5646 also reserves 4 to 8 letters
    r"(?:-[a-z]{4})?"  # script
    r"(?:-(?:[a-z]{2}|[0-9]{3}))?"  # region
    r"(?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*"  # variants
    r"(?:-[0-9a-wyz](?:-[a-z0-9]{2,8})+)*"  # extensions
    rf"(?:-{_PRIVATE_USE})?",
    re.IGNORECASE,
)
_NAMED_LANGUAGES: Final[Mapping[str, str]] = {
    "arabic": "ar",
    "bengali": "bn",
    "bulgarian": "bg",
    "catalan": "ca",
    "chinese": "zh",
    "croatian": "hr",
    "czech": "cs",
    "danish": "da",
    "deutsch": "de",
    "dutch": "nl",
    "english": "en",
    "español": "es",
    "estonian": "et",
    "finnish": "fi",
    "français": "fr",
    "french": "fr",
    "german": "de",
    "greek": "el",
    "hebrew": "he",
    "hindi": "hi",
    "hungarian": "hu",
    "indonesian": "id",
    "irish": "ga",
    "italian": "it",
    "italiano": "it",
    "japanese": "ja",
    "korean": "ko",
    "latvian": "lv",
    "lithuanian": "lt",
    "norwegian": "no",
    "persian": "fa",
    "polish": "pl",
    "portuguese": "pt",
    "romanian": "ro",
    "russian": "ru",
    "serbian": "sr",
    "slovak": "sk",
    "slovenian": "sl",
    "spanish": "es",
    "swahili": "sw",
    "swedish": "sv",
    "thai": "th",
    "turkish": "tr",
    "ukrainian": "uk",
    "urdu": "ur",
    "vietnamese": "vi",
}
_SHOWN_CHARACTERS: Final = 40


def language_tag_violation(tag: str) -> str | None:
    """Return what is wrong with a language tag and what to write instead; None if it is well-formed.

    Well-formed is what RFC 5646, section 2.1, calls so, but for languages of four letters and more, which it reserves,
    and for grandfathered tags.
    """
    if is_language_tag(tag):
        return None
    if not tag:
        return 'is empty, must be a BCP 47 language tag such as "en" or "pt-BR"'
    shown = repr(tag[:_SHOWN_CHARACTERS])
    meant = _NAMED_LANGUAGES.get(tag.strip().lower()) or tag.strip().replace("_", "-").partition(".")[0]
    if is_language_tag(meant):
        return f'is {shown}, which is no BCP 47 language tag: write "{meant}"'
    return f'is {shown}, must be a BCP 47 language tag such as "en", "pt-BR" or "zh-Hans"; of your own: "x-name"'


def is_language_tag(tag: str) -> bool:
    """Tell whether the tag is well-formed; see `language_tag_violation`."""
    is_formed = _LANGUAGE_TAG.fullmatch(tag) or re.fullmatch(_PRIVATE_USE, tag, re.IGNORECASE)
    return tag.isascii() and is_formed is not None
