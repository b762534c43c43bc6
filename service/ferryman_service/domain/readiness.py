"""What can be done with the place where everything is kept."""

from __future__ import annotations

import enum


class StoreState(enum.IntEnum):
    """What can be done with the store; what is greater can do what is less."""

    LOST = 0
    READ_ONLY = 1
    USABLE = 2
