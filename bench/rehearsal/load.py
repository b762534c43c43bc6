"""Callers that translate all the time, and a ledger with a line for each call: none may be lost, and each answer must
be that of one version of the model for just the sentences that were sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias

import grpc

from bench.rehearsal.proxy import REPLICA_HEADER
from bench.shared.turns import quantile
from ferryman import AsyncClient
from ferryman.errors import FerrymanError
from ferryman.types import StreamSentence
from ferryman.v1 import translation_pb2

MODEL: Final = "rehearsal"
ALIAS: Final = "production"
REFERENCE: Final = f"{MODEL}@{ALIAS}"
OK: Final = "OK"
BEAM_SIZE: Final = 4
LENGTH: Final = 24
"""Subwords of every translation, so that a sentence is a fixed amount of work."""
_ROUND_ROBIN: Final = '{"loadBalancingConfig": [{"round_robin": {}}]}'
_METHOD: Final = "/ferryman.v1.TranslationService/Translate"

Expected: TypeAlias = Mapping[str, Mapping[str, str]]
"""What each version, "name/version", makes of each sentence."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A call's work: so many sentences, and its deadline."""

    sentences: int = 4
    timeout_s: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to a call. `replica` is the HOST:PORT that answered, "" if unknown; `model` "" if nothing did."""

    status: str
    model: str = ""
    texts: tuple[str, ...] = ()
    replica: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A call: when it began and ended, in seconds of time.monotonic, what it asked and what came back."""

    begun_s: float
    ended_s: float
    sentences: tuple[str, ...]
    answer: Answer


class Caller(Protocol):
    """Translates by one connection."""

    async def translate(self, sentences: Sequence[str], work: Work) -> Answer:
        """Return what came back; raises nothing."""


class RawCaller:
    """The generated stubs without any retries: sees every failure. Takes several addresses in turn."""

    def __init__(self, target: str) -> None:
        """Store; the connection is made by the first call."""
        options = (("grpc.enable_retries", 0), ("grpc.service_config", _ROUND_ROBIN))
        self._channel = grpc.aio.insecure_channel(target, options)
        self._call = self._channel.unary_unary(
            _METHOD,
            translation_pb2.TranslateRequest.SerializeToString,
            translation_pb2.TranslateResponse.FromString,
        )

    async def translate(self, sentences: Sequence[str], work: Work) -> Answer:
        """Call once."""
        options = translation_pb2.TranslateOptions(beam_size=BEAM_SIZE, min_length=LENGTH, max_length=LENGTH + 1)
        request = translation_pb2.TranslateRequest(model=REFERENCE, sentences=sentences, options=options)
        call = self._call(request, timeout=work.timeout_s)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            return Answer(
                status=error.code().name, replica=_replica(error.initial_metadata(), error.trailing_metadata())
            )
        texts = tuple(each.hypotheses[0].text for each in response.translations)
        return Answer(
            status=OK, model=response.model, texts=texts, replica=_replica(await call.initial_metadata(), None)
        )

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class SdkCaller:
    """The client that users have."""

    def __init__(self, target: str) -> None:
        """Store; the connection is made by the first call."""
        self._client = AsyncClient(target)

    async def translate(self, sentences: Sequence[str], work: Work) -> Answer:
        """Call as a user does."""
        try:
            result = await self._client.translate(
                REFERENCE,
                sentences,
                timeout_s=work.timeout_s,
                beam_size=BEAM_SIZE,
                min_length=LENGTH,
                max_length=LENGTH + 1,
            )
        except FerrymanError as error:
            return Answer(status=error.code.name if error.code else type(error).__name__)
        texts = tuple(each.text for each in result.translations)
        return Answer(status=OK, model=result.model, texts=texts)

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()


def _replica(*metadata: Any) -> str:  # noqa: ANN401 (grpc's own types of metadata differ)
    for pairs in metadata:
        for key, value in pairs or ():
            if key == REPLICA_HEADER:
                return str(value)
    return ""


@dataclass
class Ledger:
    """The outcome of every call."""

    lines: list[Line] = field(default_factory=list)
    begun: int = 0

    @property
    def lost(self) -> int:
        """Calls that have begun and never ended."""
        return self.begun - len(self.lines)

    def failures(self) -> Counter[str]:
        """Count the calls that failed by their status."""
        return Counter(line.answer.status for line in self.lines if line.answer.status != OK)

    def replicas(self) -> Counter[str]:
        """Count the calls that were answered by who answered, where that is known."""
        return Counter(line.answer.replica for line in self.lines if line.answer.status == OK and line.answer.replica)

    def models(self) -> Counter[str]:
        """Count the calls that were answered by the version that translated."""
        return Counter(line.answer.model for line in self.lines if line.answer.status == OK)

    def wrong(self, expected: Expected) -> int:
        """Count the answers that are not, from the first sentence to the last, what the version that they name makes of
        the sentences of their request: mixed ones, and those of another call."""
        return sum(not _is_right(line, expected) for line in self.lines if line.answer.status == OK)

    def milliseconds(self, share: float, first_s: float = 0.0, last_s: float = float("inf")) -> float | None:
        """Return a quantile of the time that a call took, of those that were answered and began in that time; None if
        there are none."""
        times = [
            1000 * (line.ended_s - line.begun_s)
            for line in self.lines
            if line.answer.status == OK and first_s <= line.begun_s <= last_s
        ]
        return round(quantile(times, share), 1) if times else None


