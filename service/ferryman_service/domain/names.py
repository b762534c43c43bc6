"""The one rule for names that callers choose freely; names that become paths or references are stricter (ids.py)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Final

from ferryman_service.domain.errors import Violation

MAX_NAME_CHARACTERS: Final = 200
_REFUSED: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls (line breaks among them), format controls (bidirectional ones among them), surrogates, separators of lines
and paragraphs: Unicode's general categories."""
_JOINERS: Final = "\u200c\u200d"
"""Format controls that words of Persian and of Indic scripts, and emoji, are spelt with; they have no effect beyond the
characters beside them."""


def name_violations(name: str, field: str) -> Iterator[Violation]:
    """Yield what is wrong with `name`, which must be one printable line of at most 200 characters, and may be empty."""
    if len(name) > MAX_NAME_CHARACTERS:
        text = f"has {len(name)} characters, at most {MAX_NAME_CHARACTERS} are allowed"
        yield Violation(field=field, description=text, reason="TOO_LONG")
    found = next(((place, char) for place, char in enumerate(name) if _is_refused(char)), None)
    if found is not None:
        place, char = found
        text = (
            f"has U+{ord(char):04X} as character {place + 1}: a name is one line of printable characters, without line "
            "breaks, control characters and marks of writing direction"
        )
        yield Violation(field=field, description=text, reason="CONTROL_CHARACTER")


def _is_refused(char: str) -> bool:
    return unicodedata.category(char) in _REFUSED and char not in _JOINERS
