"""Loads the service constantly for minutes, at 60 % of the rate that it holds.

    python -m bench.load.soak --minutes 10

Unary calls, of which some are cancelled and some have too short a deadline, run beside streams, of which some are
abandoned. No answer may be lost, doubled or wrong, memory must not grow, and the last third must be as fast as the
first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from bench.load.alone import AloneTimes
from bench.load.setup import (
    FAILURES,
    MODEL_NAME,
    OURS,
    OUTPUT,
    SEED,
    add_options,
    client_process,
    our_server,
    prepare,
    times_alone,
)
from bench.shared.command_line import measured
from bench.shared.process import ServingProcess, memory_mib
from bench.shared.result import RESULTS, Result
from bench.shared.rows import Row, at_most, print_rows, reported
from bench.shared.server_program import Server
from bench.shared.turns import quantile

HELD_SHARE: Final = 0.6
"""The default load, as a share of the rate that the service holds."""
MEMORY_GROWTH_AT_MOST_PERCENT: Final = 10.0
P99_GROWTH_AT_MOST: Final = 1.5
STREAM_SHARE: Final = 0.2
"""Sentences a second that stream, as a share of the calls a second."""
SENTENCES: Final = 400
_SAMPLE_EVERY_S: Final = 2.0
_ALONE_CALLS: Final = 60


@dataclass
class MemorySamples:
    """A process's resident memory, MiB, every two seconds."""

    pid: int
    rss_mib: list[float] = field(default_factory=list)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take samples in a thread for the length of the block."""
        over = threading.Event()
        thread = threading.Thread(target=self._sample, args=(over,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _sample(self, over: threading.Event) -> None:
        while not over.wait(_SAMPLE_EVERY_S):
            self.rss_mib.append(memory_mib(self.pid)["rss_mib"])


def soak(server: Server, sentences: Sequence[str], *, rate: float, minutes: float) -> Result:
    """Load a server with `rate` calls a second; raises ProcessFailed."""
    command = [sys.executable, "-m", "bench.load.soak_client"]
    memory = MemorySamples(server.pid)
    step = max(1, len(sentences) // SENTENCES)
    print(f"soak: {rate:.1f} requests/s for {minutes:g} minutes", flush=True)
    with (
        ServingProcess("soak client", command, {"PYTHONPATH": os.getcwd()}, OUTPUT / "soak-client.log") as client,
        memory.taken(),
    ):
        seen = client.ask(
            "soak",
            address=server.address,
            model=MODEL_NAME,
            sentences=sentences[::step],
            rate=rate,
            stream_rate=STREAM_SHARE * rate,
            seconds=60 * minutes,
            seed=SEED,
        )
    return result_of(seen, memory.rss_mib, rate=rate, minutes=minutes)


def result_of(seen: dict[str, Any], rss_mib: Sequence[float], *, rate: float, minutes: float) -> Result:
    """Return the line to publish; a table of it is printed."""
    rows = [
        *(at_most(f"{name} answers", "count", (seen[name], None), 0, relative=False) for name in FAULTS),
        at_most(
            "growth of memory",
            "%",
            (memory_growth_percent(rss_mib), None),
            MEMORY_GROWTH_AT_MOST_PERCENT,
            relative=False,
        ),
        p99_row(seen["latencies"]),
        *(reported(name.replace("_", " "), "count", (seen[name], None)) for name in COUNTS),
        reported("peak of memory", "MiB", (max(rss_mib, default=0.0), None)),
    ]
    print_rows(rows)
    checked = [row for row in rows if row.target is not None]
    return Result(
        bench="soak-serving",
        value=sum(row.ok for row in checked) / len(checked),
        target=1.0,
        peer=None,
        details={
            "unit": "share of the conditions that hold",
            "requests_per_s": round(rate, 2),
            "minutes": minutes,
            "failures": seen["failures"],
            "rows": [row.as_dict() for row in rows],
        },
    )


FAULTS: Final = ("lost", "doubled", "wrong", "failed")
COUNTS: Final = ("answered", "cancelled", "too_late", "streamed", "streams_abandoned")


def memory_growth_percent(rss_mib: Sequence[float]) -> float:
    """Return by how much the last fifth of the samples is above the second one: the first is warming up."""
    fifth = len(rss_mib) // 5
    if not fifth:
        return 0.0
    early, late = (statistics.median(part) for part in (rss_mib[fifth : 2 * fifth], rss_mib[-fifth:]))
    return round(100 * (late / early - 1), 2)


def p99_row(latencies: Sequence[tuple[float, float]]) -> Row:
    """Compare the 99th percentile of the last third with that of the first; `latencies` are the second in which a call
    was to begin and its milliseconds."""
    end_s = max((at_s for at_s, _ in latencies), default=0.0)
    first, last = (
        quantile([ms for at_s, ms in latencies if low * end_s <= at_s <= (low + 1 / 3) * end_s] or [0.0], 0.99)
        for low in (0.0, 2 / 3)
    )
    return at_most(
        "p99 of the last third, and of the first", "ms", (round(last, 2), round(first, 2)), P99_GROWTH_AT_MOST
    )


def soak_rate(alone: AloneTimes) -> float:
    """Return 60 % of the rate that the service holds, from its times with one call in flight.

    The last result of the benchmark says how many times as many calls the service held as with one in flight. Without a
    result the rate with one in flight counts as held.
    """
    rate_alone = 1000 / alone.mean_ms
    for path in (RESULTS / "load.json", RESULTS / "load-quick.json"):
        line: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if "one_call_in_flight" in line and line["requests_per_s"][OURS]:
            mean_ms: float = line["one_call_in_flight"]["before"][OURS]["mean_ms"]
            held: float = line["requests_per_s"][OURS]
            return HELD_SHARE * rate_alone * held * mean_ms / 1000
    return HELD_SHARE * rate_alone


def measure(arguments: argparse.Namespace) -> Result:
    """Load the service at the rate of the command line, or at a share of what it holds; raises one of `FAILURES`."""
    prepared = prepare(arguments)
    with our_server(prepared.bundle, arguments.compute_type) as server:
        if not (rate := arguments.rate):
            with client_process(prepared.sentences) as client:
                rate = soak_rate(times_alone(client, (server,), _ALONE_CALLS, "before the soak")[server.name])
        return prepared.described(soak(server, prepared.sentences, rate=rate, minutes=arguments.minutes))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.load.soak", description=__doc__)
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the soak (default: 10)")
    parser.add_argument("--rate", type=float, help="requests per second (default: 60 %% of what the service holds)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; the exit status is 0 if every condition holds."""
    arguments = parse(argv)
    return measured("soak", lambda: measure(arguments), FAILURES)


if __name__ == "__main__":
    sys.exit(main())
