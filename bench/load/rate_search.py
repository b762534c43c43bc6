"""The search for the highest rate that a server holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A window at a rate (requests/s) with a limit of the 95th percentile: what was answered, what failed (by status
    code), the answers' times, the server's own means of them where it tells them, and by how much the client was late
    at worst."""

    server: str
    rate: float
    limit_ms: float
    answered: int
    failures: Mapping[str, int]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    means_ms: Mapping[str, float]
    worst_late_ms: float

    @property
    def is_held(self) -> bool:
        """Whether the server keeps up."""
        return self.answered > 0 and not self.failures and self.p95_ms < self.limit_ms

    def as_dict(self) -> dict[str, Any]:
        """Return the probe for a line of JSON; unknown milliseconds are left out."""
        times = {"p50_ms": self.p50_ms, "p95_ms": self.p95_ms, "p99_ms": self.p99_ms}
        times["worst_late_ms"] = self.worst_late_ms
        return {
            "server": self.server,
            "rate": round(self.rate, 2),
            "held": self.is_held,
            "answered": self.answered,
            "failures": dict(self.failures),
            **{name: round(value, 2) for name, value in times.items() if math.isfinite(value)},
            "means_ms": {name: round(value, 3) for name, value in self.means_ms.items()},
        }


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The first rate (requests/s), the factor to the next while rates are held (or to the one before while none is),
    and the factor between the highest held and the lowest missed rate that ends the search."""

    first_rate: float
    growth: float
    tolerance: float
    least_rate: float

    def __post_init__(self) -> None:
        assert self.growth > 1 and self.tolerance > 1, "the factors must be above 1"


class RateSearch:
    """A geometric search: rates grow until one is missed, then the gap is halved. A rate is missed if it is missed
    twice: something else may have disturbed the machine."""

    def __init__(self, config: SearchConfig) -> None:
        self.probes: list[Probe] = []
        self._config = config
        self._held = 0.0
        self._missed = math.inf
        self._again: float | None = None

    @property
    def held(self) -> float:
        """The highest rate that was held, requests/s; 0 if none was."""
        return self._held

    def next_rate(self) -> float | None:
        """Return the rate to try, None when the search is over."""
        if self._again is not None:
            return self._again
        if not self.probes:
            return self._config.first_rate
        if math.isinf(self._missed):
            return self._held * self._config.growth
        if not self._held:
            lower = self._missed / self._config.growth
            return lower if lower >= self._config.least_rate else None
        if self._missed / self._held <= self._config.tolerance:
            return None
        return math.sqrt(self._held * self._missed)

    def note(self, probe: Probe) -> None:
        """Take what `next_rate`'s rate has come to."""
        assert probe.rate == self.next_rate(), "the rate that was asked for is tried"
        self.probes.append(probe)
        if probe.is_held:
            self._held, self._again = probe.rate, None
        elif self._again is None:
            self._again = probe.rate
        else:
            self._missed, self._again = probe.rate, None


def print_probes(probes: Sequence[Probe], *, title: bool = True) -> None:
    """Print a table."""
    if title:
        print(
            f"\n{'':28} {'requests/s':>10} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'queue':>7} {'encode':>7} "
            f"{'decode':>7} {'rows':>6}"
        )
    for probe in probes:
        means = "".join(
            f" {probe.means_ms[name]:{width}.1f}" if name in probe.means_ms else f" {'-':>{width}}"
            for name, width in (("queue", 7), ("encode", 7), ("decode", 7), ("mean_batch_rows", 6))
        )
        failed = "".join(f", {count} {code}" for code, count in probe.failures.items())
        print(
            f"{probe.server:28} {probe.rate:10.1f} {probe.p50_ms:8.1f} {probe.p95_ms:8.1f} {probe.p99_ms:8.1f}{means}"
            f"  {'held' if probe.is_held else 'missed'}{failed}",
            flush=True,
        )
