"""Leases for the time of a block."""

from __future__ import annotations

from concurrent.futures import Executor
from contextlib import contextmanager


class InlineExecutor(Executor):
    """Does the work at once, in the thread that submits it."""

    def submit(self, work, /, *arguments):
        work(*arguments)


@contextmanager
def leased(loaded, reference):
    """Yield the version that the reference names now, and its engine."""
    lease = loaded.acquire(reference, loaded._models.resolve(reference))
    try:
        yield lease.version, lease.engine
    finally:
        lease.release(InlineExecutor())
