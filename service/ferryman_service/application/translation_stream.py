"""A caller's stream of sentences, and its translations as they finish, both within a window.

A sentence is in the window from when it is taken until its result is written to the caller. So a caller who does not
read is soon not read from either, and what a stream holds is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ferryman_service.application.admission import Held, cost_tokens, expected_tokens, in_portions
from ferryman_service.application.entries import Entry, Preparation
from ferryman_service.application.flight import Caller, Flight, Flights
from ferryman_service.application.loaded_models import Lease
from ferryman_service.application.text_threads import TextThreads
from ferryman_service.domain.errors import InvalidSentence
from ferryman_service.domain.models import ModelVersion
from ferryman_service.domain.translation import SentenceResult, Timings, Translation

_CHUNK_SENTENCES: Final = 64
_MOST_RESULTS: Final = 256
_UNREAD_TOKENS: Final = 200_000
"""No more sentences are taken while finished ones have as many subwords: some 20 MiB if all is asked for."""


@dataclass(frozen=True, kw_only=True)
class StreamSentence:
    """A sentence under its caller's id, and the words that its translation must begin with."""

    id: str
    sentence: str
    target_prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class SentenceError:
    """Why a sentence has no translation: the reason of the first violation, and all of them for a person."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class StreamResult:
    """What became of a sentence: its translation, or an error. `timings` are those of the sentences translated."""

    id: str
    outcome: Translation | SentenceError
    timings: Sequence[Timings] = ()


def _tokens(result: StreamResult) -> int:
    """Return the subwords of a result's hypotheses, which its memory follows."""
    if isinstance(result.outcome, SentenceError):
        return 1
    return sum(hypothesis.target_tokens for hypothesis in result.outcome.hypotheses)


