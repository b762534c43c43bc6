"""Random requests for every RPC of the contract, made from its descriptors: what a careless or hostile caller may send.

A request is a list of serialized messages, one unless the caller streams. Values come from pools of interesting ones:
names that exist, extreme numbers, enum numbers without a name, texts of combining marks, of nothing visible, of one
long word. With a size, one field of the request is filled until the request has about that many bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from ferryman.v1 import corpus_pb2, model_pb2, training_pb2, translation_pb2

_FILES: Final[tuple[FileDescriptor, ...]] = (
    corpus_pb2.DESCRIPTOR,
    model_pb2.DESCRIPTOR,
    training_pb2.DESCRIPTOR,
    translation_pb2.DESCRIPTOR,
)
_INTEGERS: Final = (0, 1, 2, 3, 5, 8, 32, 64, 100, 512, 1000, 4096, 100_000, 2**31 - 1, -1, -(2**31))
_LONG_INTEGERS: Final = (*_INTEGERS, 2**63 - 1, -(2**63), 10**12)
_FLOATS: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 10.0, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
_ENUM_NUMBERS: Final = (0, 1, 2, 3, 4, 99, 2**31 - 1, -1)
_PIECES: Final = (
    "a",
    "a ",
    "dog ",
    "é",
    "e\u0301",
    "\u0301",  # a combining mark
    "\u2581",  # the mark of a subword's beginning
    "\u200b",  # nothing visible
    "\n",
    "\x00",
    "\N{DOG FACE}",
    "a. B",
    "</s>",
    "\u202e",  # right-to-left override
)
_REPEATS: Final = (1, 1, 1, 2, 3, 20)
_UNKNOWN_FIELD: Final = b"\xc0\x3e\x01"
"""Field 1,000, a number."""
_DEPTH: Final = 8


@dataclass(frozen=True)
class Rpc:
    """A method of the contract; `path` is what gRPC calls it by."""

    name: str
    path: str
    request: Descriptor
    streams_requests: bool
    streams_responses: bool


def all_rpcs() -> list[Rpc]:
    """Return every RPC of the contract."""
    return [
        Rpc(
            name=method.name,
            path=f"/{service.full_name}/{method.name}",
            request=method.input_type,
            streams_requests=method.client_streaming,
            streams_responses=method.server_streaming,
        )
        for file in _FILES
        for service in file.services_by_name.values()
        for method in service.methods
    ]


class RequestMaker:
    """Makes requests from a seeded generator.

    `known` holds values that mean something to the service, by the name of the field: ids, model names, aliases.
    """

    def __init__(self, generator: Random, known: Mapping[str, Sequence[str]]) -> None:
        self._random = generator
        self._known = known

    def request(self, rpc: Rpc, size_bytes: int = 0) -> list[bytes]:
        """Return a request, of about `size_bytes` in one of its fields if that is not 0."""
        if not rpc.streams_requests:
            return [self._message(rpc.request, size_bytes).SerializePartialToString()]
        # A stream begins with the choice that the contract lists first, or is refused at once.
        first = self._message(rpc.request, 0)
        oneof = rpc.request.oneofs[0].fields
        self._set(first, oneof[0], 0, 0)
        later = [self._message(rpc.request, 0) for _ in range(self._random.choice(_REPEATS) if not size_bytes else 1)]
        for message in later:
            self._set(message, self._random.choice(oneof[1:]), size_bytes, 0)
        return [message.SerializePartialToString() for message in (first, *later)]

    def changed(self, rpc: Rpc, messages: Sequence[bytes], size_bytes: int) -> list[bytes]:
        """Return the request with one more field of its last message set anew, or that message's lists doubled."""
        message = GetMessageClass(rpc.request)()
        message.MergeFromString(messages[-1])
        if self._random.random() < 0.3 and 2 * len(messages[-1]) <= size_bytes:
            message.MergeFromString(messages[-1])
        else:
            where = message
            while inner := [field for field, _ in where.ListFields() if field.message_type and not field.is_repeated]:
                if self._random.random() < 0.4:
                    break
                where = getattr(where, self._random.choice(inner).name)
            if where.DESCRIPTOR.fields:
                field: Any = self._random.choice(where.DESCRIPTOR.fields)
                self._set(where, field, size_bytes if self._random.random() < 0.5 else 0, 0)
        return [*messages[:-1], message.SerializePartialToString()]

    def damaged(self, message: bytes) -> bytes:
        """Return the message with some bytes changed, cut off, or added."""
        if not message:
            return self._random.randbytes(8)
        changed = bytearray(message[: self._random.randint(1, len(message))])
        for _ in range(self._random.randint(0, 3)):
            changed[self._random.randrange(len(changed))] = self._random.randrange(256)
        return bytes(changed) + self._random.choice((b"", _UNKNOWN_FIELD, b"\xff"))

    def _message(self, descriptor: Descriptor, size_bytes: int, depth: int = 0) -> Message:
        message = GetMessageClass(descriptor)()
        large = [field for field in descriptor.fields if _can_be_large(field)]
        filled = self._random.choice(large) if large and size_bytes else None
        for field in descriptor.fields:
            if field is not filled and self._random.random() < 0.5 and depth < _DEPTH:
                self._set(message, field, 0, depth)
        if filled is not None:
            self._set(message, filled, size_bytes, depth)
        elif size_bytes or self._random.random() < 0.02:
            message.MergeFromString(_UNKNOWN_FIELD * max(1, size_bytes // len(_UNKNOWN_FIELD)))
        return message

    def _set(self, message: Message, field: FieldDescriptor, size_bytes: int, depth: int) -> None:
        if not field.is_repeated:
            if field.message_type is not None:
                getattr(message, field.name).CopyFrom(self._message(field.message_type, size_bytes, depth + 1))
            else:
                setattr(message, field.name, self._value(field, size_bytes))
            return
        if size_bytes and self._random.random() < 0.3:  # one large element
            self._add(message, field, size_bytes, depth)
            return
        some = type(message)()
        for _ in range(self._random.choice(_REPEATS)):
            self._add(some, field, 0, depth)
        encoded = some.SerializePartialToString()
        message.MergeFromString(encoded * max(1, size_bytes // max(1, len(encoded))))

    def _add(self, message: Message, field: FieldDescriptor, size_bytes: int, depth: int) -> None:
        elements = getattr(message, field.name)
        if field.message_type is not None:
            elements.append(self._message(field.message_type, size_bytes, depth + 1))
        else:
            elements.append(self._value(field, size_bytes))

    def _value(self, field: FieldDescriptor, size_bytes: int) -> object:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_STRING:
            text = self._text(field.name, size_bytes)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
        if kind == FieldDescriptor.CPPTYPE_ENUM:
            return self._random.choice(_ENUM_NUMBERS)
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self._random.random() < 0.5
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return self._random.choice(_FLOATS)
        if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
            return abs(self._random.choice(_INTEGERS))
        return self._random.choice(_INTEGERS if kind == FieldDescriptor.CPPTYPE_INT32 else _LONG_INTEGERS)

    def _text(self, name: str, size_bytes: int) -> str:
        if not size_bytes and name in self._known and self._random.random() < 0.8:
            return self._random.choice(self._known[name])
        piece = self._random.choice(_PIECES)
        return piece * max(1, (size_bytes or self._random.choice((1, 5, 40))) // len(piece.encode()))


def _can_be_large(field: FieldDescriptor, depth: int = 0) -> bool:
    if field.is_repeated or field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return True
    return (
        field.message_type is not None
        and depth < _DEPTH
        and any(_can_be_large(inner, depth + 1) for inner in field.message_type.fields)
    )
