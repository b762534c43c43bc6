"""Reading protocol buffers without trusting them (protobuf.dev, "Encoding").

A message is read against the fields that it may have. A field that is unknown, comes more often than it may, or claims
to be longer than the message that holds it, is refused. Libraries skip unknown fields and merge repeated ones: one
library could read another message than the one that a second library has checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5
_FIXED_BYTES: Final = {FIXED64: 8, FIXED32: 4}
_MOST_VARINT_BYTES: Final = 10
_SIGN_BIT: Final = 1 << 63


class MalformedMessage(ValueError):
    """The bytes are no message, or not one of the allowed form."""


@dataclass(frozen=True)
class Field:
    """A field that a message may have at most `most` times. Repeated numbers may be packed, so `packs` VARINT fields
    may come as BYTES too."""

    name: str
    wire_type: int
    most: int = 1
    packs: bool = False


@dataclass(frozen=True)
class Message:
    """The form of a message: its fields by number. `refused` names those that have a reason to be refused by name."""

    name: str
    fields: Mapping[int, Field]
    refused: Mapping[int, str]


Values = Mapping[str, list[int | memoryview]]
"""What a message holds, by field: numbers, unsigned, or bytes."""


def read_message(data: memoryview, form: Message) -> Values:
    """Return what the message holds. Raises MalformedMessage."""
    found: dict[str, list[int | memoryview]] = {field.name: [] for field in form.fields.values()}
    for number, wire_type, value in _fields(data):
        field = form.fields.get(number)
        if field is None:
            raise MalformedMessage(f"{form.name} has {form.refused.get(number, f'field {number}')}, which is refused")
        values = found[field.name]
        if field.packs and wire_type == BYTES:
            assert isinstance(value, memoryview)
            values += _unpacked(value, field.most + 1)
        elif wire_type == field.wire_type:
            values.append(value)
        else:
            raise MalformedMessage(f"{form.name} has {field.name} in wire type {wire_type}")
        if len(values) > field.most:
            raise MalformedMessage(f"{form.name} has over {field.most} of {field.name}")
    return found


def signed(value: int) -> int:
    """Return the number that 64 bits stand for in two's complement."""
    return value - 2 * _SIGN_BIT if value >= _SIGN_BIT else value


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield number, wire type and value of each field."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire_type = tag >> 3, tag & 7
        value: int | memoryview
        if wire_type == VARINT:
            value, place = _varint(data, place)
        elif wire_type == BYTES or wire_type in _FIXED_BYTES:
            length = _FIXED_BYTES.get(wire_type, -1)
            if length < 0:
                length, place = _varint(data, place)
            if length > len(data) - place:
                raise MalformedMessage(f"field {number} claims {length} bytes where {len(data) - place} are left")
            value, place = data[place : place + length], place + length
        else:
            raise MalformedMessage(f"field {number} has wire type {wire_type}")
        yield number, wire_type, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return the number at `place` and the place behind it."""
    value = 0
    for index in range(min(_MOST_VARINT_BYTES, len(data) - place)):
        byte = data[place + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            if value >= 2 * _SIGN_BIT:
                break
            return value, place + index + 1
    raise MalformedMessage("a number does not end, or has over 64 bits")


def _unpacked(data: memoryview, most: int) -> list[int | memoryview]:
    """Return the packed numbers, at most so many."""
    values: list[int | memoryview] = []
    place = 0
    while place < len(data) and len(values) < most:
        value, place = _varint(data, place)
        values.append(value)
    return values
