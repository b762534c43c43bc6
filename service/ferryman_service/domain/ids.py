"""Ids made by the server: sortable by time, unguessable, safe as file names."""

from __future__ import annotations

import re
import secrets
import time
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_CHARACTERS: Final = 9
_RANDOM_CHARACTERS: Final = 13

CORPUS_PREFIX: Final = "cor"
RUN_PREFIX: Final = "run"

ID_PATTERN: Final = f"[{_ALPHABET}]{{{_TIME_CHARACTERS + _RANDOM_CHARACTERS}}}"
"""A regular expression for an id behind its prefix."""

MODEL_NAME_PATTERN: Final = "[a-z0-9][a-z0-9._-]{0,63}"
"""A regular expression for a model's name."""

_ID = re.compile(rf"(cor|run)_{ID_PATTERN}")
_MODEL_NAME = re.compile(MODEL_NAME_PATTERN)


def new_id(prefix: str) -> str:
    """Return a new id: prefix, milliseconds since 1970 (45 bits), 65 random bits; ids of later calls sort later."""
    number = time.time_ns() // 1_000_000
    digits = [_ALPHABET[(number >> shift) & 31] for shift in range(5 * (_TIME_CHARACTERS - 1), -1, -5)]
    return f"{prefix}_{''.join(digits)}{''.join(secrets.choice(_ALPHABET) for _ in range(_RANDOM_CHARACTERS))}"


def is_id(text: str, prefix: str) -> bool:
    """Tell whether `text` has the form of an id with that prefix. Only such text may become part of a path."""
    match = _ID.fullmatch(text)
    return match is not None and match.group(1) == prefix


def is_model_name(text: str) -> bool:
    """Tell whether `text` may name a model. A model name never contains "/" and never starts with a dot."""
    return _MODEL_NAME.fullmatch(text) is not None


def is_alias(text: str) -> bool:
    """Tell whether `text` may be an alias: it has the form of a model name and is not a number, which would read as a
    version."""
    return is_model_name(text) and not text.isdigit()
