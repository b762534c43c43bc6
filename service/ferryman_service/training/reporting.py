"""How training speaks to whoever runs it."""

from __future__ import annotations

from typing import Protocol

from ferryman_service.domain.records import EventLevel, StepMetrics, ValidationMetrics


class Reporter(Protocol):
    """What training needs of its reporter; application.ports.Reporter states the contract."""

    def step(self, metrics: StepMetrics) -> None:
        """Report an update."""
        ...

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        ...

    def event(self, level: EventLevel, code: str, message: str) -> None:
        """Make a remark."""
        ...

    def check(self) -> None:
        """Raise if the work is no longer wanted."""
        ...
