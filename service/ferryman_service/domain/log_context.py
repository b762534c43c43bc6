"""What the lines of the log are about: the request, the run, the model at hand.

The fields belong to the task or thread that set them, and to what it starts by asyncio.to_thread or `in_context`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

FIELDS: Final = "ferryman_fields"
"""`extra={FIELDS: {...}}`: fields of one line alone; strings, numbers, and lists of strings."""
MAY_HOLD_TEXT: Final = "ferryman_may_hold_text"
"""`extra={MAY_HOLD_TEXT: True}`: the exception of this line may quote a sentence."""

_fields: Final[contextvars.ContextVar[Mapping[str, str]]] = contextvars.ContextVar("log_fields")
_NONE: Final[Mapping[str, str]] = {}


def log_fields() -> Mapping[str, str]:
    """Return the fields of the present task or thread."""
    return _fields.get(_NONE)


@contextmanager
def logging_with(**fields: str) -> Iterator[None]:
    """Add fields to every line that is logged inside the block."""
    token = _fields.set({**log_fields(), **fields})
    try:
        yield
    finally:
        _fields.reset(token)


def add_log_fields(**fields: str) -> None:
    """Add fields to every line that is logged from now on in this task, or until the end of the `logging_with` around
    it."""
    _fields.set({**log_fields(), **fields})


def in_context(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function so that it runs with the caller's fields, also in a thread of a pool."""
    return partial(contextvars.copy_context().run, function)
