"""The client of the soak: a process of its own that calls, cancels, streams, and keeps account of every answer.

It answers the command "soak", see `shared.process`. Every sentence is translated alone first; whatever comes back
later must be the same text, whatever shared the batch."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from bench.shared.process import answer_commands
from ferryman.v1 import translation_pb2, translation_pb2_grpc

BEAM_SIZE: Final = 5
CANCELLED_SHARE: Final = 0.05
TOO_SHORT_SHARE: Final = 0.05
LONGEST_CANCEL_S: Final = 0.1
SHORT_DEADLINES_S: Final = (0.005, 0.1)
TIMEOUT_S: Final = 30.0
STREAM_SECONDS: Final = 20.0
ABANDON_EVERY: Final = 3
_REFERENCES_AT_A_TIME: Final = 8


@dataclass(frozen=True, kw_only=True)
class SoakPlan:
    """Calls a second, streamed sentences a second, and for how long."""

    model: str
    rate: float
    stream_rate: float
    seconds: float
    seed: int


@dataclass
class Account:
    """What has become of calls and of streamed sentences. Latencies are of calls that were neither cancelled nor
    hurried: the second in which each was to begin, and its milliseconds."""

    begun: int = 0
    ended: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for a line of JSON. A call that has not ended is lost."""
        names = ("doubled", "wrong", "answered", "cancelled", "too_late", "streamed", "streams_abandoned")
        return {
            **{name: self.counts[name] for name in names},
            "lost": self.counts["lost"] + self.begun - self.ended,
            "failed": sum(self.failures.values()),
            "failures": dict(self.failures),
            "latencies": self.latencies,
        }


