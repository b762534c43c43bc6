"""Ports for servers that must be told theirs beforehand."""

import contextlib
import socket


@contextlib.contextmanager
def reserved_port():
    """A free port of 127.0.0.1. For the length of the block the system gives it to nobody who asks for any port; a
    server that asks for this one by its number, and sets SO_REUSEADDR as servers do, gets it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
