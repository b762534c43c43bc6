"""A DNS server on loopback that knows one name: what a headless service is to its callers."""

from __future__ import annotations

import ipaddress
import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

_TYPE_A = 1


class FakeDnsServer:
    """Answers every question for A records with `addresses`, which may be changed, and all others with none."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.questions = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._thread = threading.Thread(target=self._serve)

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._socket.bind(("127.0.0.1", 0))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as goodbye:
            goodbye.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, sender = self._socket.recvfrom(512)
            if not query:
                return
            self.questions += 1
            self._socket.sendto(self._answer(query), sender)

    def _answer(self, query: bytes) -> bytes:
        """RFC 1035, section 4.1: the header, the question again, and an answer for each address."""
        end = query.index(b"\0", 12) + 5
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        addresses = self.addresses if kind == _TYPE_A else []
        header = query[:2] + struct.pack("!HHHHH", 0x8580, 1, len(addresses), 0, 0)
        answers = [
            struct.pack("!HHHIH", 0xC00C, _TYPE_A, 1, 0, 4) + ipaddress.IPv4Address(address).packed
            for address in addresses
        ]
        return header + query[12:end] + b"".join(answers)
