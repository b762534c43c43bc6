"""Observers that remember what they were told."""

from __future__ import annotations


class FakeLoadObserver:
    """Implements ports.LoadObserver."""

    def __init__(self):
        self.loads_s = []
        self.failures = 0

    def loaded(self, seconds):
        self.loads_s.append(seconds)

    def failed(self):
        self.failures += 1


class FakeLaunchObserver:
    """Implements ports.LaunchObserver; `outcomes` are in order."""

    def __init__(self):
        self.outcomes = []

    def started(self):
        self.outcomes.append("started")

    def failed_to_start(self):
        self.outcomes.append("failed_to_start")

    def failed_to_supervise(self):
        self.outcomes.append("failed_to_supervise")
