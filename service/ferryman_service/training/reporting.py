"""How training speaks to whoever runs it."""

from __future__ import annotations

from typing import Protocol

from ferryman_service.domain.records import EventLevel, StepMetrics, ValidationMetrics
from ferryman_service.domain.schedule import DecayPlan


class Reporter(Protocol):
    """What training needs of its reporter; application.ports.Reporter states the contract."""

    def step(self, metrics: StepMetrics) -> None:
        """Report an update."""
        ...

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        ...

    def decay_plan(self, plan: DecayPlan) -> None:
        """Report a planned decay of the learning rate."""
        ...

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Make a remark; with `repeats` it belongs to the series."""
        ...

    def resume(self, reports: int) -> None:
        """Say that the work goes on from a point before which the series had this many reports."""
        ...

    def flush(self) -> None:
        """Wait until everything that was reported is durable."""
        ...

    def check(self) -> None:
        """Raise if the work is no longer wanted."""
        ...


class Series:
    """A Reporter in front of another, which counts the reports of the series."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.reports = 0

    def step(self, metrics: StepMetrics) -> None:
        """Report an update."""
        self.reports += 1
        self._reporter.step(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report a validation."""
        self.reports += 1
        self._reporter.validation(metrics)

    def decay_plan(self, plan: DecayPlan) -> None:
        """Report a planned decay of the learning rate."""
        self.reports += 1
        self._reporter.decay_plan(plan)

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Make a remark; with `repeats` it belongs to the series."""
        self.reports += repeats
        self._reporter.event(level, code, message, repeats=repeats)

    def resume(self, reports: int) -> None:
        """Go on from a point before which the series had this many reports."""
        self.reports = reports
        self._reporter.resume(reports)

    def flush(self) -> None:
        """Wait until everything that was reported is durable."""
        self._reporter.flush()

    def check(self) -> None:
        """Raise if the work is no longer wanted."""
        self._reporter.check()
