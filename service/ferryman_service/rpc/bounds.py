"""How many elements a request may hold. Every repeated field of every request has its line in `element_bounds`.

Lengths are checked on the parsed message, before anything loops over it. The parser itself takes 0.1 µs and some 60
bytes for an element of two bytes, during which no other thread runs. So the records of a large message are counted
first, in Python, which lets other threads in between, and a message with far too many is refused unparsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from ferryman_service.domain.errors import InvalidRequest, Violation

MAX_STREAM_SENTENCES: Final = 1024
"""Sentences in one message of StreamTranslate."""
_COUNTED_BYTES: Final = 576 * 2**10
"""Larger messages are counted before they are parsed. The largest batch of pairs that the Python client sends is
smaller: half a mebibyte and one pair."""
_SPARE_RECORDS: Final = 65_536
"""Records beyond those that a valid message can have: so that most refusals can say how many elements there are, and so
that a client with a newer contract can send fields that are unknown here."""
_CONTINUATION_BYTES: Final = bytes(range(0x80, 0x100))
_PACKED_PER_RECORD: Final = 4
"""Elements of a packed field cost the parser a quarter of what a record costs, or less."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The most elements of a repeated field, and what to do about more."""

    most: int
    cure: str


def element_bounds(max_sentences: int = 1024) -> Mapping[str, Bound]:
    """Return the bound of every repeated field that a request of the contract can hold, by the field's full name.

    `max_sentences` is the configuration's.
    """
    return {
        "ferryman.v1.TranslateRequest.sentences": Bound(
            most=max_sentences, cure="send more in several calls, or stream them"
        ),
        "ferryman.v1.TranslateRequest.target_prefixes": Bound(most=max_sentences, cure="give one for each sentence"),
        "ferryman.v1.StreamSentences.sentences": Bound(most=MAX_STREAM_SENTENCES, cure="send more messages"),
        # The Python client fills its messages by size: 43,690 empty pairs make half a mebibyte.
        "ferryman.v1.PairBatch.pairs": Bound(most=65_536, cure="send more messages"),
        "ferryman.v1.ListTrainingRunsRequest.states": Bound(most=16, cure="name each state once"),
    }


def repeated_fields(descriptor: Descriptor) -> Iterator[FieldDescriptor]:
    """Yield every repeated field that a message of this type can hold, at any depth."""
    seen: set[str] = set()

    def visit(message: Descriptor) -> Iterator[FieldDescriptor]:
        if message.full_name in seen:
            return
        seen.add(message.full_name)
        for field in message.fields:
            if field.is_repeated:
                yield field
            if field.message_type is not None:
                yield from visit(field.message_type)

    yield from visit(descriptor)


