"""Dataclasses to protobuf messages and back, by name.

A dataclass and its message have the same field names, except that a google.protobuf.Duration `x` is a float `x_s` here.
The annotation of a field selects its conversion: a dataclass, a StrEnum, a tuple, a datetime, or a plain value. None
stands for an unset field, and for zero in a plain proto3 scalar, which has no presence. Fields marked
types.NOT_ON_THE_WIRE are skipped.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ferryman.errors import Violation

_SHOWN_CHARACTERS: Final = 120
_MAX_DURATION_S: Final = 315_576_000_000
"""The range of google.protobuf.Duration: 10,000 years."""
_WHOLE_NUMBERS: Final = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}

# Protobuf's descriptors and well-known types are implemented in C and share no static type, so they are Any here.

T = TypeVar("T")
E = TypeVar("E", bound=enum.StrEnum)


@dataclasses.dataclass(frozen=True)
class _Field:
    """One field of a dataclass: its name, its name on the wire, and the parts of its annotation."""

    name: str
    wire_name: str
    kind: Any
    optional: bool
    repeated: bool


def from_message(cls: type[T], message: Message) -> T:
    """Return the message as an instance of the dataclass `cls`."""
    kind: Any = cls
    return cls(**{field.name: _read(field, message) for field in _fields(kind)})


def fill_message(value: object, message: Message, path: str = "") -> list[Violation]:
    """Set the fields of the message that are not None in the dataclass.

    Returns a violation for each value that the wire cannot carry: an unknown enum member, a number of the wrong type or
    out of range. Its field is named by its path below `path` and stays unset.
    """
    kind: Any = type(value)
    violations: list[Violation] = []
    for field in _fields(kind):
        item = getattr(value, field.name)
        if item is None:
            continue
        field_path = f"{path}.{field.wire_name}" if path else field.wire_name
        if field.repeated:
            violations += _fill_repeated(field, item, message, field_path)
        elif isinstance(field.kind, type) and dataclasses.is_dataclass(field.kind):
            violations += fill_part(field.kind, item, getattr(message, field.wire_name), field_path)
        else:
            violations += _fill_value(field, item, message, field_path)
    return violations


def fill_part(cls: type[object], value: object, message: Message, path: str) -> list[Violation]:
    """Mark the message as set and fill it, as `fill_message` does; `value` must be an instance of `cls`."""
    if not isinstance(value, cls):
        article = "an" if cls.__name__[0] in "AEIOU" else "a"
        return [wrong(path, value, f"{article} {cls.__name__}{_constructed(cls.__name__, value)}")]
    message.SetInParent()
    return fill_message(value, message, path)


def fill_fields(message: Message, fields: Mapping[str, object]) -> list[Violation]:
    """Set plain values and lists of texts by field name. Returns a violation for each value that does not fit,
    such as None."""
    violations: list[Violation] = []
    for name, value in fields.items():
        descriptor: Any = message.DESCRIPTOR.fields_by_name[name]
        if descriptor.is_repeated:
            violations += _fill_texts(getattr(message, name), value, name)
        else:
            violations += _set(message, descriptor, value, name)
    return violations


def is_iterable(value: Any) -> bool:  # noqa: ANN401 (it is what is checked)
    """Whether `iter` accepts the value; no item is consumed."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def wrong(path: str, value: object, wanted: str) -> Violation:
    """Return the violation "is VALUE, must be WANTED"."""
    return Violation(field=path, description=f"is {shown(value)}, must be {wanted}", reason="INVALID_VALUE")


def shown(value: object) -> str:
    """Return the beginning of the value's repr, on one line, for an error message."""
    # Slice first: repr of a text of megabytes is slow.
    text = repr(value[:_SHOWN_CHARACTERS] if isinstance(value, str | bytes) else value)
    is_whole = len(text) <= _SHOWN_CHARACTERS and not (
        isinstance(value, str | bytes) and len(value) > _SHOWN_CHARACTERS
    )
    return text if is_whole else text[:_SHOWN_CHARACTERS] + "…"


def enum_number(descriptor: Any, word: str) -> int | None:  # noqa: ANN401
    """Return the number of the member that `word` names ("tiny": PRESET_TINY); None if there is no such member."""
    member = descriptor.values_by_name.get(f"{_prefix(descriptor)}{word.upper()}")
    return member.number if member is not None and member.number else None


def enum_member(cls: type[E], descriptor: Any, number: int) -> E | None:  # noqa: ANN401
    """Return the member for the number; UNKNOWN, or None if `cls` has no UNKNOWN, for 0 and unknown numbers."""
    member = descriptor.values_by_number.get(number)
    word = member.name.removeprefix(_prefix(descriptor)).lower() if member is not None and number else "unknown"
    return next((candidate for candidate in cls if candidate.value == word), None)


def _prefix(descriptor: Any) -> str:  # noqa: ANN401
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", descriptor.name).upper() + "_"


@functools.cache
def _fields(cls: Hashable) -> tuple[_Field, ...]:
    assert isinstance(cls, type) and dataclasses.is_dataclass(cls), f"{cls} is not a dataclass"
    hints = typing.get_type_hints(cls)
    on_the_wire = [field.name for field in dataclasses.fields(cls) if field.metadata.get("wire", True)]
    return tuple(_field(name, hints[name]) for name in on_the_wire)


