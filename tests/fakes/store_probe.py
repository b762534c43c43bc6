"""A StoreProbe that says what it is told to."""

from __future__ import annotations

import threading

from ferryman_service.domain.readiness import StoreState


class FakeStoreProbe:
    """`state` is what it finds. While `answers` is not set, it hangs, as a disk that is gone does."""

    def __init__(self, state: StoreState = StoreState.USABLE) -> None:
        self.state = state
        self.looks = 0
        self.answers = threading.Event()
        self.answers.set()

    def look(self) -> StoreState:
        self.looks += 1
        self.answers.wait(20)
        return self.state
