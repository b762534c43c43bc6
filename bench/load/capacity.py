"""What `make bench-load` runs: how many requests a second does the service hold through gRPC, beside the plainest
server around CTranslate2?

Calls arrive at random (a Poisson process, open loop), with one sentence or some, from captions and from news, searched
with beam 5. A rate is held if none of its calls fails and 95 % are answered within a limit, from the moment when they
were to begin. The limit is twice the 95th percentile of the same calls to the peer with one in flight, measured before
the search. The highest rate is searched for both servers by turns, in windows; only one server has load at a time. If
the peer holds no rate, the benchmark is invalid: its exit status is 3.

With --soak MINUTES it is not searched for: the service is loaded at 60 % of the rate that it holds; see `load_soak`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench.load import alone as load_alone
from bench.load import soak as load_soak
from bench.load.alone import AloneTimes, alone_times
from bench.load.rate_search import Probe, RateSearch, SearchConfig, print_probes
from bench.peers.environment import PeerMissing, ctranslate2_python
from bench.quality import bleu as quality
from bench.shared.corpus import find_news
from bench.shared.models import COMPUTE_TYPES, CORES, FOLDER, PEER_TYPES, converted, current_bundle, read_text
from bench.shared.process import ProcessFailed, ServingProcess
from bench.shared.result import RESULTS, Peer, Result, publish, watched_machine
from bench.shared.server_program import Server, ServerFailed, started_server
from bench.shared.trained_model import ModelUnfit, model_facts, task_of, trained_bundle
from bench.shared.turns import quantile
from examples.local_service import ServiceFailed
from examples.parallel_text import TextMissing
from ferryman_service.bundle.manifest import SUBWORDS_FILE

OURS: Final = "ferryman"
PEER: Final = "ctranslate2 behind grpc.aio"
MODEL_NAME: Final = "load"
TARGET_RATIO: Final = 1.5
SOAK_SHARE: Final = 0.6
_LOAD: Final = FOLDER / "load"
# Multi30k's subwords make many of a news sentence; the model takes 256.
_MAX_CHARACTERS: Final = 300
_SEED: Final = 1
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


@contextlib.contextmanager
def our_server(bundle: Path, compute_type: str) -> Iterator[Server]:
    """Start the service with the bundle as its only model; raises ServerFailed."""
    data = _LOAD / "data"
    if data.exists():
        _make_writable(data)
        shutil.rmtree(data)
    here = {"PYTHONPATH": os.getcwd(), "FERRYMAN_DATA_DIR": str(data), "FERRYMAN_METRICS_PORT": "0"}
    here |= {"FERRYMAN_PROBE_PORT": "0"}
    program = [sys.executable, "-m", "ferryman_service"]
    command = [*program, "import-model", str(bundle), MODEL_NAME]
    if (ended := subprocess.run(command, capture_output=True, text=True, env={**os.environ, **here})).returncode:
        raise ServerFailed(f"the bundle cannot be published:\n{ended.stderr[-2000:]}")
    command = [*program, "serve", "--port", "0", "--roles", "translation", "--translation-threads", str(CORES)]
    command += ["--compute-type", compute_type]
    with started_server(OURS, command, _LOAD / "ferryman.log", here) as server:
        yield server


@contextlib.contextmanager
def peer_server(bundle: Path, compute_type: str) -> Iterator[Server]:
    """Start CTranslate2's server with the same weights; raises ServerFailed, PeerMissing."""
    command = [str(ctranslate2_python()), "-m", "bench.peers.ctranslate2_server"]
    command += ["--model", str(converted(bundle)[compute_type]), "--subwords", str(bundle / SUBWORDS_FILE)]
    command += ["--compute-type", PEER_TYPES[compute_type], "--threads", str(CORES)]
    with started_server(PEER, command, _LOAD / "ctranslate2.log", {"PYTHONPATH": os.getcwd()}) as server:
        yield server


@contextlib.contextmanager
def client_process(sentences: Sequence[str]) -> Iterator[ServingProcess]:
    """Start the client and give it its sentences."""
    command = [sys.executable, "-m", "bench.load.client"]
    with ServingProcess("client", command, {"PYTHONPATH": os.getcwd()}, _LOAD / "client.log") as client:
        client.ask("sentences", texts=list(sentences))
        yield client


