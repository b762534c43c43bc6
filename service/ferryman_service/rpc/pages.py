"""Pages of lists, built item by item until their size is reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from ferryman_service.application.paging import PAGE_BYTES

Item = TypeVar("Item")

_FRAME_BYTES: Final = 8
"""What an item's tag and length may take."""


class WirePage(Generic[Item]):
    """Converts the items of a page into a repeated field, in the order in which it is shown them."""

    def __init__(self, field: Any, to_wire: Callable[[Item], Any]) -> None:  # noqa: ANN401 - protobuf has no common type
        """Store the field, and how an item becomes a message."""
        self._field = field
        self._to_wire = to_wire
        self._size_bytes = 0

    def takes(self, item: Item) -> bool:
        """Add the item, unless the page would become larger than PAGE_BYTES with it; the first is always added."""
        wire = self._to_wire(item)
        size_bytes = self._size_bytes + wire.ByteSize() + _FRAME_BYTES
        if self._size_bytes and size_bytes > PAGE_BYTES:
            return False
        self._field.append(wire)
        self._size_bytes = size_bytes
        return True
