"""Rows of a comparison: our value, the peer's value, and the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Values: TypeAlias = "tuple[float, float | None]"
"""Ours and the peer's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured value, beside the peer's. `target` says what `ratio` (or `ours`, if it is not `relative`) must reach,
    or not exceed; None: it is only reported."""

    name: str
    unit: str
    ours: float
    peer: float | None
    target: float | None = None
    smaller_is_better: bool = False
    relative: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.ours / self.peer if self.peer else None

    @property
    def ok(self) -> bool:
        """Whether the target is reached."""
        if self.target is None:
            return True
        value = self.ratio if self.relative else self.ours
        assert value is not None, f"{self.name}: a relative target needs a peer"
        return value <= self.target if self.smaller_is_better else value >= self.target

    def with_details(self, **details: object) -> Row:
        """Return the row with more to report."""
        return dataclasses.replace(self, details={**self.details, **details})

    def as_dict(self) -> dict[str, Any]:
        """Return the row for a line of JSON."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours,
            "peer": self.peer,
            "ratio": None if self.ratio is None else round(self.ratio, 4),
            "target": self.target,
            "target_is": self.target_is,
            "ok": self.ok,
            **self.details,
        }

    @property
    def target_is(self) -> str | None:
        """The quantity that the target bounds, and from which side."""
        if self.target is None:
            return None
        return f"{'most' if self.smaller_is_better else 'least'} {'ratio' if self.relative else 'value'}"


def at_most(name: str, unit: str, values: Values, target: float, *, relative: bool = True) -> Row:
    """Return a row whose ratio, or value, must not be above the target."""
    ours, peer = values
    return Row(name=name, unit=unit, ours=ours, peer=peer, target=target, smaller_is_better=True, relative=relative)


def at_least(name: str, unit: str, values: Values, target: float) -> Row:
    """Return a row whose ratio must not be below the target."""
    ours, peer = values
    return Row(name=name, unit=unit, ours=ours, peer=peer, target=target)


def reported(name: str, unit: str, values: Values) -> Row:
    """Return a row without a target."""
    ours, peer = values
    return Row(name=name, unit=unit, ours=ours, peer=peer)


def print_rows(rows: Sequence[Row]) -> None:
    """Print a table."""
    width = max(len(row.name) for row in rows)
    print(f"\n{'':{width}} {'ours':>12} {'peer':>12} {'ratio':>7} {'target':>7}")
    for row in rows:
        peer, ratio = _figure(row.peer), "-" if row.ratio is None else f"{row.ratio:.2f}"
        target = "-" if row.target is None else f"{'<=' if row.smaller_is_better else '>='}{row.target:g}"
        missed = "" if row.ok else "  missed"
        print(
            f"{row.name:{width}} {_figure(row.ours):>12} {peer:>12} {ratio:>7} {target:>7} {row.unit}{missed}",
            flush=True,
        )


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