class TranslationStream:
    """One stream; belongs to an event loop. One task puts sentences in, one takes results out; `close` ends both."""

    def __init__(
        self,
        lease: Lease,
        caller: Caller,
        preparation: Preparation,
        window: int,
        flights: Flights,
        threads: TextThreads,
    ) -> None:
        """Store; must be called in the event loop. `threads` split long sentences into subwords."""
        self._caller = caller
        self._preparation = preparation
        self._window = window
        self._threads = threads
        self._flight: Flight[tuple[str, Entry, int]] = Flight(lease, caller, flights, self._deliver)
        self._in_window = 0
        self._finished: deque[StreamResult] = deque()
        self._unread_tokens = 0
        self._taken_tokens = 0
        self._taken = 0
        self._input_ended = False
        self._failure: BaseException | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._has_news = asyncio.Event()

    @property
    def version(self) -> ModelVersion:
        """The version that translates."""
        return self._flight.lease.version

    async def wait_for_room(self) -> None:
        """Wait until the window has room for a sentence."""
        await self._has_room.wait()

    async def put(self, sentences: Sequence[StreamSentence]) -> None:
        """Take sentences, as fast as window and admission allow, and return when all are on their way."""
        rest = deque(sentences)
        while rest:
            await self.wait_for_room()
            # A text that is split may hold thousands of sentences: one at a time.
            most = _CHUNK_SENTENCES if self._preparation.splitter is None else 1
            count = min(len(rest), self._window - self._in_window, most)
            chunk = [rest.popleft() for _ in range(count)]
            self._change_window(count)
            await self._start(chunk)

    def end_input(self, failure: BaseException | None = None) -> None:
        """Say that nothing more is put in: the stream ends when all is translated, or now if there was a failure."""
        self._input_ended = True
        self._failure = self._failure or failure
        self._has_news.set()

    async def results(self) -> Sequence[StreamResult]:
        """Wait for results and return those that there are, at most 256; nothing after the last of a stream whose input
        has ended.

        What was returned before counts as written, and leaves the window. Raises DeadlineExceeded, the failure that
        ended the input, and what a bug raises in the engine.
        """
        self._unread_tokens -= self._taken_tokens
        self._change_window(-self._taken)
        self._taken = self._taken_tokens = 0
        while not self._finished and not (self._input_ended and self._in_window == 0):
            if self._failure is not None:
                break
            self._has_news.clear()
            await self._has_news.wait()
        if self._failure is not None:
            raise self._failure
        self._taken = min(len(self._finished), _MOST_RESULTS)
        taken = [self._finished.popleft() for _ in range(self._taken)]
        self._taken_tokens = sum(map(_tokens, taken))
        return taken

    def close(self) -> None:
        """Stop all work that is left; call it once, when no other call is under way."""
        self._caller.token.cancel()
        self._flight.close()

    async def _start(self, chunk: Sequence[StreamSentence]) -> None:
        texts, prefixes = [item.sentence for item in chunk], [item.target_prefix for item in chunk]
        held = await self._held(expected_tokens(texts, prefixes, self._caller.options))
        try:
            entries = await self._prepare(chunk, texts, prefixes)
            for sentence, entry in zip(chunk, entries, strict=True):
                if isinstance(entry, SentenceError):
                    self._finish(StreamResult(id=sentence.id, outcome=entry))
            await self._submit(chunk, entries, held)
        finally:
            held.release()

    async def _held(self, tokens: int) -> Held:
        """Wait for room for so many tokens, at most a portion."""
        budget = self._caller.budget
        tokens, peer = min(tokens, budget.portion_tokens), self._caller.share.peer
        await budget.take(tokens, peer)
        return Held(budget, tokens, peer)

    async def _submit(
        self, chunk: Sequence[StreamSentence], entries: Sequence[Entry | SentenceError], held: Held
    ) -> None:
        """Hand what can be translated to the engine in portions, each as soon as there is room, so that other streams
        have their turns between them. For the first there is what is held."""
        options, budget = self._caller.options, self._caller.budget
        sentences = [
            (((sentence.id, entry, place), prepared), cost_tokens(prepared, options))
            for sentence, entry in zip(chunk, entries, strict=True)
            if isinstance(entry, Entry)
            for place, prepared in enumerate(entry.sentences)
        ]
        for number, (portion, tokens) in enumerate(in_portions(sentences, budget.portion_tokens)):
            if number == 0:
                await held.settle(tokens)
                held.hand_over()
            else:
                await budget.take(tokens, self._caller.share.peer)
            self._flight.submit(portion)

    async def _prepare(
        self, chunk: Sequence[StreamSentence], texts: Sequence[str], prefixes: Sequence[str]
    ) -> list[Entry | SentenceError]:
        if self._preparation.is_quick(texts, prefixes):
            return self._entries(chunk)
        return await self._threads.run(self._caller.token, lambda: self._entries(chunk))

    def _entries(self, chunk: Sequence[StreamSentence]) -> list[Entry | SentenceError]:
        entries: list[Entry | SentenceError] = []
        for sentence in chunk:
            try:
                entries.append(self._preparation.entry(sentence.sentence, sentence.target_prefix))
            except InvalidSentence as error:
                text = "; ".join(f"{violation.field} {violation.description}" for violation in error.violations[:8])
                entries.append(SentenceError(reason=error.violations[0].reason, message=text))
        return entries

    def _deliver(self, results: Sequence[tuple[tuple[str, Entry, int], SentenceResult]]) -> None:
        for (id_, entry, place), result in results:
            if result.error is not None:
                self._failure = self._failure or result.error
                self._has_news.set()
            elif entry.accept(place, result):
                self._finish(StreamResult(id=id_, outcome=entry.translation(), timings=entry.timings))

    def _finish(self, result: StreamResult) -> None:
        self._finished.append(result)
        self._unread_tokens += _tokens(result)
        self._change_window(0)
        self._has_news.set()

    def _change_window(self, change: int) -> None:
        self._in_window += change
        if self._in_window < self._window and self._unread_tokens < _UNREAD_TOKENS:
            self._has_room.set()
        else:
            self._has_room.clear()
