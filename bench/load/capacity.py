"""`make bench-load`: requests per second that the service holds through gRPC, beside the plainest server around
CTranslate2.

Calls arrive at random (a Poisson process, open loop), with one sentence or some, from captions and from news, searched
with beam 5. A rate is held if none of its calls fails and 95 % are answered within a limit, from the moment when they
were to begin. The limit is twice the 95th percentile of the same calls to the peer with one in flight, measured before
the search. The highest rate is searched for both servers by turns, in windows; only one server has load at a time. If
the peer holds no rate, the benchmark is invalid: its exit status is 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.load import alone as load_alone
from bench.load.alone import AloneTimes
from bench.load.rate_search import Probe, RateSearch, SearchConfig, print_probes
from bench.load.setup import (
    FAILURES,
    MODEL_NAME,
    OURS,
    PEER,
    SEED,
    add_options,
    client_process,
    our_server,
    peer_server,
    prepare,
    times_alone,
)
from bench.shared.command_line import measured
from bench.shared.process import ServingProcess
from bench.shared.result import Peer, Result
from bench.shared.server_program import Server
from bench.shared.turns import quantile

TARGET_RATIO: Final = 1.5
# A search gives up at so many times less than its first rate.
_LEAST_RATE_DIVISOR: Final = 8.0


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long it is searched: calls with one in flight; a window's seconds, at least, and its calls, at least; and how
    close to each other the last two rates are."""

    alone_calls: int
    warm_up_s: float
    seconds: float
    calls: int
    tolerance: float

    def window_s(self, rate: float) -> float:
        """Return the seconds of a window that are counted."""
        return max(self.seconds, self.calls / rate)

    def search(self, alone: AloneTimes) -> SearchConfig:
        """Return where to search, from the peer's times alone: its first rate is half of what it answers one by one."""
        first_rate = 0.5 * 1000 / alone.mean_ms
        return SearchConfig(
            first_rate=first_rate, growth=2.0, tolerance=self.tolerance, least_rate=first_rate / _LEAST_RATE_DIVISOR
        )


FULL: Final = Effort(alone_calls=200, warm_up_s=3.0, seconds=15.0, calls=150, tolerance=1.05)
QUICK: Final = Effort(alone_calls=60, warm_up_s=1.0, seconds=5.0, calls=40, tolerance=1.2)
# A call that takes so many limits has failed.
_TIMEOUT_LIMITS: Final = 40


def probe(client: ServingProcess, server: Server, rate: float, limit_ms: float, effort: Effort) -> Probe:
    """Drive a server at a rate for a window; raises ProcessFailed."""
    window = {"rate": rate, "warm_up_s": effort.warm_up_s, "seconds": effort.window_s(rate), "seed": SEED}
    window["timeout_s"] = _TIMEOUT_LIMITS * limit_ms / 1000
    seen = client.ask("window", address=server.address, model=MODEL_NAME, **window)
    latencies_ms = seen["latencies_ms"]
    return Probe(
        server=server.name,
        rate=rate,
        limit_ms=limit_ms,
        answered=len(latencies_ms),
        failures=seen["failures"],
        p50_ms=quantile(latencies_ms, 0.5) if latencies_ms else float("inf"),
        p95_ms=quantile(latencies_ms, 0.95) if latencies_ms else float("inf"),
        p99_ms=quantile(latencies_ms, 0.99) if latencies_ms else float("inf"),
        means_ms=seen["means_ms"],
        worst_late_ms=seen["worst_late_ms"],
    )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The searches of both servers, and the times of calls with one in flight before and after them."""

    searches: Mapping[str, RateSearch]
    limit_ms: float
    before: Mapping[str, AloneTimes]
    after: Mapping[str, AloneTimes]


def measure_servers(client: ServingProcess, servers: Sequence[Server], effort: Effort) -> Measurement:
    """Measure both servers with one call in flight, search each one's highest held rate, and measure again."""
    before = times_alone(client, servers, effort.alone_calls, "before the search")
    limit_ms = load_alone.LIMIT_FACTOR * before[PEER].p95_ms
    print(f"limit of p95: {limit_ms:.1f} ms, {load_alone.LIMIT_FACTOR:g} times the peer's with one call in flight")
    searches = search_by_turns(client, servers, limit_ms, effort.search(before[PEER]), effort)
    after = times_alone(client, servers, effort.alone_calls, "after the search")
    return Measurement(searches=searches, limit_ms=limit_ms, before=before, after=after)


