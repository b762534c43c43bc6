"""A client of HTTP/2 (RFC 9113) that sends what no library lets it: halves of messages, as far as flow control goes."""

from __future__ import annotations

import socket
import struct

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4
_FRAME_BYTES = 16_384


class RawHttp2:
    """A connection to a gRPC server; `ended` holds the streams that the server has ended."""

    def __init__(self, port):
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0))
        self._received = b""
        self._next = 1
        self._initial_window = self._window = 65_535
        self._windows = {}
        self.ended = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def call(self, path):
        """Begin a call, without a message; return its stream."""
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
        fields |= {"content-type": "application/grpc", "te": "trailers"}
        literals = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
        stream, self._next = self._next, self._next + 2
        self._windows[stream] = self._initial_window
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, literals))
        return stream

    def send(self, stream, data, patience_s=30.0):
        """Send as much as flow control allows, waiting so long for more room; return how many bytes were sent."""
        sent = 0
        while sent < len(data) and stream not in self.ended:
            size = min(_FRAME_BYTES, self._window, self._windows[stream], len(data) - sent)
            if size <= 0:
                if not self.read(patience_s):
                    break
                continue
            self._socket.sendall(_frame(_DATA, 0, stream, data[sent : sent + size]))
            sent += size
            self._window -= size
            self._windows[stream] -= size
        return sent

    def send_half(self, path, size_bytes):
        """Begin a call and send all but the last byte of a message; return its stream."""
        stream = self.call(path)
        message = b"\0" + struct.pack(">I", size_bytes) + bytes(size_bytes - 1)
        assert self.send(stream, message) in (0, len(message)) or stream in self.ended
        return stream

    def wait_for_end(self, stream):
        """Wait until the server has ended the stream."""
        while stream not in self.ended:
            assert self.read(30), "the server has not ended the stream"

    def read(self, patience_s):
        """Take what the server sends next; return False if nothing comes in time."""
        self._socket.settimeout(patience_s)
        try:
            received = self._socket.recv(1 << 16)
        except TimeoutError:
            return False
        assert received, "the server has closed the connection"
        self._received += received
        self._socket.settimeout(30)
        while len(self._received) >= 9:
            size = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + size:
                break
            kind, flags = self._received[3], self._received[4]
            stream = int.from_bytes(self._received[5:9], "big")
            payload, self._received = self._received[9 : 9 + size], self._received[9 + size :]
            self._take(kind, flags, stream, payload)
        return True

    def _take(self, kind, flags, stream, payload):
        if kind == _WINDOW_UPDATE and stream:
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind == _WINDOW_UPDATE:
            self._window += int.from_bytes(payload, "big")
        elif kind == _SETTINGS and not flags & _ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == _INITIAL_WINDOW_SIZE:
                    change, self._initial_window = value - self._initial_window, value
                    self._windows = {each: window + change for each, window in self._windows.items()}
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self.ended.add(stream)


def _frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _text(text):
    """Return a string of HPACK, not compressed (RFC 7541, section 5.2)."""
    return bytes([len(text)]) + text.encode()
