"""`make dearest`: a search for the most expensive request.

The real service translates with random weights of the preset `tiny`, which never end a sentence early. One request at a
time is sent to it: first those that are known to have been dear, then random ones of every RPC, then changed forms of
the dearest so far. While a request is in flight, for ten seconds at most, a neighbour translates one sentence after the
other. Three costs are measured:

* `loop_ms`: the most processor time that the event loop's thread took between two ticks;
* `memory_mib`: the peak of the resident memory above that before the request;
* `wait_ratio`: the neighbour's longest call over the median of its calls on the idle service, in the same run.

A cost is held against its limit. A request above a limit is sent twice more, and the median of the three counts. The
value is the smallest of limit over cost; the target is 1. At the end the memory that is left after ten idle seconds is
noted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.load.dearest_server import SECONDS
from bench.load.neighbour import SERVED as MODEL
from bench.load.neighbour import import_served_model
from bench.load.random_requests import RequestMaker, Rpc, all_rpcs
from bench.shared.made_up import made_up_text
from bench.shared.process import ProcessFailed, ServingProcess, memory_mib
from bench.shared.result import Result, publish, watched_machine
from bench.shared.server_program import Server, ServerFailed, remove_data, started_server
from examples.local_service import ServiceFailed
from ferryman import Client
from ferryman.errors import FerrymanError, ResourceExhausted
from ferryman.v1 import corpus_pb2, metrics_pb2, training_pb2, translation_pb2

FOLDER: Final = Path("bench-output/dearest")
LIMITS: Final = {"loop_ms": 50.0, "memory_mib": 256.0, "wait_ratio": 10.0}
CALL_S: Final = 10.0
IDLE_S: Final = 10.0
LARGEST_BYTES: Final = 4 << 20
_KEPT: Final = 12
_QUIET_CALLS: Final = 50
_SENTENCE: Final = "badodu gemi luva tesowi"
_PAIRS: Final = 5_000
_VOCABULARY: Final = 4_000


@dataclass(frozen=True)
class Request:
    """Serialized messages for an RPC; `name` says what they are."""

    name: str
    rpc: Rpc
    messages: Sequence[bytes]


@dataclass(frozen=True)
class Cost:
    """What a request cost, as the module says; the status code and the size of its answer."""

    loop_ms: float
    memory_mib: float
    wait_ratio: float
    seconds: float
    code: str
    answer_bytes: int

    @property
    def over(self) -> float:
        """The largest cost over its limit."""
        return max(float(getattr(self, name)) / limit for name, limit in LIMITS.items())


@dataclass
class Search:
    """The service and all that takes part; the requests so far with their costs."""

    server: Server
    seen: Path
    neighbour: Client
    caller: ServingProcess
    quiet_ms: float = 0.0
    found: list[tuple[Request, Cost]] = field(default_factory=list)

    def measure_quiet(self) -> None:
        """Measure the neighbour's calls on the idle service."""
        self.quiet_ms = statistics.median(self._neighbour_ms() for _ in range(_QUIET_CALLS))

    def try_request(self, request: Request) -> Cost:
        """Send the request, up to three times; return its cost and remember it. Raises ProcessFailed."""
        costs = [self._send(request)]
        while costs[0].over > 1 and len(costs) < 3:
            costs.append(self._send(request))
        cost = sorted(costs, key=lambda cost: cost.over)[len(costs) // 2]
        self.found.append((request, cost))
        return cost

    def dearest(self, name: str) -> list[tuple[Request, Cost]]:
        """Return the requests by one of their costs, the dearest first."""
        return sorted(self.found, key=lambda item: getattr(item[1], name), reverse=True)

    def _send(self, request: Request) -> Cost:
        directions = (request.rpc.streams_requests, request.rpc.streams_responses)
        arity = "_".join("stream" if streams else "unary" for streams in directions)
        wire = [base64.b64encode(message).decode() for message in request.messages]
        Path(f"/proc/{self.server.pid}/clear_refs").write_text("5")  # reset the peak
        before_mib = memory_mib(self.server.pid)["rss_mib"]
        _reset(self.seen)
        began_s = time.perf_counter()
        self.caller.ask("begin", address=self.server.address, path=request.rpc.path, arity=arity, messages=wire)
        longest_ms = 0.0
        is_over = False
        while not is_over and time.perf_counter() - began_s < CALL_S:
            longest_ms = max(longest_ms, self._neighbour_ms())
            is_over = self.caller.ask("is_over")
        seconds = time.perf_counter() - began_s
        ended: Mapping[str, Any] = self.caller.ask("end")
        longest_ms = max(longest_ms, self._neighbour_ms())
        (loop_s,) = SECONDS.unpack(self.seen.read_bytes())
        return Cost(
            loop_ms=1000 * loop_s,
            memory_mib=memory_mib(self.server.pid)["peak_rss_mib"] - before_mib,
            wait_ratio=longest_ms / self.quiet_ms,
            seconds=seconds,
            code=ended["code"] if is_over else "CANCELLED",
            answer_bytes=ended["answer_bytes"],
        )

    def _neighbour_ms(self) -> float:
        """Return how long a sentence took, with the refusals before it."""
        began_s = time.perf_counter()
        while True:
            try:
                self.neighbour.translate(MODEL, [_SENTENCE], timeout_s=120)
            except ResourceExhausted as refusal:
                time.sleep(refusal.retry_delay_s or 0.1)
            else:
                break
        return 1000 * (time.perf_counter() - began_s)


def _reset(path: Path) -> None:
    with path.open("r+b") as file:  # in place: the service has the file mapped
        file.write(SECONDS.pack(0.0))


def known_requests() -> Iterator[Request]:
    """Yield the requests that were dear once."""
    rpcs = {rpc.name: rpc for rpc in all_rpcs()}
    mib = 1 << 20

    def one(name: str, rpc: str, *messages: Any) -> Request:  # noqa: ANN401 (messages of protobuf)
        return Request(name, rpcs[rpc], [message.SerializeToString() for message in messages])

    runs = training_pb2.ListTrainingRunsRequest
    yield one("a MiB of states", "ListTrainingRuns", runs(states=[metrics_pb2.RUN_STATE_RUNNING] * mib))
    nameless: Any = [77] * mib
    yield one("a MiB of states without a name", "ListTrainingRuns", runs(states=nameless))
    translate, options = translation_pb2.TranslateRequest, translation_pb2.TranslateOptions
    yield one("combining marks", "Translate", translate(model=MODEL, sentences=["a" + "\u0301" * (mib // 16)]))
    long_beam = options(beam_size=32, beam_patience=10, max_length=4096, n_best=32)
    yield one("one word, the widest beam", "Translate", translate(model=MODEL, sentences=["bado"], options=long_beam))
    samples = options(n_best=32, sampling=translation_pb2.Sampling(temperature=100))
    words = ["bado"] * 1024
    yield one("1,024 words, 32 samples", "Translate", translate(model=MODEL, sentences=words, options=samples))
    lines = translate(model=MODEL, sentences=["\n" * 10_241], split_sentences=True)
    yield one("line feeds to split", "Translate", lines)
    lines = translate(model=MODEL, sentences=["a. " * 80_000], split_sentences=True)
    yield one("sentences to split", "Translate", lines)
    texts = ["Bado gemi. " * 2_000] * 8
    short = translation_pb2.TranslateOptions(beam_size=1, max_length=1)
    lines = translate(model=MODEL, sentences=texts, split_sentences=True, options=short)
    yield one("16,000 sentences, split", "Translate", lines)
    stream = translation_pb2.StreamTranslateRequest
    config = stream(config=translation_pb2.StreamTranslateConfig(model=MODEL))
    empty = translation_pb2.StreamSentences(sentences=[translation_pb2.StreamSentence()] * (2 * mib - 100))
    yield one("4 MiB of empty sentences", "StreamTranslate", config, stream(sentences=empty))
    curve = training_pb2.GetLRScheduleRequest(max_points=100_000, last_step=10**9)
    curve.recipe.SetInParent()
    yield one("a curve of 100,000 points", "GetLRSchedule", curve)
    upload = corpus_pb2.UploadCorpusRequest
    header = upload(header=corpus_pb2.UploadHeader(source_language="en", target_language="de"))
    pairs = corpus_pb2.PairBatch(split=corpus_pb2.SPLIT_TRAIN, pairs=[corpus_pb2.SentencePair()] * (2 * mib - 100))
    yield one("4 MiB of empty pairs", "UploadCorpus", header, upload(pairs=pairs))
    yield one("corpora", "ListCorpora", corpus_pb2.ListCorporaRequest(page_size=1000))


def search(running: Search, maker: RequestMaker, random: Random, seconds: float) -> None:
    """Try requests until the time is over, the known ones first. Raises ProcessFailed, FerrymanError."""
    ends_s = time.monotonic() + seconds
    for request in known_requests():
        _tell(request, running.try_request(request))
    number, rpcs = 0, all_rpcs()
    while time.monotonic() < ends_s:
        number += 1
        if number % 50 == 0:
            running.measure_quiet()
        size = round(LARGEST_BYTES ** random.uniform(0.3, 1.0))
        if number % 2 and number > len(rpcs):
            dear = random.choice(running.dearest(random.choice(list(LIMITS)))[:_KEPT])[0]
            request = Request(dear.name, dear.rpc, maker.changed(dear.rpc, dear.messages, size))
        else:
            rpc = rpcs[number % len(rpcs)]
            request = Request("random", rpc, maker.request(rpc, size))
        cost = running.try_request(request)
        if cost.over > 0.8:
            _tell(request, cost)


def _tell(request: Request, cost: Cost) -> None:
    print(
        f"{request.rpc.name:20} {request.name:32} {cost.code:20} loop {cost.loop_ms:7.1f} ms, memory "
        f"{cost.memory_mib:6.1f} MiB, wait {cost.wait_ratio:6.1f} x",
        flush=True,
    )


@contextlib.contextmanager
def scene(folder: Path) -> Iterator[tuple[Search, dict[str, list[str]]]]:
    """Start the service with a model, a corpus and a run; yield the search and what the service knows.

    Raises ServiceFailed, ServerFailed, ProcessFailed, FerrymanError.
    """
    remove_data(folder / "data")
    text = made_up_text(_PAIRS)
    import_served_model(folder / "data", text, text.source[:64], _VOCABULARY)
    environment = {"FERRYMAN_DATA_DIR": str(folder / "data"), "PYTHONPATH": os.getcwd(), "PYTHONSAFEPATH": ""}
    seen = folder / "seen"
    seen.write_bytes(SECONDS.pack(0.0))
    serve = [sys.executable, "-m", "bench.load.dearest_server", str(seen)]
    serve += ["serve", "--port", "0", "--metrics-port", "0"]
    caller_command = [sys.executable, "-m", "bench.load.dearest_caller"]
    with (
        started_server("service", [*serve, "--probe-port", "0"], folder / "service.log", environment) as server,
        Client(server.address) as client,
        ServingProcess("caller", caller_command, environment, folder / "caller.log") as caller,
    ):
        pairs = list(zip(text.source, text.target, strict=True))
        corpus = client.upload_corpus("dearest", "en", "de", train=pairs[100:], validation=pairs[:100])
        # No run trains meanwhile: it would be measured too.
        run = client.start_training(corpus.corpus_id, "trained")
        client.cancel_training(run.run_id)
        known = {
            "run_id": [run.run_id],
            "corpus_id": [corpus.corpus_id],
            "model": [MODEL, f"{MODEL}/1"],
            "sentence": [_SENTENCE],
            "sentences": [_SENTENCE],
            "source_language": ["en"],
            "target_language": ["de"],
        }
        yield Search(server=server, seen=seen, neighbour=client, caller=caller), known


def measure(seconds: float, seed: int) -> Result:
    """Run the search; raises ServiceFailed, ServerFailed, ProcessFailed, FerrymanError."""
    random = Random(seed)
    with scene(FOLDER) as (running, known):
        running.measure_quiet()  # loads the model
        running.measure_quiet()
        before_mib = memory_mib(running.server.pid)["rss_mib"]
        search(running, RequestMaker(random, known), random, seconds)
        time.sleep(IDLE_S)
        left_mib = memory_mib(running.server.pid)["rss_mib"] - before_mib
        running.measure_quiet()
    dearest = {name: running.dearest(name)[:3] for name in LIMITS}
    print("\nthe dearest:")
    for items in dearest.values():
        _tell(*items[0])
    return Result(
        bench="dearest",
        value=min(limit / max(getattr(dearest[name][0][1], name), 1e-9) for name, limit in LIMITS.items()),
        target=1.0,
        peer=None,
        details={
            "unit": "the smallest of limit over cost",
            "limits": LIMITS,
            "dearest": {name: [_as_dict(request, cost) for request, cost in items] for name, items in dearest.items()},
            "requests": len(running.found),
            "quiet_ms": round(running.quiet_ms, 2),
            "memory_left_mib": round(left_mib, 1),
            "seed": seed,
        },
    )


def _as_dict(request: Request, cost: Cost) -> dict[str, object]:
    sizes = [len(message) for message in request.messages]
    begins = [message[:60].hex() for message in request.messages[:3]]
    return {"rpc": request.rpc.name, "name": request.name, "bytes": sizes, "begins": begins} | {
        name: round(value, 1) if isinstance(value, float) else value for name, value in vars(cost).items()
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make dearest", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the random requests (default: 1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the search; the exit status is 0 if no request was over a limit."""
    arguments = parse(argv)
    with watched_machine():
        try:
            result = measure(60 * arguments.minutes, arguments.seed)
        except (ServiceFailed, ServerFailed, ProcessFailed, FerrymanError) as error:
            print(error, file=sys.stderr)
            return 2
    return publish(result)


if __name__ == "__main__":
    sys.exit(main())