def search_by_turns(
    client: ServingProcess, servers: Sequence[Server], limit_ms: float, config: SearchConfig, effort: Effort
) -> Mapping[str, RateSearch]:
    """Search each server's highest held rate, a window for the one, then one for the other."""
    searches = {server.name: RateSearch(config) for server in servers}
    while any(search.next_rate() is not None for search in searches.values()):
        for server in servers:
            if (rate := searches[server.name].next_rate()) is not None:
                measured = probe(client, server, rate, limit_ms, effort)
                searches[server.name].note(measured)
                print_probes([measured], title=False)
    return searches


def result_of(measured: Measurement, arguments: argparse.Namespace) -> Result:
    """Print the table of rates and times, and return the line to publish."""
    searches = measured.searches
    probes = [found for search in searches.values() for found in sorted(search.probes, key=lambda p: p.rate)]
    print_probes(probes)
    held = {name: search.held for name, search in searches.items()}
    print(f"\nheld: {', '.join(f'{name} {rate:.1f}' for name, rate in held.items())} requests/s\n")
    drift = load_alone.drift_of(measured.before[PEER], measured.after[PEER])
    if warning := load_alone.drift_warning(drift):
        print(warning, file=sys.stderr, flush=True)
    peer_holds = held[PEER] > 0
    return Result(
        bench="load-quick" if arguments.quick else "load",
        value=held[OURS] / held[PEER] if peer_holds else None,
        target=TARGET_RATIO,
        peer=Peer(name=f"{PEER}, {held[PEER]:.1f} requests/s", value=1.0),
        invalid_because=None if peer_holds else no_rate_held(measured),
        details={
            "unit": "times the requests/s that the peer holds with p95 under limit_ms",
            "limit_ms": round(measured.limit_ms, 2),
            "limit_is": f"{load_alone.LIMIT_FACTOR:g} times the peer's p95 with one call in flight, before the search",
            "one_call_in_flight": load_alone.as_dict(measured.before, measured.after),
            "drift": round(drift, 3),
            "requests_per_s": {name: round(rate, 2) for name, rate in held.items()},
            "compute_type": arguments.compute_type,
            "probes": [found.as_dict() for found in probes],
        },
    )


def no_rate_held(measured: Measurement) -> str:
    """Return why there is no ratio."""
    lowest = min(found.rate for found in measured.searches[PEER].probes)
    return (
        f"the peer holds no rate: at {lowest:.2f} requests/s its p95 is still over {measured.limit_ms:.0f} ms, though "
        "that of single calls is half of it; stop other programs and run the benchmark again"
    )


def measure(arguments: argparse.Namespace) -> Result:
    """Run the benchmark; raises one of `FAILURES`."""
    prepared = prepare(arguments)
    effort = QUICK if arguments.quick else FULL
    with (
        our_server(prepared.bundle, arguments.compute_type) as ours,
        peer_server(prepared.bundle, arguments.compute_type) as peer,
        client_process(prepared.sentences) as client,
    ):
        measured_servers = measure_servers(client, (ours, peer), effort)
    return prepared.described(result_of(measured_servers, arguments))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-load", description=__doc__)
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="measure shorter windows, with the same target")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached, 3 if nothing could be measured."""
    arguments = parse(argv)
    return measured("bench-load", lambda: measure(arguments), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
