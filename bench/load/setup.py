"""The set-up that the load test and the soak have in common: model, sentences, servers and client."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from bench.load.alone import AloneTimes, alone_times, print_alone
from bench.peers.environment import PeerMissing, ctranslate2_python
from bench.shared.command_line import add_corpus, add_model
from bench.shared.corpus import find_news
from bench.shared.models import COMPUTE_TYPES, CORES, FOLDER, PEER_TYPES, converted, read_text
from bench.shared.process import ProcessFailed, ServingProcess
from bench.shared.result import Result
from bench.shared.server_program import Server, ServerFailed, import_model, remove_data, started_server
from bench.shared.trained_model import ModelUnfit, model_facts, task_of, trained_bundle
from examples.local_service import ServiceFailed
from examples.parallel_text import TextMissing
from ferryman_service.bundle.manifest import SUBWORDS_FILE

OURS: Final = "ferryman"
PEER: Final = "ctranslate2 behind grpc.aio"
MODEL_NAME: Final = "load"
OUTPUT: Final = FOLDER / "load"
SEED: Final = 1
FAILURES: Final = (
    TextMissing,
    FileNotFoundError,
    ModelUnfit,
    PeerMissing,
    ProcessFailed,
    ServerFailed,
    ServiceFailed,
)
# Multi30k's subwords make many of a news sentence; the model takes 256.
_MAX_CHARACTERS: Final = 300


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The bundle to serve, the sentences to send, and the facts about both for a line of JSON."""

    bundle: Path
    sentences: Sequence[str]
    facts: Mapping[str, Any]

    def described(self, result: Result) -> Result:
        """Return the result with the facts."""
        return replace(result, details={**result.details, **self.facts})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the corpus, the model and its compute type."""
    add_corpus(parser)
    add_model(parser)
    parser.add_argument("--compute-type", choices=COMPUTE_TYPES, default="fp32", help="of every server (default: fp32)")


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Find or train the model, and read the sentences; raises one of `FAILURES`."""
    task = task_of(arguments.data, arguments.source, arguments.target)
    trained, news = trained_bundle(arguments.model, task), find_news(arguments.data, task.source, task.target)
    text = read_text(task, news)
    sentences = mixed_sentences(text.test_source, news.sentences)
    if news.test is None:
        print(f"no news in or beside {arguments.data}: the calls hold sentences of the test set alone", flush=True)
    facts = {"model": model_facts(trained), "news": news.described, "sentences": len(sentences)}
    return Prepared(bundle=trained, sentences=sentences, facts=facts)


def mixed_sentences(captions: Sequence[str], news: Sequence[str]) -> list[str]:
    """Return captions, and as many news sentences; those over 300 characters are left out. Without news: the captions
    alone."""
    longer = [line for line in news if 0 < len(line) <= _MAX_CHARACTERS]
    return [*captions[: len(longer)], *longer[: len(captions)]] if longer else list(captions)


@contextlib.contextmanager
def our_server(bundle: Path, compute_type: str) -> Iterator[Server]:
    """Start the service with the bundle as its only model; raises ServerFailed."""
    data = OUTPUT / "data"
    remove_data(data)
    import_model(bundle, data, MODEL_NAME)
    here = {"PYTHONPATH": os.getcwd(), "FERRYMAN_DATA_DIR": str(data)}
    here |= {"FERRYMAN_METRICS_PORT": "0", "FERRYMAN_PROBE_PORT": "0"}
    command = [sys.executable, "-m", "ferryman_service", "serve", "--port", "0", "--roles", "translation"]
    command += ["--translation-threads", str(CORES), "--compute-type", compute_type]
    with started_server(OURS, command, OUTPUT / "ferryman.log", here) as server:
        yield server


@contextlib.contextmanager
def peer_server(bundle: Path, compute_type: str) -> Iterator[Server]:
    """Start CTranslate2's server with the same weights; raises ServerFailed, PeerMissing."""
    command = [str(ctranslate2_python()), "-m", "bench.peers.ctranslate2_server"]
    command += ["--model", str(converted(bundle)[compute_type]), "--subwords", str(bundle / SUBWORDS_FILE)]
    command += ["--compute-type", PEER_TYPES[compute_type], "--threads", str(CORES)]
    with started_server(PEER, command, OUTPUT / "ctranslate2.log", {"PYTHONPATH": os.getcwd()}) as server:
        yield server


@contextlib.contextmanager
def client_process(sentences: Sequence[str]) -> Iterator[ServingProcess]:
    """Start the client and give it its sentences."""
    command = [sys.executable, "-m", "bench.load.client"]
    with ServingProcess("client", command, {"PYTHONPATH": os.getcwd()}, OUTPUT / "client.log") as client:
        client.ask("sentences", texts=list(sentences))
        yield client


def times_alone(client: ServingProcess, servers: Sequence[Server], calls: int, when: str) -> Mapping[str, AloneTimes]:
    """Measure each server with one call in flight, and print the times."""
    times = {server.name: alone_times(client, server, MODEL_NAME, calls=calls, seed=SEED) for server in servers}
    print_alone(times, when)
    return times