def _is_right(line: Line, expected: Expected) -> bool:
    known = expected.get(line.answer.model, {})
    return line.answer.texts == tuple(known.get(sentence) for sentence in line.sentences)


class Load:
    """Calls for the length of an `async with` block, at random times (a Poisson process) or from callers that call
    again as soon as they are answered. At the end of the block it waits for the calls that are in flight."""

    def __init__(
        self,
        caller: Caller,
        sentences: Sequence[str],
        work: Work,
        *,
        rate: float = 0.0,
        callers: int = 0,
        seed: int = 1,
    ) -> None:
        """Store. `rate` is calls a second; without one, `callers` call without pause."""
        assert (rate > 0) != (callers > 0), "either a rate or a number of callers"
        self.ledger = Ledger()
        self._caller = caller
        self._sentences = sentences
        self._work = work
        self._rate = rate
        self._callers = callers
        self._generator = random.Random(seed)
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loops = [self._arrive()] if self._rate else [self._repeat() for _ in range(self._callers)]
        for loop in loops:
            self._spawn(loop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def answered(self, count: int = 1) -> None:
        """Wait until so many more calls have ended."""
        before = len(self.ledger.lines)
        while len(self.ledger.lines) < before + count:
            await asyncio.sleep(0.01)

    def _spawn(self, work: Any) -> None:  # noqa: ANN401 (a coroutine)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _arrive(self) -> None:
        at_s = time.monotonic()
        while not self._stopped.is_set():
            at_s += self._generator.expovariate(self._rate)
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
            self._spawn(self._one())

    async def _repeat(self) -> None:
        while not self._stopped.is_set():
            await self._one()

    async def _one(self) -> None:
        sentences = tuple(self._generator.choices(self._sentences, k=self._work.sentences))
        self.ledger.begun += 1
        begun_s = time.monotonic()
        answer = await self._caller.translate(sentences, self._work)
        line = Line(begun_s=begun_s, ended_s=time.monotonic(), sentences=sentences, answer=answer)
        self.ledger.lines.append(line)


@contextlib.asynccontextmanager
async def raw_caller(target: str) -> AsyncIterator[RawCaller]:
    """Make a connection without retries for the length of the block."""
    caller = RawCaller(target)
    try:
        yield caller
    finally:
        await caller.close()


@contextlib.asynccontextmanager
async def sdk_caller(target: str) -> AsyncIterator[SdkCaller]:
    """Make a client for the length of the block."""
    caller = SdkCaller(target)
    try:
        yield caller
    finally:
        await caller.close()


class Trickle:
    """The SDK's stream of sentences, one every so often, as somebody who translates a long text has it."""

    def __init__(self, target: str, sentences: Sequence[str], every_s: float = 0.1) -> None:
        """Store."""
        self._target = target
        self._sentences = sentences
        self._every_s = every_s
        self._stopped = asyncio.Event()
        self.sent = 0
        self.failure: FerrymanError | None = None
        self.answers: list[tuple[str, str]] = []
        """The id and the text of each answer."""

    async def run(self) -> None:
        """Translate until `stop`, and then what is on its way."""
        async with AsyncClient(self._target) as client:
            stream = client.translate_stream(
                REFERENCE, self._source(), beam_size=BEAM_SIZE, min_length=LENGTH, max_length=LENGTH + 1
            )
            try:
                async for result in stream:
                    text = result.translation.text if result.translation else ""
                    self.answers.append((result.id, text))
            except FerrymanError as error:
                self.failure = error

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()

    def is_complete(self) -> bool:
        """Tell whether every sentence that was sent was answered once."""
        ids = [name for name, _ in self.answers]
        return (
            self.failure is None
            and self.sent > 0
            and sorted(ids, key=int) == [str(number) for number in range(self.sent)]
        )

    def wrong(self, version: Mapping[str, str]) -> int:
        """Count the answers that are not what a version makes of their sentence."""
        return sum(version[self._sentence(int(name))] != text for name, text in self.answers)

    def _sentence(self, number: int) -> str:
        return self._sentences[number % len(self._sentences)]

    async def _source(self) -> AsyncIterator[StreamSentence]:
        while not self._stopped.is_set():
            number, self.sent = self.sent, self.sent + 1
            yield StreamSentence(id=str(number), sentence=self._sentence(number))
            await asyncio.sleep(self._every_s)


@contextlib.asynccontextmanager
async def trickle(target: str, sentences: Sequence[str]) -> AsyncIterator[Trickle]:
    """Translate a stream for the length of the block, and wait for its last answer."""
    stream = Trickle(target, sentences)
    task = asyncio.create_task(stream.run())
    try:
        yield stream
    finally:
        stream.stop()
        await task
