"""The caller of `dearest`: makes one call at a time in a thread and reports its end. It answers commands, see
`shared.process`."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc

from bench.shared.process import answer_commands

_LARGEST_MESSAGE_BYTES = 1 << 30


class CallerCommands:
    """The commands that the caller's process answers."""

    def __init__(self) -> None:
        self._channel: grpc.Channel | None = None
        self._call: Any = None
        self._thread: threading.Thread | None = None
        self._answer_bytes = 0

    def begin(self, address: str, path: str, arity: str, messages: Sequence[str]) -> None:
        """Begin a call of serialized messages, in base64; `arity` is that of gRPC, such as "unary_stream"."""
        options = (("grpc.max_receive_message_length", _LARGEST_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(address, options)
        wire = [base64.b64decode(message) for message in messages]
        method = getattr(self._channel, arity)(path)
        request = iter(wire) if arity.startswith("stream") else wire[0]
        self._answer_bytes = 0
        self._call = method(request) if arity.endswith("stream") else method.future(request)
        self._thread = threading.Thread(target=self._read, args=(arity.endswith("stream"),), daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        """Whether the call has ended."""
        assert self._thread is not None
        return not self._thread.is_alive()

    def end(self) -> dict[str, object]:
        """Cancel the call if it has not ended; return its status code's name and the bytes of its answer."""
        assert self._call is not None and self._thread is not None and self._channel is not None
        self._call.cancel()
        self._thread.join(10)
        code = self._call.code()
        self._channel.close()
        return {"code": code.name, "answer_bytes": self._answer_bytes}

    def _read(self, streams: bool) -> None:
        with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
            if streams:
                for answer in self._call:
                    self._answer_bytes += len(answer)
            else:
                self._answer_bytes = len(self._call.result())


def main() -> None:
    """Answer until no command follows."""
    commands = CallerCommands()
    answer_commands({"begin": commands.begin, "is_over": commands.is_over, "end": commands.end}, at=time.time())


if __name__ == "__main__":
    main()
