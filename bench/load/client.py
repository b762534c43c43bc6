"""The client of the load test, a process of its own: calls Translate at times drawn beforehand, however long answers
take, and counts each call's time from the moment when it was to begin. So a server that falls behind cannot slow its
callers down and look better for it. It also makes the same calls one after the other, each when the one before it has
been answered.

It answers commands, see `shared.process`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import grpc

from bench.shared.process import answer_commands
from ferryman.v1 import translation_pb2

METHOD: Final = "/ferryman.v1.TranslationService/Translate"
TIMED: Final = ("queue", "text", "encode", "decode", "total")

Method: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[bytes, translation_pb2.TranslateResponse]"


@dataclass(frozen=True, kw_only=True)
class Window:
    """Calls at random times: `rate` a second on average (a Poisson process), the first `warm_up_s` seconds not counted.

    `several_share` of the calls hold 2 to 8 sentences, the others one. `length`: subwords of each translation; 0: the
    model ends it.
    """

    rate: float
    warm_up_s: float
    seconds: float
    seed: int
    beam_size: int = 5
    several_share: float = 0.15
    timeout_s: float = 10.0
    length: int = 0


@dataclass(frozen=True)
class Arrival:
    """A call: when it is to begin, in seconds from the window's begin, and its sentences."""

    at_s: float
    sentences: Sequence[str]


@dataclass
class Seen:
    """The answers: milliseconds of each call that counts and was answered, the codes of those that failed, the
    server's own times (of a server that tells them), and how late calls began because the client was busy."""

    latencies_ms: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    timings_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TIMED})
    mean_batch_rows: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for a line of JSON."""
        means = {name: sum(values) / len(values) for name, values in self.timings_ms.items() if values}
        if self.mean_batch_rows:
            means["mean_batch_rows"] = sum(self.mean_batch_rows) / len(self.mean_batch_rows)
        return {
            "latencies_ms": self.latencies_ms,
            "failures": dict(self.failures),
            "means_ms": means,
            "worst_late_ms": max(self.late_ms, default=0.0),
        }


def arrivals(window: Window, sentences: Sequence[str]) -> Iterator[Arrival]:
    """Yield the calls of a window: the same for the same window and sentences."""
    end_s = window.warm_up_s + window.seconds
    return itertools.takewhile(lambda arrival: arrival.at_s < end_s, _all_arrivals(window, sentences))


def _all_arrivals(window: Window, sentences: Sequence[str]) -> Iterator[Arrival]:
    """Yield calls without an end. The same seed gives the same sentences at every rate."""
    generator = random.Random(window.seed)
    at_s = 0.0
    while True:
        at_s += generator.expovariate(window.rate)
        count = generator.randint(2, 8) if generator.random() < window.several_share else 1
        yield Arrival(at_s, generator.choices(sentences, k=count))


def request_of(model: str, sentences: Sequence[str], beam_size: int, length: int = 0) -> bytes:
    """Return a serialised TranslateRequest; `length` as in `Window`."""
    options = translation_pb2.TranslateOptions(beam_size=beam_size)
    if length:
        options.min_length, options.max_length = length - 1, length
    return translation_pb2.TranslateRequest(model=model, sentences=sentences, options=options).SerializeToString()


async def drive(address: str, model: str, window: Window, sentences: Sequence[str]) -> Seen:
    """Make the calls and wait for all answers."""
    calls = [
        (a.at_s, len(a.sentences), request_of(model, a.sentences, window.beam_size, window.length))
        for a in arrivals(window, sentences)
    ]
    seen = Seen()
    async with _method(address) as translate:
        begin_s = time.perf_counter()

        async def call(at_s: float, count: int, request: bytes) -> None:
            counts = at_s >= window.warm_up_s
            try:
                response = await translate(request, timeout=window.timeout_s)
            except grpc.aio.AioRpcError as error:
                seen.failures[error.code().name] += 1
                return
            assert len(response.translations) == count, "an answer has a translation for each sentence"
            if counts:
                seen.latencies_ms.append(1000 * (time.perf_counter() - begin_s - at_s))
                _add_timings(seen, response)

        tasks = []
        for at_s, count, request in calls:
            await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
            seen.late_ms.append(1000 * (time.perf_counter() - begin_s - at_s))
            tasks.append(asyncio.create_task(call(at_s, count, request)))
        await asyncio.gather(*tasks)
    return seen


async def drive_one_at_a_time(
    address: str, model: str, window: Window, sentences: Sequence[str], *, warm_up: int, calls: int
) -> Seen:
    """Make the first calls of the window, each when the one before has been answered; `warm_up` calls before them do
    not count."""
    seen = Seen()
    several = list(itertools.islice(_all_arrivals(window, sentences), calls))
    async with _method(address) as translate:
        for number, arrival in enumerate([*several[:warm_up], *several]):
            request = request_of(model, arrival.sentences, window.beam_size, window.length)
            begin_s = time.perf_counter()
            try:
                response = await translate(request, timeout=window.timeout_s)
            except grpc.aio.AioRpcError as error:
                seen.failures[error.code().name] += 1
                continue
            if number >= warm_up:
                seen.latencies_ms.append(1000 * (time.perf_counter() - begin_s))
                _add_timings(seen, response)
    return seen


@asynccontextmanager
async def _method(address: str) -> AsyncIterator[Method]:
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        yield channel.unary_unary(METHOD, None, translation_pb2.TranslateResponse.FromString)


def _add_timings(seen: Seen, response: translation_pb2.TranslateResponse) -> None:
    if not response.HasField("timings"):
        return
    for name in TIMED:
        seen.timings_ms[name].append(getattr(response.timings, name).ToMicroseconds() / 1000)
    seen.mean_batch_rows.append(response.timings.mean_batch_rows)


class ClientCommands:
    """The commands that a client process answers."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    def sentences(self, texts: Sequence[str]) -> int:
        """Take the sentences that calls are made of."""
        self._sentences = list(texts)
        return len(self._sentences)

    def window(self, address: str, model: str, **window: Any) -> dict[str, Any]:  # noqa: ANN401
        """Drive a server for a while; return what was seen."""
        return asyncio.run(drive(address, model, Window(**window), self._sentences)).as_dict()

    def one_at_a_time(
        self,
        address: str,
        model: str,
        warm_up: int,
        calls: int,
        **window: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """Make so many calls, one after the other; return what was seen."""
        driven = drive_one_at_a_time(address, model, Window(**window), self._sentences, warm_up=warm_up, calls=calls)
        return asyncio.run(driven).as_dict()


def main() -> None:
    """Answer until no command follows."""
    commands = ClientCommands()
    answer_commands(
        {"sentences": commands.sentences, "window": commands.window, "one_at_a_time": commands.one_at_a_time}
    )


if __name__ == "__main__":
    main()
