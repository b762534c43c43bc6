"""Latency with one call in flight: each call begins when the one before it has been answered.

The load test takes its limit from these times of the peer, so that the limit fits the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.shared.process import ServingProcess
from bench.shared.server_program import Server, ServerFailed
from bench.shared.turns import quantile

LIMIT_FACTOR: Final = 2.0
"""A rate is held if the 95th percentile is below so many times that of the peer's calls alone."""
DRIFT_AT_MOST: Final = 1.25
_WARM_UP_CALLS: Final = 10
_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class AloneTimes:
    """Milliseconds of calls with one in flight."""

    mean_ms: float
    p50_ms: float
    p95_ms: float

    def as_dict(self) -> dict[str, float]:
        """Return the times for a line of JSON."""
        return {"mean_ms": round(self.mean_ms, 2), "p50_ms": round(self.p50_ms, 2), "p95_ms": round(self.p95_ms, 2)}


def alone_times(client: ServingProcess, server: Server, model: str, *, calls: int, seed: int) -> AloneTimes:
    """Make so many calls, one after the other; raises ProcessFailed, and ServerFailed if one fails."""
    window = {"rate": 1.0, "warm_up_s": 0.0, "seconds": 0.0, "seed": seed, "timeout_s": _TIMEOUT_S}
    seen = client.ask(
        "one_at_a_time", address=server.address, model=model, warm_up=_WARM_UP_CALLS, calls=calls, **window
    )
    if seen["failures"]:
        raise ServerFailed(f"{server.name} fails with one call in flight: {seen['failures']}")
    latencies_ms = seen["latencies_ms"]
    return AloneTimes(
        mean_ms=statistics.fmean(latencies_ms), p50_ms=quantile(latencies_ms, 0.5), p95_ms=quantile(latencies_ms, 0.95)
    )


def print_alone(times: Mapping[str, AloneTimes], when: str) -> None:
    """Print a line for each server."""
    for name, found in times.items():
        print(
            f"{name:28} one call in flight, {when}: mean {found.mean_ms:.1f} ms, p50 {found.p50_ms:.1f}, "
            f"p95 {found.p95_ms:.1f}",
            flush=True,
        )


def drift_of(before: AloneTimes, after: AloneTimes) -> float:
    """Return how many times as long the calls took at the end."""
    return after.p95_ms / before.p95_ms


def drift_warning(drift: float) -> str | None:
    """Return a sentence about a machine that became faster or slower; None if it stayed the same."""
    if 1 / DRIFT_AT_MOST <= drift <= DRIFT_AT_MOST:
        return None
    return (
        f"warning: at the end the peer's p95 with one call in flight was {drift:.2f} times that of the beginning: the "
        "machine's speed has changed; stop other programs and run the benchmark again"
    )


def as_dict(before: Mapping[str, AloneTimes], after: Mapping[str, AloneTimes]) -> dict[str, Any]:
    """Return both for a line of JSON."""
    parts: Sequence[tuple[str, Mapping[str, AloneTimes]]] = (("before", before), ("after", after))
    return {when: {name: found.as_dict() for name, found in times.items()} for when, times in parts}
