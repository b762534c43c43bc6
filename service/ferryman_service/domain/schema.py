"""Reading dataclasses from decoded JSON with every type and bound checked.

What JSON holds is nobody's dataclass yet: `true` passes for 1, `1e999` for a number, and a text for whatever a field is
said to be. `read_fields` takes a field only in the type that its annotation names, numbers only if they are finite and
in their range, and texts only if they are short, in one line and printable.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

_Class = TypeVar("_Class")
_SHOWN_CHARACTERS: Final = 60
_MOST_DIGITS: Final = 30


class SchemaMismatch(ValueError):
    """A value that the schema does not allow. `field` is its path, such as "header.scores.bleu"; `description` goes on
    from there."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field} {description}")
        self.field = field
        self.description = description


@dataclass(frozen=True)
class Number:
    """A range of numbers, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Text:
    """A form of texts: what `pattern` matches as a whole, at most `longest` characters, said in words by `form`."""

    longest: int = 200
    pattern: str = ".*"
    form: str = ""


Limits = Mapping[tuple[type[Any], str], Number | Text]
"""The limits of fields, by dataclass and name."""

_ANY_NUMBER: Final = Number(0, 2**63 - 1)
_ANY_TEXT: Final = Text()


def read_fields(cls: type[_Class], values: object, path: str, limits: Limits | None = None) -> _Class:
    """Return the dataclass whose fields `values` holds; those with a default may be missing.

    Fields are dataclasses, enums of texts, str, bool, int, float, or one of these or None. Without a limit of its own a
    number is at least 0, and a text has at most 200 characters. Raises SchemaMismatch, whose field begins with `path`.
    """
    members = mapping_of(values, path)
    fields = _fields_of(typing.cast("Hashable", cls))
    for name in members:
        if name not in fields:
            raise SchemaMismatch(_join(path, shown(name)), "is not a field of this format")
    found = {}
    for name, (annotation, required) in fields.items():
        if name in members:
            found[name] = _read(annotation, members[name], _join(path, name), (limits or {}).get((cls, name)), limits)
        elif required:
            raise SchemaMismatch(_join(path, name), "is missing")
    try:
        return cls(**found)
    except AssertionError as error:
        raise SchemaMismatch(path, f"contradicts itself: {error}") from error


def mapping_of(values: object, path: str) -> Mapping[str, Any]:
    """Return a decoded JSON object; raises SchemaMismatch for anything else."""
    if not isinstance(values, dict):
        raise SchemaMismatch(path, f"is {shown(values)}, must be an object")
    return values


def shown(value: object) -> str:
    """Return a value as it may stand in a message: short, in one line, printable."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return "a number of too many digits"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _read(annotation: object, value: object, path: str, limit: Number | Text | None, limits: Limits | None) -> object:
    if isinstance(annotation, types.UnionType):
        if value is None:
            return None
        (annotation,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    assert isinstance(annotation, type), f"{path} is of a type that no schema has: {annotation}"
    if dataclasses.is_dataclass(annotation):
        return read_fields(annotation, value, path, limits)
    if issubclass(annotation, enum.Enum):
        legal = [member.value for member in annotation]
        if not isinstance(value, str) or value not in legal:
            raise SchemaMismatch(path, f"is {shown(value)}, must be one of {', '.join(legal)}")
        return annotation(value)
    if annotation is bool:
        if not isinstance(value, bool):
            raise SchemaMismatch(path, f"is {shown(value)}, must be true or false")
        return value
    if annotation is str:
        return read_text(value, path, limit if isinstance(limit, Text) else _ANY_TEXT)
    assert annotation in (int, float), f"{path} is of a type that no schema has: {annotation}"
    return _read_number(annotation, value, path, limit if isinstance(limit, Number) else _ANY_NUMBER)


def read_text(value: object, path: str, limit: Text) -> str:
    """Return the text; raises SchemaMismatch if it is none, or not of the form."""
    if not isinstance(value, str):
        raise SchemaMismatch(path, f"is {shown(value)}, must be a text")
    if len(value) > limit.longest:
        raise SchemaMismatch(path, f"has {len(value)} characters, must have at most {limit.longest}")
    if not value.isprintable() or re.fullmatch(limit.pattern, value) is None:
        raise SchemaMismatch(path, f"is {shown(value)}, must be {limit.form or 'printable, in one line'}")
    return value


def _read_number(annotation: type[int] | type[float], value: object, path: str, limit: Number) -> int | float:
    kind = "a whole number" if annotation is int else "a number"
    is_number = isinstance(value, int) or (annotation is float and isinstance(value, float))
    if isinstance(value, bool) or not is_number:
        raise SchemaMismatch(path, f"is {shown(value)}, must be {kind}")
    assert isinstance(value, int | float)
    if not (math.isfinite(value) if isinstance(value, float) else True) or not limit.low <= value <= limit.high:
        raise SchemaMismatch(path, f"is {shown(value)}, must be {kind} from {limit.low:g} to {limit.high:g}")
    return annotation(value)


@functools.cache
def _fields_of(cls: Hashable) -> Mapping[str, tuple[Any, bool]]:
    """Return each field's annotation, and whether it is required."""
    assert isinstance(cls, type) and dataclasses.is_dataclass(cls), f"{cls} is no dataclass"
    annotations = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        field.name: (annotations[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(cls)
    }


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
