"""The report of a scenario: figures, conditions that must hold, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.rehearsal.load import Expected, Ledger


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Something that must hold, and what was seen."""

    text: str
    seen: str
    holds: bool


@dataclass
class Report:
    """Of one scenario."""

    name: str
    title: str
    figures: dict[str, Any] = field(default_factory=dict)
    conditions: list[Condition] = field(default_factory=list)

    def must(self, text: str, seen: object, holds: bool) -> None:
        """Note a condition."""
        self.conditions.append(Condition(text=text, seen=str(seen), holds=holds))

    def count(self, ledger: Ledger, expected: Expected) -> None:
        """Note the figures of a ledger, and what must hold of each: no call lost, no answer wrong or mixed."""
        self.figures |= {
            "calls": ledger.begun,
            "failed": dict(ledger.failures()),
            "by_version": dict(ledger.models()),
            "by_replica": dict(sorted(ledger.replicas().items())),
            "p50_ms": ledger.milliseconds(0.5),
            "p99_ms": ledger.milliseconds(0.99),
        }
        wrong = ledger.wrong(expected)
        self.must("every call that began has ended", f"{ledger.lost} lost", ledger.lost == 0 and ledger.begun > 0)
        self.must("every answer is one version's, for the sentences of its call", f"{wrong} are not", wrong == 0)

    def must_not_fail(self, ledger: Ledger) -> None:
        """Note that no call may fail."""
        failures = ledger.failures()
        self.must("no call fails", f"{failures.total()} of {ledger.begun} {dict(failures) or ''}", not failures)

    @property
    def ok(self) -> bool:
        """Whether everything holds that must."""
        return bool(self.conditions) and all(condition.holds for condition in self.conditions)

    def as_dict(self) -> Mapping[str, Any]:
        """Return it for a line of JSON."""
        conditions = [{"condition": c.text, "seen": c.seen, "holds": c.holds} for c in self.conditions]
        return {"scenario": self.name, "title": self.title, "ok": self.ok, **self.figures, "conditions": conditions}


def print_report(report: Report, console: Console) -> None:
    """Print the table of a scenario."""
    table = Table(title=f"{report.name}. {report.title}", title_justify="left", show_lines=False)
    for column in ("", "seen", ""):
        table.add_column(column, overflow="fold")
    for name, value in report.figures.items():
        table.add_row(name, _shown(value), "")
    table.add_section()
    for condition in report.conditions:
        table.add_row(condition.text, condition.seen, "holds" if condition.holds else "BROKEN")
    console.print(table)


def conditions_of(reports: Sequence[Report]) -> Sequence[Condition]:
    """Return all conditions of all scenarios."""
    return [condition for report in reports for condition in report.conditions]


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {each}" for key, each in value.items()) or "none"
    return str(value)
