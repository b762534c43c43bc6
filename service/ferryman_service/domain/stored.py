"""What comes out of a store and may not be what went in: rows that cannot be read, and the check that finds them."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeGuard, TypeVar

_INT64: Final = range(-(2**63), 2**63)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class UnreadableRow:
    """A row of a table that cannot be read. `name` names it to people and calls (a run's id, "en-de/7"), `place` is
    where it stands in lists, `why` says which part is wrong."""

    table: str
    name: str
    why: str
    place: str = ""


def readable(rows: Iterable[T | UnreadableRow]) -> list[T]:
    """Return the rows that could be read."""
    return [row for row in rows if _is_readable(row)]


def check_fields(value: object) -> None:
    """Raise TypeError or ValueError if a field of this dataclass, or of one inside it, is not of the type that it
    declares: constructors take whatever a stored text holds."""
    kind: Any = type(value)
    for name, allowed in _allowed_types(kind):
        field = getattr(value, name)
        if type(field) not in allowed:
            raise TypeError(f"{name} is {_shown(field)}, which is of the wrong type")
        _check_value(name, field)


def _check_value(name: str, value: object) -> None:
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, int):
        if value not in _INT64:
            raise ValueError(f"{name} is {_shown(value)}, which is out of range")
    elif isinstance(value, tuple | list):
        for item in value:
            _check_value(name, item)
    elif dataclasses.is_dataclass(value):
        check_fields(value)


def _check_text(name: str, text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not UTF-8") from error


def _is_readable(row: T | UnreadableRow) -> TypeGuard[T]:
    return not isinstance(row, UnreadableRow)


@functools.cache
def _allowed_types(cls: Hashable) -> tuple[tuple[str, frozenset[type]], ...]:
    assert isinstance(cls, type) and dataclasses.is_dataclass(cls), f"{cls} is no dataclass"
    hints = typing.get_type_hints(cls)
    return tuple((field.name, frozenset(_types_of(hints[field.name]))) for field in dataclasses.fields(cls))


def _types_of(hint: Any) -> list[type]:  # noqa: ANN401 (an annotation has no common type)
    if isinstance(hint, types.UnionType):
        return [kind for choice in typing.get_args(hint) for kind in _types_of(choice)]
    origin = typing.get_origin(hint)
    if origin is not None:
        return [tuple, list]  # every generic annotation of a stored dataclass is a sequence
    return [float, int] if hint is float else [hint]


def _shown(value: object) -> str:
    return repr(value)[:80]