def mixed_sentences(captions: Sequence[str], news: Sequence[str]) -> list[str]:
    """Return captions, and as many news sentences; those over 300 characters are left out. Without news: the captions
    alone."""
    longer = [line for line in news if 0 < len(line) <= _MAX_CHARACTERS]
    return [*captions[: len(longer)], *longer[: len(captions)]] if longer else list(captions)


def probe(client: ServingProcess, server: Server, rate: float, limit_ms: float, effort: Effort) -> Probe:
    """Drive a server at a rate for a window; raises ProcessFailed."""
    window = {"rate": rate, "warm_up_s": effort.warm_up_s, "seconds": effort.window_s(rate), "seed": _SEED}
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
    before = times_alone(client, servers, effort, "before the search")
    limit_ms = load_alone.LIMIT_FACTOR * before[PEER].p95_ms
    print(f"limit of p95: {limit_ms:.1f} ms, {load_alone.LIMIT_FACTOR:g} times the peer's with one call in flight")
    searches = search_by_turns(client, servers, limit_ms, effort.search(before[PEER]), effort)
    after = times_alone(client, servers, effort, "after the search")
    return Measurement(searches=searches, limit_ms=limit_ms, before=before, after=after)


def times_alone(
    client: ServingProcess, servers: Sequence[Server], effort: Effort, when: str
) -> Mapping[str, AloneTimes]:
    """Measure each server with one call in flight, and print the times."""
    times = {
        server.name: alone_times(client, server, MODEL_NAME, calls=effort.alone_calls, seed=_SEED) for server in servers
    }
    load_alone.print_alone(times, when)
    return times


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


def measure(arguments: argparse.Namespace) -> Result:
    """Run the benchmark; raises what `main` reports."""
    task = task_of(arguments.data, arguments.source, arguments.target)
    trained, news = trained_bundle(arguments.model, task), find_news(arguments.data, task.source, task.target)
    text = read_text(task, news)
    bundle, sentences = current_bundle(trained, text.held_out), mixed_sentences(text.test_source, news.sentences)
    if news.test is None:
        print(f"no news in or beside {arguments.data}: the calls hold sentences of the test set alone", flush=True)
    if arguments.soak:
        result = soak(bundle, sentences, arguments)
    else:
        effort = QUICK if arguments.quick else FULL
        with (
            our_server(bundle, arguments.compute_type) as ours,
            peer_server(bundle, arguments.compute_type) as peer,
            client_process(sentences) as client,
        ):
            measured = measure_servers(client, (ours, peer), effort)
        result = result_of(measured, arguments)
    facts = {"model": model_facts(trained), "news": news.described, "sentences": len(sentences)}
    return replace(result, details={**result.details, **facts})


def soak(bundle: Path, sentences: Sequence[str], arguments: argparse.Namespace) -> Result:
    """Load the service for minutes, at 60 % of the rate that it holds, if no other is given."""
    with our_server(bundle, arguments.compute_type) as server:
        if not (rate := arguments.rate):
            with client_process(sentences) as client:
                rate = soak_rate(times_alone(client, (server,), QUICK, "before the soak")[server.name])
        return load_soak.measure(server, MODEL_NAME, sentences, rate=rate, minutes=arguments.soak)


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
            return SOAK_SHARE * rate_alone * held * mean_ms / 1000
    return SOAK_SHARE * rate_alone


def _make_writable(folder: Path) -> None:
    """Published bundles are read-only folders."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-load", description=__doc__)
    parser.add_argument("--data", type=Path, default=quality.DEFAULT_DATA, help="folder with train, val and test files")
    parser.add_argument("--source", default="en", help="source language (default: en)")
    parser.add_argument("--target", default="de", help="target language (default: de)")
    parser.add_argument("--model", type=Path, help="folder of a trained bundle (default: find one, or train one)")
    parser.add_argument("--compute-type", choices=COMPUTE_TYPES, default="fp32", help="of both (default: fp32)")
    parser.add_argument("--quick", action="store_true", help="shorter windows, the same target")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="constant load instead")
    parser.add_argument("--rate", type=float, help="of the soak, requests/s (default: 60 %% of what the service holds)")
    return parser.parse_args(argv)


_FAILURES: Final = (
    TextMissing,
    FileNotFoundError,
    ModelUnfit,
    PeerMissing,
    ProcessFailed,
    ServerFailed,
    ServiceFailed,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached, 3 if nothing could be measured."""
    arguments = parse(argv)
    try:
        with watched_machine():
            return publish(measure(arguments))
    except _FAILURES as error:
        sys.exit(f"bench-load: {error}")


if __name__ == "__main__":
    sys.exit(main())