class Soak:
    """One soak. Everything runs in one event loop."""

    def __init__(self, stub: translation_pb2_grpc.TranslationServiceAsyncStub, plan: SoakPlan) -> None:
        self.account = Account()
        self._stub = stub
        self._plan = plan
        self._texts: Mapping[str, str] = {}
        self._random = random.Random(plan.seed)

    async def run(self, sentences: Sequence[str]) -> None:
        """Translate each sentence alone, then call and stream until the time is over and everything has ended."""
        self._texts = await self._references(sentences)
        begin_s = time.perf_counter()
        await asyncio.gather(self._call_all(begin_s), self._stream_all(begin_s))

    async def _references(self, sentences: Sequence[str]) -> dict[str, str]:
        places = asyncio.Semaphore(_REFERENCES_AT_A_TIME)

        async def translated(sentence: str) -> str:
            async with places:
                response = await self._stub.Translate(self._request([sentence]), timeout=TIMEOUT_S)
                return response.translations[0].hypotheses[0].text

        return dict(zip(sentences, await asyncio.gather(*map(translated, sentences)), strict=True))

    def _request(self, sentences: Sequence[str]) -> translation_pb2.TranslateRequest:
        return translation_pb2.TranslateRequest(model=self._plan.model, sentences=sentences, options=_OPTIONS)

    async def _call_all(self, begin_s: float) -> None:
        sentences, at_s = list(self._texts), 0.0
        tasks: set[asyncio.Task[None]] = set()
        while (at_s := at_s + self._random.expovariate(self._plan.rate)) < self._plan.seconds:
            await asyncio.sleep(max(0.0, begin_s + at_s - time.perf_counter()))
            chosen = self._random.choices(sentences, k=self._random.choice((1, 1, 1, 1, 1, 1, 3)))
            task = asyncio.create_task(self._call(chosen, begin_s + at_s, begin_s, self._random.random()))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _call(self, sentences: Sequence[str], due_s: float, begin_s: float, lot: float) -> None:
        """Make a call and account for it; `lot`, drawn from 0 to 1, says whether it is cancelled or hurried."""
        self.account.begun += 1
        is_cancelled, is_hurried = lot < CANCELLED_SHARE, CANCELLED_SHARE <= lot < CANCELLED_SHARE + TOO_SHORT_SHARE
        timeout_s = self._random.uniform(*SHORT_DEADLINES_S) if is_hurried else TIMEOUT_S
        call = self._stub.Translate(self._request(sentences), timeout=timeout_s)
        if is_cancelled:
            asyncio.get_running_loop().call_later(self._random.uniform(0, LONGEST_CANCEL_S), call.cancel)
        try:
            response = await call
        except asyncio.CancelledError:
            assert is_cancelled, "nobody else cancels"
            self.account.counts["cancelled"] += 1
        except grpc.aio.AioRpcError as error:
            if is_hurried and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                self.account.counts["too_late"] += 1
            else:
                self.account.failures[error.code().name] += 1
        else:
            self._check(sentences, [item.hypotheses[0].text for item in response.translations])
            if not (is_cancelled or is_hurried):
                self.account.latencies.append((due_s - begin_s, 1000 * (time.perf_counter() - due_s)))
        self.account.ended += 1

    def _check(self, sentences: Sequence[str], texts: Sequence[str]) -> None:
        right = texts == [self._texts[sentence] for sentence in sentences]
        self.account.counts["answered" if right else "wrong"] += 1

    async def _stream_all(self, begin_s: float) -> None:
        """Stream, one stream after the other; each third one is abandoned half-way."""
        number = 0
        end_s = begin_s + self._plan.seconds
        while count := int(self._plan.stream_rate * min(STREAM_SECONDS, max(0.0, end_s - time.perf_counter()))):
            number += 1
            lines = self._random.choices(list(self._texts), k=count)
            await self._stream(lines, is_abandoned=number % ABANDON_EVERY == 0)

    async def _stream(self, lines: Sequence[str], *, is_abandoned: bool) -> None:
        seen: Counter[str] = Counter()
        call = self._stub.StreamTranslate(self._paced(lines))
        try:
            async for response in call:
                for item in response.translations:
                    seen[item.id] += 1
                    self._check_streamed(lines[int(item.id)], item)
                if is_abandoned and len(seen) > len(lines) // 2:
                    call.cancel()
                    self.account.counts["streams_abandoned"] += 1
                    return
        except grpc.aio.AioRpcError as error:
            self.account.failures[f"stream {error.code().name}"] += 1
        finally:
            self.account.counts["doubled"] += sum(count - 1 for count in seen.values())
        self.account.counts["lost"] += len(lines) - len(seen)

    def _check_streamed(self, sentence: str, item: translation_pb2.StreamTranslation) -> None:
        text = item.translation.hypotheses[0].text if item.HasField("translation") else None
        self.account.counts["streamed" if text == self._texts[sentence] else "wrong"] += 1

    async def _paced(self, lines: Sequence[str]) -> AsyncIterator[translation_pb2.StreamTranslateRequest]:
        config = translation_pb2.StreamTranslateConfig(model=self._plan.model, options=_OPTIONS)
        yield translation_pb2.StreamTranslateRequest(config=config)
        begin_s = time.perf_counter()
        for number, line in enumerate(lines):
            await asyncio.sleep(max(0.0, begin_s + number / self._plan.stream_rate - time.perf_counter()))
            sentence = translation_pb2.StreamSentence(id=str(number), sentence=line)
            sentences = translation_pb2.StreamSentences(sentences=[sentence])
            yield translation_pb2.StreamTranslateRequest(sentences=sentences)


_OPTIONS: Final = translation_pb2.TranslateOptions(beam_size=BEAM_SIZE)


async def _soak(address: str, sentences: Sequence[str], plan: SoakPlan) -> Account:
    async with grpc.aio.insecure_channel(address) as channel:
        soak = Soak(translation_pb2_grpc.TranslationServiceStub(channel), plan)
        await soak.run(sentences)
        return soak.account


def soak(address: str, sentences: Sequence[str], **plan: Any) -> dict[str, Any]:  # noqa: ANN401
    """Load a server; return the account."""
    return asyncio.run(_soak(address, list(dict.fromkeys(sentences)), SoakPlan(**plan))).as_dict()


def main() -> None:
    """Answer until no command follows."""
    answer_commands({"soak": soak})


if __name__ == "__main__":
    main()
