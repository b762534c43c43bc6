"""What `make bench-load` runs: how many requests a second does the service hold through gRPC, beside the plainest
server around CTranslate2?

Calls arrive at random (a Poisson process, open loop), with one sentence or some, from captions and from news, searched
with beam 5. A rate is held if 95 % of the calls are answered within 250 ms of the moment when they were to begin and
none fails. The highest such rate is searched for both servers by turns, in windows; only one server has load at a time.

With --soak MINUTES it is not searched for: the service is loaded at 60 % of the rate that it held; see `load_soak`.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import load_soak, quality
from bench.load_search import LATENCY_AT_MOST_MS, Probe, RateSearch, SearchConfig, print_probes
from bench.peer_environment import PeerMissing, ctranslate2_python
from bench.result import RESULTS, Peer, Result, publish
from bench.server_program import Server, ServerFailed, started_server
from bench.serving_cpu import CORES, NEWS, PEER_TYPES
from bench.serving_models import COMPUTE_TYPES, FOLDER, converted, current_bundle, read_text, trained_bundle
from bench.serving_process import ProcessFailed, ServingProcess
from bench.turns import quantile
from examples.parallel_text import TextMissing, find_files, read_lines
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
_SETTLE_WINDOW: Final = {"rate": 10.0, "warm_up_s": 1.0, "seconds": 1.0, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long it is searched: a window's seconds, and how close to each other the last two rates are."""

    warm_up_s: float
    seconds: float
    search: SearchConfig


FULL: Final = Effort(warm_up_s=3.0, seconds=15.0, search=SearchConfig(first_rate=20.0, growth=2.0, tolerance=1.05))
QUICK: Final = Effort(warm_up_s=1.0, seconds=5.0, search=SearchConfig(first_rate=20.0, growth=2.0, tolerance=1.2))


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
    command = [str(ctranslate2_python()), "-m", "bench.peer_ctranslate2_server"]
    command += ["--model", str(converted(bundle)[compute_type]), "--subwords", str(bundle / SUBWORDS_FILE)]
    command += ["--compute-type", PEER_TYPES[compute_type], "--threads", str(CORES)]
    with started_server(PEER, command, _LOAD / "ctranslate2.log", {"PYTHONPATH": os.getcwd()}) as server:
        yield server


@contextlib.contextmanager
def client_process(sentences: Sequence[str]) -> Iterator[ServingProcess]:
    """Start the client and give it its sentences."""
    command = [sys.executable, "-m", "bench.load_client"]
    with ServingProcess("client", command, {"PYTHONPATH": os.getcwd()}, _LOAD / "client.log") as client:
        client.ask("sentences", texts=list(sentences))
        yield client


def mixed_sentences(captions: Sequence[str], news: Path) -> list[str]:
    """Return captions, and as many news sentences; those over 300 characters are left out. Raises TextMissing."""
    lines = read_lines(find_files(str(news / "test"), "en", "en")).source  # there is no other side
    longer = [line for line in lines if 0 < len(line) <= _MAX_CHARACTERS]
    return [*captions[: len(longer)], *longer[: len(captions)]]


def probe(client: ServingProcess, server: Server, rate: float, effort: Effort) -> Probe:
    """Drive a server at a rate for a window; raises ProcessFailed."""
    window = {"rate": rate, "warm_up_s": effort.warm_up_s, "seconds": effort.seconds, "seed": _SEED}
    seen = client.ask("window", address=server.address, model=MODEL_NAME, **window)
    latencies_ms = seen["latencies_ms"]
    return Probe(
        server=server.name,
        rate=rate,
        answered=len(latencies_ms),
        failures=seen["failures"],
        p50_ms=quantile(latencies_ms, 0.5) if latencies_ms else float("inf"),
        p95_ms=quantile(latencies_ms, 0.95) if latencies_ms else float("inf"),
        p99_ms=quantile(latencies_ms, 0.99) if latencies_ms else float("inf"),
        means_ms=seen["means_ms"],
        worst_late_ms=seen["worst_late_ms"],
    )


