"""What can be done with the place where everything is kept."""

from __future__ import annotations

import enum


class StoreState(enum.IntEnum):
    """What can be done with the store; what is greater can do what is less. A damaged one is read, as far as that goes,
    and not written."""

    LOST = 0
    DAMAGED = 1
    READ_ONLY = 2
    USABLE = 3