def _field(name: str, hint: Any) -> _Field:  # noqa: ANN401 (an annotation has no common type)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    optional = type(None) in choices
    kinds = [choice for choice in choices if choice is not type(None)]
    repeated = typing.get_origin(kinds[0]) is tuple
    # "Preset | str": the enumeration comes first and says more.
    kind = typing.get_args(kinds[0])[0] if repeated else kinds[0]
    return _Field(name, name.removesuffix("_s"), kind, optional, repeated)


def _read(field: _Field, message: Message) -> object:
    descriptor: Any = message.DESCRIPTOR.fields_by_name[field.wire_name]
    value = getattr(message, field.wire_name)
    if field.repeated:
        return tuple(from_message(field.kind, item) if isinstance(item, Message) else item for item in value)
    if descriptor.has_presence and not message.HasField(field.wire_name) and field.optional:
        return None
    if isinstance(value, Message):
        reader = _READERS.get(descriptor.message_type.full_name)
        return from_message(field.kind, value) if reader is None else reader(value)
    if descriptor.enum_type is not None:
        return enum_member(field.kind, descriptor.enum_type, value)
    return None if field.optional and not descriptor.has_presence and not value else value


def _fill_repeated(field: _Field, items: Any, message: Message, path: str) -> list[Violation]:  # noqa: ANN401
    container = getattr(message, field.wire_name)
    if not dataclasses.is_dataclass(field.kind):
        container.extend(items)
        return []
    return [v for i, item in enumerate(items) for v in fill_message(item, container.add(), f"{path}[{i}]")]


def _fill_value(field: _Field, item: Any, message: Message, path: str) -> list[Violation]:  # noqa: ANN401
    descriptor: Any = message.DESCRIPTOR.fields_by_name[field.wire_name]
    if descriptor.message_type is not None:
        try:
            _WRITERS[descriptor.message_type.full_name](getattr(message, field.wire_name), item)
        except (TypeError, ValueError, OverflowError):
            message.ClearField(field.wire_name)
            return [wrong(path, item, _WRITTEN[descriptor.message_type.full_name])]
        return []
    if descriptor.enum_type is not None:
        number = enum_number(descriptor.enum_type, str(item))
        if number is None:
            legal = ", ".join(member.value for member in field.kind)
            description = f"is {shown(str(item))}, must be one of {legal}"
            return [Violation(field=path, description=description, reason="OUT_OF_RANGE")]
        item = number
    return _set(message, descriptor, item, path)


def _set(message: Message, descriptor: Any, value: object, path: str) -> list[Violation]:  # noqa: ANN401
    try:
        setattr(message, descriptor.name, value)
    except (TypeError, ValueError, OverflowError):
        return [wrong(path, value, _wanted(descriptor))]
    return []


def _fill_texts(container: Any, items: Any, path: str) -> list[Violation]:  # noqa: ANN401
    if isinstance(items, str | bytes | Mapping) or not is_iterable(items):
        return [wrong(path, items, "a list of texts")]
    violations: list[Violation] = []
    for index, item in enumerate(items):
        try:
            container.append(item)
        except (TypeError, ValueError):
            violations.append(wrong(f"{path}[{index}]", item, "UTF-8 text"))
    return violations


def _constructed(name: str, value: object) -> str:
    """Return the hint that shows a dictionary as a call of the class; empty for other values."""
    if not isinstance(value, Mapping):
        return ""
    return shown_words(f"; write {name}({', '.join(f'{key}=...' for key in value)})")


def shown_words(text: str) -> str:
    """Return the text, cut to the length of a quotation in an error message."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def _wanted(descriptor: Any) -> str:  # noqa: ANN401
    if descriptor.cpp_type in _WHOLE_NUMBERS:
        least, most = _WHOLE_NUMBERS[descriptor.cpp_type]
        return f"a whole number from {least:,} to {most:,}"
    return {
        FieldDescriptor.CPPTYPE_DOUBLE: "a number",
        FieldDescriptor.CPPTYPE_FLOAT: "a number",
        FieldDescriptor.CPPTYPE_BOOL: "true or false",
    }.get(descriptor.cpp_type, "UTF-8 text")


def _read_time(message: Any) -> datetime:  # noqa: ANN401
    return typing.cast("datetime", message.ToDatetime(tzinfo=UTC))


def _read_seconds(message: Any) -> float:  # noqa: ANN401
    # One division, so that what was written as 1.372 is read as 1.372.
    return float(message.ToNanoseconds() / 1e9)


def _write_time(message: Any, value: datetime) -> None:  # noqa: ANN401
    message.FromDatetime(value)


def _write_seconds(message: Any, value: float) -> None:  # noqa: ANN401
    nanoseconds = round(value * 1e9)
    if value and not nanoseconds:
        raise ValueError(f"{value!r} s is less than a nanosecond, which a Duration cannot hold")
    if abs(nanoseconds) > _MAX_DURATION_S * 10**9:
        raise ValueError(f"{value!r} s is more than a Duration holds")
    message.FromNanoseconds(nanoseconds)


_READERS: Mapping[str, Callable[[Any], object]] = {
    "google.protobuf.Timestamp": _read_time,
    "google.protobuf.Duration": _read_seconds,
}
_WRITERS: Mapping[str, Callable[[Any, Any], None]] = {
    "google.protobuf.Timestamp": _write_time,
    "google.protobuf.Duration": _write_seconds,
}
_WRITTEN: Mapping[str, str] = {
    "google.protobuf.Timestamp": "a datetime",
    "google.protobuf.Duration": f"a number of seconds, 0 or from 1e-9 to {_MAX_DURATION_S:,}",
}