def search_by_turns(client: ServingProcess, servers: Sequence[Server], effort: Effort) -> Mapping[str, RateSearch]:
    """Search each server's highest held rate, a window for the one, then one for the other."""
    searches = {server.name: RateSearch(effort.search) for server in servers}
    for server in servers:  # the model is loaded, caches are filled
        client.ask("window", address=server.address, model=MODEL_NAME, **_SETTLE_WINDOW)
    while any(search.next_rate() is not None for search in searches.values()):
        for server in servers:
            if (rate := searches[server.name].next_rate()) is not None:
                measured = probe(client, server, rate, effort)
                searches[server.name].note(measured)
                print_probes([measured], title=False)
    return searches


def measure(arguments: argparse.Namespace) -> Result:
    """Run the benchmark; raises TextMissing, FileNotFoundError, PeerMissing, ProcessFailed, ServerFailed."""
    trained = trained_bundle(arguments.model)
    text = read_text(arguments.data, NEWS, trained)
    bundle, sentences = current_bundle(trained, text.held_out), mixed_sentences(text.test_source, NEWS)
    if arguments.soak:
        with our_server(bundle, arguments.compute_type) as server:
            rate = arguments.rate or SOAK_SHARE * last_held_rate()
            return load_soak.measure(server, MODEL_NAME, sentences, rate=rate, minutes=arguments.soak)
    effort = QUICK if arguments.quick else FULL
    with (
        our_server(bundle, arguments.compute_type) as ours,
        peer_server(bundle, arguments.compute_type) as peer,
        client_process(sentences) as client,
    ):
        searches = search_by_turns(client, (ours, peer), effort)
    return result_of(searches, arguments)


def result_of(searches: Mapping[str, RateSearch], arguments: argparse.Namespace) -> Result:
    """Print the table of rates and times, and return the line to publish."""
    probes = [found for search in searches.values() for found in sorted(search.probes, key=lambda p: p.rate)]
    print_probes(probes)
    held = {name: search.held for name, search in searches.items()}
    ratio = held[OURS] / held[PEER] if held[PEER] else 0.0
    print(f"\nheld: {', '.join(f'{name} {rate:.1f}' for name, rate in held.items())} requests/s, ratio {ratio:.2f}\n")
    return Result(
        bench="load-quick" if arguments.quick else "load",
        value=ratio,
        target=TARGET_RATIO,
        peer=Peer(name=f"{PEER}, {held[PEER]:.1f} requests/s", value=1.0),
        details={
            "unit": f"times the requests/s that the peer holds with p95 under {LATENCY_AT_MOST_MS:g} ms",
            "requests_per_s": {name: round(rate, 2) for name, rate in held.items()},
            "compute_type": arguments.compute_type,
            "probes": [found.as_dict() for found in probes],
        },
    )


def last_held_rate() -> float:
    """Return what the last run of the benchmark found for the service, requests/s; raises FileNotFoundError."""
    for name in ("load", "load-quick"):
        if (path := RESULTS / f"{name}.json").exists():
            values: dict[str, Any] = json.loads(path.read_text())
            return float(values["requests_per_s"][OURS])
    raise FileNotFoundError(f"{RESULTS} holds no load.json: run make bench-load first, or pass --rate")


def _make_writable(folder: Path) -> None:
    """Published bundles are read-only folders."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make bench-load", description=__doc__)
    parser.add_argument("--data", type=Path, default=quality.DEFAULT_DATA, help="folder with train, val and test files")
    parser.add_argument("--model", type=Path, help="folder of a trained bundle (default: what bench-quality left)")
    parser.add_argument("--compute-type", choices=COMPUTE_TYPES, default="fp32", help="of both (default: fp32)")
    parser.add_argument("--quick", action="store_true", help="shorter windows, the same target")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="constant load instead")
    parser.add_argument("--rate", type=float, help="of the soak, requests/s (default: 60 %% of what was held last)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 0 if the target is reached."""
    try:
        return publish(measure(parse(argv)))
    except (TextMissing, FileNotFoundError, PeerMissing, ProcessFailed, ServerFailed) as error:
        sys.exit(f"bench-load: {error}")


if __name__ == "__main__":
    sys.exit(main())