class RequestBounds:
    """Checks requests; safe to use from several threads at once."""

    def __init__(self, bounds: Mapping[str, Bound]) -> None:
        self._bounds = bounds
        self._plans: dict[str, _Plan] = {}

    def read(self, kind: type[Message], data: bytes) -> Message:
        """Return the message that the bytes are. Raises InvalidRequest with every field that has too many elements, and
        DecodeError."""
        plan = self._plan(cast("Descriptor", kind.DESCRIPTOR))
        if len(data) > _COUNTED_BYTES:
            plan.count(data)
        message = kind.FromString(data)
        if violations := list(plan.violations(message)):
            raise InvalidRequest(violations)
        return message

    def _plan(self, descriptor: Descriptor) -> _Plan:
        plan = self._plans.get(descriptor.full_name)
        if plan is None:
            plan = self._plans[descriptor.full_name] = _Plan(descriptor, self._bounds)
        return plan


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A field that holds messages, or is repeated; `bound` None: it is not, or belongs to another contract."""

    name: str
    path: str
    repeated: bool
    bound: Bound | None
    is_packable: bool
    child: _Plan | None


class _Plan:
    """What to look at in messages of one type."""

    def __init__(self, descriptor: Descriptor, bounds: Mapping[str, Bound], path: str = "", depth: int = 8) -> None:
        """Look at the fields of the type; `path` is that of the field which holds the message."""
        self.fields: dict[int, _Field] = {}
        self.most_records = len(descriptor.fields)
        for field in descriptor.fields:
            place = f"{path}.{field.name}" if path else field.name
            child = None
            if field.message_type is not None and depth > 0:
                child = _Plan(field.message_type, bounds, place, depth - 1)
            if not field.is_repeated and child is None:
                continue
            bound = bounds.get(field.full_name) if field.is_repeated else None
            inner = child.most_records if child is not None else 0
            self.most_records += inner if bound is None else bound.most * (1 + inner)
            self.fields[field.number] = _Field(
                name=field.name,
                path=place,
                repeated=field.is_repeated,
                bound=bound,
                is_packable=child is None and field.type not in (field.TYPE_STRING, field.TYPE_BYTES),
                child=child,
            )
        self._looks_at: list[_Field] = [
            each for each in self.fields.values() if each.bound or (each.child and each.child._looks_at)
        ]

    def violations(self, message: Any) -> Iterator[Violation]:  # noqa: ANN401 - protobuf has no common type
        """Yield every field that has too many elements."""
        for field in self._looks_at:
            if not field.repeated:
                if message.HasField(field.name) and field.child is not None:
                    yield from field.child.violations(getattr(message, field.name))
                continue
            elements = getattr(message, field.name)
            if field.bound is not None and len(elements) > field.bound.most:
                yield _too_many(field.path, f"{len(elements):,}", field.bound)
            elif field.child is not None and field.child._looks_at:
                for element in elements:
                    yield from field.child.violations(element)

    def count(self, data: bytes) -> None:
        """Raise InvalidRequest if there are so many records that they must not be parsed, DecodeError if they cannot
        be."""
        seen: Counter[int] = Counter()
        try:
            _walk(data, (0, len(data)), self, self.most_records + _SPARE_RECORDS, seen)
        except IndexError:
            raise DecodeError("the message ends within a field") from None
        except _TooManyRecordsError:
            raise InvalidRequest([self._most_seen(seen)]) from None

    def _most_seen(self, seen: Counter[int]) -> Violation:
        bounded = {id(field): field for field in self._bounded()}
        for key, count in seen.most_common():
            field = bounded.get(key)
            if field is not None and field.bound is not None and count > field.bound.most:
                return _too_many(field.path, f"more than {field.bound.most:,}", field.bound)
        text = (
            f"holds more than {self.most_records + _SPARE_RECORDS:,} fields, repeated or unknown: is its sender's "
            "contract the same as ours?"
        )
        return Violation(field="request", description=text, reason="TOO_MANY_FIELDS")

    def _bounded(self) -> Iterator[_Field]:
        for field in self.fields.values():
            if field.bound is not None:
                yield field
            if field.child is not None:
                yield from field.child._bounded()


class _TooManyRecordsError(Exception):
    """The count is over its limit."""


def _too_many(path: str, count: str, bound: Bound) -> Violation:
    text = f"has {count} elements, may have {bound.most:,} at most: {bound.cure}"
    return Violation(field=path, description=text, reason="OUT_OF_RANGE")


def _walk(data: bytes, span: tuple[int, int], plan: _Plan, left: int, seen: Counter[int]) -> int:
    """Count the records of a message in the wire format, and those of the messages in it; return how many are left of
    those that may be there. `seen` counts the elements of repeated fields.

    Raises _TooManyRecordsError, DecodeError, and IndexError where the bytes end within a record.
    """
    place, end = span
    fields = plan.fields
    while place < end:
        left -= 1
        if left < 0:
            raise _TooManyRecordsError
        tag = data[place]
        place += 1
        if tag >= 0x80:
            tag, place = _varint(data, place - 1)
        field = fields.get(tag >> 3)
        if field is not None and field.bound is not None:
            seen[id(field)] += 1
        kind = tag & 7
        if kind == 0:
            while data[place] >= 0x80:
                place += 1
            place += 1
        elif kind == 2:
            size = data[place]
            place += 1
            if size >= 0x80:
                size, place = _varint(data, place - 1)
            stop = place + size
            if stop > end:
                raise DecodeError("a field is longer than its message")
            if field is not None:
                if field.child is not None:
                    left = _walk(data, (place, stop), field.child, left, seen)
                elif field.is_packable:
                    elements = len(data[place:stop].translate(None, _CONTINUATION_BYTES))
                    seen[id(field)] += elements
                    left -= elements // _PACKED_PER_RECORD
            place = stop
        elif kind == 1:
            place += 8
        elif kind == 5:
            place += 4
        # What is left are the begin and the end of a group, an old form: its fields are counted as if they were not in
        # one. Two wire types do not exist; the parser will say so.
    return left


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the number that begins there, and where the next record does."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise DecodeError("a number has more than ten bytes")
